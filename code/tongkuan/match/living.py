"""What is there once listings are removed and added: distinct listings, their local means, and their pairs.

Listings are counted with the removed ones among them: those of before, then the added ones. Rows are of the distinct
listings that are there. Means of those that were there before stay as they were until the next full run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from tongkuan.encode.encode import Embeddings
from tongkuan.match.candidates import NEAREST, Neighbours, Rows, local_means
from tongkuan.match.join import Listings, Verdict, keys, pair_columns, read_pairs
from tongkuan.match.options import Engine
from tongkuan.match.scores import Catalogue, Numbers, Pairs, all_pairs, concatenated, exact_scores, scored
from tongkuan.match.search import EXACT_WORK, Search, neighbours_of

AT_ONCE = 4096  # new listings that are searched for between two steps of the progress bar


@dataclass(frozen=True, slots=True)
class Living:
    """K distinct listings of T, of which some are removed."""

    item_ids: list[str]
    """(T,)."""
    is_there: NDArray[np.bool_]
    """(T,)."""
    firsts: NDArray[np.int64]
    """(K,): the first listing of each that is there."""
    numbers: NDArray[np.int64]
    """(T,): the row of each listing; -1 of one that is removed with all its copies."""
    catalogue: Catalogue

    @classmethod
    def of(
        cls,
        item_ids: list[str],
        embeddings: Embeddings,
        categories: Sequence[str],
        means: Numbers,
        is_there: NDArray[np.bool_],
    ) -> "Living":
        """From all listings (T,); `means` are NaN of the added ones."""
        listings = Listings.of(item_ids, embeddings, categories)
        count = len(item_ids)
        firsts = np.full(len(listings.firsts), count)
        np.minimum.at(firsts, listings.numbers[is_there], np.flatnonzero(is_there))
        kept = np.argsort(firsts, kind="stable")[: int((firsts < count).sum())]
        place = np.full(len(firsts), -1)
        place[kept] = np.arange(len(kept))
        is_all = (kept == np.arange(len(firsts))).all() if len(kept) == len(firsts) else False
        distinct = listings.embeddings if is_all else listings.embeddings[kept]
        catalogue = Catalogue(distinct, means[firsts[kept]], listings.categories[kept])
        return cls(item_ids, is_there, firsts[kept], place[listings.numbers], catalogue)

    @property
    def copies(self) -> NDArray[np.int64]:
        """(K,): how many listings each stands for."""
        return np.bincount(self.numbers[self.is_there], minlength=len(self.firsts))

    @property
    def first_ids(self) -> pa.Array:
        """(K,): by which pairs name each."""
        return pa.array([self.item_ids[row] for row in self.firsts.tolist()], pa.string())

    def copied(self, start: int) -> NDArray[np.int64]:
        """Listings from `start` on that are there and not the first of their row."""
        listings = np.arange(start, len(self.item_ids))
        is_copy = self.is_there[start:] & (self.firsts[self.numbers[start:]] != listings)
        found: NDArray[np.int64] = listings[is_copy]
        return found


def new_matches(living: Living, verdict: Verdict, engine: Engine, candidates: int, recall: float) -> Pairs:
    """Matches of rows without a mean with all others, new ones among them, each once; gives those rows their means.

    By looking at every listing while that fits the time of an exact search, else by an index of all.
    """
    catalogue = living.catalogue
    new = np.flatnonzero(np.isnan(catalogue.means)).astype(np.int32)
    if not len(new):
        return concatenated([])
    by_index = engine != "exact" and len(new) * catalogue.embeddings.size > EXACT_WORK
    k = neighbours_of(engine, candidates) if by_index else NEAREST
    search = Search(catalogue.embeddings, catalogue.categories, k, by_index, recall)
    blocks = [new[start : start + AT_ONCE] for start in range(0, len(new), AT_ONCE)]
    near = [search.neighbours(block) for block in tqdm(blocks, desc="search", unit="part", disable=None)]
    catalogue.means[new] = np.concatenate([local_means(each) for each in near])
    found = []
    for block, each in zip(tqdm(blocks, desc="pairs", unit="part", disable=None), near, strict=True):
        if by_index:
            found.append(named_matches(catalogue, block, each, verdict))
        else:
            found.append(all_pairs(catalogue, block, verdict.score_floor, verdict.threshold, is_upper=False))
    pairs = concatenated(found)
    once = np.zeros(len(pairs), bool)
    once[np.unique(keys(pairs), return_index=True)[1]] = True
    return pairs.where(once)


def named_matches(catalogue: Catalogue, rows: Rows, neighbours: Neighbours, verdict: Verdict) -> Pairs:
    """Matches of these rows among their neighbours (Q, k)."""
    left = np.broadcast_to(rows[:, None], neighbours.rows.shape)
    is_there = neighbours.rows >= 0
    return scored(catalogue, left[is_there], neighbours.rows[is_there], verdict.score_floor, verdict.threshold)


def added_columns(living: Living, pairs: Pairs, start: int) -> dict[str, pa.Array]:
    """A file of new matches, and of each listing from `start` on that is a copy the pair with the first of its row."""
    copied = living.copied(start)
    own = living.numbers[copied].astype(np.int32)
    left = [living.item_ids[row] for row in (*living.firsts[pairs.left], *living.firsts[own])]
    right = [living.item_ids[row] for row in (*living.firsts[pairs.right], *copied)]
    catalogue = living.catalogue
    return pair_columns(
        left,
        right,
        np.r_[pairs.scores, exact_scores(catalogue.embeddings, own, own)],
        np.r_[pairs.cosines, np.ones(len(own))],
        np.r_[pairs.scaled, 2 - 2 * catalogue.means[own]],
    )


def without(table: pa.Table, heirs: dict[str, str | None], touched: set[str]) -> pa.Table | None:
    """A file of pairs without removed listings; None when it names none.

    `heirs` are the removed ids, each with the copy of before that pairs now name instead. The other sides of pairs of
    removed listings are added to `touched`.
    """
    removed = pa.array(list(heirs), pa.string())
    hit = pc.or_(pc.is_in(table["left"], removed), pc.is_in(table["right"], removed))
    if not pc.any(hit).as_py():
        return None
    own = table.filter(hit)
    rows, left, right = [], [], []
    for row, sides in enumerate(zip(own["left"].to_pylist(), own["right"].to_pylist(), strict=True)):
        names = [heirs.get(side, side) for side in sides]
        touched.update(name for name in names if name is not None)
        if None not in names and names[0] != names[1]:
            rows.append(row)
            left.append(str(names[0]))
            right.append(str(names[1]))
    own = own.take(pa.array(rows, pa.int64()))
    numbers = [own[name].to_numpy().astype(np.float64) for name in ("score", "cosine", "scaled")]
    renamed = pa.table(pair_columns(left, right, *numbers))
    whole = pa.concat_tables([table.filter(pc.invert(hit)).replace_schema_metadata(None), renamed])
    return whole.sort_by([("left", "ascending"), ("right", "ascending")]).combine_chunks()


def all_rows(tables: Sequence[pa.Table], living: Living) -> Pairs:
    """All pairs of distinct rows of all files."""
    first_ids = living.first_ids
    return concatenated([read_pairs(table, first_ids) for table in tables])
