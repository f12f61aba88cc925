"""Attributes as people write them: one clear reading each, in every writing; the published reading stays as it was."""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scripts import sample
from tongkuan.base.errors import UserError
from tongkuan.records.attribute_syntax import MAX_DEPTH, pairs_of_value, plain
from tongkuan.records.attributes import TEN_KEYS, attributes_of, item_text, normalise, parse_attributes
from tongkuan.records.items import Item, info_row, parse_item

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
BOTH = {"品牌": ["甲"], "颜色": ["红"]}


@pytest.mark.parametrize(
    "text",
    [
        *("品牌：甲；颜色：红", "品牌:甲；颜色:红", "品牌：甲;颜色：红", "品牌:甲;颜色：红", "品牌:甲;;颜色:红;"),
        *("品牌:甲\n颜色:红", "品牌：甲\r\n颜色：红\r\n", "品牌=甲\r颜色=红", "品牌:甲\\n颜色:红"),
        *("品牌:甲|颜色:红", "品牌：甲｜颜色：红", "| 品牌 : 甲 | 颜色 : 红 |", "品牌=甲|颜色=红"),
        *("品牌=甲;颜色=红", "品牌＝甲；颜色＝红", "品牌=甲,颜色=红", "品牌=甲\t颜色=红"),
        *("品牌:甲,颜色:红", "品牌：甲，颜色：红", "品牌: 甲, 颜色: 红", "品牌:甲、颜色:红"),
        *("品牌:甲\t颜色:红", "品牌：甲\u3000颜色：红", "品牌:甲 颜色:红"),
        *("品牌:甲<br>颜色:红", "品牌：甲<BR/>颜色：红<br />", "<p>品牌：甲</p><p class='x'>颜色：<b>红</b></p>"),
        *("品牌#:#甲\n颜色#:#红", "品牌#:#甲|颜色#:#红", "品牌#:甲#;颜色#:红", "品牌#：甲#；颜色#：红"),
        *(
            "品\u200b牌:甲\ufeff;颜色:\u00ad红",
            "品牌#:#甲\u2060#;#颜色#:#红",
            "品牌&#58;甲;颜色:红",
            "品牌:&nbsp;甲;颜色:红",
        ),
    ],
)
def test_any_usual_separators_are_read(text: str) -> None:
    assert parse_attributes(text) == BOTH


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("时间:12:30;尺寸:3=2", {"时间": ["12:30"], "尺寸": ["3=2"]}),
        ("尺寸=3:2;比例=16:9", {"尺寸": ["3:2"], "比例": ["16:9"]}),
        ("网址:http://a.com\nhttp://b.com", {"网址": ["http://a.com http://b.com"]}),
        ("网址：https://a.b/?x=1&y=2；品牌：甲", {"网址": ["https://a.b/?x=1&y=2"], "品牌": ["甲"]}),
        ("营业:9:00;12:30", {"营业": ["9:00;12:30"]}),
        ("颜色:红,蓝;品牌:甲", {"颜色": ["红,蓝"], "品牌": ["甲"]}),
        ("颜色:红,蓝", {"颜色": ["红,蓝"]}),
        ("颜色：红；蓝；品牌：甲", {"颜色": ["红;蓝"], "品牌": ["甲"]}),
        ("颜色:红|蓝\n品牌:甲", {"颜色": ["红|蓝"], "品牌": ["甲"]}),
        ("尺寸:长;宽\n品牌:甲", {"尺寸": ["长;宽"], "品牌": ["甲"]}),
        ("a:1,b:2;c:3", {"a": ["1,b:2"], "c": ["3"]}),
        ("颜色,尺码:红,M;品牌:甲", {"颜色,尺码": ["红,m"], "品牌": ["甲"]}),
        ("尺寸#:#10&#215;20#;#品牌#:#A&amp;B", {"尺寸": ["10×20"], "品牌": ["a&b"]}),
        ("说明:a&lt;b;重量:<5kg", {"说明": ["a<b"], "重量": ["<5kg"]}),
        ("链接:?a=1&copy=2", {"链接": ["?a=1&copy=2"]}),
        ("红色 纯棉 2024", {}),
        ("红\t棉", {}),
    ],
)
def test_values_keep_their_own_signs(text: str, meant: dict[str, list[str]]) -> None:
    assert parse_attributes(text) == meant


