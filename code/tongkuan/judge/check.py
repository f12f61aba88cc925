"""The judges' side: check a result file row by row, and score it by running its similarity.py as they do.

`./entrypoint.sh check --submit submit --pairs data/item_test_pair.jsonl`
`./entrypoint.sh score --submit submit --pairs data/item_valid_pair.jsonl`
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tongkuan.base.errors import UserError, clip, entrypoint, missing
from tongkuan.base.metrics import Labels, Scores, quality_at
from tongkuan.judge.guard import run_similarity
from tongkuan.records.items import Pair, read_pairs
from tongkuan.records.labels import contradiction_note
from tongkuan.records.result import Prediction, read_predictions

CONTRADICTION_ADVICE = "each is scored by its own label: delete such lines and predict again"


def read_result(submit_dir: Path, pairs: Sequence[Pair], pairs_path: Path) -> list[Prediction]:
    """The result's rows, checked: every pair once and no other, one embedding an item, one size.

    Embeddings are dropped as soon as they are compared, so that memory grows with items, not with pairs.
    """
    path = submit_dir / "result.jsonl"
    if not (submit_dir / "similarity.py").is_file():
        raise missing(submit_dir / "similarity.py", "no such file; run ./entrypoint.sh predict")
    wanted = Counter((pair.left, pair.right) for pair in pairs)
    embeddings: dict[str, bytes] = {}
    rows = []
    size = 0
    for where, row in read_predictions(path):
        key = (row.left, row.right)
        if key not in wanted:
            raise UserError(f"{where}: {clip(key)} is not a pair of {pairs_path}; predict these pairs")
        if not wanted[key]:
            raise UserError(f"{where}: pair {clip(key)} stands here too often; predict again")
        wanted[key] -= 1
        for item_id, embedding in ((row.left, row.left_embedding), (row.right, row.right_embedding)):
            size = size or len(embedding)
            if len(embedding) != size:
                raise UserError(
                    f"{where}: an embedding of {len(embedding)} numbers among some of {size}; predict again"
                )
            if embeddings.setdefault(item_id, embedding.tobytes()) != embedding.tobytes():
                raise UserError(f"{where}: item {clip(item_id)} has another embedding than before; predict again")
        empty = np.empty(0)
        rows.append(Prediction(row.left, empty, row.right, empty, row.threshold))
    if absent := [key for key, count in wanted.items() if count]:
        raise UserError(f"{path}: {len(absent)} pairs are missing, first {clip(min(absent))}; predict again")
    return rows


def check(submit_dir: Path, pairs_path: Path) -> None:
    """Print that the result keeps the judges' contract, or raise UserError with the first line that does not."""
    pairs = read_pairs(pairs_path, labels="optional")
    rows = read_result(submit_dir, pairs, pairs_path)
    print(f"{submit_dir / 'result.jsonl'}: {len(rows)} rows keep the contract")
    print(f"next: {entrypoint('score', '--submit', submit_dir, '--pairs', 'FILE_WITH_LABELS')}")


@dataclass(frozen=True, slots=True)
class Judged:
    """A checked result with known answers, (N,) each in the result's order, and lines on how it came about."""

    scores: Scores
    labels: Labels
    thresholds: Scores
    notes: list[str]


def score(submit_dir: Path, pairs_path: Path) -> float:
    """Print and return the F1 that the judges compute."""
    found = judged(submit_dir, pairs_path)
    quality = quality_at(found.scores, found.labels, found.thresholds)
    print(f"{quality} on {len(found.scores)} pairs")
    for note in found.notes:
        print(note)
    print(f"next: {entrypoint('report', '--submit', submit_dir, '--pairs', pairs_path)}")
    return quality.f1


def judged(submit_dir: Path, pairs_path: Path) -> Judged:
    """Score a result by its similarity.py. UserError when it breaks the contract or a pair has no label."""
    pairs = read_pairs(pairs_path)
    rows = read_result(submit_dir, pairs, pairs_path)
    scores, notes = run_similarity(submit_dir, len(rows), pairs_path)
    thresholds = np.array([row.threshold for row in rows], dtype=np.float64)
    return Judged(
        scores,
        labels_of(rows, pairs),
        thresholds,
        [*filter(None, [contradiction_note(pairs_path, pairs, CONTRADICTION_ADVICE)]), *notes],
    )


def labels_of(rows: Sequence[Prediction], pairs: Sequence[Pair]) -> Labels:
    """int64 (N,): a pair's first row has the label of where the pair is listed first, its second of the second."""
    listed = defaultdict[tuple[str, str], list[int | None]](list)
    for pair in reversed(pairs):
        listed[pair.left, pair.right].append(pair.label)
    return np.array([listed[row.left, row.right].pop() for row in rows], dtype=np.int64)
