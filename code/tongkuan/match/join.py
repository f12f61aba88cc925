"""From the embeddings of a catalogue to its pairs and groups on the disk, partition by partition."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from tongkuan.encode.encode import Embeddings
from tongkuan.match import files
from tongkuan.match.candidates import SEED, Neighbours, Rows, collapse, local_means
from tongkuan.match.files import Folder, partitions, sum_of
from tongkuan.match.groups import facts, group
from tongkuan.match.machines import HERE, Machines
from tongkuan.match.options import Grouping, Options
from tongkuan.match.scores import (
    Catalogue,
    Numbers,
    Pairs,
    all_pairs,
    candidate_pairs,
    concatenated,
    exact_scores,
)
from tongkuan.match.search import (
    Search,
    code_sums,
    engine_name,
    neighbours_of,
    search_partitions,
    wants_index,
)

PAIRS = "pairs"
SAMPLE = 500  # listings that are held against all others


@dataclass(frozen=True, slots=True)
class Listings:
    """N listings, M of them distinct: those of equal embedding and category are one."""

    item_ids: list[str]
    embeddings: Embeddings
    """(M, 2D)."""
    categories: Rows
    """(M,)."""
    firsts: NDArray[np.int64]
    """(M,): the listing that each is the embedding of."""
    numbers: NDArray[np.int64]
    """(N,): the distinct one of each listing."""

    @classmethod
    def of(cls, item_ids: list[str], embeddings: Embeddings, categories: Sequence[str]) -> "Listings":
        """From the embeddings (N, 2D) of all listings."""
        _, codes = np.unique(np.array(categories), return_inverse=True)
        codes = codes.astype(np.int32)
        told_apart = embeddings
        if codes.any():
            told_apart = np.hstack([embeddings, codes.view(np.float32)[:, None]])
        firsts, numbers = collapse(told_apart)
        distinct = embeddings if len(firsts) == len(embeddings) else embeddings[firsts]
        return cls(item_ids, distinct, codes[firsts].astype(np.int32), firsts, numbers)

    @property
    def copies(self) -> NDArray[np.int64]:
        """(M,): how many listings each stands for."""
        return np.bincount(self.numbers, minlength=len(self.firsts))


@dataclass(frozen=True, slots=True)
class Verdict:
    """When two listings match: score above the model's threshold, and scaled cosine above the catalogue's."""

    score_floor: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Join:
    """A catalogue with its neighbours, and where its files go."""

    listings: Listings
    catalogue: Catalogue
    neighbours: Neighbours
    facts: dict[str, Any]
    """Of the search, see Search.facts."""
    engine: str
    """What was searched how, for the user."""
    by_score: bool
    """Whether every pair is looked at, and not only neighbours."""
    folder: Folder
    made_of: str
    partition_size: int
    machines: Machines

    @classmethod
    def of(
        cls, listings: Listings, sums: Sequence[str], folder: Folder, options: Options, machines: Machines = HERE
    ) -> "Join":
        """Search the neighbours of all listings; `sums` are those of the partitions of embeddings."""
        engine, size = options.engine, options.partition_size
        by_index = wants_index(engine, listings.categories, listings.embeddings.shape[1])
        k = neighbours_of(engine, options.candidates)
        search = Search(listings.embeddings, listings.categories, k, by_index, options.recall)
        recall = options.recall if by_index else None
        made_of = sum_of(list(sums), k, recall, options.within, code_sums())
        neighbours, found = search_partitions(search, folder, made_of, size, machines)
        catalogue = Catalogue(listings.embeddings, local_means(neighbours), listings.categories)
        made_of, name = sum_of(made_of, engine == "exact"), engine_name(engine, k, by_index)
        return cls(listings, catalogue, neighbours, found, name, engine == "exact", folder, made_of, size, machines)

    def pairs(self, verdict: Verdict) -> Pairs:
        """All matches of distinct listings, from the disk where they are there."""
        parts = partitions(len(self.catalogue.embeddings), self.partition_size)
        paths = [self.folder.part(PAIRS, number) for number in range(len(parts))]
        sums = [sum_of(self.made_of, verdict.score_floor, verdict.threshold, rows.start, rows.stop) for rows in parts]
        todo = files.missing(paths, sums)
        work = partial(matches, self.catalogue, self.neighbours, self.by_score, verdict)
        made = self.machines.each(work, [parts[number] for number in todo])
        for place, found in tqdm(made, total=len(todo), desc="pairs", unit="part", disable=None):
            number = todo[place]
            files.write_table(paths[number], self.columns(found, parts[number]), sums[number])
        self.folder.drop_parts(PAIRS, len(parts))
        firsts = pa.array(self.listings.item_ids, pa.string()).take(pa.array(self.listings.firsts))
        return concatenated([read_pairs(files.made_table(*made), firsts) for made in zip(paths, sums, strict=True)])

    def columns(self, pairs: Pairs, rows: slice) -> dict[str, Any]:
        """A file of matches, and of each listing that stands for others the pairs with those, in the order of ids."""
        items = self.listings
        is_copy = items.firsts[items.numbers] != np.arange(len(items.numbers))
        copied = np.flatnonzero(is_copy & (items.numbers >= rows.start) & (items.numbers < rows.stop))
        own = items.numbers[copied].astype(np.int32)
        left = [items.item_ids[row] for row in (*items.firsts[pairs.left], *items.firsts[own])]
        right = [items.item_ids[row] for row in (*items.firsts[pairs.right], *copied)]
        cosines = np.r_[pairs.cosines, np.ones(len(own))]
        scaled = np.r_[pairs.scaled, 2 - 2 * self.catalogue.means[own]]
        scores = np.r_[pairs.scores, exact_scores(self.catalogue.embeddings, own, own)]
        return pair_columns(left, right, scores, cosines, scaled)

    def sample(self) -> Rows:
        """Rows of listings that are held against all others, the same each time."""
        return sample_of(self.catalogue)

    def measured_recall(self, found: Pairs, verdict: Verdict) -> float:
        """Share of the sample's matches with any listing that were found: 0 to 1."""
        return measured_recall(self.catalogue, found, verdict)


