"""Problems in the data that the page lists: contradictory labels, pictures in both train and validation."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from tongkuan.base.machine import available_cores
from tongkuan.records.items import Item, Pair, components, item_file, pair_file, read_items, read_pairs
from tongkuan.records.pictures import UnreadableError, open_picture, read_file
from tongkuan.records.rows import is_given
from tongkuan.report.views import Pictures

SIDES = ("train", "valid")
THUMBNAIL = 8  # pixels a side
# Of 255, root mean square over a thumbnail. Halving a picture or storing it as a poor JPEG moved it by 3.4 at most (the
# sample's drawings of 96 pixels; photos of groceries by 1.2), and no two of 800 drawings were nearer than 7.1.
MAX_DISTANCE = 5.0
BLOCK = 512  # pictures compared at a time


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two items labelled different, and the same through pairs: `chain` has the item ids from one to the other.

    Of an item labelled different from itself, it has that one.
    """

    left: str
    right: str
    chain: tuple[str, ...]
    file: str


@dataclass(frozen=True, slots=True)
class Twin:
    """An item of train and one of validation with nearly the same picture; the distance is of 255."""

    train: Item
    valid: Item
    distance: float


def read_sides(data_dir: Path, pairs_path: Path, pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Labelled pairs by file name: the scored ones, and train's and validation's where they lie in the data folder."""
    found = {pairs_path.name: list(pairs)}
    for side in SIDES:
        path = pair_file(data_dir, side)
        if is_given(path) and path.name not in found:
            found[path.name] = [pair for pair in read_pairs(path, labels="optional") if pair.label is not None]
    return found


def contradictions(sides: Mapping[str, Sequence[Pair]]) -> list[Contradiction]:
    """Pairs labelled different whose items the "same" labels join, directly or through other items, or are one."""
    labelled = [(pair, name) for name, pairs in sides.items() for pair in pairs]
    same = [pair for pair, _ in labelled if pair.label == 1]
    group_of: dict[str, int] = {}
    neighbours: dict[str, set[str]] = {}
    for number, group in enumerate(components(same)):
        for index in group:
            left, right = same[index].left, same[index].right
            group_of[left] = group_of[right] = number
            neighbours.setdefault(left, set()).add(right)
            neighbours.setdefault(right, set()).add(left)
    found: dict[tuple[str, str], Contradiction] = {}
    for pair, name in labelled:
        left, right = sorted((pair.left, pair.right))
        is_joined = left == right or (left in group_of and group_of[left] == group_of.get(right))
        if pair.label == 0 and is_joined and (left, right) not in found:
            found[left, right] = Contradiction(left, right, shortest_way(left, right, neighbours), name)
    return sorted(found.values(), key=lambda problem: (len(problem.chain), problem.left, problem.right))


def shortest_way(start: str, end: str, neighbours: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Item ids from `start` to `end` over the fewest pairs; of equal ways, the same one every time."""
    before = {start: start}
    ring = [start] if start != end else []
    for item_id in ring:  # grows on the way: breadth first
        for other in sorted(neighbours[item_id]):
            if other not in before:
                before[other] = item_id
                ring.append(other)
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return tuple(reversed(way))


def thumbnail(path: Path) -> NDArray[np.float32] | None:
    """float32 (THUMBNAIL * THUMBNAIL * 3,), 0 to 255, None when the picture cannot be read."""
    try:
        image = open_picture(read_file(path), 8 * THUMBNAIL).image
    except UnreadableError:
        return None
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    return np.asarray(small, dtype=np.float32).reshape(-1)


def twins(data_dir: Path, pictures: Pictures) -> list[Twin] | None:
    """Near-duplicate pictures across train and validation, the nearest first; None when either has no item file.

    Every picture is decoded small, once; each of validation is compared with each of train by matrix product.
    """
    if not all(is_given(item_file(data_dir, side)) for side in SIDES):
        return None
    looks, owners = zip(*(looks_of(data_dir, side, pictures) for side in SIDES), strict=True)
    train, valid = looks
    found = []
    squares = (train**2).sum(axis=1)
    for start in range(0, len(valid), BLOCK):
        block = valid[start : start + BLOCK]
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, in float32 good to a fraction of a level squared: close enough to shortlist
        squared = squares + (block**2).sum(axis=1)[:, None] - 2 * block @ train.T  # (B, T)
        for row, column in np.argwhere(squared < train.shape[1] * (MAX_DISTANCE + 1) ** 2):
            distance = float(np.sqrt(np.mean((block[row] - train[column]) ** 2)))
            if distance <= MAX_DISTANCE:
                found.append(Twin(owners[0][column], owners[1][start + row], distance))
    return sorted(found, key=lambda twin: (twin.distance, twin.valid.item_id, twin.train.item_id))


def looks_of(data_dir: Path, side: str, pictures: Pictures) -> tuple[NDArray[np.float32], list[Item]]:
    """(thumbnails (P, T), the item that each was first seen with) of a side's readable pictures, each file once."""
    first_owner: dict[str, Item] = {}
    for item in read_items(item_file(data_dir, side)).values():
        first_owner.setdefault(item.image_name, item)
    named = [(path, item) for name, item in first_owner.items() if (path := pictures.path(name))]
    with ThreadPoolExecutor(available_cores()) as pool:
        found = list(
            tqdm(
                pool.map(thumbnail, (path for path, _ in named)),
                desc=f"pictures of {side}", unit="picture", total=len(named), disable=None,
            )
        )  # fmt: skip
    kept = [(look, item) for look, (_, item) in zip(found, named, strict=True) if look is not None]
    looks = np.array([look for look, _ in kept], dtype=np.float32).reshape(len(kept), 3 * THUMBNAIL**2)
    return looks, [item for _, item in kept]
