"""A matched catalogue as it stands: the manifest, and the listings with their embeddings and groups.

Nothing is locked for reading: what has been read is one state, if the manifest is the same before and after.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from tongkuan.base.errors import UserError
from tongkuan.encode.encode import Embeddings
from tongkuan.match import files
from tongkuan.match.candidates import Rows
from tongkuan.match.files import Folder
from tongkuan.match.join import PAIRS, Verdict
from tongkuan.match.options import Options
from tongkuan.match.scores import Numbers
from tongkuan.match.transaction import TOMBSTONES, last_change, read_manifest, staged

EMBEDDINGS = "embeddings"
TRIES = 5  # to read while changes take place


@dataclass(frozen=True, slots=True)
class State:
    """N listings in the order of their files, without those that tombstones name."""

    folder: Folder
    manifest: dict[str, Any]
    item_ids: list[str]
    categories: list[str]
    embeddings: Embeddings
    """(N, 2D)."""
    files: list[str]
    """Names of the files of embeddings."""
    file_of: Rows
    """(N,): the place in `files` of each listing's own."""
    groups: pa.Table
    """A row a listing in the same order."""
    tombstones: set[tuple[str, str]]
    """(file, item_id)."""

    @property
    def means(self) -> Numbers:
        """How dense it is about each listing, (N,)."""
        found: Numbers = self.groups["mean"].to_numpy()
        return found

    @property
    def verdict(self) -> Verdict:
        """When two listings match."""
        return Verdict(self.manifest["score_above"], float(self.manifest["threshold"]["value"]))

    @property
    def options(self) -> Options:
        """Of the full run."""
        return Options(**self.manifest["options"])

    @property
    def number(self) -> int:
        """Of the last change since the full run, 0 without one."""
        return last_change(self.manifest)

    def compared_within(self, categories: list[str]) -> list[str]:
        """What must be equal of two listings that are compared: their categories, or nothing."""
        return categories if self.options.within == "category" else [""] * len(categories)

    def pairs(self, name: str) -> pa.Table:
        """Pairs of one of `pair_files`."""
        return table_of(self.folder.path / name)

    @property
    def pair_files(self) -> list[str]:
        """Names of the files of pairs."""
        return named(self.manifest, PAIRS)


def named(manifest: dict[str, Any], kind: str) -> list[str]:
    """Files of a kind by name."""
    return sorted(name for name in manifest["files"] if name.startswith(f"{kind}/"))


def open_state(folder: Folder) -> State:
    """Read a catalogue. UserError when there is none, when a file is damaged or when it does not fit the others."""
    for _ in range(TRIES):
        manifest = read_manifest(folder)
        try:
            state = load(folder, manifest)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            if read_manifest(folder) == manifest:
                raise unfit(folder, f"{type(error).__name__}: {error}") from error
        else:
            if read_manifest(folder) == manifest:
                return state
    raise UserError(f"{folder.path}: changed all the time while it was read; wait for the end of what changes it")


def unfit(folder: Folder, what: str) -> UserError:
    """The error for files that are damaged or do not belong together."""
    return UserError(f"{folder.path}: not to be read ({what}); see ./entrypoint.sh match check, or match run again")


def table_of(path: Path) -> pa.Table:
    """The table of a whole file, else OSError or ArrowException."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read()


def standing_table(folder: Folder, manifest: dict[str, Any], name: str) -> pa.Table:
    """The table of a file of a standing name, which a killed change may have left elsewhere."""
    try:
        return table_of(staged(folder, name, last_change(manifest)))
    except FileNotFoundError:
        return table_of(folder.path / name)


def read_tombstones(folder: Folder, manifest: dict[str, Any]) -> set[tuple[str, str]]:
    """(file, item_id) of listings that were removed since the full run."""
    if TOMBSTONES not in manifest["files"]:
        return set()
    table = standing_table(folder, manifest, TOMBSTONES)
    return set(zip(table["file"].to_pylist(), table["item_id"].to_pylist(), strict=True))


def load(folder: Folder, manifest: dict[str, Any]) -> State:
    """All that State has. ValueError when counts or ids differ."""
    groups = standing_table(folder, manifest, folder.groups.name)
    tombstones = read_tombstones(folder, manifest)
    names = named(manifest, EMBEDDINGS)
    count = groups.num_rows
    embeddings: NDArray[np.float32] | None = None
    item_ids: list[str] = []
    categories: list[str] = []
    file_of = np.empty(count, np.int32)
    for number, name in enumerate(tqdm(names, desc="read", unit="part", disable=None)):
        table = table_of(folder.path / name)
        if dead := {item_id for file, item_id in tombstones if file == name}:
            table = table.filter(pa.array([item_id not in dead for item_id in table["item_id"].to_pylist()]))
        rows = slice(len(item_ids), len(item_ids) + table.num_rows)
        if rows.stop > count:
            raise ValueError(f"{folder.groups.name} has {count:,} listings, the embeddings more")
        found = files.rows_of(table["e"])
        if embeddings is None:
            embeddings = np.empty((count, found.shape[1]), np.float32)
        embeddings[rows], file_of[rows] = found, number
        item_ids += table["item_id"].to_pylist()
        categories += table["category"].to_pylist()
    if embeddings is None or item_ids != groups["item_id"].to_pylist():
        raise ValueError(f"{folder.groups.name} has other listings than the embeddings")
    return State(folder, manifest, item_ids, categories, embeddings, names, file_of, groups, tombstones)
