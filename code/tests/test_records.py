"""Records: attributes survive any punctuation, errors name file and line, numbers come back as they went."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tongkuan.base.errors import UserError
from tongkuan.records.attribute_syntax import plain
from tongkuan.records.attributes import TEN_KEYS, item_text, normalise, parse_attributes
from tongkuan.records.items import Item, Pair, info_row, pair_row, read_ids, read_items, read_pairs
from tongkuan.records.result import format_embedding, parse_embedding, prediction_row, read_predictions

# Without `#`, which is the strict writing's own sign; with everything that looser writings split at.
TEXTS = st.text(st.sampled_from(":;：；,，|=/ .-1aZ红色ＡΩé") | st.characters(exclude_characters="#", codec="utf-8"))
KEYS = st.text(st.sampled_from("abc颜色货号 型"), min_size=1).filter(lambda key: bool(normalise(key)))
# Nor a lone semicolon: `a#:#;#;#b#:#1` has its first `#;#` one place too early.
VALUES = TEXTS.filter(lambda value: bool(normalise(plain(value))) and value not in (";", "；"))
PAIRS = st.lists(st.tuples(KEYS, VALUES), min_size=2, max_size=8)


def strict(pairs: list[tuple[str, str]]) -> str:
    return "#;#".join(f"{key}#:#{value}" for key, value in pairs)


def expected(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    values: dict[str, dict[str, None]] = {}
    for key, value in pairs:
        values.setdefault(normalise(key), {})[normalise(plain(value))] = None
    return {key: list(distinct) for key, distinct in values.items()}


@given(PAIRS)
def test_the_strict_writing_comes_back_whatever_the_values_hold(pairs: list[tuple[str, str]]) -> None:
    assert parse_attributes(strict(pairs)) == expected(pairs)
    assert list(parse_attributes(strict(pairs))) == list(expected(pairs)), "first-seen order"


def test_a_single_strict_attribute_comes_back_too() -> None:
    assert parse_attributes("尺寸#:#长;宽:10") == {"尺寸": ["长;宽:10"]}


@pytest.mark.parametrize(
    ("text", "quoted", "published"),
    [
        ("品牌#:#Nike#;#货号#:#A-1", {"品牌": ["nike"], "货号": ["a-1"]}, {"品牌": ["nike"], "货号": ["a-1"]}),
        ("品牌:Nike;货号:A-1", {"品牌": ["nike"], "货号": ["a-1"]}, {"品牌": ["nike"], "货号": ["a-1"]}),
        ("品牌#:Nike;货号#:A-1", {"品牌": ["nike"], "货号": ["a-1"]}, {"品牌": ["nike"], "货号": ["a-1"]}),
        ("a#:#1；2#;#b#:#3：4", {"a": ["1;2"], "b": ["3:4"]}, {"a": ["1"], "b": ["3:4"]}),
        ("a#:#x#;#a#:#y#;#a#:#x", {"a": ["x", "y"]}, {"a": ["x", "y"]}),
        ("a#:#Ｎｏ　１#;#b#:#", {"a": ["no 1"]}, {"a": ["no 1"]}),
        ("", {}, {}),
        ("no separator", {}, {}),
        ("#;#:#:#", {}, {}),
    ],
)
def test_both_styles(text: str, quoted: dict[str, list[str]], published: dict[str, list[str]]) -> None:
    assert parse_attributes(text, "quoted") == quoted
    assert parse_attributes(text, "published") == published


def test_the_text_of_an_item_is_title_then_the_ten_keys_in_their_order() -> None:
    item = Item(
        "1", "ＡＢ  Shoe", "货号#:#X1#;#产地#:#杭州#;#颜色分类#:#红", "颜色分类#:#蓝#;#颜色分类#:#红#;#尺码#:#42"
    )
    assert item_text(item) == "ab shoe;红,蓝;x1;42"
    assert item_text(Item("1")) == ""
    assert item_text(Item("1", "", "品牌#:#N")) == "n"
    assert item_text(item, ("产地",)) == "ab shoe;杭州"


@given(st.text(), st.lists(st.tuples(st.sampled_from(TEN_KEYS), TEXTS), max_size=5))
def test_cleaning_an_items_text_again_changes_nothing(title: str, pairs: list[tuple[str, str]]) -> None:
    text = item_text(Item("1", title, strict(pairs)))
    assert normalise(unicodedata.normalize("NFKC", text)) == normalise(text)


ITEM: dict[str, Any] = {"item_id": "a1", "title": "t", "item_image_name": "a.jpg"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_items_may_lack_anything_but_their_id(path: Path) -> None:
    path.write_text('{"item_id": 7, "title": null, "unknown": [1]}\n\n{"item_id": "b"}\n')
    assert read_items(path) == {"7": Item("7"), "b": Item("b")}


def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"item_id":"a"}\r\n\r\n{"item_id":"b"}')
    assert list(read_items(path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"item_id": "b"', r"rows\.jsonl:2: not a JSON line"),
        ("[1]", r"rows\.jsonl:2: expected a JSON object, found \[1\]"),
        ('{"title": "t"}', r"rows\.jsonl:2: no item_id"),
        ('{"item_id": "b", "title": ["t"]}', r"rows\.jsonl:2: title must be a text"),
        ('{"item_id": "a1", "title": "other"}', r"rows\.jsonl:2: item 'a1' stands here twice"),
        ('{"item_id": "b", "title": "\\ud800"}', r"rows\.jsonl:2: not a JSON line"),
    ],
)
def test_a_bad_item_line_is_named(path: Path, line: str, message: str) -> None:
    path.write_text(json.dumps(ITEM) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_items(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf_8_are_named_by_line(path: Path) -> None:
    path.write_bytes(b'{"item_id":"a"}\n{"item_id":"\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not a JSON line"):
        read_items(path)


def test_a_repeated_item_line_is_harmless(path: Path) -> None:
    path.write_text((json.dumps(ITEM) + "\n") * 2)
    assert list(read_items(path)) == ["a1"]


def test_a_missing_file_says_what_brings_it(path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl: no such file; run \./entrypoint\.sh resize"):
        read_items(path)
    with pytest.raises(UserError, match=r"do this"):
        read_pairs(path.parent, advice="do this")


@pytest.mark.parametrize(
    ("label", "meant"), [("0", 0), (1, 1), (0.0, 0), ("1.0", 1), (-0.0, 0), (True, 1), ("False", 0)]
)
def test_labels_are_texts_numbers_or_booleans(path: Path, label: object, meant: int) -> None:
    path.write_text(json.dumps({"src_item_id": "a", "tgt_item_id": "b", "item_label": label}))
    assert read_pairs(path) == [Pair("a", "b", meant)]


@pytest.mark.parametrize("label", ["2", "same", 0.5, "0.5", [1], "1 ", -1, "NaN", 1e300])
def test_any_other_label_is_an_error(path: Path, label: object) -> None:
    path.write_text(json.dumps({"src_item_id": "a", "tgt_item_id": "b", "item_label": label}))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: item_label must be 0 or 1"):
        read_pairs(path, labels="optional")


def test_a_missing_label_is_an_error_only_where_it_is_needed(path: Path) -> None:
    path.write_text('{"src_item_id": "a", "tgt_item_id": "b"}')
    assert read_pairs(path, labels="optional") == [Pair("a", "b", None)]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no item_label"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("item", "pair"), [("1001.0", "1001"), ('"1001"', "1001.0"), ("1001", "1.001e3"), ("-0.0", "0")]
)
def test_ids_as_numbers_meet(path: Path, item: str, pair: str) -> None:
    path.write_text(f'{{"item_id": {item}}}\n{{"item_id": "b"}}\n')
    items = read_items(path)
    path.write_text(f'{{"src_item_id": {pair}, "tgt_item_id": "b", "item_label": 1.0}}\n')
    assert read_pairs(path, items) == [Pair(next(iter(items)), "b", 1)]


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 + 1, 2**64 + 1, 10**30 + 1, -(2**70)])
def test_whole_numbers_of_any_size_keep_every_digit(path: Path, number: int) -> None:
    for text in (f'{{"item_id": {number}}}', f'[{{"item_id": {number}}}]', f'{{"item_id": {number}, "title": NaN}}'):
        path.write_text(text)
        assert list(read_items(path)) == [str(number)]
    row = json.loads(info_row({"item_id": number, "title": "红"}, "a.jpg"))
    assert row == {"item_id": number, "title": "红", "item_image_name": "a.jpg"}


@pytest.mark.parametrize("number", ["9007199254740993.0", "1e16", "-1.8446744073709552e19"])
def test_a_float_that_may_be_several_ids_is_refused(path: Path, number: str) -> None:
    path.write_text(f'{{"item_id": {number}}}')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: item_id .* beyond 2\^53.*; write the id as text"):
        read_items(path)
    path.write_text(f'{{"item_id": "{number}"}}')
    assert list(read_items(path)) == [number]


@pytest.mark.parametrize("value", ["true", "[1]", '{"a": 1}'])
def test_what_is_no_id_is_refused_and_as_text_taken(path: Path, value: str) -> None:
    path.write_text(f'{{"item_id": {value}}}')
    with pytest.raises(UserError, match=r"item_id must be a text, found .*quotation marks"):
        read_items(path)
    path.write_text(json.dumps({"item_id": value}))
    assert list(read_items(path)) == [value]


def test_other_numbers_are_their_digits(path: Path) -> None:
    path.write_text('{"item_id": 1.5, "title": 2024.0, "cate_name": 1e22, "item_pvs": 0.5, "item_image_name": 7.0}')
    assert read_items(path) == {"1.5": Item("1.5", "2024", "0.5", image_name="7", category="1e+22")}


@pytest.mark.parametrize("label", ["0.5", "NaN", '"2"', "1e400"])
def test_the_advice_on_labels_works(path: Path, label: str) -> None:
    line = '{"src_item_id": "a", "tgt_item_id": "b", "item_label": %s}\n'
    path.write_text(line % 1 + line % label)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        read_pairs(path)
    for mended in (line % 1 + line % 0, line % 1):
        path.write_text(mended)
        assert read_pairs(path)


def test_an_unknown_item_is_named_with_the_nearest_known(path: Path) -> None:
    path.write_text('{"src_item_id": "item17", "tgt_item_id": "item71x", "item_label": "1"}')
    items = {name: Item(name) for name in ("item17", "item71", "zzz")}
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: unknown item 'item71x' \(did you mean 'item71'\?\); add it to i\.j"
    ):
        read_pairs(path, items, items_path=Path("i.j"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_pairs_is_an_error(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(UserError, match=r"rows\.jsonl: no pairs"):
        read_pairs(path)


def test_half_a_pair_is_an_error(path: Path) -> None:
    path.write_text('{"src_item_id": "a", "item_label": "1"}')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a pair needs src_item_id and tgt_item_id"):
        read_pairs(path)


def test_rows_written_are_rows_read(path: Path) -> None:
    pairs = [Pair("a", "b", 1), Pair("b", "a", 0), Pair("红", "色", None)]
    path.write_bytes(b"".join(map(pair_row, pairs)))
    assert read_pairs(path, labels="optional") == pairs
    assert json.loads(info_row({**ITEM, "extra": [1]}, "new.jpg")) == {
        **ITEM,
        "extra": [1],
        "item_image_name": "new.jpg",
    }


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, min_size=1, max_size=16))
def test_an_embedding_comes_back_exactly(numbers: list[float]) -> None:
    embedding = np.array(numbers, dtype=np.float32)
    text = format_embedding(embedding).decode()
    assert json.loads(text) == parse_embedding(text, "here").tolist(), "the judges read it with Python's own json"
    back = parse_embedding(text, "here").astype(np.float32)
    assert back.tobytes() == embedding.tobytes()


def test_an_embedding_of_a_strided_array_is_written_in_order() -> None:
    embedding = np.arange(8, dtype=np.float32)[::2]
    assert parse_embedding(format_embedding(embedding).decode(), "here").tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_an_embedding_that_is_not_finite_is_never_written(number: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        format_embedding(np.array([1, number], dtype=np.float32))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(FLOATS, min_size=1, max_size=4), FLOATS)
def test_a_row_is_the_json_of_its_fields(item_id: str, numbers: list[float], threshold: float) -> None:
    text = format_embedding(np.array(numbers, dtype=np.float32))
    row = prediction_row(item_id, text, "b", text, threshold)
    fields = [item_id, text.decode(), "b", text.decode(), threshold]
    keys = ["src_item_id", "src_item_emb", "tgt_item_id", "tgt_item_emb", "threshold"]
    assert row == orjson.dumps(dict(zip(keys, fields, strict=True))) + b"\n"


def test_predictions_come_back(path: Path) -> None:
    path.write_bytes(prediction_row("a", b"[0.5,1]", "b", b"[2,-3e-9]", 1.65))
    [(where, prediction)] = read_predictions(path)
    assert where == f"{path}:1"
    assert (prediction.left, prediction.right, prediction.threshold) == ("a", "b", 1.65)
    assert prediction.left_embedding.tolist() == [0.5, 1]
    assert prediction.right_embedding.tolist() == [2, -3e-9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_item_emb": [1, 2]}, "src_item_emb must be a string"),
        ({"src_item_emb": "[1,"}, "src_item_emb is not a JSON list"),
        ({"src_item_emb": "[]"}, "1 to 1024 numbers"),
        ({"tgt_item_emb": json.dumps([0] * 1025)}, "tgt_item_emb must hold 1 to 1024 numbers"),
        ({"tgt_item_emb": "[true]"}, "not a number"),
        ({"tgt_item_emb": "[null]"}, "not a number"),
        ({"tgt_item_emb": '["1"]'}, "not a number"),
        ({"tgt_item_emb": "[NaN]"}, "not a JSON list"),
        ({"tgt_item_emb": "[1e999]"}, "not a JSON list"),
        ({"tgt_item_emb": "[1, -Infinity]"}, "not a JSON list"),
        ({"threshold": "0"}, "threshold must be a number"),
        ({"threshold": None}, "threshold must be a number"),
        ({"threshold": True}, "threshold must be a number"),
    ],
)
def test_a_bad_prediction_is_named(path: Path, change: dict[str, Any], message: str) -> None:
    good = {"src_item_id": "a", "src_item_emb": "[1]", "tgt_item_id": "b", "tgt_item_emb": "[1]", "threshold": 0}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    rows = read_predictions(path)
    next(rows)
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        next(rows)


def test_ids_are_read_from_a_list_or_from_items(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes("\ufeff a \r\n\n商品\n".encode())
    assert read_ids(tmp_path / "list") == ["a", "商品"]
    (tmp_path / "items").write_text('{"item_id": 12}\n{"item_id": "b", "title": "c"}\n')
    assert read_ids(tmp_path / "items") == ["12", "b"]