PAIRS: list[Any] = [
    {"品牌": "甲", "颜色": "红"},
    {"品牌": ["甲"], "颜色": ["红", "红"], "空": None, "无": "", "NaN": float("nan")},
    {"基本": {"品牌": "甲"}, "外观": {"颜色": "红"}},
    ["品牌:甲", "颜色：红"],
    ["品牌#:#甲", "颜色=红"],
    ["品牌:甲;颜色:红"],
    [["品牌", "甲"], ["颜色", "红"]],
    [{"品牌": "甲"}, {"颜色": "红"}],
    [{"name": "品牌", "value": "甲", "id": 7}, {"name": "颜色", "value": "红"}],
    [{"key": "品牌", "value": "甲"}, {"key": "颜色", "value": ["红"]}],
    [{"k": "品牌", "v": "甲"}, {"k": "颜色", "v": "红"}],
    [{"attr_name": "品牌", "attr_value": "甲"}, {"attrName": "颜色", "attrValue": "红"}],
    [{"propertyName": "品牌", "valueName": "甲"}, {"propertyName": "颜色", "valueName": "红"}],
    [{"属性名": "品牌", "属性值": "甲"}, {"属性名": "颜色", "属性值": "红"}],
    [{"name": "品牌", "value": {"value": "甲"}}, {"name": "颜色", "values": [{"name": "红", "id": 1}]}],
    {"attributes": [{"name": "品牌", "value": "甲"}, {"name": "颜色", "value": "红"}]},
]


@pytest.mark.parametrize("value", PAIRS)
def test_json_values_are_read_as_they_are_and_within_a_text(value: Any) -> None:
    item = parse_item({"item_id": "a", "item_pvs": value}, "here")
    assert attributes_of(item) == BOTH
    if not isinstance(value, dict) or "NaN" not in value:
        quoted = (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1), str(value))
        assert [parse_attributes(text) for text in quoted] == [BOTH] * 3
        assert "甲" in item_text(parse_item({"item_id": "a", "sku_pvs": value}, "here"))
    assert attributes_of(item, "published") == BOTH, "what a file has as values, either style reads"


def test_numbers_and_quantities_are_their_digits() -> None:
    value = {"重量": {"value": 5, "unit": "kg"}, "长": 10.0, "宽": 2.5, "大": 12345678901234567890, "防水": True}
    item = parse_item({"item_id": "a", "item_pvs": value}, "here")
    meant = {"重量": ["5kg"], "长": ["10"], "宽": ["2.5"], "大": ["12345678901234567890"], "防水": ["true"]}
    assert attributes_of(item) == meant


@pytest.mark.parametrize("value", [["红色", "纯棉"], [1, 2.5], ["红:"], {"": "红"}])
def test_values_without_keys_are_no_error_and_no_key(value: Any) -> None:
    item = parse_item({"item_id": "a", "item_pvs": value}, "here")
    assert item.item_attributes and not attributes_of(item)


@pytest.mark.parametrize("value", [[], {}, {"a": None}, [None, {}], {"a": []}])
def test_nothing_is_nothing(value: Any) -> None:
    assert parse_item({"item_id": "a", "item_pvs": value}, "here") == Item("a")


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}"), ('{"a":[', "]}"), ('[{"a":', "}]")])
def test_what_is_too_deep_is_one_line(start: str, end: str) -> None:
    text = start * 200 + "1" + end * 200
    with pytest.raises(UserError, match="here: item_pvs is nested deeper than 16; write it as text: key#:#value"):
        parse_item({"item_id": "a", "item_pvs": json.loads(text)}, "here")
    assert MAX_DEPTH == 16 and parse_item({"item_id": "a", "item_pvs": "key#:#value#;#key#:#value"}, "here")
    with pytest.raises(ValueError, match="nested"):
        pairs_of_value(json.loads(text))
    parse_attributes(text)


def test_titles_lose_html_and_characters_without_width_in_quoted_only() -> None:
    title = "<b>A&amp;B</b>\u200b 10&#215;20<br/>纯\u00ad棉 <5kg &unknown; R&D;"
    assert item_text(Item("1", title)) == "a&b 10×20 纯棉 <5kg &unknown; r&d;"
    assert (
        item_text(Item("1", title), style="published") == unicodedata.normalize("NFKC", title.replace("#", "")).lower()
    )


@given(st.text() | st.text(st.sampled_from("<b/>&#;:=|[]{}\"\\,' \n品甲")))
def test_any_text_has_pairs_that_are_clean(text: str) -> None:
    for style in ("quoted", "published"):
        for key, values in parse_attributes(text, style).items():
            assert key and key == normalise(key) and values and all(values) and len(set(values)) == len(values)
    plain(text)


WORDS = st.text(st.sampled_from("#;:：；=|,\n ab品甲{}[]<>&") | st.characters(codec="utf-8"), max_size=6)


def clean(word: str) -> str:
    return normalise(plain(word))


