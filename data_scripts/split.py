"""Make item-disjoint train and validation pairs: connected components of items go to one side whole.

./entrypoint.sh split --data data --ratio 5.6 --seed 0
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tongkuan.base.errors import UserError, entrypoint, missing
from tongkuan.base.files import check_writable, publish
from tongkuan.records.items import (
    HANDED_OUT,
    Item,
    Pair,
    components,
    info_row,
    item_file,
    pair_file,
    pair_row,
    read_item_rows,
    read_items,
    read_pairs,
)
from tongkuan.records.labels import contradictory, only_label, pair_key
from tongkuan.records.rows import is_given

SIDES = ("train", "valid")
ADVICE = "run ./entrypoint.sh resize first, or ./entrypoint.sh demo"


@dataclass(slots=True)
class HandedOut:
    """Items and pairs of train and valid together; where both have an item, train's line counts."""

    items: dict[str, Item] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # raw item lines by id
    pairs: list[Pair] = field(default_factory=list)
    num_differing: int = 0  # items that train and valid describe differently


@dataclass(slots=True)
class Cleaned:
    """Distinct labelled pairs in canonical order, and what was left out on the way."""

    pairs: list[Pair]
    contradictions: list[tuple[str, str]]
    num_repeated: int
    num_unlabelled: int


def ends(pairs: Iterable[Pair]) -> list[str]:
    """Ids of all items in `pairs`, sorted."""
    return sorted({item_id for pair in pairs for item_id in (pair.left, pair.right)})


def count_positives(pairs: Iterable[Pair]) -> int:
    return sum(pair.label == 1 for pair in pairs)


def read_handed_out(folder: Path) -> HandedOut:
    """What `resize` published of train and valid. Raises UserError when it has neither."""
    handed = HandedOut()
    for side in SIDES:
        info = item_file(folder, side)
        if not is_given(info):
            continue
        items: dict[str, Item] = {}
        rows: dict[str, dict[str, Any]] = {}
        for item, row in read_item_rows(info, ADVICE):
            items[item.item_id] = item
            rows.setdefault(item.item_id, row)
        handed.pairs += read_pairs(pair_file(folder, side), items, "optional", info, ADVICE)
        handed.num_differing += sum(handed.items.get(item_id, item) != item for item_id, item in items.items())
        handed.items = items | handed.items
        handed.rows = rows | handed.rows
    if not handed.pairs:
        raise missing(folder, f"no item_train_info.jsonl or item_valid_info.jsonl to split; {ADVICE}")
    return handed


def clean(pairs: Sequence[Pair]) -> Cleaned:
    """Each labelled pair once, whichever way round it stands.

    Left out as contradictions: pairs labelled both ways, and items labelled different from themselves.

    Sorted, so that nothing that follows depends on the order of the files.
    """
    labelled: dict[tuple[str, str], set[Pair]] = defaultdict(set)
    num_repeated, num_unlabelled = 0, 0
    for pair in pairs:
        if pair.label is None:
            num_unlabelled += 1
            continue
        versions = labelled[pair_key(pair)]
        num_repeated += any(version.label == pair.label for version in versions)
        versions.add(pair)
    contradictions = sorted({pair_key(pairs[index]) for index in contradictory(pairs)})
    for key in contradictions:
        del labelled[key]
    # Of a pair written both ways round, the way that sorts first stays.
    kept = [min(labelled[key], key=lambda pair: (pair.left, pair.right)) for key in sorted(labelled)]
    return Cleaned(kept, contradictions, num_repeated, num_unlabelled)


