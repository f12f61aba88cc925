"""Attribute syntax: what an item's attribute texts say by key, and the text that a model reads of an item."""

import json
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tongkuan.base.errors import clip
from tongkuan.records.attribute_syntax import Pairs, pairs_of_text, plain
from tongkuan.records.items import Item

AttributeStyle = Literal["quoted", "published"]
# The ten most frequent keys of the competition's items (arXiv 2208.11064, section on data).
TEN_KEYS = ("颜色分类", "货号", "型号", "品牌", "尺寸", "口味", "品名", "批准文号", "系列", "尺码")
DEFAULT_KEYS = "the ten keys that model.attribute_keys has by default"
NUM_OFFERED = 10  # keys named when none of those asked for occurs
MAX_OFFERED = 30  # characters of such a key


def normalise(text: str) -> str:
    """NFKC, lower case, white space runs to one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def parse_attributes(text: str, style: AttributeStyle = "quoted") -> dict[str, list[str]]:
    """Attribute values by key, keys and distinct values in first-seen order, all normalised.

    quoted: split first, normalise after, so `:` `;` and their full-width forms inside a value survive; any usual
    separators, HTML and JSON are read (attribute_syntax).
    published: as the paper's code did: drop `#`, NFKC, lower case, then split on `;` and the first `:`.
    """
    attributes: dict[str, dict[str, None]] = {}  # a dict keeps the order, and is quick with many values
    for raw_key, raw_value in published_pairs(text) if style == "published" else pairs_of_text(text):
        key, value = normalise(raw_key), normalise(raw_value)
        if key and value:
            attributes.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in attributes.items()}


def published_pairs(text: str) -> Pairs:
    """(key, value) as the paper's code split them."""
    segments = [segment.partition(":") for segment in clean_as_published(text).split(";")]
    return [(key, value) for key, separator, value in segments if separator]


def clean_as_published(text: str) -> str:
    """The paper's cleaning, done once: drop `#`, NFKC, lower case."""
    return unicodedata.normalize("NFKC", text.replace("#", "")).lower()


def attributes_of(item: Item, style: AttributeStyle = "quoted") -> dict[str, list[str]]:
    """Attribute values of an item by key: those of the item, then those that only its SKUs have."""
    attributes = parse_attributes(item.item_attributes, style)
    for key, values in parse_attributes(item.sku_attributes, style).items():
        attributes[key] = list(dict.fromkeys([*attributes.get(key, ()), *values]))
    return attributes


def item_text(item: Item, keys: Sequence[str] = TEN_KEYS, style: AttributeStyle = "quoted") -> str:
    """Title, then the values of `keys`, non-empty parts joined by `;`; several values of a key joined by `,`."""
    title = clean_as_published(item.title) if style == "published" else normalise(plain(item.title))
    attributes = attributes_of(item, style)
    parts = [title, *(",".join(attributes.get(normalise(key), [])) for key in keys)]
    return ";".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# What is said of a catalogue's attributes


@dataclass(slots=True)
class Coverage:
    """What items have of attributes: items with a text, with one of the keys asked for, and texts without any key."""

    num_items: int = 0
    num_with_text: int = 0
    num_covered: int = 0
    num_unread: int = 0
    first_unread: tuple[str, str] = ("", "")
    """Item id and text."""
    keys: Counter[str] = field(default_factory=Counter)


def count_coverage(items: Iterable[Item], keys: Sequence[str], style: AttributeStyle = "quoted") -> Coverage:
    """Go through the items once."""
    found = Coverage()
    wanted = {normalise(key) for key in keys}
    for item in items:
        found.num_items += 1
        texts = [text for text in (item.item_attributes, item.sku_attributes) if text.strip()]
        found.num_with_text += bool(texts)
        present: set[str] = set()
        for text in texts:
            present |= (names := parse_attributes(text, style).keys())
            if not names:
                found.first_unread = found.first_unread if found.num_unread else (item.item_id, text)
                found.num_unread += 1
        found.num_covered += not wanted.isdisjoint(present)
        found.keys.update(sorted(present))
    return found


def coverage_lines(
    items: Iterable[Item], keys: Sequence[str], style: AttributeStyle = "quoted", asked: str = "model.attribute_keys"
) -> list[str]:
    """How many items have one of the keys (`asked` names them), and what is lost of their attribute texts."""
    found = count_coverage(items, keys, style)
    lines = [f"attributes: {found.num_covered:,} of {found.num_items:,} items have at least one of {asked}"]
    if found.num_unread:
        item_id, text = found.first_unread
        lines.append(
            f"note: {found.num_unread:,} attribute texts yield no key, first item {clip(item_id)}: {clip(text)}; "
            "write them as key:value;key:value"
        )
    if keys and found.num_with_text and not found.num_covered:
        warning = f"warning: no item has any of {asked}, so titles are all the text that is read"
        if offered := keys_to_offer(found):
            common = ", ".join(f"{clip(key)} {found.keys[key]:,}" for key in offered)
            setting = f"model.attribute_keys=[{', '.join(map(yaml_word, offered))}]"
            warning += f"; commonest here: {common}; to read them: train with {shlex.quote(setting)}"
        lines.append(warning)
    return lines


def keys_to_offer(found: Coverage) -> list[str]:
    """The commonest keys that can be typed, those of as many items by name."""
    ordered = sorted(found.keys, key=lambda key: (-found.keys[key], key))
    return [key for key in ordered if len(key) <= MAX_OFFERED and key.isprintable()][:NUM_OFFERED]


def yaml_word(word: str) -> str:
    """A text as YAML reads it back within a list: words as they are, all else in quotation marks."""
    is_word = word.isalpha() and word.lower() not in ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
    return word if is_word else json.dumps(word, ensure_ascii=False)
