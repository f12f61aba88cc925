"""Every picture of a set: its output name, its fate, and its row in the ledger."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
from tqdm import tqdm

from data_scripts.archives.sources import Source
from data_scripts.linking.names import fold, path_steps, safe_name
from tongkuan.base.files import publish
from tongkuan.records.items import SPLITS
from tongkuan.records.pictures import UnreadableError

STATUSES = ("ok", "repaired", "unreadable", "missing", "duplicate", "ambiguous")


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
    cause: str = ""  # why it is unreadable
    twin: "Picture | None" = None  # an earlier one of the same bytes and name
    is_named: bool = False  # by an item

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def row(self) -> dict[str, Any]:
        fields = ("image", "detail", "width", "height")
        return {"split": self.split, "name": self.name, "status": self.status} | {f: getattr(self, f) for f in fields}

    def add_detail(self, text: str) -> None:
        self.detail = "; ".join(part for part in (self.detail, text) if part)


class Digests:
    """SHA-256 of pictures' bytes, each read once at most."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self.sources = sources
        self._known: dict[Picture, str] = {}

    def of(self, picture: Picture) -> str:
        """Hex; for a picture whose bytes cannot be had, a text like no other."""
        if picture not in self._known:
            try:
                data = self.sources[picture.split].read(picture.key)
                self._known[picture] = hashlib.sha256(data).hexdigest()
            except UnreadableError:
                self._known[picture] = f"{picture.split}/{picture.path}"
        return self._known[picture]


def list_pictures(sources: dict[str, Source]) -> list[Picture]:
    """Every picture file, by split, name and path."""
    pictures = [
        Picture(split, "/".join(path_steps(path)) or "_", key)
        for split, source in sources.items()
        for path, key in source.entries()
    ]
    return sorted(pictures, key=lambda picture: (SPLITS.index(picture.split), picture.name, picture.path))


def assign_names(pictures: list[Picture], digests: Digests) -> None:
    """Give each picture an output name of its own, or the earlier picture of the same name and bytes as its twin.

    Only pictures whose names meet are read here; the order of `pictures` decides who keeps the plain name.
    """
    firsts: dict[str, Picture] = {}  # of a name; unread until a second comes
    seen: dict[tuple[str, str], Picture] = {}  # by name and bytes
    taken: dict[str, Picture] = {}
    numbers: dict[str, int] = {}  # where to go on counting, so that a name of 100,000 pictures costs no 100,000 squared
    for picture in tqdm(pictures, desc="names", unit=" pictures", disable=None):
        picture.image = safe_name(picture.name)
        wanted = fold(picture.image)
        first = firsts.setdefault(wanted, picture)
        if first is not picture:
            seen.setdefault((wanted, digests.of(first)), first)
            twin = seen.setdefault((wanted, digests.of(picture)), picture)
            if twin is not picture:
                picture.twin = twin
                picture.status, picture.detail = "duplicate", f"the same bytes as {twin.split}/{twin.path}"
                continue
        if holder := taken.get(wanted):
            picture.status, picture.detail = "duplicate", f"other bytes than {holder.split}/{holder.path}"
            # The same for pictures whose numbered names are the same: all numbers below are taken for good.
            counted = fold(safe_name(picture.name, "~0000000"))
            for number in itertools.count(numbers.get(counted, 2)):
                picture.image = safe_name(picture.name, f"~{number}")
                if fold(picture.image) not in taken:
                    numbers[counted] = number + 1
                    break
        taken[fold(picture.image)] = picture


def write_ledger(path: Path, pictures: Iterable[Picture]) -> None:
    """Publish one row a picture, by split and name. Last of all: a data folder with a ledger is whole."""
    with publish(path) as file:
        for picture in sorted(pictures, key=lambda picture: (picture.split, picture.name, picture.path)):
            file.write(orjson.dumps(picture.row()) + b"\n")