def find_components(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs grouped so that no item is in two groups; groups in the order of their first pair."""
    return [[pairs[index] for index in group] for group in components(pairs)]


def assign(components: Sequence[list[Pair]], ratio: float, seed: int) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """(train, valid) components: pairs as near `ratio` : 1 as whole components allow, positives likewise.

    Large components first, equal ones in an order that the seed decides; each goes where positives and negatives so
    far come out nearest to their shares. So every size is split in proportion, and the single pairs, which come
    last, even out what the large ones left. Neither side stays empty when there are two components.
    """

    def order(component: list[Pair]) -> tuple[int, bytes]:
        # A hash rather than a shuffle: the same in every Python, and other components do not move this one.
        return -len(component), hashlib.sha256(f"{seed}:{ends(component)[0]}".encode()).digest()

    train: list[list[Pair]] = []
    valid: list[list[Pair]] = []
    share = 1 / (1 + ratio)  # of validation
    excess = [0.0, 0.0]  # positives and negatives that validation has beyond its share so far
    for component in sorted(components, key=order):
        positives = count_positives(component)
        sizes = (positives, len(component) - positives)
        if_train = [had - share * size for had, size in zip(excess, sizes, strict=True)]
        if_valid = [had + size for had, size in zip(if_train, sizes, strict=True)]
        to_valid = math.hypot(*if_valid) < math.hypot(*if_train)
        (valid if to_valid else train).append(component)
        excess = if_valid if to_valid else if_train
    for empty, full in ((valid, train), (train, valid)):
        if not empty and len(full) > 1:
            empty.append(full.pop())
    return train, valid


def describe(side: Sequence[list[Pair]]) -> dict[str, Any]:
    """A side's numbers for the report."""
    pairs = [pair for component in side for pair in component]
    positives = count_positives(pairs)
    return {
        "pairs": len(pairs),
        "items": len(ends(pairs)),
        "components": len(side),
        "positives": positives,
        "positive_share": round(positives / len(pairs), 6),
    }


def write_side(data_dir: Path, side: str, pairs: Sequence[Pair], handed: HandedOut) -> None:
    """Publish a side's items and pairs, both sorted by id."""
    with publish(item_file(data_dir, side)) as file:
        for item_id in ends(pairs):
            file.write(info_row(handed.rows[item_id], handed.items[item_id].image_name))
    with publish(pair_file(data_dir, side)) as file:
        file.writelines(map(pair_row, pairs))


def split(data_dir: Path, ratio: float, seed: int) -> str:
    """Split train and valid in `data_dir` and return the closing lines. Raises UserError before anything is changed."""
    handed = read_handed_out(data_dir / HANDED_OUT)
    check_writable(data_dir)
    cleaned = clean(handed.pairs)
    components = find_components(cleaned.pairs)
    if not components:
        raise UserError(
            f"{data_dir / HANDED_OUT}: no usable pair ({left_out(cleaned)}), so no item-disjoint validation is "
            "possible; add pairs of two items labelled 0 or 1"
        )
    if len(components) < 2:
        raise UserError(
            f"{data_dir / HANDED_OUT}: {len(cleaned.pairs):,} usable pairs hang together in {len(components)} "
            "component(s), so no item-disjoint validation is possible; add labelled pairs of other items, or train "
            "with the pairs as handed out"
        )
    sides = dict(zip(SIDES, assign(components, ratio, seed), strict=True))
    pairs = {side: sorted((pair for group in sides[side] for pair in group), key=pair_key) for side in SIDES}
    test_path = item_file(data_dir, "test")
    test_items = set(read_items(test_path, ADVICE)) if is_given(test_path) else set()
    largest = max(components, key=len)
    report = {
        "seed": seed,
        "ratio_asked": ratio,
        "ratio_reached": round(len(pairs["train"]) / len(pairs["valid"]), 6),
        **{side: describe(sides[side]) for side in SIDES},
        "largest_component": {
            "pairs": len(largest),
            "share_of_pairs": round(len(largest) / len(cleaned.pairs), 6),
            "side": next(side for side in SIDES if any(group is largest for group in sides[side])),
        },
        "items_also_in_test": {side: len(test_items.intersection(ends(pairs[side]))) for side in SIDES},
        "items_told_differently": handed.num_differing,
        "pairs_unlabelled": cleaned.num_unlabelled,
        "pairs_repeated": cleaned.num_repeated,
        "pairs_contradictory": cleaned.contradictions,
    }
    report_path = data_dir / "split.json"
    report_path.unlink(missing_ok=True)  # where it is, the four files fit together
    for side in SIDES:
        write_side(data_dir, side, pairs[side], handed)
    with publish(report_path) as file:
        file.write(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    notes = [note for side in SIDES if (note := label_note(side, pairs[side], components))]
    return summary(report, data_dir, left_out(cleaned), notes)


def left_out(cleaned: Cleaned) -> str:
    """Counts of what was left out."""
    alone = sum(left == right for left, right in cleaned.contradictions)
    itself = f", {alone:,} of an item labelled different from itself" if alone else ""
    return (
        f"{cleaned.num_unlabelled:,} unlabelled, {cleaned.num_repeated:,} repeated, "
        f"{len(cleaned.contradictions) - alone:,} labelled both ways{itself}"
    )


def label_note(side: str, pairs: Sequence[Pair], components: Sequence[list[Pair]]) -> str:
    """A line on a side whose pairs all have one label, and why the other label did not come there; or nothing."""
    if (label := only_label(pairs)) is None:
        return ""
    other = 1 - label
    holders = sum(any(pair.label == other for pair in component) for component in components)
    what = {"train": "nothing can be learned from it", "valid": "no threshold can be chosen there"}[side]
    advice = {
        0: f"add pairs of label {other}",
        1: f"those of label {other} hang together through common items, uncut; add such pairs of other items",
    }.get(holders, "name another --ratio, nearer to 1, or another --seed")
    return f"note: {side} has only pairs of label {label}: {what}; {advice}"


def summary(report: dict[str, Any], data_dir: Path, left_out: str, notes: Sequence[str]) -> str:
    """What was made, what a user should know of it, and what to type next."""
    lines = [
        f"{side}: {report[side]['pairs']:,} pairs of {report[side]['items']:,} items in "
        f"{report[side]['components']:,} components, {report[side]['positive_share']:.1%} the same product"
        for side in SIDES
    ]
    lines += [f"left out: {left_out} (see {data_dir / 'split.json'})", *notes]
    largest = report["largest_component"]
    if largest["share_of_pairs"] > 0.5:
        lines.append(
            f"note: one component holds {largest['share_of_pairs']:.0%} of the pairs; "
            f"it went to {largest['side']} whole"
        )
    asked, reached = report["ratio_asked"], report["ratio_reached"]
    if not 0.9 < reached / asked < 1.1:
        lines.append(f"note: {reached:.3g} pairs of train to one of valid, not {asked:g}: components are not cut")
    if also := sum(report["items_also_in_test"].values()):
        lines.append(f"note: {also:,} items also occur in test")
    lines.append(f"next: {entrypoint('train', '--data', data_dir)}")
    return "\n".join(lines)
