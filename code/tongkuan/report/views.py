"""What the page shows of items and pairs: texts clipped, attributes by key, groups, and small pictures."""

import base64
import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tongkuan.records.attributes import TEN_KEYS, AttributeStyle, attributes_of, normalise
from tongkuan.records.items import Item, Pair
from tongkuan.records.pictures import UnreadableError, open_picture, read_file
from tongkuan.report.result import Result

MAX_PICTURED = 200  # pairs
PICTURE_SIDE = 176  # pixels
JPEG_QUALITY = 75
# Longer texts are a mistake or an attack; either way nobody reads on.
MAX_TITLE, MAX_VALUE, MAX_KEYS = 500, 200, 60
MAX_CATEGORIES = 40
PRESENCE = ("both, a value in common", "both, none in common", "one side only", "neither side")
PICTURES = ("both pictures", "one picture", "no picture")
NAMED, NONE_NAMED, NO_FILE, DAMAGED = range(4)  # what is known of an item's picture


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters; an ellipsis says that there were more. Lone surrogates cannot be written."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def joined_attributes(item: Item, style: AttributeStyle) -> dict[str, str]:
    """Values by key, as the page shows them."""
    kept = list(attributes_of(item, style).items())[:MAX_KEYS]
    return {clipped(key, MAX_VALUE): clipped(", ".join(values), MAX_VALUE) for key, values in kept}


class Pictures:
    """The pictures of a data folder as data URIs; a name that leads out of the folder counts as no file."""

    def __init__(self, data_dir: Path, damaged: Iterable[str] = ()) -> None:
        self.folder = data_dir / "images"
        self.damaged = set(damaged)
        self._paths: dict[str, Path | None] = {}

    def path(self, name: str) -> Path | None:
        """Where a picture lies, None when it does not."""
        if name not in self._paths:
            self._paths[name] = self._find(name)
        return self._paths[name]

    def _find(self, name: str) -> Path | None:
        inside = posixpath.normpath(name)
        if not name or "\0" in name or inside.startswith(("/", "..")):
            return None
        path = self.folder / inside
        try:
            return path if path.is_file() else None
        except OSError:  # a name longer than files may have
            return None

    def state(self, name: str) -> int:
        """One of NAMED, NONE_NAMED, NO_FILE and DAMAGED, without opening the file."""
        if not name:
            return NONE_NAMED
        if name in self.damaged:
            return DAMAGED
        return NAMED if self.path(name) else NO_FILE

    def encoded(self, name: str) -> str:
        """A small JPEG in base64; empty when there is none, and `damaged` knows those that cannot be read."""
        path = self.path(name)
        if path is None:
            return ""
        try:
            small = open_picture(read_file(path), PICTURE_SIDE).image
        except UnreadableError:
            self.damaged.add(name)
            return ""
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True, slots=True)
class Group:
    """A table of the page: what pairs are told apart by, the names of its rows and each pair's row, (N,)."""

    name: str
    rows: list[str]
    codes: NDArray[np.uint8]


def category_group(pairs: Sequence[Pair], items: Mapping[str, Item]) -> Group:
    """Pairs by their category, the commonest first; rare ones together."""
    names = []
    for pair in pairs:
        left, right = items[pair.left].category, items[pair.right].category
        names.append((left or "no category named") if left == right else "two categories")
    commonest = sorted(Counter(names).items(), key=lambda entry: (-entry[1], entry[0]))
    shown = {name: number for number, (name, _) in enumerate(commonest[:MAX_CATEGORIES])}
    rows = [clipped(name, MAX_VALUE) for name in shown]
    if rest := len(commonest) - len(shown):
        rows.append(f"{rest} further categories")
    codes = [shown.get(name, len(shown)) for name in names]
    return Group("category", rows, np.array(codes, dtype=np.uint8))


def presence_groups(
    pairs: Sequence[Pair], items: Mapping[str, Item], pictures: Pictures, keys: Sequence[str], style: AttributeStyle
) -> list[Group]:
    """Pairs by which pictures there are, and for each attribute key by which side has it and whether they agree."""
    lacks = {item_id: pictures.state(item.image_name) != NAMED for item_id, item in items.items()}
    lacking = np.array([lacks[pair.left] + lacks[pair.right] for pair in pairs], dtype=np.uint8)
    groups = [Group("picture", list(PICTURES), lacking)]
    known = {item_id: attributes_of(item, style) for item_id, item in items.items()}
    for key in keys:
        values = {item_id: set(attributes.get(key, ())) for item_id, attributes in known.items()}
        codes = np.empty(len(pairs), dtype=np.uint8)
        for number, pair in enumerate(pairs):
            left, right = values[pair.left], values[pair.right]
            has_both, has_one = bool(left and right), bool(left or right)
            codes[number] = (0 if left & right else 1) if has_both else 2 if has_one else 3
        groups.append(Group(clipped(key, MAX_VALUE), list(PRESENCE), codes))
    return groups


def attribute_keys(items: Mapping[str, Item], model_keys: object, style: AttributeStyle) -> list[str]:
    """The keys that the model reads as far as items have them; without a model, the commonest of the items."""
    counts = Counter(key for item in items.values() for key in attributes_of(item, style))
    if isinstance(model_keys, list):
        return [key for key in map(normalise, map(str, model_keys)) if counts[key]]
    commonest = sorted(counts, key=lambda key: (-counts[key], key))
    return commonest[: len(TEN_KEYS)]


def worth_seeing(result: Result, lacking: NDArray[np.bool_], changed: NDArray[np.bool_] | None) -> list[int]:
    """Numbers of the pairs to picture, best first, at most MAX_PICTURED: a share for each list of the page.

    The surest mistakes are the same whatever the threshold: the highest scores of different pairs and the lowest of
    same ones.
    """
    margins, labels = result.margins, result.labels
    nearest = np.argsort(np.abs(margins), kind="stable")
    trained = np.argsort(np.abs(result.scores), kind="stable")[: MAX_PICTURED // 10]
    lists: list[Iterable[Any]] = [
        np.flatnonzero(labels == 0),
        np.flatnonzero(labels == 1)[::-1],
        nearest[: MAX_PICTURED // 5],
        trained,
        np.flatnonzero(lacking),
        [] if changed is None else nearest[changed[nearest]],
        range(len(labels)),
    ]
    return list(dict.fromkeys(first_of_each(lists)))[:MAX_PICTURED]


def first_of_each(lists: Iterable[Iterable[Any]]) -> Iterator[int]:
    """The first of each list, then the second of each, until all are empty."""
    return (int(number) for number in chain.from_iterable(zip_longest(*lists)) if number is not None)


def item_views(
    items: Mapping[str, Item], pictures: Pictures, style: AttributeStyle
) -> list[tuple[str, str, str, dict[str, str], str, int]]:
    """(id, title, category, attributes, picture's name, picture's state) of each item."""
    return [
        (
            clipped(item.item_id, MAX_VALUE),
            clipped(item.title, MAX_TITLE),
            clipped(item.category, MAX_VALUE),
            joined_attributes(item, style),
            clipped(item.image_name, MAX_VALUE),
            pictures.state(item.image_name),
        )
        for item in items.values()
    ]
