"""The report's numbers: intervals, curves, calibration, two results side by side. numpy only, no file.

Scores are float64 (N,), labels 0 or 1 (N,); a pair is called the same when its score > the threshold.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.calibration import Platt, cross_fitted, fit_platt, probabilities, shortage
from tongkuan.base.metrics import Labels, Quality, Scores, bootstrap, intervals, quality_at

MAX_POINTS = 400  # of a curve: no screen shows more
CALIBRATION_BINS = 10
NORMAL_95 = 1.959964  # 97.5 % of a normal distribution lie below


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def estimates(scores: Scores, labels: Labels, threshold: float | Scores) -> dict[str, Estimate]:
    """F1, precision and recall with bootstrap intervals; the interval of F1 is the one that `evaluate` prints."""
    quality = quality_at(scores, labels, threshold)
    return {name: Estimate(getattr(quality, name), *ends) for name, ends in intervals(quality).items()}


def sweep(scores: Scores, labels: Labels) -> list[tuple[float, Quality]]:
    """(threshold, Quality) at no more than MAX_POINTS distinct scores, thresholds rising.

    Half of the points are even in rank and half in score, so that neither curve has gaps; the ends stay.
    """
    values = np.unique(scores)
    cuts = np.concatenate([[np.nextafter(values[0], -np.inf)], values])  # below the lowest: every pair is called
    if len(cuts) > MAX_POINTS:
        ranks = np.linspace(0, len(cuts) - 1, MAX_POINTS // 2).round().astype(np.int64)
        levels = np.searchsorted(cuts, np.linspace(cuts[0], cuts[-1], MAX_POINTS // 2)).clip(0, len(cuts) - 1)
        cuts = cuts[np.union1d(ranks, levels)]
    return [(float(cut), quality_at(scores, labels, float(cut))) for cut in cuts]


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of like predicted probability: mean prediction, observed share, its interval."""

    count: int
    predicted: float
    observed: Estimate


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well predicted probabilities fit the labels."""

    bins: list[Bin]
    """By tenths of the probability, those that hold pairs: what a chart shows."""
    error: float
    """Expected calibration error, over bins of equal counts as far as equal probabilities, never split, allow."""


def calibration(predictions: Scores, labels: Labels) -> Calibration:
    """Of probabilities (N,), by CALIBRATION_BINS bins."""
    tenths = np.minimum((predictions * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    ranks = np.searchsorted(np.sort(predictions), predictions)
    equal = binned(predictions, labels, ranks * CALIBRATION_BINS // len(ranks))
    error = sum(b.count * abs(b.observed.value - b.predicted) for b in equal) / len(labels)
    return Calibration(binned(predictions, labels, tenths), error)


def binned(predictions: Scores, labels: Labels, places: NDArray[np.int64]) -> list[Bin]:
    """The bins by each pair's place (N,), places rising."""
    bins = []
    for place in np.unique(places):
        inside = places == place
        count, same = int(inside.sum()), int(labels[inside].sum())
        predicted = float(predictions[inside].mean())
        bins.append(Bin(count, predicted, wilson(same, count)))
    return bins


@dataclass(frozen=True, slots=True)
class Probabilities:
    """P(same) of each pair, (N,), and what it rests on; None when scores are no log-odds and labels too few."""

    values: Scores | None
    scaling: Platt | None
    """Fitted to these pairs' labels; None where they are too few, and then values are sigmoid(score)."""
    shortage: str
    before: Calibration | None
    """Of sigmoid(score); None when scores are no log-odds."""
    after: Calibration | None
    """Calibrated, each pair by a scaling that was not fitted to it."""

    def __str__(self) -> str:
        if self.values is None:
            return f"no P(same): scores are no log-odds and not calibrated: {self.shortage}"
        if self.after is None:
            return f"P(same) is sigmoid(score), not calibrated: {self.shortage}"
        own = f", of sigmoid(score) {self.before.error:.4f}" if self.before else ""
        return f"P(same) is calibrated on these pairs: expected calibration error {self.after.error:.4f}{own}"


def calibrated(scores: Scores, labels: Labels, are_log_odds: bool) -> Probabilities:
    """Platt's scaling where the labels suffice for it, else the model's own probabilities."""
    own = probabilities(scores) if are_log_odds else None
    before = None if own is None else calibration(own, labels)
    if why := shortage(labels):
        return Probabilities(own, None, why, before, None)
    scaling = fit_platt(scores, labels)
    after = calibration(cross_fitted(scores, labels), labels)
    return Probabilities(probabilities(scores, scaling), scaling, "", before, after)


def wilson(hits: int, count: int) -> Estimate:
    """A share and Wilson's 95 % interval, which stays within 0 and 1."""
    share, z = hits / count, NORMAL_95
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, centre - reach), min(1.0, centre + reach))


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value: could `won` against `lost` be the throws of a fair coin? 1 when nothing differs."""
    count = won + lost
    # Whole numbers up to the last division, which Python rounds rightly however large they are.
    term = tail = 1
    for k in range(min(won, lost)):
        term = term * (count - k) // (k + 1)  # the binomial coefficient of count over k + 1
        tail += term
    chance: float = 2 * tail / 2**count
    return min(1.0, chance)


@dataclass(frozen=True, slots=True)
class Comparison:
    """This result beside another on the same pairs, each at its own threshold."""

    won: int
    """Right here, wrong there."""
    lost: int
    """Wrong here, right there."""
    p_value: float
    other_f1: float
    gain: Estimate
    """F1 here less F1 there; both are drawn from the same pairs."""
    changed: NDArray[np.bool_]
    """(N,): the verdicts differ."""


def compare(margins: Scores, other: Scores, labels: Labels) -> Comparison:
    """Compare verdicts by margins (N,) here and there."""
    called = np.stack([margins > 0, other > 0], axis=1)
    right = called == (labels == 1)[:, None]
    won, lost = (int(np.sum(right[:, side] & ~right[:, 1 - side])) for side in (0, 1))

    def f1_of(side: NDArray[np.float64], answers: Labels) -> float:
        return quality_at(side, answers, 0.5).f1

    def gain(verdicts: NDArray[np.float64], answers: Labels) -> float:
        return f1_of(verdicts[:, 0], answers) - f1_of(verdicts[:, 1], answers)

    verdicts = called.astype(np.float64)
    estimate = Estimate(gain(verdicts, labels), *bootstrap(gain, verdicts, labels))
    changed = called[:, 0] != called[:, 1]
    return Comparison(won, lost, mcnemar(won, lost), f1_of(verdicts[:, 1], labels), estimate, changed)
