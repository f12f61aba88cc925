"""words.py: what is said alike falls in the same bucket, on any machine and in any writing; silence says nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tongkuan.records.attribute_syntax import canonical
from tongkuan.records.attributes import AttributeStyle
from tongkuan.records.items import Item
from tongkuan.records.words import BUCKETS, KINDS, Word, bucket, model_numbers, pieces, words_of


def said(title: str = "", *attributes: str, style: AttributeStyle = "quoted") -> list[Word]:
    """Words of a listing with attributes as `key:value`."""
    return words_of(Item("a", title=title, item_attributes=";".join(attributes)), style)


def of_kind(words: list[Word], kind: str) -> set[int]:
    return {word.bucket for word in words if word.owner == KINDS.index(kind)}


def by_key(words: list[Word]) -> list[Word]:
    return [word for word in words if word.owner >= len(KINDS)]


# ---------------------------------------------------------------------------------------------------------------------
# Buckets


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("", 0),
        ("title\0 红", 45204),
        ("货号", 67524),
        ("numbers\0aj5909", 83862),
        ("title\0👟👟", 155443),
        ("\ud800", 42280),
    ],
)
def test_a_word_has_its_bucket_on_any_machine(word: str, number: int) -> None:
    assert bucket(word) == number


def test_a_models_words_stay_where_its_training_put_them() -> None:
    """A model file holds numbers by bucket: other buckets would read them as those of other words."""
    words = said("红", "货号:A1")
    assert [of_kind(words, kind) for kind in ("title", "values")] == [{10408, 45204, 237981}, {222745}]
    assert by_key(words) == [Word(50130, 67528)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Nike Air", "nike air"),
        ("ＮＩＫＥ　Ａｉｒ", "nike air"),
        ("nike  air\n", "nike air"),
        ("Ⅳ代 ①", "iv代 1"),
        ("<b>nike</b> &#97;ir", "nike air"),
        ("ni\u200bke air", "nike air"),
    ],
)
def test_another_writing_of_the_same_title_has_the_same_words(one: str, other: str) -> None:
    assert said(one) == said(other)
    assert said("", f"品名:{one}") == said("", f"品名:{other}")


def test_keys_too_are_the_same_in_another_writing() -> None:
    assert said("", "Ｂrand：Ａ") == said("", "brand:a")


@pytest.mark.parametrize("text", ["👟", "红", "儿童卡通水杯", "🐻🎒", "⭐", "a"])
def test_emoji_and_chinese_without_blanks_count(text: str) -> None:
    assert of_kind(said(f"杯 {text}"), "title") > of_kind(said("杯"), "title")
    assert of_kind(said("", f"图案:{text}"), "values") and by_key(said("", f"图案:{text}"))


def test_titles_that_share_a_piece_share_a_word_and_others_do_not() -> None:
    cup, mug, shoe = (of_kind(said(title), "title") for title in ("卡通水杯", "儿童水杯", "跑步鞋"))
    assert cup & mug and cup != mug
    assert not cup & shoe


def test_pieces_are_runs_of_two_to_four_characters_within_words() -> None:
    assert set(pieces(["ab c"])) == {" a", "ab", "b ", " ab", "ab ", " ab ", " c", "c ", " c "}


def test_the_text_is_title_and_values_and_the_title_alone_is_told_apart() -> None:
    whole = said("水杯", "图案:小熊")
    assert of_kind(whole, "title") == of_kind(said("水杯"), "title")
    assert of_kind(whole, "text") == of_kind(said("水杯"), "text") | of_kind(said("小熊"), "text")
    assert not of_kind(whole, "title") & of_kind(whole, "text")


# ---------------------------------------------------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize(
    "value",
    ["其他", "其他/other", "other/其他", "Other", "ＯＴＨＥＲ", "见描述", "如图", "无", "N/A", "-", "/"],
)
@pytest.mark.parametrize("style", ["quoted", "published"])
def test_a_value_that_says_nothing_is_as_a_key_that_lacks(value: str, style: AttributeStyle) -> None:
    assert said("杯", f"品牌:{value}", "型号:a1", style=style) == said("杯", "型号:a1", style=style)
    assert said("", f"品牌:{value}", style=style) == []


def test_of_several_values_the_silent_one_is_left_out() -> None:
    assert said("", "颜色:红;颜色:其他") == said("", "颜色:红")


def test_words_of_a_key_have_one_owner_and_it_is_the_keys() -> None:
    red, blue, other = (by_key(said("", text)) for text in ("颜色:红", "颜色:蓝", "图案:红"))
    assert {word.owner for word in red} == {word.owner for word in blue} == {len(KINDS) + bucket("颜色")}
    assert red != blue, "what it says tells them apart"
    assert {word.owner for word in other} == {len(KINDS) + bucket("图案")}
    assert not {word.bucket for word in red} & {word.bucket for word in other}, "the same value of another key"


def test_what_only_the_skus_say_counts_as_well() -> None:
    assert words_of(Item("a", sku_attributes="颜色:红"), "quoted") == said("", "颜色:红")


# ---------------------------------------------------------------------------------------------------------------------
# Model numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("nike aj5909-001 男鞋", {"aj5909", "aj5909001"}),
        ("a-b-c12", {"abc12"}),
        ("xk9-77-l", {"xk977", "xk977l"}),
        ("2022新款", {"2022"}),
        ("abc def", set()),
        ("a1 b22", set()),
        ("型号kx100白色", {"kx100"}),
        ("-1234- --", {"1234"}),
    ],
)
def test_model_numbers_are_found_in_titles(text: str, numbers: set[str]) -> None:
    assert set(model_numbers([text])) == numbers
    assert of_kind(said(text), "numbers") == {bucket(f"numbers\0{number}") for number in numbers}


def test_a_model_number_is_the_same_in_a_title_and_under_a_key() -> None:
    assert of_kind(said("Nike AJ5909-001 男鞋"), "numbers") == of_kind(said("", "货号:AJ5909-001"), "numbers")
    assert of_kind(said("AJ5909 001"), "numbers") & of_kind(said("AJ5909-001"), "numbers")


# ---------------------------------------------------------------------------------------------------------------------
# Any listing

ANY = st.text(st.characters() | st.sampled_from("#:;：；=|<&>{}[]\"'\\-0aA \n其他👟"), max_size=40)
PLAIN = st.text(st.sampled_from("红蓝熊杯abz019-👟"), min_size=1, max_size=4)


@given(ANY, ANY, ANY, st.sampled_from(["quoted", "published"]))
def test_any_listing_has_words_sorted_and_each_once(title: str, item: str, sku: str, style: AttributeStyle) -> None:
    words = words_of(Item("a", title=title, item_attributes=item, sku_attributes=sku), style)
    assert words == sorted(set(words))
    assert all(0 <= word.bucket < BUCKETS and 0 <= word.owner < len(KINDS) + BUCKETS for word in words)


@given(st.lists(st.tuples(PLAIN, PLAIN), max_size=6).flatmap(lambda pairs: st.tuples(*[st.permutations(pairs)] * 2)))
def test_the_order_of_attributes_says_nothing(orders: tuple[list[tuple[str, str]], ...]) -> None:
    one, other = (words_of(Item("a", title="杯", item_attributes=canonical(pairs)), "quoted") for pairs in orders)
    assert one == other
