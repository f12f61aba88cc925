"""Splitting: no item on both sides, components whole, the ratio asked for, the same for any order of the lines."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts import split
from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.records.items import Pair, read_items, read_pairs

Line = tuple[str, str, int | None]


def hand_out(data: Path, **sides: list[Line]) -> None:
    """What resize publishes for split to draw from."""
    folder = data / "handed_out"
    folder.mkdir(parents=True, exist_ok=True)
    for side, lines in sides.items():
        ids = dict.fromkeys(item_id for left, right, _ in lines for item_id in (left, right))
        write(folder / f"item_{side}_info.jsonl", [{"item_id": i, "item_image_name": f"{i}.jpg"} for i in ids])
        rows = [{"src_item_id": left, "tgt_item_id": right, "item_label": label} for left, right, label in lines]
        write(folder / f"item_{side}_pair.jsonl", [{k: v for k, v in row.items() if v is not None} for row in rows])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(data: Path, *more: str) -> dict[str, Any]:
    """Split and return the report."""
    assert main(["split", "--data", str(data), *more]) == 0
    report: dict[str, Any] = json.loads((data / "split.json").read_text())
    return report


def read_side(data: Path, side: str) -> tuple[set[str], list[Pair]]:
    """A side's item ids and pairs, which must fit each other exactly."""
    items = read_items(data / f"item_{side}_info.jsonl")
    pairs = read_pairs(data / f"item_{side}_pair.jsonl", items)
    assert {item_id for pair in pairs for item_id in (pair.left, pair.right)} == set(items), "only items that are used"
    return set(items), pairs


def catalogue(num_components: int, seed: int = 0) -> list[Line]:
    """Components of one to six pairs, about a third of the pairs positive."""
    rng = random.Random(seed)
    lines: list[Line] = []
    for number in range(num_components):
        size = rng.choice([1, 1, 1, 2, 3, 6])
        lines += [(f"c{number}", f"c{number}i{n}", int(rng.random() < 0.33)) for n in range(size)]
    return lines


def files(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in data.glob("*.json*")}


def test_sides_share_no_item_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = catalogue(300)
    hand_out(tmp_path, train=lines[:400], valid=lines[400:])
    run(tmp_path)
    train_items, train_pairs = read_side(tmp_path, "train")
    valid_items, valid_pairs = read_side(tmp_path, "valid")
    assert not train_items & valid_items
    assert sorted((p.left, p.right, p.label) for p in train_pairs + valid_pairs) == sorted(lines)


@pytest.mark.parametrize("ratio", [1.0, 5.6, 20.0])
def test_the_ratio_and_the_positive_share_are_met(tmp_path: Path, ratio: float) -> None:
    hand_out(tmp_path, train=catalogue(800))
    report = run(tmp_path, "--ratio", str(ratio))
    assert report["ratio_reached"] == pytest.approx(ratio, rel=0.02)
    assert report["train"]["positive_share"] == pytest.approx(report["valid"]["positive_share"], abs=0.02)
    assert report["train"]["pairs"] == len(read_side(tmp_path, "train")[1])
    assert report["valid"]["positives"] == sum(pair.label or 0 for pair in read_side(tmp_path, "valid")[1])


def test_running_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    hand_out(tmp_path, train=catalogue(50))
    run(tmp_path)
    first = files(tmp_path)
    run(tmp_path)
    assert files(tmp_path) == first
    assert len(first) == 5


def test_the_order_of_the_lines_does_not_matter_but_the_seed_does(tmp_path: Path) -> None:
    lines = catalogue(100)
    hand_out(tmp_path / "a", train=lines)
    random.Random(1).shuffle(lines)
    hand_out(tmp_path / "b", train=lines[:50], valid=lines[50:])
    for name in ("a", "b"):
        run(tmp_path / name, "--seed", "3")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    before = read_side(tmp_path / "a", "valid")[0]
    run(tmp_path / "a", "--seed", "4")
    assert read_side(tmp_path / "a", "valid")[0] != before


