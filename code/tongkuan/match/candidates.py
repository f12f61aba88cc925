"""Candidates: for each listing the k others whose embeddings [p ; q] have the largest cosine with its own.

By cosine and not by score, for two reasons. The score is no metric: listings with a large q are everybody's
neighbours, often nearer to a listing than that listing is to itself, and an index of inner products misses true mates.
And of all true pairs that the score accepts, the 50 nearest by cosine hold all but a few in a thousand.

Arrays in, arrays out: no file, no model. Embeddings are float32 (N, 2D); rows are int32 and -1 where there is none.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tongkuan.base.machine import available_cores
from tongkuan.encode.encode import Embeddings
from tongkuan.encode.store import prefetch

Rows = NDArray[np.int32]
NEAREST = 10  # neighbours whose mean cosine says how dense it is about a listing
SEED = 0
SAMPLE = 500  # rows on which the recall of an index is measured
QUERIES, BASE = 8192, 65_536  # rows of a block of queries and of what they are held against
LISTS = 4  # times the square root of N, lists of an index: with one times, recall falls and the work grows
FIRST_PROBES, KEPT_PROBES = 8, 16  # lists that are looked into at first; that are known of each listing
TRAINED_ON = 32  # rows a list
ITERATIONS = 6  # of k-means
CODED, CODE_BITS = 2, 4  # numbers of an embedding that share a code, and its bits
FIRST_EXACT, MOST_EXACT = 250, 4000  # listings, the nearest by their codes, that are looked at exactly


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Of each of Q listings its nearest, by falling cosine, of equal cosines the lower row first; itself never."""

    cosines: NDArray[np.float32]
    """(Q, k), -inf where there is none."""
    rows: Rows
    """(Q, k)."""


@dataclass(frozen=True, slots=True)
class Index:
    """Inverted lists of codes, and how well they find what an exact search finds.

    A code says roughly where a unit vector lies (product quantisation, Jegou et al. 2011), in a sixteenth of its bytes,
    and is compared in registers (fast scan, Andre et al. 2015). What is nearest by codes is then looked at exactly.
    """

    coarse: Any
    """faiss.IndexFlatIP of the centres of the lists. Not typed: what faiss says of its types is of C++ in part."""
    lists: Any
    """faiss.IndexIVFPQFastScan, which needs `coarse` to live."""
    lengths: NDArray[np.float32]
    """(N,), of the embeddings; 1 of those of zeros."""
    kept: Neighbours
    """The lists (N, KEPT_PROBES or all) that are nearest to each listing. It lies in the first."""
    probes: int
    exact: int
    """How many, the nearest by their codes, are looked at exactly."""
    recall: float
    """Of the pairs of a sample that could match, from either side, see `could_match`."""


def collapse(embeddings: Embeddings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows of the distinct embeddings (M,), for each row the number among them (N,)), in the order of first rows.

    Thousands of identical listings would fill each other's k places, and hide what else is near.
    """
    words = np.ascontiguousarray(embeddings).view(np.uint32)
    # Sorting a number a row takes a tenth of the time of sorting whole rows.
    factors = np.random.default_rng(SEED).integers(1 << 63, size=words.shape[1], dtype=np.uint64)
    mixed = np.empty(len(words), np.uint64)
    for start in range(0, len(words), BASE):
        np.matmul(words[start : start + BASE].astype(np.uint64), factors, out=mixed[start : start + BASE])
    _, firsts, numbers = np.unique(mixed, return_index=True, return_inverse=True)
    again = np.flatnonzero(firsts[numbers] != np.arange(len(words)))
    if not (words[again] == words[firsts[numbers[again]]]).all():  # two rows of one number
        whole = words.view(np.dtype((np.void, words.shape[1] * words.itemsize))).ravel()
        _, firsts, numbers = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return firsts[order], place[numbers.ravel()]


def unit_rows(embeddings: Embeddings) -> Embeddings:
    """Each row at length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.divide(embeddings, np.where(lengths > 0, lengths, 1), dtype=np.float32)


