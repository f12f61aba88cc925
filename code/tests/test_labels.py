"""Labels that cannot tell anything are said to: one label alone, pairs labelled both ways, an item unlike itself."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_main import error_of
from test_train import metrics_of
from worlds import make_data, train_words, write_jsonl

from data_scripts import split
from tongkuan.cli.verbs import main
from tongkuan.model.modelfile import load_model
from tongkuan.records.items import Pair, read_pairs
from tongkuan.records.labels import contradiction_note, contradictory, only_label

Edit = Any
STEPS = ("train.steps=4", "train.validate_every=2", "--nproc", "1")


def told(left: str, right: str, label: int) -> dict[str, str]:
    return {"src_item_id": left, "tgt_item_id": right, "item_label": str(label)}


def rows_of(path: Path) -> list[dict[str, str]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def keep_label(path: Path, label: int) -> None:
    write_jsonl(path, [row for row in rows_of(path) if row["item_label"] == str(label)])


def notes_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


# ---------------------------------------------------------------------------------------------------------------------
# Contradictions


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([("a", "a", 0)], [0]),
        ([("a", "a", 1), ("a", "b", 1), ("b", "a", 1)], []),
        ([("a", "b", 1), ("c", "d", 0), ("b", "a", 0), ("a", "b", 1), ("a", "b", 0)], [2, 4]),
        ([("a", "a", 1), ("a", "a", 0), ("b", "b", None)], [1]),
        ([("a", "b", None), ("a", "b", 0), ("b", "a", None)], []),
    ],
)
def test_contradictions_are_found_either_way_round(rows: list[tuple[str, str, int | None]], found: list[int]) -> None:
    assert contradictory([Pair(*row) for row in rows]) == found


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.sampled_from([0, 1, None])), max_size=12))
def test_what_split_keeps_contradicts_nothing(rows: list[tuple[str, str, int | None]]) -> None:
    pairs = [Pair(*row) for row in rows]
    cleaned = split.clean(pairs)
    assert contradictory(cleaned.pairs) == []
    both = {pair_key for pair_key in map(frozenset, ((p.left, p.right) for p in pairs))
            if {p.label for p in pairs if frozenset((p.left, p.right)) == pair_key} >= {0, 1}
            or (len(pair_key) == 1 and any(p.label == 0 and {p.left, p.right} == pair_key for p in pairs))}  # fmt: skip
    assert {frozenset(key) for key in cleaned.contradictions} == both


def test_a_note_names_the_line_counts_blank_ones_and_is_gone_when_followed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [told("a", "b", 1), told("c", "c", 0), told("b", "a", 0)]
    path.write_bytes(b"\n".join([b"", *map(orjson.dumps, rows)]))
    note = contradiction_note(path, read_pairs(path))
    assert note.startswith(f"note: {path}:3: item 'c' is labelled different from itself; ")
    assert "contradict themselves or others: 2, used as they stand" in note and "\n" not in note
    write_jsonl(path, [rows[0], rows[2]])
    assert f"{path}:2: 'b' and 'a' are labelled 0 here, 1 before" in contradiction_note(path, read_pairs(path))
    write_jsonl(path, rows[:1])
    assert contradiction_note(path, read_pairs(path)) == ""


def test_train_dry_run_and_evaluate_note_them(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    train_pairs, valid_pairs = (data / f"item_{side}_pair.jsonl" for side in ("train", "valid"))
    write_jsonl(train_pairs, [told("train-0-0", "train-0-0", 0), *rows_of(train_pairs)])
    turned = rows_of(valid_pairs)[0]
    write_jsonl(valid_pairs, [*rows_of(valid_pairs), told(turned["tgt_item_id"], turned["src_item_id"], 0)])
    wanted = [f"note: {train_pairs}:1: item 'train-0-0' is labelled", f"note: {valid_pairs}:25: 'valid-0-1' and "]
    for more in ([], ["--dry-run"]):
        assert main(train_words(tmp_path, data, *STEPS, *more)) == 0
        assert [note.startswith(start) for note, start in zip(notes_of(capsys), wanted, strict=True)] == [True, True]
    assert main(["evaluate", "--data", str(data), "--model", str(model)]) == 0
    assert [note.startswith(wanted[1]) for note in notes_of(capsys)] == [True]


def hand_out(data: Path, pairs: list[dict[str, str]]) -> None:
    folder = data / "handed_out"
    folder.mkdir(parents=True)
    ids = dict.fromkeys(pair[side] for pair in pairs for side in ("src_item_id", "tgt_item_id"))
    write_jsonl(folder / "item_train_info.jsonl", [{"item_id": item_id} for item_id in ids])
    write_jsonl(folder / "item_train_pair.jsonl", pairs)


def run_split(data: Path, *more: str) -> list[str]:
    return main(["split", "--data", str(data), *more])


@pytest.mark.parametrize("alone", [["x"], ["a0", "b0"], ["x", "y", "z"]])
def test_split_drops_items_unlike_themselves(
    tmp_path: Path, alone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [told(f"a{number}", f"b{number}", number % 2) for number in range(8)]
    hand_out(tmp_path, [*pairs, *(told(item_id, item_id, 0) for item_id in alone), told("c", "c", 1)])
    assert run_split(tmp_path) == 0
    assert f"0 labelled both ways, {len(alone)} of an item labelled different from itself" in capsys.readouterr().out
    report = orjson.loads((tmp_path / "split.json").read_bytes())
    assert report["pairs_contradictory"] == [[item_id, item_id] for item_id in alone]
    kept = [row for side in ("train", "valid") for row in rows_of(tmp_path / f"item_{side}_pair.jsonl")]
    assert sorted(row["src_item_id"] for row in kept) == sorted([*(f"a{number}" for number in range(8)), "c"])


def test_split_without_a_usable_pair_says_what_there_was(tmp_path: Path) -> None:
    hand_out(tmp_path, [told("a", "a", 0), {"src_item_id": "a", "tgt_item_id": "b"}])
    with pytest.raises(split.UserError, match=r"no usable pair \(1 unlabelled, 0 repeated, 0 labelled both ways, 1 of"):
        run_split(tmp_path)
    assert not (tmp_path / "split.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# One label


@pytest.mark.parametrize("labels", [[0], [1, 1], [0, None], [0, 1], [None], [1, 0, None]])
def test_one_label_alone_is_known(labels: list[int | None]) -> None:
    known = set(labels) - {None}
    assert only_label([Pair("a", "b", label) for label in labels]) == (known.pop() if len(known) == 1 else None)


@pytest.mark.parametrize(("label", "names"), [(0, "different"), (1, "the same product")])
def test_nothing_is_learned_from_one_label(tmp_path: Path, label: int, names: str) -> None:
    data = make_data(tmp_path / "data")
    path = data / "item_train_pair.jsonl"
    before = rows_of(path)
    keep_label(path, label)
    for more in ([], ["--dry-run"]):
        line = error_of(*train_words(tmp_path, data, *STEPS, *more))
        assert line.startswith(f"{path}: all 12 pairs have label {label}, from which a model only learns to call any")
        assert f"pair {names}; add pairs of label {1 - label}, or split train" in line
    assert not (tmp_path / "m").exists() and not [*tmp_path.glob("run/*")]
    write_jsonl(path, [*rows_of(path), next(row for row in before if row["item_label"] == str(1 - label))])
    assert main(train_words(tmp_path, data, *STEPS)) == 0


@pytest.mark.parametrize("label", [0, 1])
def test_no_threshold_is_chosen_by_one_label_and_the_last_model_is_kept(
    tmp_path: Path, label: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    path = data / "item_valid_pair.jsonl"
    keep_label(path, label)
    assert main(train_words(tmp_path, data, *STEPS)) == 0
    out = capsys.readouterr().out
    assert out.count("note: ") == 1 and f"note: {path}: only pairs of label {label}: no threshold can be" in out
    assert "best of" not in out and "best so far" not in out and f"{tmp_path / 'm'}: the last of 4 steps, " in out
    _, card = load_model(tmp_path / "m")
    assert (card.threshold, card.facts["step"]) == (0.0, 4)
    assert [row["threshold"] for row in metrics_of(tmp_path / "run") if "valid_f1" in row] == [0.0, 0.0]
    assert main(train_words(tmp_path, data, *STEPS, "--dry-run")) == 0
    assert len(notes_of(capsys)) == 1
    assert main(["evaluate", "--data", str(data), "--model", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert f"note: only pairs of label {label}: F1 is " in out and "best on these" not in out
    other = next(row for row in rows_of(make_data(tmp_path / "again") / path.name) if row["item_label"] != str(label))
    write_jsonl(path, [*rows_of(path), other])
    assert main(["evaluate", "--data", str(data), "--model", str(tmp_path / "m")]) == 0
    assert "best on these" in capsys.readouterr().out


def test_validation_of_a_single_item_is_of_one_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    write_jsonl(data / "item_valid_pair.jsonl", [told("valid-0-0", "valid-0-0", 1)])
    assert main(train_words(tmp_path, data, *STEPS)) == 0
    assert [": only pairs of label 1: " in note for note in notes_of(capsys)] == [True]
    assert load_model(tmp_path / "m")[1].threshold == 0.0


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("holders", ["none", "one", "some"])
def test_split_notes_a_side_of_one_label(
    tmp_path: Path, label: int, holders: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [told(f"a{number}", f"b{number}", label) for number in range(60)]
    chain = [f"c{number}" for number in range(9)]
    if holders == "one":
        pairs += [told(left, right, 1 - label) for left, right in pairwise(chain)]
    if holders == "some":
        pairs += [told(f"d{number}", f"e{number}", 1 - label) for number in range(2)]
    hand_out(tmp_path, pairs)
    assert run_split(tmp_path) == 0
    advice = {
        "none": f"add pairs of label {1 - label}",
        "one": f"those of label {1 - label} hang together through common items, uncut",
        "some": "name another --ratio, nearer to 1, or another --seed",
    }
    notes = [note for note in notes_of(capsys) if "only pairs" in note]
    assert len(notes) == (2 if holders == "none" else 1)
    assert all(advice[holders] in note for note in notes)
    assert "no threshold can be chosen there" in notes[-1]
    if holders == "some":
        assert run_split(tmp_path, "--ratio", "1") == 0
    if holders == "one":
        write_jsonl(tmp_path / "handed_out" / "item_valid_info.jsonl", [{"item_id": "f"}, {"item_id": "g"}])
        more = [told("f", "g", 1 - label)]
        write_jsonl(tmp_path / "handed_out" / "item_valid_pair.jsonl", more)
        assert run_split(tmp_path, "--ratio", "1") == 0
    if holders != "none":
        assert not any("only pairs" in note for note in notes_of(capsys))
