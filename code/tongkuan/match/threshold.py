"""The threshold of a catalogue: how much nearer than their neighbourhoods two listings must be to match.

It is chosen on labelled groups where there are any, else by how many of all pairs pass: a sample of listings is held
against the whole catalogue. Arrays in, a number and its reason out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.metrics import best_threshold
from tongkuan.match.scores import Numbers

NATURAL = 0.0  # nearer to each other than to the neighbourhoods on average
PER_LISTING = 5.0  # matches of a listing, on average, that a threshold without labels may let through
MANY = 20  # matches of one listing: hardly all the same product
REJECTED = -8.0  # below every scaled cosine: of pairs whose score is too low for a match

Source = Literal["given", "labels", "sample"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold of scaled cosines and where it comes from."""

    value: float
    source: Source
    reason: str
    """A line for the user."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """M labelled listings, each pair of them once."""

    scaled: Numbers
    """(P,), REJECTED where the score is too low."""
    same: NDArray[np.int64]
    """(P,): 1 in one group, else 0."""
    is_labelled: NDArray[np.bool_]
    """(P,): whether somebody has labelled this very pair."""
    num_listings: int


def from_labels(labelled: Labelled, num_listings: int, split: str) -> Threshold:
    """The threshold of the highest F1 that is to be expected in a catalogue of `num_listings`.

    Pairs of labelled listings in different groups that nobody has asked about are like pairs drawn from the catalogue,
    where each listing meets more others: they count for as many. Those that were asked about are harder than others
    and count once. A catalogue's F1 on pairs that were asked about alone would say nothing of the rest.
    """
    weight = max(1.0, (num_listings - 1) / max(labelled.num_listings - 1, 1))
    weights = np.where(labelled.is_labelled | (labelled.same == 1), 1.0, weight)
    value, f1 = best_threshold(labelled.scaled, labelled.same, weights)
    groups = f"{labelled.num_listings:,} labelled listings of {split}"
    return Threshold(value, "labels", f"chosen on {groups}, where pairs have F1 {f1:.4f} at this catalogue's size")


def from_sample(scaled: Numbers, num_rows: int) -> Threshold:
    """NATURAL, or as much more as it takes that a listing has PER_LISTING matches on average.

    `scaled` (P,) are all pairs above NATURAL of `num_rows` listings with any other.
    """
    most = int(PER_LISTING * num_rows)
    value = NATURAL if len(scaled) <= most else float(np.sort(scaled)[::-1][most])
    share = float((scaled > value).sum()) / max(num_rows, 1)
    reason = f"without labels: {share:.2f} matches a listing, of {num_rows:,} listings held against all"
    return Threshold(value, "sample", reason)


def warning(num_matches: NDArray[np.int64]) -> str:
    """A line when listings (N,) have more than MANY matches, empty when none has."""
    over = int((num_matches > MANY).sum())
    if not over:
        return ""
    return (
        f"warning: {over:,} listings have more than {MANY} matches, the most {int(num_matches.max()):,}; "
        "look at these groups first, or give a higher --threshold"
    )
