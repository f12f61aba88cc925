"""Attribute syntax: what an item's attribute texts say by key, and the text that a model reads of an item."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from tongkuan.records import Item

AttributeStyle = Literal["quoted", "published"]
# The ten most frequent keys of the competition's items (arXiv 2208.11064, section on data).
TEN_KEYS = ("颜色分类", "货号", "型号", "品牌", "尺寸", "口味", "品名", "批准文号", "系列", "尺码")


def normalise(text: str) -> str:
    """NFKC, lower case, white space runs to one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def parse_attributes(text: str, style: AttributeStyle = "quoted") -> dict[str, list[str]]:
    """Attribute values by key, keys and distinct values in first-seen order, all normalised.

    quoted: split first, normalise after, so `:` `;` and their full-width forms inside a value survive.
    published: as the paper's code did: drop `#`, NFKC, lower case, then split on `;` and the first `:`.
    """
    attributes: dict[str, dict[str, None]] = {}  # a dict keeps the order, and is quick with many values
    if style == "published":
        segments = [segment.partition(":") for segment in clean_as_published(text).split(";")]
    else:
        segments = [split_key(segment) for segment in split_segments(text)]
    for raw_key, separator, raw_value in segments:
        key, value = normalise(raw_key), normalise(raw_value)
        if separator and key and value:
            attributes.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in attributes.items()}


def clean_as_published(text: str) -> str:
    """The paper's cleaning, done once: drop `#`, NFKC, lower case."""
    return unicodedata.normalize("NFKC", text.replace("#", "")).lower()


def split_segments(text: str) -> list[str]:
    """`key…value` segments. The strict separator wins when present; a loose `;` counts only before a new `key:`."""
    if "#;#" in text or text.count("#:#") == 1:
        return text.split("#;#")
    segments: list[str] = []
    for part in re.split(r"#?;", text):
        if segments and ":" not in part:
            segments[-1] += ";" + part  # a semicolon inside a value, not a separator
        else:
            segments.append(part)
    return segments


def split_key(segment: str) -> tuple[str, str, str]:
    """(key, separator, value) at the strictest separator that the segment holds."""
    for separator in ("#:#", "#:", ":"):
        if separator in segment:
            return segment.partition(separator)
    return segment, "", ""


def attributes_of(item: Item, style: AttributeStyle = "quoted") -> dict[str, list[str]]:
    """Attribute values of an item by key: those of the item, then those that only its SKUs have."""
    attributes = parse_attributes(item.item_attributes, style)
    for key, values in parse_attributes(item.sku_attributes, style).items():
        attributes[key] = list(dict.fromkeys([*attributes.get(key, ()), *values]))
    return attributes


def item_text(item: Item, keys: Sequence[str] = TEN_KEYS, style: AttributeStyle = "quoted") -> str:
    """Title, then the values of `keys`, non-empty parts joined by `;`; several values of a key joined by `,`."""
    title = clean_as_published(item.title) if style == "published" else normalise(item.title)
    attributes = attributes_of(item, style)
    parts = [title, *(",".join(attributes.get(normalise(key), [])) for key in keys)]
    return ";".join(part for part in parts if part)
