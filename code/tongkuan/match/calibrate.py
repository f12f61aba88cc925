"""What the threshold of a catalogue is chosen on: labelled groups of the split itself, else of valid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tongkuan.encode.encode import Embeddings
from tongkuan.learn.batches import products_of
from tongkuan.match.candidates import NEAREST, exact_neighbours, local_means
from tongkuan.match.scores import Catalogue, Numbers, exact_cosines, exact_scores
from tongkuan.match.threshold import REJECTED, Labelled
from tongkuan.records.items import Item, Pair, item_file, pair_file, read_items, read_pairs
from tongkuan.records.labels import pair_key
from tongkuan.records.rows import given, is_given

MOST_LABELLED = 2000  # listings: all their pairs are scored, and each is held against the whole catalogue


@dataclass(frozen=True, slots=True)
class LabelledItems:
    """Labelled listings of a split and their groups."""

    split: str
    items: dict[str, Item]
    """All of the split."""
    item_ids: list[str]
    groups: list[int]
    """Of each of them."""
    asked: set[tuple[str, str]]
    """Keys of the pairs that somebody has labelled."""


def labelled_items(data_dir: Path, split: str, items: dict[str, Item]) -> LabelledItems | None:
    """Of the split, else of valid; None when neither has a pair that is labelled the same product.

    At most MOST_LABELLED, the first ones of the file of pairs, and whole groups.
    """
    for name in dict.fromkeys((split, "valid")):
        if not is_given(pair_file(data_dir, name)) or not is_given(item_file(data_dir, name)):
            continue
        items_path = given(item_file(data_dir, name))
        own = items if name == split else read_items(items_path)
        pairs = read_pairs(given(pair_file(data_dir, name)), own, "optional", items_path)
        pairs = [pair for pair in pairs if pair.label is not None and pair.left != pair.right]
        if any(pair.label == 1 for pair in pairs):
            return chosen(name, own, pairs)
    return None


def chosen(split: str, items: dict[str, Item], pairs: Sequence[Pair]) -> LabelledItems:
    """The first groups, with no more than MOST_LABELLED listings; one that is larger by itself counts all the same."""
    groups = products_of(pairs)
    by_group: dict[int, list[str]] = {}
    for pair in pairs:
        for item_id in (pair.left, pair.right):
            by_group.setdefault(groups[item_id], []).append(item_id)
    item_ids: dict[str, None] = {}
    for members in by_group.values():
        new = dict.fromkeys(members)
        if item_ids and len(item_ids) + len(new) > MOST_LABELLED:
            break
        item_ids |= new
    asked = {pair_key(pair) for pair in pairs}
    return LabelledItems(split, items, list(item_ids), [groups[item_id] for item_id in item_ids], asked)


def means_among(catalogue: Catalogue, embeddings: Embeddings) -> Numbers:
    """How dense it is about listings that are not in the catalogue, but among it and each other: (M,)."""
    count = len(catalogue.embeddings)
    both = np.concatenate([catalogue.embeddings, embeddings])
    return local_means(exact_neighbours(both, np.arange(count, len(both), dtype=np.int32), NEAREST))


def labelled_pairs(items: LabelledItems, embeddings: Embeddings, means: Numbers, score_floor: float) -> Labelled:
    """All pairs of labelled listings, of their embeddings (M, 2D) and means (M,)."""
    count = len(items.item_ids)
    left, right = (side.astype(np.int32) for side in np.triu_indices(count, 1))
    scaled = 2 * exact_cosines(embeddings, left, right) - means[left] - means[right]
    scaled[exact_scores(embeddings, left, right) <= score_floor] = REJECTED
    groups = np.array(items.groups)
    place = {item_id: number for number, item_id in enumerate(items.item_ids)}
    asked = np.zeros((count, count), dtype=bool)
    for a, b in items.asked:
        if a in place and b in place:
            asked[place[a], place[b]] = asked[place[b], place[a]] = True
    same = (groups[left] == groups[right]).astype(np.int64)
    return Labelled(scaled, same, asked[left, right], count)


def rows_of(items: LabelledItems, item_ids: Sequence[str], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The catalogue's distinct row of each labelled listing; `numbers` (N,) are the rows of `item_ids`."""
    place = {item_id: number for number, item_id in enumerate(item_ids)}
    return numbers[[place[item_id] for item_id in items.item_ids]]
