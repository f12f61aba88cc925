"""learn/threshold.py: the cut of the highest smoothed F1 is better on other pairs than the one that was best on few."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_train import metrics_of
from worlds import read_jsonl, tiny_settings, write_jsonl

from tongkuan.base.metrics import Labels, Scores, best_threshold, quality_at
from tongkuan.learn.threshold import smoothed_threshold
from tongkuan.learn.train import train
from tongkuan.model.modelfile import load_model
from tongkuan.records.items import pair_file

FEW = st.lists(
    st.tuples(st.sampled_from([-3.5, -1.0, 0.0, 0.5, 2.0, 1e30]), st.integers(0, 1)), min_size=1, max_size=30
).map(lambda pairs: (np.array([score for score, _ in pairs]), np.array([label for _, label in pairs], dtype=np.int64)))


def drawn(count: int, seed: int) -> tuple[Scores, Labels]:
    """Scores of pairs of which a third are the same product; those score 2.5 more, on average."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(count) < 1 / 3).astype(np.int64)
    return generator.normal(2.5 * labels - 1.5, 1.5), labels


def test_on_other_pairs_it_is_better_than_the_cut_that_is_best_on_few() -> None:
    others, gains, distances = drawn(100_000, 10_000), [], []
    ideal, _ = best_threshold(*others)
    for seed in range(100):
        few = drawn(150, seed)
        cuts = [choose(*few)[0] for choose in (smoothed_threshold, best_threshold)]
        smoothed, best = (quality_at(*others, cut).f1 for cut in cuts)
        gains.append(smoothed - best)
        distances.append(np.abs(np.array(cuts) - ideal))
    assert np.mean(gains) > 0.005
    nearer, farther = np.mean(distances, axis=0)
    assert nearer < 0.7 * farther


def test_of_many_pairs_it_loses_nothing() -> None:
    scores, labels = drawn(50_000, 0)
    _, reached = smoothed_threshold(scores, labels)
    _, best = best_threshold(scores, labels)
    assert best - 0.001 < reached <= best


@given(FEW)
def test_the_f1_told_is_the_f1_reached_by_a_finite_cut(pairs: tuple[Scores, Labels]) -> None:
    threshold, f1 = smoothed_threshold(*pairs)
    assert np.isfinite(threshold) and f1 == quality_at(*pairs, threshold).f1


@pytest.mark.parametrize("factor", [1e-6, 250.0])
def test_it_does_not_depend_on_the_unit_of_scores(factor: float) -> None:
    scores, labels = drawn(300, 1)
    threshold, f1 = smoothed_threshold(scores, labels)
    assert smoothed_threshold(factor * scores, labels) == (pytest.approx(factor * threshold), f1)


@pytest.mark.parametrize(
    ("scores", "labels"), [([0.5, 0.5, 0.5], [1, 0, 1]), ([0.1, 0.7], [1, 1]), ([0.1, 0.7], [0, 0])]
)
def test_where_nothing_is_to_be_smoothed_it_is_the_best(scores: list[float], labels: list[int]) -> None:
    pairs = np.array(scores), np.array(labels)
    assert smoothed_threshold(*pairs) == best_threshold(*pairs)


def test_where_two_scores_tell_all_the_cut_lies_between_them() -> None:
    threshold, f1 = smoothed_threshold(np.array([-2.0] * 5 + [4.0] * 3), np.array([0] * 5 + [1] * 3))
    assert -2 < threshold < 4 and f1 == 1


def test_a_model_has_it_when_asked_and_says_nothing_of_it_when_not(data: Path, tmp_path: Path) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    rows = read_jsonl(pair_file(own, "valid"))
    for row in rows[::3]:  # or any cut between all of one label and all of the other would do
        row["item_label"] = str(1 - int(row["item_label"]))
    write_jsonl(pair_file(own, "valid"), rows)
    cards = {}
    for choice in ("best", "smoothed"):
        settings = tiny_settings(tmp_path, f"train.threshold={choice}", "train.steps=3")
        train(settings, own, tmp_path / f"{choice}.run", tmp_path / choice)
        _, cards[choice] = load_model(tmp_path / choice)
        (row,) = [row for row in metrics_of(tmp_path / f"{choice}.run") if "threshold" in row]
        assert (cards[choice].threshold, cards[choice].facts["valid_f1"]) == (row["threshold"], row["valid_f1"])
    assert cards["smoothed"].threshold != cards["best"].threshold
    assert cards["smoothed"].facts["train"]["threshold"] == "smoothed"
    assert "threshold" not in cards["best"].facts["train"], "files of a published recipe keep their bytes"