@given(st.dictionaries(WORDS, WORDS | st.lists(WORDS, max_size=3), max_size=5))
def test_attributes_come_back_from_their_text(value: dict[str, Any]) -> None:
    item = parse_item({"item_id": "a", "item_pvs": value}, "here")
    found = attributes_of(item)
    wanted: dict[str, dict[str, None]] = {}
    for key, words in value.items():
        for word in [words] if isinstance(words, str) else words:
            if clean(key) and clean(word) and key.strip():
                wanted.setdefault(clean(key), {})[clean(word)] = None
    if "#" not in json.dumps(value):  # which is dropped where it would make a sign of its own
        assert found == {key: list(words) for key, words in wanted.items()}


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.sampled_from(["name", "value"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES, VALUES, VALUES)
def test_a_published_row_is_read_as_the_raw_one(title: Any, item_pvs: Any, sku_pvs: Any) -> None:
    row = {"item_id": 7, "title": title, "item_pvs": item_pvs, "sku_pvs": sku_pvs, "item_image_name": "raw/a.png"}
    try:
        item = parse_item(row, "here")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    line = info_row(row, "raw/a.png")
    again = parse_item(json.loads(line), "here")
    assert again == item
    for style in ("quoted", "published"):
        assert item_text(again, style=style) == item_text(item, style=style)
    assert parse_item(json.loads(info_row(json.loads(line), "raw/a.png")), "here") == item


# ---------------------------------------------------------------------------------------------------------------------
# The published reading, and today's writings, word for word


def published_text(item: Item, keys: Iterable[str] = TEN_KEYS) -> str:
    """What the paper's code made of an item, written once more."""

    def cleaned(text: str) -> str:
        return unicodedata.normalize("NFKC", text.replace("#", "")).lower()

    found: dict[str, list[str]] = {}
    for text in (item.item_attributes, item.sku_attributes):
        for segment in cleaned(text).split(";"):
            key, sign, value = (" ".join(part.split()) for part in segment.partition(":"))
            if sign and key and value and value not in found.setdefault(key, []):
                found[key].append(value)
    parts = [cleaned(item.title), *(",".join(found.get(normalise(key), [])) for key in keys)]
    return ";".join(part for part in parts if part)


def quoted_attributes(text: str) -> dict[str, list[str]]:
    """What `quoted` made of strict texts and of `key:value;key:value` before it knew other writings."""
    segments: list[str] = []
    if "#;#" in text or text.count("#:#") == 1:
        segments = text.split("#;#")
    else:
        for part in re.split(r"#?;", text):
            if segments and ":" not in part:
                segments[-1] += ";" + part
            else:
                segments.append(part)
    found: dict[str, list[str]] = {}
    for segment in segments:
        sign = next((sign for sign in ("#:#", "#:", ":") if sign in segment), None)
        key, value = map(normalise, segment.split(sign, 1)) if sign else ("", "")
        if key and value and value not in found.setdefault(key, []):
            found[key].append(value)
    return found


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Of the sample catalogue, and of real data where it is at hand."""
    rows = [listing.row for listings in sample.plan(40).listings.values() for listing in listings]
    rows += [orjson.loads(line) for file in sorted(DATA.glob("*/item_*_info.jsonl")) for line in file.open("rb")]
    found = [parse_item(row, "here") for row in rows]
    assert len(found) > 50
    return found


def test_published_texts_stay_to_the_byte(items: list[Item]) -> None:
    for item in items:
        assert item_text(item, style="published") == published_text(item)


def test_quoted_texts_of_todays_writings_stay(items: list[Item]) -> None:
    for item in items:
        for text in (item.item_attributes, item.sku_attributes):
            assert parse_attributes(text) == quoted_attributes(text)
        assert item_text(item).startswith(normalise(item.title))


USUAL = st.lists(
    st.tuples(
        st.text(st.sampled_from("ab,、品牌 颜色|"), min_size=1).filter(lambda key: bool(key.strip())),
        st.text(st.sampled_from("ab=,:|、.红 12/-（）")).map(lambda value: "v" + value),
    ),
    min_size=2,
    max_size=5,
)


@given(USUAL)
def test_key_value_semicolons_stay_as_they_were(pairs: list[tuple[str, str]]) -> None:
    text = ";".join(f"{key}:{value}" for key, value in pairs)
    assert parse_attributes(text) == quoted_attributes(text)


@given(st.text() | st.text(st.sampled_from("#;:：；ab品 &<b>\u200b")))
def test_published_reads_any_text_as_it_did(text: str) -> None:
    item = Item("1", text, text, text)
    assert item_text(item, style="published") == published_text(item)
