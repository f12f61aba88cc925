"""What the labels of pairs leave open: only one of the two, or both of the same pair. No model, no tensor."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.errors import clip
from tongkuan.records.items import Pair
from tongkuan.records.rows import read_rows

ADVICE = "delete such lines, or split train and valid by ./entrypoint.sh split, which leaves them out"
NAMES = {0: "different", 1: "the same product"}


def pair_key(pair: Pair) -> tuple[str, str]:
    """The same for a pair written either way round."""
    return min((pair.left, pair.right), (pair.right, pair.left))


def only_label(pairs: Sequence[Pair]) -> int | None:
    """The label that all labelled pairs have, None when both occur or none does."""
    labels = {pair.label for pair in pairs} - {None}
    return labels.pop() if len(labels) == 1 else None


def contradictory(pairs: Sequence[Pair]) -> list[int]:
    """Indices at which a label contradicts the pairs before it, or calls an item different from itself."""
    expected_labels: dict[tuple[str, str], int] = {}
    found = []
    for index, pair in enumerate(pairs):
        if pair.label is None:
            continue
        expected = 1 if pair.left == pair.right else expected_labels.setdefault(pair_key(pair), pair.label)
        if pair.label != expected:
            found.append(index)
    return found


def contradiction_note(path: Path, pairs: Sequence[Pair], advice: str = ADVICE) -> str:
    """A line on the pairs of `path`, in its order, whose labels contradict each other; empty when none do."""
    found = contradictory(pairs)
    if not found:
        return ""
    pair = pairs[found[0]]
    number, _ = next(islice(read_rows(path, "name a file with pairs"), found[0], None))
    if pair.left == pair.right:
        what = f"item {clip(pair.left)} is labelled different from itself"
    else:
        what = (
            f"{clip(pair.left)} and {clip(pair.right)} are labelled {pair.label} here, {1 - (pair.label or 0)} before"
        )
    return (
        f"note: {path}:{number}: {what}; pairs that contradict themselves or others: {len(found):,}, used as they "
        f"stand; {advice}"
    )


def labels_of(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """int64 (N,) of labelled pairs."""
    return np.array([pair.label for pair in pairs], dtype=np.int64)
