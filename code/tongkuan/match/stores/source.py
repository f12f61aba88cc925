"""What a store is filled from: the Parquet files of a matched catalogue, without the listings that were removed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tongkuan.base.errors import UserError
from tongkuan.encode.encode import Embeddings
from tongkuan.match import files
from tongkuan.match.files import MADE_OF, Folder, sum_of
from tongkuan.match.transaction import read_manifest

ADVICE = "run ./entrypoint.sh match run"
COLUMNS = ("item_id", "category", "e")
READ = 10_000  # listings at once


@dataclass(frozen=True, slots=True)
class Batch:
    """N listings that follow each other."""

    ids: list[str]
    categories: list[str]
    embeddings: Embeddings
    """(N, W)."""


@dataclass(frozen=True, slots=True)
class Source:
    """The listings of a catalogue, in the order of its files."""

    model: str
    """Hex SHA-256 of the model file."""
    made_of: str
    """The same sum, the same listings in the same order."""
    width: int
    count: int
    parts: dict[Path, NDArray[np.int64]]
    """Files, and the rows of each that stand."""

    @classmethod
    def of(cls, folder: Folder) -> "Source":
        """Read all but the embeddings. UserError when it is no finished catalogue or its files do not fit."""
        model = read_manifest(folder)["sha256"]["model"]
        paths = sorted((folder.path / "embeddings").glob("part-*.parquet"))
        standing = set(read(folder.groups, ["item_id"])["item_id"].to_pylist())
        tables = [read(path, ["item_id"]) for path in paths]
        ids = [table["item_id"].to_pylist() for table in tables]
        # A listing that was changed stands in a later file once more.
        last = {item_id: number for number, own in enumerate(ids) for item_id in own if item_id in standing}
        if not last or len(last) < len(standing):
            raise UserError(f"{folder.groups}: names listings that have no embedding; {ADVICE} again")
        rows = [np.flatnonzero([last.get(item_id) == number for item_id in own]) for number, own in enumerate(ids)]
        sums = [table.schema.metadata[MADE_OF].decode() for table in tables]
        made_of = sum_of(model, sums, [own.tolist() for own in rows])
        return cls(model, made_of, width_of(paths[0]), len(last), dict(zip(paths, rows, strict=True)))

    def batches(self, size: int, skipped: int = 0) -> Iterator[Batch]:
        """All listings after the first `skipped`, `size` at once and fewer at the end of a file."""
        for path, rows in self.parts.items():
            own, skipped = rows[skipped:], max(0, skipped - len(rows))
            if not len(own):
                continue
            table = read(path, COLUMNS).take(pa.array(own))
            embeddings = files.rows_of(table["e"])
            ids, categories = table["item_id"].to_pylist(), table["category"].to_pylist()
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                yield Batch(ids[part], categories[part], embeddings[part])

    def sample(self, size: int) -> Embeddings:
        """Embeddings of some listings, evenly spread: float32 (n, W), n is at most `size`."""
        places = np.unique(np.linspace(0, self.count - 1, min(size, self.count), dtype=np.int64))
        found, start = [], 0
        for batch in self.batches(READ):
            stop = start + len(batch.ids)
            found.append(batch.embeddings[places[(places >= start) & (places < stop)] - start])
            start = stop
        return np.concatenate(found)


def read(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a file, each page held against its sum. UserError when it is damaged or none of ours."""
    with unfit_is_told(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        file.schema_arrow.metadata[MADE_OF]  # KeyError without
        return file.read(list(columns)).select(columns)


def width_of(path: Path) -> int:
    """How many numbers an embedding has in a file."""
    with unfit_is_told(path):
        return int(pq.read_schema(path).field("e").type.list_size)


@contextmanager
def unfit_is_told(path: Path) -> Iterator[None]:
    """UserError for what goes wrong with a file that is damaged, or has other columns."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, gone or not made by match run; {ADVICE} again") from error
