"""Scores of candidate pairs: the model's own in float64, and the cosine held against how dense it is about both.

The scaled cosine is 2 c(a, b) - m(a) - m(b), where m is the mean cosine of a listing with its ten nearest ("CSLS",
cross-domain similarity local scaling, Conneau et al., arXiv 1710.04087). Above 0 two listings are nearer to each
other than to their neighbourhoods. A threshold on the score alone lets more through the larger the catalogue is.

Arrays in, arrays out. Embeddings [p ; q] are float32 (N, 2D), rows of pairs int32 (P,).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tongkuan.base.machine import available_cores
from tongkuan.encode.encode import Embeddings, one_thread_each
from tongkuan.encode.store import prefetch
from tongkuan.match.candidates import Neighbours, Rows, unit_rows
from tongkuan.model.towers import pair_scores

Numbers = NDArray[np.float64]
PAIRS_AT_ONCE = 65_536
ROWS_AT_ONCE, OTHERS_AT_ONCE = 512, 16_384
SPARSE = 0.01
ROUNDING = 1e-5  # of a cosine or a scaled one in float32, and more


@dataclass(frozen=True, slots=True)
class Pairs:
    """P pairs of rows."""

    left: Rows
    right: Rows
    scores: Numbers
    """The model's."""
    cosines: Numbers
    scaled: Numbers

    def __len__(self) -> int:
        return len(self.left)

    def where(self, chosen: NDArray[np.bool_]) -> "Pairs":
        """Those that are chosen (P,)."""
        return Pairs(*(getattr(self, name)[chosen] for name in ("left", "right", "scores", "cosines", "scaled")))


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Distinct listings, and how dense it is about each."""

    embeddings: Embeddings
    means: Numbers
    """(N,), `local_means` of their neighbours."""
    categories: Rows
    """(N,): only listings of one category are compared."""

    def scaled(self, rows: Rows) -> Numbers:
        """Scaled cosines (n, n) of all pairs of some listings."""
        units = self.embeddings[rows].astype(np.float64)
        lengths = np.linalg.norm(units, axis=1, keepdims=True)
        units /= np.where(lengths > 0, lengths, 1)
        means = self.means[rows]
        found: Numbers = 2 * np.einsum("id,jd->ij", units, units) - means[:, None] - means
        return found

    def scores(self, rows: Rows) -> Numbers:
        """The model's scores (n, n) of all pairs of some listings."""
        left, right = (side.ravel() for side in np.meshgrid(rows, rows, indexing="ij"))
        return exact_scores(self.embeddings, left, right).reshape(len(rows), len(rows))


def exact_scores(embeddings: Embeddings, left: Rows, right: Rows) -> Numbers:
    """The model's score of each pair, float64 (P,)."""
    scores = np.empty(len(left))
    for block in blocks(len(left)):
        scores[block] = pair_scores(embeddings[left[block]], embeddings[right[block]])
    return scores


def exact_cosines(embeddings: Embeddings, left: Rows, right: Rows) -> Numbers:
    """The cosine of each pair, float64 (P,): the same from whichever side, and whatever found the pair."""
    cosines = np.empty(len(left))
    for block in blocks(len(left)):
        a, b = (embeddings[side[block]].astype(np.float64) for side in (left, right))
        lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        cosines[block] = (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1)
    return cosines


def blocks(count: int) -> Iterator[slice]:
    """Of pairs, whose embeddings are gathered together."""
    return (slice(start, start + PAIRS_AT_ONCE) for start in range(0, count, PAIRS_AT_ONCE))


def scored(catalogue: Catalogue, left: Rows, right: Rows, score_floor: float, threshold: float) -> Pairs:
    """Of the given pairs those whose score is above the floor and whose scaled cosine is above the threshold."""
    cosines = exact_cosines(catalogue.embeddings, left, right)
    scaled = 2 * cosines - catalogue.means[left] - catalogue.means[right]
    passes = scaled > threshold
    left, right, cosines, scaled = left[passes], right[passes], cosines[passes], scaled[passes]
    pairs = Pairs(left, right, exact_scores(catalogue.embeddings, left, right), cosines, scaled)
    return pairs.where(pairs.scores > score_floor)


