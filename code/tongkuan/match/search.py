"""Neighbours of all listings by partitions, exact or by an index, among all or within each category."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from tongkuan.base.files import sha256_of
from tongkuan.base.machine import available_cores
from tongkuan.encode.encode import Embeddings
from tongkuan.match import files
from tongkuan.match.candidates import (
    LISTS,
    NEAREST,
    Index,
    Neighbours,
    Rows,
    build_index,
    exact_neighbours,
    index_neighbours,
)
from tongkuan.match.files import Folder, partitions, sum_of
from tongkuan.match.machines import HERE, Machines
from tongkuan.match.options import Engine, Options

# Multiply-adds that an exact search may take: 300,000 listings of 2 x 128, about ten minutes on two cores.
EXACT_WORK = 300_000**2 * 256
MULTIPLY_ADDS = 2.5e10  # a second and core, of products of matrices on a plain CPU
LOOKED_AT = 13_000  # embeddings that an index costs as much as looking at, of each listing, beside its lists
FEW = 10_000  # listings of a category that no index is worth while for
NEIGHBOURS = "neighbours"
SOURCES = ("candidates", "scores", "search", "files")  # of this folder, that decide what is written


@dataclass
class Search:
    """The neighbours of distinct listings."""

    embeddings: Embeddings
    categories: Rows
    """(N,): neighbours are of the same category."""
    k: int
    by_index: bool
    recall: float
    """That an index is to have."""
    indexes: dict[int, Index] = field(default_factory=dict)

    def neighbours(self, queries: Rows) -> Neighbours:
        """Of these rows, (Q, k)."""
        cosines = np.full((len(queries), self.k), -np.inf, np.float32)
        rows = np.full((len(queries), self.k), -1, np.int32)
        own = self.categories[queries]
        for category in np.unique(own).tolist():
            members = self.members(category)
            place = np.flatnonzero(own == category)
            found = self.within(category, members, np.searchsorted(members, queries[place]).astype(np.int32))
            cosines[place] = found.cosines
            rows[place] = np.where(found.rows < 0, np.int32(-1), members[found.rows])
        return Neighbours(cosines, rows)

    def members(self, category: int) -> Rows:
        """Rows of a category."""
        return np.flatnonzero(self.categories == category).astype(np.int32)

    def within(self, category: int, members: Rows, queries: Rows) -> Neighbours:
        """Neighbours among the members of a category, numbered as they stand there."""
        all_of_them = len(members) == len(self.embeddings)
        embeddings = self.embeddings if all_of_them else self.embeddings[members]
        if not self.by_index or len(members) < FEW:
            return exact_neighbours(embeddings, queries, self.k)
        if category not in self.indexes:
            self.indexes[category] = build_index(embeddings, self.k, self.recall)
        return index_neighbours(embeddings, self.indexes[category], queries, self.k)

    def prepare(self, parts: Sequence[slice]) -> None:
        """Build the indexes that these partitions need: once, and not on each machine."""
        if self.by_index and parts:
            asked = np.unique(np.concatenate([np.unique(self.categories[rows]) for rows in parts]))
            for category in asked.tolist():
                self.within(category, self.members(category), np.empty(0, np.int32))

    def part(self, rows: slice) -> tuple[Neighbours, dict[str, Any]]:
        """Neighbours of a partition, and `facts` of them."""
        queries = np.arange(rows.start, rows.stop, dtype=np.int32)
        return self.neighbours(queries), self.facts(queries)

    def facts(self, queries: Rows) -> dict[str, Any]:
        """Of the indexes that these rows were looked up in, the least recall measured and the most lists looked into.

        Of no others, so that a partition's file does not depend on what was searched before it.
        """
        asked = np.unique(self.categories[queries]).tolist()
        indexes = [self.indexes[category] for category in asked if category in self.indexes]
        if not indexes:
            return {}
        return {"recall": min(each.recall for each in indexes), "probes": max(each.probes for each in indexes)}


def wants_index(engine: Engine, categories: NDArray[np.integer[Any]], width: int) -> bool:
    """Whether neighbours are looked up in an index: when asked for, or when looking at all takes too long."""
    sizes = np.bincount(categories).astype(np.float64)
    return engine == "faiss" or (engine == "auto" and float((sizes**2).sum()) * width > EXACT_WORK)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search takes, by arithmetic."""

    name: str
    seconds: float
    memory: int
    """Bytes."""
    disk: int
    """Bytes, of embeddings and neighbours."""


