"""What is lost of attributes is said once, with what to type: by resize, train, predict, plans and attributes."""

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from commands import ok, run_verb
from hypothesis import given
from hypothesis import strategies as st
from worlds import make_data, tiny_preset, train_words

from tongkuan.cli.verbs import main
from tongkuan.presets import apply_override, load_settings
from tongkuan.records.attributes import TEN_KEYS, count_coverage, coverage_lines, item_text, yaml_word
from tongkuan.records.items import Item, read_items, read_pairs
from tongkuan.report.result import find_items

ENGLISH = "Brand#:#Acme#;#Color#:#Red#;#Screen Size#:#XL#;#No#:#1"


def items_of(*texts: str) -> list[Item]:
    return [Item(f"i{number}", "t", text) for number, text in enumerate(texts)]


def test_items_with_a_key_asked_for_are_counted() -> None:
    items = [*items_of("品牌:甲", "产地:浙江", "品牌 甲", "", "  "), Item("s", "t", "", "品牌：甲")]
    found = count_coverage(items, TEN_KEYS)
    assert (found.num_items, found.num_with_text, found.num_covered, found.num_unread) == (6, 4, 2, 1)
    assert coverage_lines(items, TEN_KEYS) == [
        "attributes: 2 of 6 items have at least one of model.attribute_keys",
        "note: 1 attribute texts yield no key, first item 'i2': '品牌 甲'; write them as key:value;key:value",
    ]


@pytest.mark.parametrize("text", ["品牌 甲", "Acme red XL", "【品牌】甲"])
def test_the_advice_for_texts_without_a_key_works(text: str) -> None:
    _, note, warning = coverage_lines(items_of(text), TEN_KEYS)
    assert warning.startswith("warning: no item has any of")
    advised = note.rpartition("write them as ")[2].replace("key", "品牌")
    [line] = coverage_lines(items_of(advised), TEN_KEYS)
    assert line.startswith("attributes: 1 of 1")


@pytest.mark.parametrize(
    "texts",
    [
        (ENGLISH,),
        ("产地:浙江;材质:棉", "产地:x"),
        ('{"yes": 1, "a, b": 2, "it\'s": 3, "[x]": 4, "1.5": 5}',),
        ("null:1;尺 码:2",),
    ],
)
def test_keys_that_never_occur_are_a_warning_whose_setting_works(texts: tuple[str, ...], tmp_path: Path) -> None:
    items = items_of(*texts)
    [line, warning] = coverage_lines(items, TEN_KEYS)
    assert line.startswith(f"attributes: 0 of {len(items)}") and warning.startswith("warning: no item has any of")
    [typed] = shlex.split(warning.rpartition("train with ")[2])
    settings = load_settings(str(tiny_preset(tmp_path)), [typed])
    [line] = coverage_lines(items, settings.model.attribute_keys)
    assert line.startswith(f"attributes: {len(items)} of {len(items)}")
    assert item_text(items[0], settings.model.attribute_keys) != "t"


@given(st.text(max_size=8) | st.sampled_from(["Yes", "NULL", "~", "on", "1e3", "品牌", "- a"]))
def test_any_key_is_typed_so_that_yaml_reads_it_back(word: str) -> None:
    if word.isprintable():
        values: dict[str, Any] = {}
        apply_override(values, f"model.attribute_keys=[{yaml_word(word)}]")
        assert values == {"model": {"attribute_keys": [word]}}


def test_wild_keys_are_clipped_and_never_typed() -> None:
    [_, warning] = coverage_lines(items_of("k\x1b[2J:1", "x" * 500 + ":1"), TEN_KEYS)
    assert warning.isprintable() and len(warning) < 200 and "train with" not in warning


def test_without_attribute_texts_or_keys_there_is_no_warning() -> None:
    assert len(coverage_lines(items_of("", ""), TEN_KEYS)) == 1
    assert len(coverage_lines(items_of(ENGLISH), ())) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


@pytest.fixture
def english(tmp_path: Path) -> Path:
    """A data folder whose items have English keys, and one text without any."""
    data = make_data(tmp_path / "data", num_products=2)
    for path in data.glob("item_*_info.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [
            json.dumps(row | {"item_pvs": "just words" if number == 0 else ENGLISH}) for number, row in enumerate(rows)
        ]
        path.write_text("\n".join(lines))
    return data


def said(out: str) -> tuple[int, int, int]:
    """How often the counts, the note and the warning stand in what a verb printed."""
    return (
        len(re.findall("^attributes: 0 of", out, re.M)),
        len(re.findall("^note: ", out, re.M)),
        len(re.findall("^warning: ", out, re.M)),
    )


@pytest.mark.parametrize(("is_plan", "inputs"), [(True, "both"), (False, "both"), (True, "image")])
def test_train(english: Path, tmp_path: Path, is_plan: bool, inputs: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(train_words(tmp_path, english, f"model.inputs={inputs}", "train.steps=1", *["--dry-run"] * is_plan))
    assert said(capsys.readouterr().out) == ((1, 1, 1) if inputs == "both" else (0, 0, 0))


@pytest.mark.parametrize("is_plan", [True, False])
def test_predict(english: Path, model: Path, tmp_path: Path, is_plan: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--data", english, "--model", model, "--submit", tmp_path / "s"]
    main([*map(str, words), *["--dry-run"] * is_plan])
    assert said(capsys.readouterr().out) == (1, 1, 1)


def test_resize_and_attributes_say_it_once(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "valid", "test"):
        (english / f"item_{split}_images").symlink_to(english / "images")
    main(["resize", "--raw", str(english), "--data", str(tmp_path / "out"), "--size", "8", "--workers", "1"])
    assert said(capsys.readouterr().out) == (1, 1, 1)
    assert said(ok(run_verb("attributes", "--data", tmp_path / "out"))) == (0, 1, 1)


def test_every_reader_sees_packed_files(english: Path, model: Path, tmp_path: Path) -> None:
    for path in english.glob("item_*.jsonl"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    submit = tmp_path / "s"
    main(["predict", "--data", str(english), "--model", str(model), "--submit", str(submit), "--split", "valid"])
    main(["verify", "--data", str(english), "--model", str(model), "--submit", str(submit)])
    pairs = english / "item_valid_pair.jsonl"
    assert find_items(english, read_pairs(pairs), {}).keys() <= read_items(english / "item_valid_info.jsonl").keys()
    assert main(["attributes", "--data", str(english)]) == 0
