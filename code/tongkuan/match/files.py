"""The files of a matched catalogue: Parquet, each whole or not at all, each with the sum of what it was made of.

A file whose sum is the wanted one is taken as it stands, so that the same command goes on where it was killed; one
that is damaged or was made of something else is made anew.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tongkuan.base.errors import FailureError
from tongkuan.base.files import publish

MADE_OF = b"tongkuan.made_of"
ABOUT = b"tongkuan.about"
LEVEL = 3  # of zstd


def sum_of(*facts: Any) -> str:
    """Hex SHA-256 of facts that JSON can say."""
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a catalogue's files lie: FOLDER/KIND/part-NNNNNN.parquet, groups.parquet, report.html and manifest.json."""

    path: Path

    def part(self, kind: str, number: int) -> Path:
        """A partition's file."""
        return self.path / kind / f"part-{number:06}.parquet"

    @property
    def groups(self) -> Path:
        """The group of each listing."""
        return self.path / "groups.parquet"

    @property
    def page(self) -> Path:
        """What a reader looks at."""
        return self.path / "report.html"

    @property
    def manifest(self) -> Path:
        """What made all this; written last."""
        return self.path / "manifest.json"

    def drop_parts(self, kind: str, count: int) -> None:
        """Delete the partitions from `count` on that another run has left."""
        wanted = {self.part(kind, number) for number in range(count)}
        for path in (self.path / kind).glob("part-*.parquet"):
            if path not in wanted:
                path.unlink()


def made_table(path: Path, made_of: str) -> pa.Table:
    """The table of a file that has just been written or found."""
    if (table := read_table(path, made_of)) is None:
        raise FailureError(f"{path}: reads back otherwise than it was written; check the disk and run it again")
    return table


def write_table(path: Path, columns: Mapping[str, Any], made_of: str, about: Mapping[str, Any] | None = None) -> None:
    """Publish columns; `about` is what else there is to say of them."""
    table = pa.table(dict(columns))
    facts = {MADE_OF: made_of.encode(), ABOUT: orjson.dumps(about or {}, option=orjson.OPT_SORT_KEYS)}
    # Embeddings hardly repeat: a dictionary of them would be as large again.
    repeated = [name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)]
    with publish(path) as file:
        pq.write_table(
            table.replace_schema_metadata(facts),
            file,
            compression="zstd",
            compression_level=LEVEL,
            use_dictionary=repeated,
            write_page_checksum=True,
        )


def read_table(path: Path, made_of: str) -> pa.Table | None:
    """The table of a whole file that was made of this, else None."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if (file.schema_arrow.metadata or {}).get(MADE_OF) != made_of.encode():
                return None
            return file.read()
    except (OSError, pa.ArrowException):
        return None


def about(path: Path) -> dict[str, Any]:
    """What a file says beside its columns."""
    found: dict[str, Any] = orjson.loads(pq.read_schema(path).metadata[ABOUT])
    return found


def matrix(rows: NDArray[Any]) -> pa.FixedSizeListArray:
    """A column of rows of equal length (N, W)."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])


def rows_of(column: pa.ChunkedArray) -> NDArray[Any]:
    """The array (N, W) that `matrix` made a column of."""
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    joined: NDArray[Any] = np.concatenate([np.empty(0, column.type.value_type.to_pandas_dtype()), *parts])
    return joined.reshape(-1, width)