def plan_search(options: Options, categories: NDArray[np.int64], width: int) -> Plan:
    """What the search of listings (N,) in these categories takes on this machine."""
    count, k = len(categories), neighbours_of(options.engine, options.candidates)
    by_index = wants_index(options.engine, categories, width)
    sizes = np.bincount(categories).astype(np.float64)
    looked_at = np.where(by_index & (sizes >= FEW), LOOKED_AT + LISTS * np.sqrt(sizes), sizes)
    work = float((sizes * looked_at).sum()) * width
    if options.engine == "exact":
        work *= 1.5  # once more for the pairs, of which it looks at half
    lists = 8 * count * k
    vectors = 4 * count * width
    name = engine_name(options.engine, k, by_index)
    return Plan(name, work / MULTIPLY_ADDS / available_cores(), vectors * (1 + by_index) + lists, vectors + lists)


def neighbours_of(engine: Engine, candidates: int) -> int:
    """How many neighbours of each listing are kept: where every pair is looked at, those that tell how dense it is."""
    return NEAREST if engine == "exact" else max(candidates, NEAREST)


def engine_name(engine: Engine, k: int, by_index: bool) -> str:
    """What is looked at, for the user."""
    if engine == "exact":
        return "every pair"
    return f"{k} neighbours each by {'an index' if by_index else 'exact search'}"


def code_sums() -> dict[str, str]:
    """Of the code and the library that decide what is found."""
    folder = Path(__file__).parent
    return {**{name: sha256_of(folder / f"{name}.py") for name in SOURCES}, "faiss": version("faiss-cpu")}


def search_partitions(
    search: Search, folder: Folder, made_of: str, size: int, machines: Machines = HERE
) -> tuple[Neighbours, dict[str, Any]]:
    """Neighbours of all listings, from the disk where they are there, and the worst of `Search.facts`."""
    count = len(search.embeddings)
    parts = partitions(count, size)
    paths = [folder.part(NEIGHBOURS, number) for number in range(len(parts))]
    sums = [sum_of(made_of, rows.start, rows.stop) for rows in parts]
    todo = files.missing(paths, sums)
    with tqdm(total=len(parts), initial=len(parts) - len(todo), desc="search", unit="part", disable=None) as progress:
        search.prepare([parts[number] for number in todo])
        for place, (found, about) in machines.each(search.part, [parts[number] for number in todo]):
            columns: dict[str, pa.Array] = {"cosines": files.matrix(found.cosines), "rows": files.matrix(found.rows)}
            files.write_table(paths[todo[place]], columns, sums[todo[place]], about)
            progress.update()
    folder.drop_parts(NEIGHBOURS, len(parts))
    all_found = Neighbours(np.empty((count, search.k), np.float32), np.empty((count, search.k), np.int32))
    facts: dict[str, Any] = {}
    for rows, path, own_sum in zip(parts, paths, sums, strict=True):
        table = files.made_table(path, own_sum)
        all_found.cosines[rows], all_found.rows[rows] = files.rows_of(table["cosines"]), files.rows_of(table["rows"])
        facts = combined(facts, files.about(path))
    return all_found, facts


def combined(facts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The worse of two."""
    if not facts or not more:
        return facts or more
    return {"recall": min(facts["recall"], more["recall"]), "probes": max(facts["probes"], more["probes"])}
