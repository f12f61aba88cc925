"""metrics.py against scikit-learn and a brute-force loop."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from tongkuan.base.metrics import Quality, average_precision, best_threshold, bootstrap, intervals, quality_at

# Few distinct values: ties are the rule.
CASES = st.lists(
    st.tuples(st.sampled_from([-2.0, -1.0, 0.0, 0.25, 1.5, 3.0]), st.integers(0, 1)), min_size=1, max_size=30
)


def arrays(case: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s for s, _ in case]), np.array([y for _, y in case], dtype=np.int64)


@given(CASES, st.sampled_from([-3.0, 0.0, 0.25, 5.0]))
def test_figures_are_those_of_scikit_learn(case: list[tuple[float, int]], threshold: float) -> None:
    scores, labels = arrays(case)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, (scores > threshold).astype(int), average="binary", zero_division=0
    )
    quality = quality_at(scores, labels, threshold)
    assert (quality.precision, quality.recall, quality.f1) == pytest.approx((precision, recall, f1))


@given(CASES)
def test_no_threshold_beats_the_best_one(case: list[tuple[float, int]]) -> None:
    scores, labels = arrays(case)
    threshold, f1 = best_threshold(scores, labels)
    cuts = [scores.min() - 1, scores.max() + 1, *((a + b) / 2 for a in scores for b in scores)]
    assert f1 == pytest.approx(max(quality_at(scores, labels, cut).f1 for cut in cuts))
    assert quality_at(scores, labels, threshold).f1 == pytest.approx(f1), "the F1 told is the F1 reached"


HUGE, TINY = 1.7976931348623157e308, 5e-324
CLOSE = st.floats(allow_nan=False, allow_infinity=False).flatmap(
    lambda x: st.lists(
        st.tuples(
            st.sampled_from([x, math.nextafter(x, math.inf), math.nextafter(x, -math.inf), -x]), st.integers(0, 1)
        ),
        min_size=1,
        max_size=8,
    ).map(lambda pairs: [(float(np.clip(score, -HUGE, HUGE)), label) for score, label in pairs])
)


@given(CLOSE)
@example([(1.0, 1), (0.9999999999999999, 0)])  # midway rounds onto the upper
@example([(TINY, 1), (0.0, 0), (-TINY, 0)])
@example([(1e17, 1), (1e17, 0)])  # one less is the same double
@example([(HUGE, 1), (-HUGE, 0)])  # their distance is no double
@example([(-HUGE, 1), (-HUGE, 1)])  # nothing finite lies below
def test_the_f1_told_is_reached_however_close_or_far_scores_lie(case: list[tuple[float, int]]) -> None:
    scores, labels = arrays(case)
    threshold, f1 = best_threshold(scores, labels)
    assert np.isfinite(threshold) and quality_at(scores, labels, threshold).f1 == f1
    cuts = [math.nextafter(scores.min(), -math.inf), *scores]
    assert f1 == max(quality_at(scores, labels, cut).f1 for cut in cuts if np.isfinite(cut))


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 1)), min_size=1, max_size=30))
def test_ordinary_thresholds_are_those_of_before_to_the_bit(case: list[tuple[float, int]]) -> None:
    scores, labels = arrays(case)
    distinct = np.unique(scores)
    middle = [low + (high - low) / 2 for low, high in itertools.pairwise(distinct)]
    if any(cut == high for cut, high in zip(middle, distinct[1:], strict=False)):
        return  # told and reached differed
    cuts = np.array([distinct[-1] + 1, *middle[::-1], (distinct[0] - 1) + (distinct[0] - (distinct[0] - 1)) / 2])
    f1 = np.array([quality_at(scores, labels, cut).f1 for cut in cuts])
    best = cuts[f1 == f1.max()]
    assert best_threshold(scores, labels)[0] == best[np.argmin(np.abs(best))]


def test_the_best_threshold_keeps_clear_of_every_score() -> None:
    threshold, _ = best_threshold(np.array([3.0, 1.0, -1.0]), np.array([1, 1, 0]))
    assert threshold == 0.0


def test_all_the_same_is_among_the_choices() -> None:
    scores = np.array([2.0, 1.0, 0.5])
    threshold, f1 = best_threshold(scores, np.array([0, 0, 1]))
    assert threshold < 0.5 and f1 == 0.5


def test_of_equal_thresholds_the_one_nearest_to_zero_is_taken() -> None:
    threshold, f1 = best_threshold(np.array([5.0, 0.5, -0.5]), np.array([0, 0, 0]))
    assert f1 == 0.0 and abs(threshold) <= 0.5


def test_no_scores_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one score"):
        best_threshold(np.empty(0), np.empty(0, dtype=np.int64))


@given(CASES)
def test_average_precision_is_that_of_scikit_learn(case: list[tuple[float, int]]) -> None:
    scores, labels = arrays(case)
    expected = average_precision_score(labels, scores) if labels.any() else 0.0
    assert average_precision(scores, labels) == pytest.approx(expected)


def test_a_bootstrap_interval_holds_the_figure_narrows_with_data_and_repeats() -> None:
    generator = np.random.default_rng(1)

    def interval(count: int) -> tuple[float, float, float]:
        labels = generator.integers(0, 2, count)
        scores = labels + generator.normal(0, 0.8, count)
        figure = lambda s, y: quality_at(s, y, 0.5).f1  # noqa: E731
        low, high = bootstrap(figure, scores, labels, draws=200)
        assert (low, high) == bootstrap(figure, scores, labels, draws=200)
        return low, figure(scores, labels), high

    few, many = interval(100), interval(2000)
    assert few[0] <= few[1] <= few[2] and many[0] <= many[1] <= many[2]
    assert many[2] - many[0] < few[2] - few[0]


@pytest.mark.parametrize(
    "counts", [(900, 40, 60, 4000), (5, 3, 2, 490), (3000, 0, 0, 0), (0, 7, 9, 2000), (0, 0, 0, 50), (1, 0, 400, 9)]
)
def test_intervals_by_counts_are_those_of_drawing_pairs(counts: tuple[int, int, int, int]) -> None:
    quality = Quality(*counts)
    called = np.repeat([1.0, 1.0, 0.0, 0.0], counts)
    labels = np.repeat([1, 0, 1, 0], counts)
    found = intervals(quality, draws=200_000)
    for name, (low, high) in found.items():
        figure = lambda s, y, name=name: getattr(quality_at(s, y, 0.5), name)  # noqa: E731
        expected = bootstrap(figure, called, labels, draws=2000)
        spread = high - low
        assert low <= getattr(quality, name) <= high
        # What 2,000 draws leave to chance in an end: a twentieth of the interval is four standard errors and more.
        assert (low, high) == pytest.approx(expected, abs=1e-9 + 0.05 * spread + ratio_step(quality, name))
    assert intervals(quality) == intervals(quality), "the same counts give the same interval"


def ratio_step(quality: Quality, name: str) -> float:
    """How far neighbouring values of a figure lie apart, where few counts make it coarse."""
    wholes = {"precision": quality.true_positives + quality.false_positives}
    whole = wholes.get(name, quality.true_positives + quality.false_negatives)
    return 1 / max(whole, 1) if whole < 50 else 0.0


def test_intervals_need_pairs_and_take_no_longer_for_many() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        intervals(Quality(0, 0, 0, 0))
    started = time.process_time()
    low, high = intervals(Quality(10**11, 10**10, 10**10, 10**12))["f1"]
    assert time.process_time() - started < 1 and high - low < 1e-4


def test_a_threshold_of_each_pairs_own_is_taken_pair_by_pair() -> None:
    quality = quality_at(np.array([1.0, 1.0]), np.array([1, 1]), np.array([0.5, 1.0]))
    assert (quality.true_positives, quality.false_negatives) == (1, 1), "greater than, not equal"
