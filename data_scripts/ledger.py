"""Every picture of a set: its output name, its fate, and the items that it belongs to."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
from names import fold, path_tails, safe_name
from sources import Source
from tqdm import tqdm

from tongkuan.files import publish
from tongkuan.pictures import UnreadableError
from tongkuan.records import Item, Pair

STATUSES = ("ok", "repaired", "unreadable", "missing", "duplicate")
SPLITS = ("train", "valid", "test")


@dataclass(eq=False, slots=True)
class Picture:
    """A picture file and its ledger row; `key` is what its split's source reads it by."""

    split: str
    path: str
    key: Any
    image: str = ""
    status: str = "ok"
    detail: str = ""
    width: int = 0
    height: int = 0
    twin: "Picture | None" = None  # an earlier one of the same bytes and name
    is_named: bool = False  # by an item

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def row(self) -> dict[str, Any]:
        fields = ("image", "detail", "width", "height")
        return {"split": self.split, "name": self.name, "status": self.status} | {f: getattr(self, f) for f in fields}


def list_pictures(sources: dict[str, Source]) -> list[Picture]:
    """Every picture file, by split, name and path."""
    pictures = [
        Picture(split, next(iter(path_tails(path)), "_"), key)
        for split, source in sources.items()
        for path, key in source.entries()
    ]
    return sorted(pictures, key=lambda picture: (SPLITS.index(picture.split), picture.name, picture.path))


def assign_names(pictures: list[Picture], sources: dict[str, Source]) -> None:
    """Give each picture an output name of its own, or the earlier picture of the same name and bytes as its twin.

    Only pictures whose names meet are read here; the order of `pictures` decides who keeps the plain name.
    """
    wanted: dict[str, list[Picture]] = {}
    taken: dict[str, Picture] = {}
    digests: dict[Picture, str] = {}

    def digest(picture: Picture) -> str:
        if picture not in digests:
            try:
                data = sources[picture.split].read(picture.key)
                digests[picture] = hashlib.sha256(data).hexdigest()
            except UnreadableError:
                digests[picture] = f"{picture.split}/{picture.path}"  # like no other
        return digests[picture]

    for picture in tqdm(pictures, desc="names", unit=" pictures", disable=None):
        picture.image = safe_name(picture.name)
        rivals = wanted.setdefault(fold(picture.image), [])
        twin = next((rival for rival in rivals if digest(rival) == digest(picture)), None)
        if twin:
            picture.twin = twin
            picture.status, picture.detail = "duplicate", f"the same bytes as {twin.split}/{twin.path}"
            continue
        rivals.append(picture)
        if holder := taken.get(fold(picture.image)):
            picture.status, picture.detail = "duplicate", f"other bytes than {holder.split}/{holder.path}"
            tails = (f"~{number}" for number in itertools.count(2))
            picture.image = next(name for t in tails if fold(name := safe_name(picture.name, t)) not in taken)
        taken[fold(picture.image)] = picture


class Index:
    """Pictures of a split by every tail of their path (`a/b.jpg`, `b.jpg`), with and without the suffix."""

    def __init__(self, pictures: Iterable[Picture]) -> None:
        self.names: dict[str, Picture] = {}
        self.stems: dict[str, Picture] = {}
        for picture in pictures:
            for tail in path_tails(picture.path):
                self.names.setdefault(tail, picture)
                self.stems.setdefault(str(PurePosixPath(tail).with_suffix("")), picture)

    def by_name(self, name: str) -> Picture | None:
        """The picture of that name; the longest part of a path that fits decides."""
        return next((self.names[tail] for tail in path_tails(name) if tail in self.names), None)

    def by_stem(self, name: str) -> Picture | None:
        """As `by_name`, with the suffix left out on both sides."""
        stems = (str(PurePosixPath(tail).with_suffix("")) for tail in path_tails(name))
        return next((self.stems[stem] for stem in stems if stem in self.stems), None)


def resolve(name: str, split: str, indexes: dict[str, Index]) -> Picture | None:
    """Which picture an item's name means: name, then stem in its own split, then name, then stem in the others."""
    others = [index for other, index in indexes.items() if other != split]
    for group in ([indexes[split]], others):
        for look_up in (Index.by_name, Index.by_stem):
            for index in group:
                if picture := look_up(index, name):
                    return picture
    return None


@dataclass(frozen=True, slots=True)
class Records:
    """A split's lines as handed out: items by id, their raw rows, pairs with or without labels."""

    items: dict[str, Item]
    rows: list[dict[str, Any]]
    pairs: list[Pair]


def link_pictures(records: dict[str, Records], pictures: list[Picture]) -> dict[str, dict[str, str]]:
    """Output name or "" by split and item id. Marks the pictures that items name, adds a row for each missing one."""
    found = {split: Index(p for p in pictures if p.split == split and p.image) for split in SPLITS}
    unreadable = {split: Index(p for p in pictures if p.split == split and not p.image) for split in SPLITS}
    missing: dict[tuple[str, str], Picture] = {}
    images: dict[str, dict[str, str]] = {}
    for split, record in records.items():
        images[split] = {}
        for item in record.items.values():
            name = item.image_name
            # A readable picture elsewhere goes before an unreadable one of the split's own.
            picture = (resolve(name, split, found) or resolve(name, split, unreadable)) if name else None
            if name and picture is None:
                detail = f"no such file; named by item {item.item_id}"
                picture = missing.setdefault((split, name), Picture(split, name, None, "", "missing", detail))
            if picture:
                picture.is_named = True
            images[split][item.item_id] = picture.image if picture else ""
    pictures.extend(missing.values())
    return images


def write_ledger(path: Path, pictures: list[Picture]) -> None:
    """Publish one row a picture, by split and name. Last of all: a data folder with a ledger is whole."""
    with publish(path) as file:
        for picture in sorted(pictures, key=lambda picture: (picture.split, picture.name, picture.path)):
            file.write(orjson.dumps(picture.row()) + b"\n")
