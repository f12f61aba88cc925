"""Precision, recall and F1, the threshold sweep and bootstrap intervals: pure numpy, no model, no file.

A pair counts as "same" when its score is greater than the threshold. Scores are float64 (N,), labels 0 or 1 (N,).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Quality:
    """Counts and the figures that follow from them; a figure without a denominator is 0."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def precision(self) -> float:
        return ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        return ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    def __str__(self) -> str:
        return f"F1 {self.f1:.4f}  precision {self.precision:.4f}  recall {self.recall:.4f}"


def ratio(part: int, whole: int) -> float:
    """part / whole, 0 when there is no whole."""
    return part / whole if whole else 0.0


def quality_at(scores: Scores, labels: Labels, threshold: float | Scores) -> Quality:
    """Counts at one threshold, or at a threshold of each pair's own (N,)."""
    same, called = labels == 1, scores > threshold
    return Quality(
        int(np.sum(called & same)),
        int(np.sum(called & ~same)),
        int(np.sum(~called & same)),
        int(np.sum(~called & ~same)),
    )


def best_threshold(scores: Scores, labels: Labels, weights: Scores | None = None) -> tuple[float, float]:
    """(threshold, F1) of the highest F1 over every distinct way to cut, "all same" and "none same" included.

    A pair counts `weights` (N,) times, once without them.

    Ties in score are never split. A cut lies midway between neighbouring scores, so that rounding the last digit
    of a score does not change a verdict, or on the lower one where no double lies between; it is finite, as the
    scores are. Of equal F1 the cut nearest to 0, the threshold as trained, is taken.
    """
    if not len(scores):
        raise ValueError("best_threshold needs at least one score")
    order = np.argsort(-scores, kind="stable")
    sorted_scores, sorted_labels = scores[order], labels[order]
    last_of_score = np.append(np.flatnonzero(sorted_scores[1:] != sorted_scores[:-1]), len(scores) - 1)
    counts = np.ones_like(sorted_labels) if weights is None else weights[order]
    called = np.cumsum(counts)[last_of_score]
    true_positives = np.cumsum(sorted_labels * counts)[last_of_score]
    f1 = 2 * true_positives / np.maximum(called + true_positives[-1], 1)  # 2TP + FP + FN = called + positives
    distinct = sorted_scores[last_of_score]
    with np.errstate(over="ignore", invalid="ignore"):
        # Where a step of 1 is lost in rounding, the next double; below the least double nothing is finite.
        lowest = min(distinct[-1] - 1.0, np.nextafter(distinct[-1], -np.inf))
        below = np.append(distinct[1:], lowest)
        gaps = distinct - below
        middle = np.where(np.isfinite(gaps), below + gaps / 2, below / 2 + distinct / 2)
    cuts = np.concatenate([[distinct[0] + 1.0], np.where(middle < distinct, middle, below)])
    f1 = np.concatenate([[0.0], f1])
    f1[~np.isfinite(cuts)] = -1.0
    best = np.flatnonzero(f1 == f1.max())
    chosen = best[np.argmin(np.abs(cuts[best]))]
    return float(cuts[chosen]), float(f1[chosen])


def average_precision(scores: Scores, labels: Labels) -> float:
    """Area under the precision-recall steps, ties taken together; 0 when nothing is "same"."""
    positives = int(labels.sum())
    if not positives:
        return 0.0
    order = np.argsort(-scores, kind="stable")
    sorted_scores = scores[order]
    last_of_score = np.append(np.flatnonzero(sorted_scores[1:] != sorted_scores[:-1]), len(scores) - 1)
    true_positives = np.cumsum(labels[order])[last_of_score]
    recall_gain = np.diff(np.concatenate([[0], true_positives])) / positives
    return float(np.sum(recall_gain * true_positives / (last_of_score + 1)))


def intervals(
    quality: Quality, draws: int = 10_000, share: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of F1, precision and recall over pairs drawn with replacement, by name of the figure.

    The figures depend on the four counts alone, and the counts of pairs drawn with replacement are multinomial: so
    counts are drawn, in a time that does not grow with the pairs. Raises ValueError when there are none.
    """
    counts = np.array(dataclasses.astuple(quality))
    total = int(counts.sum())
    if not total:
        raise ValueError("intervals need at least one pair")
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, draws)
    hits, false_alarms, misses, _ = drawn.T
    figures = {
        "f1": (2 * hits, 2 * hits + false_alarms + misses),
        "precision": (hits, hits + false_alarms),
        "recall": (hits, hits + misses),
    }
    found = {}
    for name, (part, whole) in figures.items():
        low, high = np.quantile(part / np.maximum(whole, 1), [(1 - share) / 2, (1 + share) / 2])
        found[name] = (float(low), float(high))
    return found


def bootstrap(
    figure: Callable[[Scores, Labels], float],
    scores: Scores,
    labels: Labels,
    draws: int = 1000,
    share: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of figure(scores, labels) over pairs drawn with replacement.

    For figures that need the pairs themselves; those of one result at its threshold have `intervals`.
    """
    generator = np.random.default_rng(seed)
    values = np.empty(draws)
    for draw in range(draws):
        chosen = generator.integers(0, len(scores), len(scores))
        values[draw] = figure(scores[chosen], labels[chosen])
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