@contextmanager
def threads_of_faiss(count: int) -> Iterator[None]:
    """What faiss does inside it does on so many threads. Torch may share OpenMP with it, and keep what is left set."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def exact_neighbours(embeddings: Embeddings, queries: Rows, k: int) -> Neighbours:
    """The k nearest of each row in `queries` among all rows, found by looking at all of them."""

    @threads_of_faiss(1)  # sums cut otherwise would end in other bits
    def search(rows: Rows) -> Neighbours:
        units = unit_rows(embeddings[rows])
        found = Neighbours(np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int32))
        for start in range(0, len(embeddings), BASE):
            base = unit_rows(embeddings[start : start + BASE])
            cosines, places = faiss.knn(units, base, min(k + 1, len(base)), metric=faiss.METRIC_INNER_PRODUCT)
            both = np.hstack([found.cosines, cosines]), np.hstack([found.rows, places.astype(np.int32) + start])
            found = nearest(*both, rows, k)
        return found

    return joined(search, queries, k)


def build_index(embeddings: Embeddings, k: int, recall: float, seed: int = SEED) -> Index:
    """An index whose recall of a sample's pairs is at least `recall`, or which looks at as much as it may.

    Until it is so, the lists that are looked into or the listings that are looked at exactly are doubled, whichever
    finds more.
    """
    count, width = embeddings.shape
    num_lists = max(1, min(round(LISTS * math.sqrt(count)), count))
    coarse = faiss.IndexFlatIP(width)
    metric = faiss.METRIC_INNER_PRODUCT
    lists = faiss.IndexIVFPQ(coarse, width, num_lists, max(1, width // CODED), CODE_BITS, metric)
    lists.by_residual = False
    lists.cp.spherical, lists.cp.niter, lists.cp.seed = True, ITERATIONS, seed
    lists.cp.min_points_per_centroid, lists.cp.max_points_per_centroid = 1, TRAINED_ON
    lists.pq.cp.min_points_per_centroid = 1
    generator = np.random.default_rng(seed)
    chosen = generator.choice(count, min(count, TRAINED_ON * num_lists), replace=False)
    with threads_of_faiss(1):  # training shares thousands of short loops out, and waits at the end of each
        lists.train(unit_rows(embeddings[np.sort(chosen)]))
    rows = np.arange(count, dtype=np.int32)
    width_kept = min(KEPT_PROBES, num_lists)
    kept = joined(partial(nearest_lists, coarse, embeddings, probes=width_kept), rows, width_kept)
    lengths = np.empty(count, np.float32)
    with threads_of_faiss(available_cores()):
        for start in range(0, count, BASE):
            block = embeddings[start : start + BASE]
            lengths[start : start + BASE] = np.linalg.norm(block, axis=1)
            units, own = unit_rows(block), kept.rows[start : start + BASE, 0].astype(np.int64)
            lists.add_core(len(block), faiss.swig_ptr(units), None, faiss.swig_ptr(own))
    lengths[lengths == 0] = 1
    packed = faiss.IndexIVFPQFastScan(lists)
    sample = np.sort(generator.choice(count, min(count, SAMPLE), replace=False)).astype(np.int32)
    wanted = exact_neighbours(embeddings, sample, k)

    def measured(index: Index) -> Index:
        search = partial(index_neighbours, embeddings, index, k=k)
        return replace(index, recall=recall_of(search, *could_match(search, sample, wanted)))

    most = min(count, MOST_EXACT)
    index = measured(Index(coarse, packed, lengths, kept, min(FIRST_PROBES, num_lists), min(FIRST_EXACT, most), 0.0))
    while index.recall < recall and (index.probes < num_lists or index.exact < most):
        wider = replace(index, probes=min(2 * index.probes, num_lists))
        deeper = replace(index, exact=min(2 * index.exact, most))
        index = max(measured(wider), measured(deeper), key=lambda each: each.recall)
    return index


def nearest_lists(coarse: Any, embeddings: Embeddings, rows: Rows, probes: int) -> Neighbours:
    """The lists (Q, probes) that are nearest to some rows, by what their centres are held in."""
    with threads_of_faiss(1):
        cosines, lists = coarse.search(unit_rows(embeddings[rows]), probes)
    return Neighbours(cosines, lists.astype(np.int32))


def index_neighbours(embeddings: Embeddings, index: Index, queries: Rows, k: int) -> Neighbours:
    """As exact_neighbours, but only what the index finds.

    Queries go in the order of their nearest lists: what one has read is in the processor's cache for the next.
    """

    @threads_of_faiss(1)
    def search(rows: Rows) -> Neighbours:
        units = unit_rows(embeddings[rows])
        if index.probes <= index.kept.rows.shape[1]:
            probed = Neighbours(index.kept.cosines[rows, : index.probes], index.kept.rows[rows, : index.probes])
        else:
            probed = nearest_lists(index.coarse, embeddings, rows, index.probes)
        wide = max(index.exact, k + 1)
        _, found = index.lists.search_preassigned(units, wide, probed.rows, probed.cosines)
        return nearest(
            products_by_row(units, embeddings, found) / index.lengths[found], found.astype(np.int32), rows, k
        )

    index.lists.nprobe = index.probes
    order = np.argsort(index.kept.rows[queries, 0], kind="stable")
    found, back = joined(search, queries[order], k), np.argsort(order)
    return Neighbours(found.cosines[back], found.rows[back])


def products_by_row(units: Embeddings, embeddings: Embeddings, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Inner products (Q, n) of each of Q vectors with n embeddings of its own; `rows` (Q, n) may have -1: of any."""
    products = np.empty(rows.shape, np.float32)
    rows = np.ascontiguousarray(np.maximum(rows, 0))
    library: Any = faiss
    pointers = map(library.swig_ptr, (products, units, embeddings, rows))
    library.fvec_inner_products_by_idx(*pointers, embeddings.shape[1], *rows.shape)
    return products


