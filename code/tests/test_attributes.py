"""attributes: keys and values counted once an item, agreement of pairs, a table that stays straight and bounded."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import ok, run_verb
from rich.cells import cell_len

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.records.attributes import TEN_KEYS, attributes_of
from tongkuan.records.items import Item

Row = tuple[str, str]


def catalogue(folder: Path, split: str, items: dict[str, str], pairs: list[tuple[str, str, Any]] | None = None) -> None:
    """A split's files: attribute text by item id, and pairs with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"item_{split}_info.jsonl", [{"item_id": key, "item_pvs": text} for key, text in items.items()])
    if pairs is not None:
        rows = [{"src_item_id": left, "tgt_item_id": right, "item_label": label} for left, right, label in pairs]
        write(folder / f"item_{split}_pair.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def table(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines that the verb prints."""
    assert main(["attributes", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def cells(line: str) -> list[str]:
    """A line's cells: two blanks part them, one may stand in them."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


BRANDS = {
    "a": "品牌#:#Nike#;#颜色#:#红",
    "b": "品牌#:#nike#;#颜色#:#蓝",
    "c": "品牌#:#Puma#;#颜色#:#红",
    "d": "颜色#:#红#;#颜色#:#绿",
}


def test_each_key_with_its_items_values_and_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(tmp_path, "train", BRANDS, [("a", "b", "1"), ("a", "c", "0"), ("c", "d", "0"), ("b", "d", None)])
    lines = table(capsys, "--data", tmp_path)
    assert cells(lines[0]) == [
        "key",
        "items",
        "share",
        "values",
        "same agree",
        "different agree",
        "commonest values",
    ]
    assert cells(lines[1]) == ["'颜色'", "4", "100.0%", "3", "0%", "100%", "'红' 3, '绿' 1, '蓝' 1"]
    assert cells(lines[2]) == ["*", "'品牌'", "3", "75.0%", "2", "100%", "0%", "'nike' 2, 'puma' 1"]
    assert lines[3] == "2 of 2 keys of 4 items; 1 labelled pairs the same product, 2 different"
    assert lines[-1] == "next: set model.attribute_keys in a preset"


def test_columns_are_straight_though_chinese_is_wide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(tmp_path, "test", {"a": "品牌#:#x#;#批准文号#:#x#;#size#:#x"})
    lines = table(capsys, "--data", tmp_path)[:4]
    starts = {cell_len(line[: line.index("'x' 1")]) for line in lines[1:]}
    assert starts == {cell_len(lines[0][: lines[0].index("commonest")])}


def test_without_labelled_pairs_there_is_no_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(tmp_path, "test", BRANDS)
    assert cells(table(capsys, "--data", tmp_path)[1])[4:6] == ["-", "-"]


def test_splits_are_those_that_are_there_or_those_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(tmp_path, "train", {"a": "k#:#1", "b": "k#:#2"})
    catalogue(tmp_path, "valid", {"a": "k#:#3"})
    catalogue(tmp_path, "test", {"z": "k#:#1"})
    assert cells(table(capsys, "--data", tmp_path)[1])[1:] == ["3", "100.0%", "2", "-", "-", "'1' 2, '2' 1"]
    assert cells(table(capsys, "--data", tmp_path, "--split", "valid")[1])[1] == "1"
    both = table(capsys, "--data", "elsewhere", "--raw", tmp_path, "--split", "valid", "--split", "test")
    assert cells(both[1])[1] == "2"
    with pytest.raises(UserError, match=r"item_extra_info\.jsonl: no such file"):
        main(["attributes", "--data", str(tmp_path), "--split", "extra"])


def test_keys_stand_by_number_of_items_then_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(tmp_path, "train", {"1": "b:1;a:1;z:1", "2": "z:2"})
    assert [cells(line)[0] for line in table(capsys, "--data", tmp_path)[1:4]] == ["'z'", "'a'", "'b'"]
    lines = table(capsys, "--data", tmp_path, "--top", 1)
    assert cells(lines[1])[0] == "'z'" and lines[2].startswith("1 of 3 keys")


def test_the_default_ten_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(tmp_path, "train", {"1": "#;#".join(f"{key}#:#1" for key in (*TEN_KEYS, "产地", "材质"))})
    marked = [line for line in table(capsys, "--data", tmp_path)[1:13] if line.startswith("*")]
    assert {cells(line)[1] for line in marked} == {repr(key) for key in TEN_KEYS}


def test_the_attribute_style_is_the_readers_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(tmp_path, "train", {"1": "k#:#1；m：2"})
    assert table(capsys, "--data", tmp_path)[2].startswith("1 of 1 keys")
    assert table(capsys, "--data", tmp_path, "--attributes", "published")[3].startswith("2 of 2 keys")


def test_hostile_keys_and_values_are_shown_clipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J\x07\u202e"
    items = {f"{number}": f"k{hostile}#:#{hostile}{'长' * 5000}{number}" for number in range(3)}
    items |= {f"n{number}": f"key{number}{'x' * 300}#:#v" for number in range(2000)}
    catalogue(tmp_path, "train", items)
    lines = table(capsys, "--data", tmp_path)
    assert all(cell_len(line) < 200 and line.isprintable() for line in lines)
    assert cells(lines[1])[1] == "3"


def test_values_of_item_and_sku_count_together() -> None:
    item = Item("a", item_attributes="k#:#1#;#m#:#x", sku_attributes="k#:#2#;#k#:#1")
    assert attributes_of(item) == {"k": ["1", "2"], "m": ["x"]}


def test_without_item_files_the_verb_that_makes_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no item_train_info\.jsonl.*resize first"):
        main(["attributes", "--data", str(tmp_path)])
    catalogue(tmp_path, "train", {})
    with pytest.raises(UserError, match="no items in train"):
        main(["attributes", "--data", str(tmp_path)])


def test_it_is_a_verb(tmp_path: Path) -> None:
    catalogue(tmp_path, "train", BRANDS, [("a", "b", "1")])
    assert ok(run_verb("attributes", "--data", tmp_path)).endswith("next: set model.attribute_keys in a preset\n")
    done = run_verb("attributes", "--data", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