def sample_of(catalogue: Catalogue) -> Rows:
    """Rows of listings that are held against all others, the same each time."""
    count = len(catalogue.embeddings)
    chosen = np.random.default_rng(SEED).choice(count, min(count, SAMPLE), replace=False)
    return np.sort(chosen).astype(np.int32)


def measured_recall(catalogue: Catalogue, found: Pairs, verdict: Verdict) -> float:
    """Share of the sample's matches with any listing that were found: 0 to 1."""
    wanted = all_pairs(catalogue, sample_of(catalogue), verdict.score_floor, verdict.threshold, is_upper=False)
    return float(np.isin(keys(wanted), keys(found)).sum()) / len(wanted) if len(wanted) else 1.0


def matches(catalogue: Catalogue, neighbours: Neighbours, by_score: bool, verdict: Verdict, rows: slice) -> Pairs:
    """Of one partition: among the neighbours of all listings, or among all pairs."""
    if not by_score:
        return candidate_pairs(catalogue, neighbours, rows, verdict.score_floor, verdict.threshold)
    own = np.arange(rows.start, rows.stop, dtype=np.int32)
    return all_pairs(catalogue, own, verdict.score_floor, verdict.threshold)


def keys(pairs: Pairs) -> NDArray[np.int64]:
    """A number for each pair, whichever way round it stands."""
    low, high = np.minimum(pairs.left, pairs.right), np.maximum(pairs.left, pairs.right)
    return low.astype(np.int64) << 32 | high