def candidate_pairs(
    catalogue: Catalogue, neighbours: Neighbours, rows: slice, score_floor: float, threshold: float
) -> Pairs:
    """Matches among what these rows name as neighbours; `neighbours` are of all rows.

    Each pair comes once of all rows: from the lower row, or from the only one that names the other.
    """
    found, cosines = neighbours.rows[rows], neighbours.cosines[rows].astype(np.float64)
    left = np.broadcast_to(np.arange(rows.start, rows.stop, dtype=np.int32)[:, None], found.shape)
    means = catalogue.means
    passes = (found >= 0) & (2 * cosines - means[left] - means[found] > threshold - ROUNDING)
    left, found = left[passes], found[passes]
    once = left < found
    for block in blocks(len(left)):
        once[block] |= (neighbours.rows[found[block]] != left[block][:, None]).all(axis=1)
    left, found = left[once], found[once]
    return scored(catalogue, np.minimum(left, found), np.maximum(left, found), score_floor, threshold)


def all_pairs(catalogue: Catalogue, rows: Rows, score_floor: float, threshold: float, is_upper: bool = True) -> Pairs:
    """Matches of these rows with every other listing, by looking at all; `is_upper`: only with those after them.

    Products in float32 tell which pairs may pass, with room for their rounding; those are computed exactly.
    """
    jobs = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]

    def search(own: Rows) -> Pairs:
        first = int(own.min()) if is_upper else 0
        parts = [
            (own[place], other)
            for start in range(first, len(catalogue.embeddings), OTHERS_AT_ONCE)
            for place, other in [may_pass(catalogue, own, start, score_floor, threshold, is_upper)]
        ]
        left, right = (np.concatenate(side) for side in zip(*parts, strict=True))
        return scored(catalogue, left, right, score_floor, threshold)

    with one_thread_each():
        return concatenated(list(prefetch(jobs, search, available_cores())))


def may_pass(
    catalogue: Catalogue, own: Rows, start: int, score_floor: float, threshold: float, is_upper: bool
) -> tuple[NDArray[np.int64], Rows]:
    """(place in `own`, other row) of pairs that may be matches, the others from `start` on, OTHERS_AT_ONCE of them."""
    mine, base = catalogue.embeddings[own], catalogue.embeddings[start : start + OTHERS_AT_ONCE]
    others = np.arange(start, start + len(base), dtype=np.int32)
    limits = (catalogue.means[own] + threshold - ROUNDING)[:, None] + catalogue.means[others]
    passes = 2 * products(unit_rows(mine), unit_rows(base)) > limits
    passes &= catalogue.categories[own][:, None] == catalogue.categories[others]
    passes &= others > own[:, None] if is_upper else others != own[:, None]
    if passes.mean() > SPARSE:  # of a low threshold: the score must tell, and each exact one costs a thousand of these
        half = base.shape[1] // 2
        signed = np.hstack([-mine[:, :half], mine[:, half:]])
        # |error| <= n u |a| |b| of a product of n terms (Higham, Accuracy and Stability, 3.1), u = 2^-24
        lengths = np.linalg.norm(mine, axis=1)[:, None] * np.linalg.norm(base, axis=1)
        passes &= products(signed, base) > score_floor - 1.1 * base.shape[1] * 2.0**-24 * lengths
    place, other = np.nonzero(passes)
    return place, others[other]


def products(left: Embeddings, right: Embeddings) -> NDArray[np.float32]:
    """All inner products (A, B) of two sides; by torch, whose threads `one_thread_each` rules."""
    # Arrays from another machine cannot be written to, of which torch would warn.
    mine, others = (torch.from_numpy(np.require(side, requirements="W")) for side in (left, right))
    found: NDArray[np.float32] = (mine @ others.T).numpy()
    return found


def concatenated(parts: list[Pairs]) -> Pairs:
    """All pairs of the parts in their order."""
    if not parts:
        none = np.empty(0, np.int32)
        return Pairs(none, none, *(np.empty(0) for _ in range(3)))
    names = ("left", "right", "scores", "cosines", "scaled")
    return Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