def test_a_pair_counts_once_and_contradictions_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train: list[Line] = [("a", "b", 1), ("b", "a", 1), ("a", "b", 1), ("c", "d", 0), ("d", "c", 1), ("e", "f", None)]
    hand_out(tmp_path, train=train, valid=[("g", "h", 0), ("b", "a", 1)])
    report = run(tmp_path)
    assert report["pairs_repeated"] == 3
    assert report["pairs_unlabelled"] == 1
    assert report["pairs_contradictory"] == [["c", "d"]]
    pairs = read_side(tmp_path, "train")[1] + read_side(tmp_path, "valid")[1]
    assert sorted((p.left, p.right) for p in pairs) == [("a", "b"), ("g", "h")]
    assert "1 unlabelled, 3 repeated, 1 labelled both ways" in capsys.readouterr().out


def test_a_component_of_most_pairs_goes_to_train_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain: list[Line] = [(f"a{n:04}", f"a{n + 1:04}", n % 2) for n in range(2000)]
    hand_out(tmp_path, train=[*chain, ("x", "y", 1), ("v", "w", 0)])
    report = run(tmp_path)
    assert report["largest_component"] == {"pairs": 2000, "share_of_pairs": 0.999001, "side": "train"}
    assert len(read_side(tmp_path, "valid")[1]) == 2
    out = capsys.readouterr().out
    assert "one component holds 100% of the pairs" in out
    assert "not 5.6" in out


def test_items_that_also_occur_in_test_are_counted_and_test_is_untouched(tmp_path: Path) -> None:
    hand_out(tmp_path, train=[("a", "b", 1), ("c", "d", 0)])
    write(tmp_path / "item_test_info.jsonl", [{"item_id": "a"}, {"item_id": "z"}])
    write(tmp_path / "item_test_pair.jsonl", [{"src_item_id": "a", "tgt_item_id": "z"}])
    before = files(tmp_path)
    report = run(tmp_path)
    assert sum(report["items_also_in_test"].values()) == 1
    assert before.items() <= files(tmp_path).items()


def test_an_item_told_differently_keeps_the_line_of_train(tmp_path: Path) -> None:
    hand_out(tmp_path, train=[("a", "b", 1)], valid=[("a", "c", 0), ("x", "y", 0)])
    write(tmp_path / "handed_out" / "item_valid_info.jsonl", [{"item_id": i, "title": "v"} for i in "acxy"])
    report = run(tmp_path)
    items = {
        i: item for side in ("train", "valid") for i, item in read_items(tmp_path / f"item_{side}_info.jsonl").items()
    }
    assert items["a"].image_name == "a.jpg"
    assert items["c"].title == "v"
    assert report["items_told_differently"] == 1


def test_without_handed_out_pairs_resize_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run \./entrypoint\.sh resize first"):
        main(["split", "--data", str(tmp_path)])


@pytest.mark.parametrize("lines", [[("a", "b", 1), ("b", "c", 0)], [("a", "b", None)]])
def test_what_cannot_be_drawn_is_an_error_and_changes_nothing(tmp_path: Path, lines: list[Line]) -> None:
    hand_out(tmp_path, train=lines)
    with pytest.raises(UserError, match="no item-disjoint validation"):
        main(["split", "--data", str(tmp_path)])
    assert not files(tmp_path)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 1)), min_size=1, max_size=60),
    st.floats(0.05, 50),
    st.integers(0, 5),
)
def test_any_components_are_whole_and_disjoint(lines: list[tuple[int, int, int]], ratio: float, seed: int) -> None:
    pairs = split.clean(Pair(str(left), str(right), label) for left, right, label in lines).pairs
    components = split.find_components(pairs)
    seen: set[str] = set()
    for component in components:
        ids = set(split.ends(component))
        assert not ids & seen
        seen |= ids
        assert len(split.find_components(component)) == 1
    train, valid = split.assign(components, ratio, seed)
    assert sorted(map(str, train + valid)) == sorted(map(str, components))
    assert len(components) < 2 or (train and valid)
