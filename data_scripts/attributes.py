"""Count attribute keys and values over the item files: the table from which the ten keys of a preset are picked.

./entrypoint.sh attributes --data data --top 20
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.cells import cell_len
from tqdm import tqdm

from tongkuan.base.errors import UserError, clip, missing
from tongkuan.records.attributes import DEFAULT_KEYS, TEN_KEYS, AttributeStyle, attributes_of, coverage_lines, normalise
from tongkuan.records.items import SPLITS, Item, Pair, item_file, pair_file, read_items, read_pairs
from tongkuan.records.rows import is_given

ADVICE = "run ./entrypoint.sh resize first, or ./entrypoint.sh demo"
KEY_LENGTH, VALUE_LENGTH = 24, 20  # characters shown
NUM_COMMONEST = 3
HEADER = ("", "key", "items", "share", "values", "same agree", "different agree", "commonest values")
LEFT_ALIGNED = (1, 7)  # columns of texts; numbers stand at the right


@dataclass(slots=True)
class Counts:
    """How many items have each key, and each value of a key. Flat: a counter a key would cost more than the files."""

    num_items: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    values: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(slots=True)
class Agreement:
    """Of the pairs of one label in which both sides have a key: how many there are, and share a value of it."""

    num_pairs: int = 0
    num_agreeing: int = 0

    def __str__(self) -> str:
        return f"{self.num_agreeing / self.num_pairs:.0%}" if self.num_pairs else "-"


def read_catalogue(folder: Path, splits: Sequence[str]) -> tuple[dict[str, Item], list[Pair]]:
    """Items by id and labelled pairs of the splits, or of those that are there. UserError when none is."""
    splits = splits or [split for split in SPLITS if is_given(item_file(folder, split))]
    if not splits:
        raise missing(folder, f"no item_train_info.jsonl, item_valid_info.jsonl or item_test_info.jsonl; {ADVICE}")
    items: dict[str, Item] = {}
    pairs: list[Pair] = []
    for split in dict.fromkeys(splits):
        info, pair = item_file(folder, split), pair_file(folder, split)
        found = read_items(info, ADVICE)
        if is_given(pair):
            new = read_pairs(pair, found, "optional", info, ADVICE)
            pairs += [pair for pair in new if pair.label is not None]
        items = found | items  # of an item that several splits have, the first one's line counts
    if not items:
        raise UserError(f"{folder}: no items in {', '.join(splits)}; {ADVICE}")
    return items, pairs


def count_attributes(items: Iterable[Item], style: AttributeStyle) -> Counts:
    """Each key and each value of it once an item."""
    counts = Counts()
    for item in items:
        counts.num_items += 1
        for key, values in attributes_of(item, style).items():
            counts.keys[key] += 1
            counts.values.update((key, value) for value in values)
    return counts


def top_keys(counts: Counts, number: int) -> list[str]:
    """The commonest keys, those of as many items by name."""
    return heapq.nsmallest(number, counts.keys, key=lambda key: (-counts.keys[key], key))


def commonest_values(counts: Counts, keys: Sequence[str]) -> dict[str, tuple[int, list[tuple[str, int]]]]:
    """Of each key the number of distinct values and the commonest of them with their items."""
    by_key: dict[str, list[tuple[int, str]]] = {key: [] for key in keys}
    for (key, value), number in counts.values.items():
        if key in by_key:
            by_key[key].append((-number, value))
    return {
        key: (len(values), [(value, -number) for number, value in heapq.nsmallest(NUM_COMMONEST, values)])
        for key, values in by_key.items()
    }


def count_agreement(
    items: Mapping[str, Item], pairs: Iterable[Pair], keys: Sequence[str], style: AttributeStyle
) -> dict[tuple[str, int], Agreement]:
    """By key and label, over the pairs in which both sides have the key. Agreeing is sharing a value.

    A key is useful when the same product's listings agree on it and different products' do not.
    """
    known: dict[str, dict[str, list[str]]] = {}

    def values_of(item_id: str) -> dict[str, list[str]]:
        if item_id not in known:
            attributes = attributes_of(items[item_id], style)
            known[item_id] = {key: attributes[key] for key in keys if key in attributes}
        return known[item_id]

    found: dict[tuple[str, int], Agreement] = defaultdict(Agreement)
    for pair in pairs:
        left, right = values_of(pair.left), values_of(pair.right)
        for key in left.keys() & right.keys():
            agreement = found[key, pair.label or 0]
            agreement.num_pairs += 1
            agreement.num_agreeing += not set(left[key]).isdisjoint(right[key])
    return found


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with straight columns on a terminal, where a Chinese character is two columns wide."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blanks = " " * (width - cell_len(cell))
            cells.append(cell + blanks if number in LEFT_ALIGNED else blanks + cell)
        lines.append("  ".join(cells).rstrip())
    return lines


def attributes(folder: Path, splits: Sequence[str] | None, top: int, style: AttributeStyle) -> str:
    """The table and the closing lines. Raises UserError when there is nothing to count."""
    items, pairs = read_catalogue(folder, splits or ())
    counts = count_attributes(tqdm(items.values(), desc="items", unit="item", disable=None), style)
    keys = top_keys(counts, top)
    commonest = commonest_values(counts, keys)
    agreement = count_agreement(items, tqdm(pairs, desc="pairs", unit="pair", disable=None), keys, style)
    default = {normalise(key) for key in TEN_KEYS}
    rows: list[Sequence[str]] = [HEADER]
    for key in keys:
        num_values, values = commonest[key]
        rows.append(
            (
                "*" if key in default else "",
                clip(key, KEY_LENGTH),
                f"{counts.keys[key]:,}",
                f"{counts.keys[key] / counts.num_items:.1%}",
                f"{num_values:,}",
                str(agreement.get((key, 1), Agreement())),
                str(agreement.get((key, 0), Agreement())),
                ", ".join(f"{clip(value, VALUE_LENGTH)} {number:,}" for value, number in values),
            )
        )
    num_same = sum(pair.label == 1 for pair in pairs)
    labelled = f"{num_same:,} labelled pairs the same product, {len(pairs) - num_same:,} different"
    return "\n".join(
        [
            *align(rows),
            f"{len(keys):,} of {len(counts.keys):,} keys of {counts.num_items:,} items; {labelled}",
            "* in the default ten; agree: of the pairs whose two sides have the key, those that share a value of it",
            *coverage_lines(items.values(), TEN_KEYS, style, DEFAULT_KEYS)[1:],
            "next: set model.attribute_keys in a preset",
        ]
    )
