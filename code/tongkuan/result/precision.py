"""What a lower precision costs: verdicts that are others than at fp32, counted on pairs that are encoded twice."""

from collections.abc import Sequence

import numpy as np

from tongkuan.base.metrics import Scores
from tongkuan.encode.encode import Embeddings, distinct_items, scores_of
from tongkuan.encode.inference import Inference
from tongkuan.records.items import Pair
from tongkuan.settings import Precision

SHARE, LEAST, MOST = 20, 32, 256  # a pair in so many is looked at, and so many at least and at most


def sample_of(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs from all over, the same ones every time."""
    count = min(len(pairs), max(LEAST, min(MOST, len(pairs) // SHARE)))
    return [pairs[number * len(pairs) // count] for number in range(count)]


def exact_embeddings(run: Inference, pairs: Sequence[Pair]) -> dict[str, Embeddings] | None:
    """Of the pairs' items at fp32, on every rank; None where the run is at fp32. Before anything else is encoded."""
    return run.encode("fp32", "fp32", distinct_items(pairs)) if run.precision != "fp32" and pairs else None


def cost_of(scores: Scores, exact: Scores, threshold: float, precision: Precision) -> str:
    """One line on scores (N,) beside those at fp32: verdicts that differ, and the largest change of a score."""
    changed = int(((scores > threshold) != (exact > threshold)).sum())
    advice = "; --precision fp32 changes none" if changed else ""
    return (
        f"{precision} against fp32: {changed} of {len(exact)} verdicts differ at {threshold:.4f}, "
        f"largest change of a score {np.abs(scores - exact).max():.2g}{advice}"
    )


def cost_line(
    pairs: Sequence[Pair],
    embeddings: dict[str, Embeddings],
    exact: dict[str, Embeddings],
    threshold: float,
    precision: Precision,
) -> str:
    """`cost_of` some pairs by the embeddings of their items."""
    return cost_of(scores_of(pairs, embeddings), scores_of(pairs, exact), threshold, precision)
