"""The threshold of the highest *smoothed* F1: how pairs would fall on either side, had others been drawn. numpy only.

F1 on few hundred pairs is a ragged curve, flat about its top: where its highest tooth stands is chance. So each score
counts as a bell about it, by a kernel estimate of the distribution of scores of same and of different pairs, as for
the cut-off of a medical test in R. Fluss, D. Faraggi and B. Reiser (Biometrical Journal 47, 2005).
"""

import math

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.calibration import sigmoid
from tongkuan.base.metrics import Labels, Scores, best_threshold, quality_at

MOST_CUTS = 500  # that are tried: the smoothed curve is the same between
NORMAL_IQR = 1.349  # standard deviations between the quartiles of a normal distribution
LOGISTIC_DEVIATION = math.pi / math.sqrt(3)  # of the logistic distribution of scale 1


def smoothed_threshold(scores: Scores, labels: Labels) -> tuple[float, float]:
    """(threshold, F1 that is reached there) of float64 (N,) scores and labels (N,), 0 or 1.

    Of equal smoothed F1 the cut nearest to 0, the threshold as trained, is taken. With one distinct score, or of
    labels that are all the same, as best_threshold. ValueError without scores.
    """
    distinct = np.unique(scores)
    if len(distinct) < 2 or len(np.unique(labels)) < 2:
        return best_threshold(scores, labels)
    same = labels == 1
    scale = np.where(same, bandwidth(scores[same]), bandwidth(scores[~same])) / LOGISTIC_DEVIATION
    middles = distinct[:-1] + np.diff(distinct) / 2
    chosen = np.unique(np.linspace(0, len(middles) - 1, min(len(middles), MOST_CUTS)).round().astype(np.int64))
    cuts = np.concatenate([[distinct[0] - 1.0], middles[chosen]])
    f1 = np.array([smoothed_f1(scores, same, scale, cut) for cut in cuts])
    best = cuts[f1 == f1.max()]
    threshold = float(best[np.argmin(np.abs(best))])
    return threshold, quality_at(scores, labels, threshold).f1


def bandwidth(scores: Scores) -> float:
    """Deviation of the bell about each of (N,) scores of one label, above 0.

    Least mean square error of the distribution function when it is normal: (4 / N)^(1/3) of its deviation, in which a
    few far scores count little (B. Hansen, Bandwidth selection for nonparametric distribution estimation, 2004).
    """
    low, high = np.quantile(scores, [0.25, 0.75])
    deviation, robust = float(scores.std()), float(high - low) / NORMAL_IQR
    spread = min(deviation, robust) if robust > 0 else deviation
    rate: float = (4 / len(scores)) ** (1 / 3)
    return max(rate * spread, float(np.finfo(np.float64).tiny))


def smoothed_f1(scores: Scores, same: NDArray[np.bool_], scale: Scores, cut: float) -> float:
    """F1 at a cut when each pair is called the same to the share of its bell that lies above."""
    with np.errstate(over="ignore"):
        called = sigmoid((scores - cut) / scale)
    found: float = 2 * called[same].sum() / (called.sum() + same.sum())
    return found
