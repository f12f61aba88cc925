"""Probabilities: rising with the score, nearer to the truth than over-sure scores, finite whatever the scores."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize  # scikit-learn brings it

from tongkuan.base.calibration import MIN_LABELS, Platt, cross_fitted, fit_platt, probabilities, shortage
from tongkuan.base.metrics import Labels, Scores
from tongkuan.report.figures import calibrated, calibration

ANY = st.lists(
    st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 1)), min_size=2, max_size=60
).map(lambda pairs: (np.array([score for score, _ in pairs]), np.array([label for _, label in pairs])))


def drawn(count: int, seed: int = 0, shift: float = 0.0) -> tuple[Scores, Labels]:
    """Log-odds, and labels that are as likely as they say."""
    generator = np.random.default_rng(seed)
    log_odds = generator.normal(shift, 2, count)
    return log_odds, (generator.random(count) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)


def loss(predictions: Scores, labels: Labels) -> float:
    """Cross-entropy."""
    return float(-np.mean(np.log(np.where(labels == 1, predictions, 1 - predictions))))


@pytest.mark.parametrize(("factor", "count"), [(3.0, 60), (0.2, 5_000), (400.0, 500), (-1.0, 200)])
def test_no_other_scaling_is_nearer_to_platts_targets(factor: float, count: int) -> None:
    log_odds, labels = drawn(count)
    scores = factor * log_odds + 1
    same = labels.sum()
    targets = np.where(labels == 1, (same + 1) / (same + 2), 1 / (count - same + 2))

    def cross_entropy(numbers: Scores) -> float:
        scale, bias = numbers[0] / np.abs(factor), numbers[1]
        return float(np.mean(np.logaddexp(0, scale * scores + bias) - targets * (scale * scores + bias)))

    found = fit_platt(scores, labels)
    oracle = minimize(cross_entropy, [0.0, 0.0], bounds=[(0, None), (None, None)], options={"ftol": 1e-14})
    assert cross_entropy(np.array([found.scale * np.abs(factor), found.bias])) <= oracle.fun + 1e-12


def test_over_sure_and_shifted_scores_come_back_to_the_odds_they_were_made_of() -> None:
    log_odds, labels = drawn(50_000)
    found = fit_platt(5 * log_odds + 3, labels)
    assert (found.scale, found.bias) == (pytest.approx(1 / 5, rel=0.05), pytest.approx(-3 / 5, abs=0.05))


def test_calibrated_the_error_is_smaller_on_pairs_that_it_was_not_fitted_to() -> None:
    log_odds, labels = drawn(1_000)
    scores, unseen = 4 * log_odds + 2, cross_fitted(4 * log_odds + 2, labels)
    assert calibration(unseen, labels).error < 0.5 * calibration(probabilities(scores), labels).error
    assert loss(unseen, labels) < loss(probabilities(scores), labels)
    assert np.array_equal(unseen, cross_fitted(scores, labels)), "the same every time"
    flipped = cross_fitted(scores, np.where(np.arange(1_000) == 7, 1 - labels, labels))
    assert flipped[7] == unseen[7] and np.any(flipped != unseen), "a pair's own label does not decide its probability"


def test_scores_that_are_log_odds_already_are_left_nearly_as_they_are() -> None:
    scores, labels = drawn(20_000, shift=-1)
    found = calibrated(scores, labels, are_log_odds=True)
    assert found.before is not None and found.after is not None and found.values is not None
    assert max(found.before.error, found.after.error) < 0.015
    assert found.values == pytest.approx(probabilities(scores), abs=0.02)


@given(ANY)
@example((np.array([0.0] * 6 + [-1.0]), np.ones(7, dtype=np.int64)))  # sums round to a slope below 0
def test_whatever_the_scores_probabilities_are_finite_and_never_fall_as_the_score_rises(
    case: tuple[Scores, Labels],
) -> None:
    scores, labels = case
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        scaling = fit_platt(scores, labels)
        for found in (probabilities(scores, scaling), probabilities(scores), cross_fitted(scores, labels)):
            assert np.all((found >= 0) & (found <= 1))
        assert scaling.scale >= 0 and np.isfinite([scaling.scale, scaling.bias]).all()
        rises = np.diff(probabilities(np.sort(scores), scaling))
        assert rises.min() > -1e-15, "but for the last bit of exp"


def test_scores_that_part_the_labels_perfectly_still_leave_a_doubt() -> None:
    scores, labels = np.repeat([-1e3, 1e3], 25), np.repeat([0, 1], 25)
    assert probabilities(np.array([-1e3, 1e3]), fit_platt(scores, labels)) == pytest.approx([1 / 27, 26 / 27])


@pytest.mark.parametrize(("scores", "labels"), [(np.zeros(50), np.arange(50) % 2), (np.arange(50.0), np.ones(50))])
def test_scores_that_tell_nothing_and_labels_of_one_kind_give_one_probability(scores: Scores, labels: Labels) -> None:
    found = fit_platt(scores, labels.astype(np.int64))
    assert found == Platt(0.0, pytest.approx(np.log((labels.sum() + 1) / (51 - labels.sum()))))  # type: ignore[arg-type]


def test_scores_turned_round_are_not_turned_back() -> None:
    log_odds, labels = drawn(500)
    assert fit_platt(-log_odds, labels).scale == 0
    assert probabilities(-log_odds, fit_platt(-log_odds, labels)) == pytest.approx(labels.mean(), abs=0.01)


@pytest.mark.parametrize(
    ("same", "different"), [(0, 0), (50, 0), (0, 50), (MIN_LABELS - 1, 500), (500, MIN_LABELS - 1)]
)
def test_too_few_labels_are_told_and_the_model_is_taken_at_its_word(same: int, different: int) -> None:
    labels = np.repeat([1, 0], [same, different])
    assert shortage(labels).endswith(f"here are {same} same and {different} different")
    scores = np.linspace(-3, 3, len(labels))
    if len(labels):
        found = calibrated(scores, labels, are_log_odds=True)
        assert found.scaling is None and found.after is None
        assert np.array_equal(found.values, 1 / (1 + np.exp(-scores)))  # type: ignore[arg-type]
        assert calibrated(scores, labels, are_log_odds=False).values is None, "no log-odds, no sigmoid of them"


def test_labels_just_enough_are_used() -> None:
    assert not shortage(np.repeat([1, 0], MIN_LABELS))


def test_the_error_is_that_of_bins_of_equal_counts_and_ties_stay_together() -> None:
    predictions = np.linspace(0, 0.1, 100)
    labels = (np.arange(100) % 10 == 0).astype(np.int64)  # a tenth of every bin, whatever was predicted
    expected = np.mean(np.abs(0.1 - predictions.reshape(10, 10).mean(axis=1)))
    assert calibration(predictions, labels).error == pytest.approx(expected)
    tied = np.full(100, 0.3)
    assert calibration(tied, np.sort(labels)).error == pytest.approx(0.2), "in any order of the pairs"
