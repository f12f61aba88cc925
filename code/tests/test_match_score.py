"""`match score`: the groups of a catalogue against labelled pairs."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_main import error_of
from worlds import write_jsonl

from tongkuan.cli.verbs import main
from tongkuan.match.files import Folder, write_table
from tongkuan.match.score import quality_of

Pairs = list[tuple[str, str, str]]


def write(folder: Path, pairs: Pairs) -> tuple[Path, Path]:
    """A matched folder of the groups {a, b, c} and {d} and of e, and a file of labelled pairs."""
    out, path = Folder(folder / "match"), folder / "pairs.jsonl"
    out.path.mkdir()
    write_table(out.groups, {"item_id": pa.array([*"abcde"]), "group_id": pa.array([*"aaade"])}, "")
    out.manifest.write_text("{}")
    write_jsonl(path, [dict(zip(("src_item_id", "tgt_item_id", "item_label"), pair, strict=True)) for pair in pairs])
    return out.path, path


def scored(folder: Path, pairs: Pairs) -> list[str]:
    out, path = write(folder, pairs)
    return ["match", "score", "--out", str(out), "--pairs", str(path)]


def test_listings_are_one_product_through_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """b = a = d and c: of the pairs ab, ac, bc in one group ab is right, and ad, bd are missed."""
    assert main(scored(tmp_path, [("a", "b", "1"), ("a", "d", "1"), ("c", "a", "0")])) == 0
    assert "F1 0.3333  precision 0.3333  recall 0.3333 on all pairs of 4 labelled listings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("a", "z", "1")], "unknown item 'z'"),
        ([("a", "b", "0")], "no pair is labelled the same"),
        ([("a", "b", "")], "item_label"),
    ],
)
def test_pairs_that_do_not_fit_are_one_line(tmp_path: Path, pairs: Pairs, words: str) -> None:
    assert words in error_of(*scored(tmp_path, pairs))


def test_a_folder_without_groups_is_one_line(tmp_path: Path) -> None:
    words = scored(tmp_path, [("a", "b", "1")])
    (tmp_path / "match" / "manifest.json").unlink()
    assert "match run --out" in error_of(*words)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_counts_are_those_of_all_pairs_one_by_one(kinds: list[tuple[int, int]]) -> None:
    groups, products = zip(*kinds, strict=True)
    pairs = [(a, b) for a in range(len(kinds)) for b in range(a)]
    called = [groups[a] == groups[b] for a, b in pairs]
    same = [products[a] == products[b] for a, b in pairs]
    found = quality_of(groups, products)
    assert found.true_positives == sum(c and s for c, s in zip(called, same, strict=True))
    assert found.false_positives == sum(c and not s for c, s in zip(called, same, strict=True))
    assert found.false_negatives == sum(s and not c for c, s in zip(called, same, strict=True))
    assert found.true_negatives == sum(not (s or c) for c, s in zip(called, same, strict=True))