def pair_columns(
    left: Sequence[str], right: Sequence[str], scores: Numbers, cosines: Numbers, scaled: Numbers
) -> dict[str, Any]:
    """A file of pairs, (P,) each, in the order of ids, the smaller one of each pair left."""
    sides = [(min(a, b), max(a, b)) for a, b in zip(left, right, strict=True)]
    order = np.array(sorted(range(len(sides)), key=sides.__getitem__), dtype=np.int64)
    return {
        "left": pa.array([sides[place][0] for place in order], pa.string()),
        "right": pa.array([sides[place][1] for place in order], pa.string()),
        "score": scores[order],
        "cosine": cosines[order].astype(np.float32),
        "scaled": scaled[order].astype(np.float32),
    }


def read_pairs(table: pa.Table, firsts: pa.Array) -> Pairs:
    """Pairs of distinct rows from a file; those of a listing with what it stands for are left out."""
    rows = [pc.index_in(table[side], value_set=firsts) for side in ("left", "right")]
    is_distinct = pc.and_(pc.is_valid(rows[0]), pc.is_valid(rows[1]))
    left, right = (column.filter(is_distinct).to_numpy().astype(np.int32) for column in rows)
    kept = table.filter(is_distinct)
    scores, cosines, scaled = (kept[name].to_numpy().astype(np.float64) for name in ("score", "cosine", "scaled"))
    return Pairs(left, right, scores, cosines, scaled)


def group_columns(
    item_ids: Sequence[str],
    group_ids: Sequence[str],
    sizes: NDArray[np.int64],
    densities: Numbers,
    weakest: Numbers,
    means: Numbers,
) -> dict[str, Any]:
    """The file of groups, (N,) each; `weakest` is NaN where there is none."""
    return {
        "item_id": pa.array(item_ids, pa.string()),
        "group_id": pa.array(group_ids, pa.string()),
        "size": sizes.astype(np.int32),
        "density": densities.astype(np.float32),
        "weakest": pa.array(weakest, mask=np.isnan(weakest)),
        "mean": means,
    }


@dataclass(frozen=True, slots=True)
class Summary:
    """What to say of groups."""

    counts: dict[str, int]
    oversized: list[int]
    """See Groups."""
    matches: NDArray[np.int64]
    """(N,), of each listing."""


def counted(group_ids: Sequence[str], sizes: NDArray[np.integer[Any]], distinct: int, pairs: int) -> dict[str, int]:
    """What a manifest counts, from the group and the size of it of each listing (N,)."""
    return {
        "listings": len(group_ids),
        "distinct": distinct,
        "pairs": pairs,
        "groups": len({group_ids[row] for row in np.flatnonzero(sizes > 1).tolist()}),
        "largest": int(sizes.max()),
    }


def write_groups(join: Join, found: Pairs, verdict: Verdict, grouping: Grouping) -> Summary:
    """Link the matches to groups and write them, a row a listing in the order of the items."""
    items, copies, count = join.listings, join.listings.copies, len(join.listings.firsts)
    linked = group(count, found.left, found.right, found.scaled, verdict.threshold, join.catalogue.scaled, grouping)
    about = facts(linked.labels, copies, found.left, found.right, join.catalogue.scores)
    labels = linked.labels[items.numbers]
    smallest: dict[int, str] = {}
    for label, item_id in zip(labels.tolist(), items.item_ids, strict=True):
        smallest[label] = min(smallest.get(label, item_id), item_id)
    group_ids = [smallest[label] for label in labels.tolist()]
    columns = group_columns(
        items.item_ids,
        group_ids,
        about.sizes[items.numbers],
        about.densities[items.numbers],
        about.weakest[items.numbers],
        join.catalogue.means[items.numbers],
    )
    made_of = sum_of(join.made_of, verdict.score_floor, verdict.threshold, grouping)
    files.write_table(join.folder.groups, columns, made_of)
    partners = np.bincount(found.left, copies[found.right], count) + np.bincount(found.right, copies[found.left], count)
    counts = counted(group_ids, columns["size"], count, len(found) + len(items.item_ids) - count)
    return Summary(counts, linked.oversized, (partners + copies - 1).astype(np.int64)[items.numbers])
