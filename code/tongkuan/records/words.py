"""An item's words as bucket numbers: pieces of its text, model numbers, and what it says by key. Nothing is learned.

Equal words fall in equal buckets, whatever their language; emoji are characters like others.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from zlib import crc32

from tongkuan.records.attribute_syntax import plain
from tongkuan.records.attributes import AttributeStyle, attributes_of, normalise
from tongkuan.records.items import Item

BUCKETS = 1 << 18
GRAM_SIZES = (2, 3, 4)  # characters
KINDS = ("title", "text", "values", "numbers")
"""Pieces of the title; of title and values; keys with their values; model numbers."""
# Values that say nothing, normalised: such a key counts as lacking.
SILENT = frozenset(
    [
        "其他",
        "其它",
        "其他/other",
        "other/其他",
        "other/其它",
        "other",
        "others",
        "其他品牌",
        "见描述",
        "见详情",
        "详见描述",
        "如图",
        "如图所示",
        "无",
        "否",
        "没有",
        "不详",
        "未知",
        "none",
        "no",
        "n/a",
        "n",
        "na",
        "null",
        "unknown",
        "-",
        "--",
        "/",
    ]
)
# Letters and digits as sellers write model numbers: aj5909-001.
NUMBER = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
LEAST_NUMBER = 4  # characters


class Word(NamedTuple):
    """One word of an item."""

    bucket: int
    owner: int
    """Its kind's place in KINDS, or len(KINDS) + the bucket of the key under which it is said."""


def bucket(word: str) -> int:
    """The same number for the same word, on any machine."""
    return crc32(word.encode("utf-8", "surrogatepass")) % BUCKETS


def words_of(item: Item, style: AttributeStyle) -> list[Word]:
    """All words of an item, each once: by kind, then by key; sorted, so that the same words are in the same order."""
    title = normalise(plain(item.title))
    said = [
        (key, value) for key, values in attributes_of(item, style).items() for value in values if value not in SILENT
    ]
    texts = [title, *(value for _, value in said)]
    by_kind: tuple[Iterable[str], ...] = (
        pieces([title]),
        pieces(texts),
        (f"{key}\0{value}" for key, value in said),
        model_numbers(texts),
    )
    found = {Word(bucket(f"{KINDS[kind]}\0{word}"), kind) for kind, words in enumerate(by_kind) for word in words}
    found |= {Word(bucket(f"key\0{key}\0{value}"), len(KINDS) + bucket(key)) for key, value in said}
    return sorted(found)


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Runs of 2 to 4 characters within words, whose ends count as characters."""
    for text in texts:
        for word in text.split():
            padded = f" {word} "
            for size in GRAM_SIZES:
                yield from (padded[start : start + size] for start in range(max(1, len(padded) - size + 1)))


def model_numbers(texts: Iterable[str]) -> Iterator[str]:
    """Runs of letters, digits and hyphens with a digit; also what stands before each hyphen. Hyphens do not count."""
    for text in texts:
        for run in NUMBER.findall(text):
            steps = run.split("-")
            for end in range(1, len(steps) + 1):
                number = "".join(steps[:end])
                if len(number) >= LEAST_NUMBER and any(character.isdigit() for character in number):
                    yield number
