"""Probabilities from scores: sigmoid(score) as a model means it, and Platt's scaling, calibrated by labels. numpy only.

J. Platt, Probabilistic outputs for support vector machines (1999): P(same) = sigmoid(scale * score + bias). Scores are
float64 (N,), labels 0 or 1 (N,).
"""

from dataclasses import dataclass

import numpy as np

from tongkuan.base.metrics import Labels, Scores

MIN_LABELS = 20  # of each kind: ten for each of the two numbers fitted, an old rule of logistic regression
FOLDS = 5
MAX_STEPS = 100  # Newton takes about ten
LARGEST_EXPONENT = 700.0  # exp of more is no double


@dataclass(frozen=True, slots=True)
class Platt:
    """P(same) = sigmoid(scale * score + bias); scale >= 0, so a higher score is never less probable."""

    scale: float
    bias: float


AS_TRAINED = Platt(1.0, 0.0)


def probabilities(scores: Scores, scaling: Platt = AS_TRAINED) -> Scores:
    """float64 (N,), between 0 and 1; without a scaling those of scores that are log-odds."""
    with np.errstate(over="ignore"):
        log_odds = scaling.scale * scores + scaling.bias
    return sigmoid(log_odds)


def sigmoid(log_odds: Scores) -> Scores:
    """Of any number, infinities too, without an overflow."""
    found: Scores = 1 / (1 + np.exp(-np.clip(log_odds, -LARGEST_EXPONENT, LARGEST_EXPONENT)))
    return found


def shortage(labels: Labels) -> str:
    """Why labels are too few to calibrate by; empty when they suffice."""
    same = int(np.sum(labels == 1))
    different = int(np.sum(labels == 0))
    if min(same, different) >= MIN_LABELS:
        return ""
    return f"that takes {MIN_LABELS} pairs of each label, and here are {same} same and {different} different"


def fit_platt(scores: Scores, labels: Labels) -> Platt:
    """The scaling of the least cross-entropy to Platt's targets, which keep some doubt: (n + 1) / (n + 2), 1 / (n + 2).

    By Newton's steps, halved where they overshoot. Where a higher score does not speak for the same product the scale
    is 0, and every pair has the mean target. Sums are no matrix products, whose last bits depend on the machine's
    cores. ValueError without scores.
    """
    if not len(scores):
        raise ValueError("fit_platt needs at least one score")
    num_same = int(labels.sum())
    targets = np.where(labels == 1, (num_same + 1) / (num_same + 2), 1 / (len(labels) - num_same + 2))
    base = float(targets.mean())
    flat = Platt(0.0, float(np.log(base / (1 - base))))
    # By the largest first: squares of what is left neither overflow nor vanish.
    largest = float(np.abs(scores).max())
    units = scores / largest if largest else scores
    centre, spread = float(units.mean()), float(units.std())
    if num_same in (0, len(labels)) or largest * spread <= np.finfo(np.float64).tiny:
        return flat
    standard = (units - centre) / spread
    if standard[labels == 1].mean() <= standard[labels == 0].mean():  # the loss falls towards a negative scale
        return flat
    slope, offset = newton(standard, targets, 0.0, flat.bias)
    slope = max(slope, 0.0)  # where the means are all but equal, rounding may lead below
    return Platt(slope / (largest * spread), offset - slope * centre / spread)


def newton(standard: Scores, targets: Scores, slope: float, offset: float) -> tuple[float, float]:
    """(slope, offset) of the least cross-entropy of sigmoid(slope * standard + offset) to targets (N,)."""

    def loss(slope: float, offset: float) -> float:
        log_odds = slope * standard + offset
        return float(np.sum(np.logaddexp(0, log_odds) - targets * log_odds))

    before = loss(slope, offset)
    for _ in range(MAX_STEPS):
        guesses = sigmoid(slope * standard + offset)
        errors, weights = guesses - targets, guesses * (1 - guesses)
        by_slope, by_offset = float(np.sum(errors * standard)), float(np.sum(errors))
        square, cross, whole = (float(np.sum(weights * standard**power)) for power in (2, 1, 0))
        determinant = square * whole - cross * cross
        if not determinant > 0:
            break
        to_slope = (whole * by_slope - cross * by_offset) / determinant
        to_offset = (square * by_offset - cross * by_slope) / determinant
        size = 1.0
        while size and not (after := loss(slope - size * to_slope, offset - size * to_offset)) < before:
            size = size / 2 if size > 1e-9 else 0.0
        if not size:  # no step makes it better: this is the least
            break
        slope, offset, before = slope - size * to_slope, offset - size * to_offset, after
    return slope, offset


def cross_fitted(scores: Scores, labels: Labels) -> Scores:
    """Calibrated probabilities (N,), each by a scaling fitted to the four fifths of the pairs that lack it."""
    folds = np.random.default_rng(0).permutation(len(scores)) % FOLDS
    found: Scores = np.empty(len(scores))
    for fold in range(FOLDS):
        held_out = folds == fold
        if held_out.any():
            found[held_out] = probabilities(scores[held_out], fit_platt(scores[~held_out], labels[~held_out]))
    return found