def nearest(cosines: NDArray[np.float32], found: Rows, queries: Rows, k: int) -> Neighbours:
    """The k first of what was found for each query (Q, n), itself left out; fewer when there are no more.

    Cosine and row are sorted as one number of 64 bits, which takes a quarter of the time of sorting by two.
    """
    none = (found < 0) | (found == queries[:, None])
    falling = rising_bits(np.where(none, np.float32(np.inf), -cosines)).astype(np.uint64)
    keys = falling << np.uint64(32) | np.where(none, np.int32(-1), found).view(np.uint32)
    if k < keys.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    keys.sort(axis=1)
    negated = floats_of((keys >> np.uint64(32)).astype(np.uint32))
    return Neighbours(np.float32(0) - negated, keys.astype(np.uint32).view(np.int32))


def rising_bits(numbers: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Numbers without a sign that sort as the floats do: those below 0 turned about, the others above them."""
    bits = (numbers + np.float32(0)).view(np.uint32)  # no zero is below another
    return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def floats_of(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The floats that `rising_bits` made these of."""
    return (bits ^ np.where(bits >> 31, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))).view(np.float32)


def joined(search: Callable[[Rows], Neighbours], queries: Rows, k: int) -> Neighbours:
    """What `search` finds, block by block, a thread a core; with k columns whatever there is."""
    cosines = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int32)
    blocks = [slice(start, start + QUERIES) for start in range(0, len(queries), QUERIES)]
    parts: Iterator[Neighbours] = prefetch((queries[block] for block in blocks), search, available_cores())
    for block, part in zip(blocks, parts, strict=True):
        width = part.rows.shape[1]
        cosines[block, :width], rows[block, :width] = part.cosines, part.rows
    return Neighbours(cosines, rows)


def local_means(neighbours: Neighbours) -> NDArray[np.float64]:
    """Mean cosine of each listing with its NEAREST, float64 (N,); 0 for one without any."""
    first = neighbours.cosines[:, :NEAREST].astype(np.float64)
    is_there = np.isfinite(first)
    means: NDArray[np.float64] = np.where(is_there, first, 0).sum(axis=1) / np.maximum(is_there.sum(axis=1), 1)
    return means


def could_match(search: Callable[[Rows], Neighbours], rows: Rows, found: Neighbours) -> tuple[Rows, Rows]:
    """(row, neighbour) of those exact neighbours (Q, k) of some rows that are nearer than their neighbourhoods are.

    The rest of the k are the background of a listing, which no match comes of. How dense a neighbourhood is, `search`
    says: it is what matches are held against. Without any such pair: all that are nearer than the listing's own.
    """
    means = local_means(search(rows))[:, None]
    near = found.cosines >= means
    others = np.unique(found.rows[near])
    of_others = np.append(local_means(search(others)), 0)
    scaled = 2 * found.cosines.astype(np.float64) - means - of_others[np.searchsorted(others, found.rows)]
    both = near & (scaled > 0)
    places, columns = np.nonzero(both if both.any() else near)
    return rows[places], found.rows[places, columns]


def recall_of(search: Callable[[Rows], Neighbours], left: Rows, right: Rows) -> float:
    """Share of pairs (P,) of which one names the other among its neighbours: 0 to 1, 1 when there are none."""
    queries, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    named = search(queries.astype(np.int32)).rows
    of_left, of_right = np.split(places, 2)
    hits = (named[of_left] == right[:, None]).any(axis=1) | (named[of_right] == left[:, None]).any(axis=1)
    return float(hits.mean()) if len(hits) else 1.0
