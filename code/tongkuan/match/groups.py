"""Groups of listings that are one product, from pairs that match.

Connected components alone grow together: one wrong pair joins two groups. So each component is cut by average linkage
(two groups merge while the mean over all their pairs is above the threshold) or by complete linkage (while every pair
is); pairs that are no candidates are computed. Arrays in, arrays out; P pairs of N listings, rows int32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from tongkuan.match.candidates import Rows
from tongkuan.match.options import Grouping
from tongkuan.match.scores import Numbers

Labels = NDArray[np.int64]
METHODS = {"average": "average", "strict": "complete"}
MOST = 2000  # listings of a component that linkage is asked about: its table grows with the square


@dataclass(frozen=True, slots=True)
class Groups:
    """Which group each listing is in, and what had to be done for it."""

    labels: Labels
    """(N,), numbered by the first row of each group."""
    oversized: list[int]
    """Sizes of components above MOST, largest first, which were split by a raised threshold."""


def group(
    num_listings: int,
    left: Rows,
    right: Rows,
    strengths: Numbers,
    threshold: float,
    all_strengths: Callable[[Rows], Numbers],
    grouping: Grouping = "average",
) -> Groups:
    """Groups of the pairs with these strengths (P,); `all_strengths(rows)` (n, n) is of all pairs of n listings."""
    labels = np.arange(num_listings)
    oversized: list[int] = []
    for rows in parts(num_listings, left, right, strengths, oversized):
        table = all_strengths(rows)
        highest = max(float(table.max()), threshold)
        distances = highest - (table + table.T) / 2
        np.fill_diagonal(distances, 0)
        tree = linkage(squareform(distances, checks=False), METHODS[grouping])
        clusters = fcluster(tree, highest - threshold, "distance")
        firsts = np.full(clusters.max() + 1, num_listings)
        np.minimum.at(firsts, clusters, rows)
        labels[rows] = firsts[clusters]
    return Groups(labels, sorted(oversized, reverse=True))


def parts(num_listings: int, left: Rows, right: Rows, strengths: Numbers, oversized: list[int]) -> Iterator[Rows]:
    """Rows of each component of two listings or more, in their order; above MOST it is split at its median strength.

    The size of each that was split is appended to `oversized`.
    """
    for rows, inside in components(num_listings, left, right):
        if len(rows) <= MOST:
            yield rows
            continue
        oversized.append(len(rows))
        own = strengths[inside]
        raised = np.median(own)
        strong = inside[own > (raised if raised < own.max() else own.min())]
        yield from parts(num_listings, left[strong], right[strong], strengths[strong], [])


def components(num_listings: int, left: Rows, right: Rows) -> Iterator[tuple[Rows, NDArray[np.int64]]]:
    """(rows, numbers of its pairs) of each component of two listings or more, by their first rows."""
    ones = np.ones(len(left), dtype=bool)
    count, labels = connected_components(coo_matrix((ones, (left, right)), (num_listings,) * 2), directed=False)
    sizes = np.bincount(labels, minlength=count)
    rows = np.argsort(labels, kind="stable")
    pairs = np.argsort(labels[left], kind="stable")
    row_ends, pair_ends = np.cumsum(sizes), np.cumsum(np.bincount(labels[left], minlength=count))
    for number in np.flatnonzero(sizes > 1):
        inside = pairs[pair_ends[number - 1] if number else 0 : pair_ends[number]]
        yield rows[row_ends[number] - sizes[number] : row_ends[number]].astype(np.int32), inside


@dataclass(frozen=True, slots=True)
class Facts:
    """What to know of the group of each listing, (N,) each."""

    sizes: NDArray[np.int64]
    """Listings, copies among them."""
    densities: Numbers
    """Share of the group's pairs that match; 1 for a listing alone."""
    weakest: Numbers
    """The lowest score of any two of the group; NaN for a listing alone."""


def facts(
    labels: Labels, copies: NDArray[np.int64], left: Rows, right: Rows, all_scores: Callable[[Rows], Numbers]
) -> Facts:
    """Of groups of distinct listings, which stand for `copies` (N,) each; `all_scores(rows)` (n, n) is of n listings.

    Copies of one listing match each other, and what their listing matches.
    """
    count = len(labels)
    sizes = np.bincount(labels, weights=copies, minlength=count)
    matching = np.bincount(labels, weights=copies * (copies - 1) / 2, minlength=count)
    within = labels[left] == labels[right]
    left, right = left[within], right[within]
    matching += np.bincount(labels[left], weights=copies[left] * copies[right], minlength=count)
    possible = sizes * (sizes - 1) / 2
    densities = np.where(possible > 0, matching / np.maximum(possible, 1), 1.0)
    weakest = np.full(count, np.nan)
    order = np.argsort(labels, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(labels, minlength=count))
    for label in np.flatnonzero(sizes > 1):
        rows = order[ends[label - 1] if label else 0 : ends[label]]
        scores = all_scores(rows)
        counted = np.triu(np.ones(scores.shape, dtype=bool), 1) | np.diag(copies[rows] > 1)
        weakest[label] = scores[counted].min()
    return Facts(sizes[labels].astype(np.int64), densities[labels], weakest[labels])
