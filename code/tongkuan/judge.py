"""The judges' side: check a result file row by row, and score it by running its similarity.py as they do.

`./entrypoint.sh check --submit submit --pairs data/item_test_pair.jsonl`
`./entrypoint.sh score --submit submit --pairs data/item_valid_pair.jsonl`
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tongkuan.files import UserError
from tongkuan.metrics import Labels, Scores, quality_at
from tongkuan.records import Pair, Prediction, clip, read_pairs, read_predictions

SECONDS_A_PAIR = 0.05
START_SECONDS = 60

# Runs in a process of its own, isolated from our packages: similarity.py is a stranger's code. Its prints go to
# stderr, so that they cannot pass for scores.
RUNNER = """
import importlib.util, json, sys
similarity, result, scores = sys.argv[1:]
sys.stdout = sys.stderr
spec = importlib.util.spec_from_file_location("similarity", similarity)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with open(result, encoding="utf-8") as rows, open(scores, "w", encoding="utf-8") as out:
    for row in map(json.loads, filter(str.strip, rows)):
        score = module.compute(json.loads(row["src_item_emb"]), json.loads(row["tgt_item_emb"]))
        out.write(f"{float(score)!r} {float(row['threshold'])!r}\\n")
"""


def read_result(submit_dir: Path, pairs: Sequence[Pair], pairs_path: Path) -> list[Prediction]:
    """The result's rows, checked: every pair once and no other, one embedding an item, one size.

    Embeddings are dropped as soon as they are compared, so that memory grows with items, not with pairs.
    """
    path = submit_dir / "result.jsonl"
    if not (submit_dir / "similarity.py").is_file():
        raise UserError(f"{submit_dir / 'similarity.py'}: no such file; run ./entrypoint.sh predict")
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
    if missing := [key for key, count in wanted.items() if count]:
        raise UserError(f"{path}: {len(missing)} pairs are missing, first {clip(min(missing))}; predict again")
    return rows


def check(submit_dir: Path, pairs_path: Path) -> None:
    """Print that the result keeps the judges' contract, or raise UserError with the first line that does not."""
    pairs = read_pairs(pairs_path, labels="optional")
    rows = read_result(submit_dir, pairs, pairs_path)
    print(f"{submit_dir / 'result.jsonl'}: {len(rows)} rows keep the contract")
    print(f"next: ./entrypoint.sh score --submit {submit_dir} --pairs FILE_WITH_LABELS")


def score(submit_dir: Path, pairs_path: Path) -> float:
    """Print and return the F1 that the judges compute."""
    scores, labels, thresholds = judged(submit_dir, pairs_path)
    quality = quality_at(scores, labels, thresholds)
    print(f"{quality} on {len(scores)} pairs")
    return quality.f1


def judged(submit_dir: Path, pairs_path: Path) -> tuple[Scores, Labels, Scores]:
    """(scores, labels, thresholds), (N,) each in the result's order, of a checked result with known answers."""
    pairs = read_pairs(pairs_path)
    rows = read_result(submit_dir, pairs, pairs_path)
    scores, thresholds = run_similarity(submit_dir, len(rows))
    labels_by_pair = {(pair.left, pair.right): pair.label for pair in pairs}
    labels = np.array([labels_by_pair[row.left, row.right] for row in rows], dtype=np.int64)
    return scores, labels, thresholds


def run_similarity(submit_dir: Path, count: int) -> tuple[Scores, Scores]:
    """(scores, thresholds), float64 (N,) each, by similarity.py in a process of its own, bounded in time."""
    similarity = submit_dir / "similarity.py"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.jsonl"
        command = [sys.executable, "-IB", "-c", RUNNER, *map(str, (similarity, submit_dir / "result.jsonl", out))]
        seconds = START_SECONDS + SECONDS_A_PAIR * count
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{similarity}: not done after {seconds:.0f} s; make compute faster") from error
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"{similarity}: failed with exit code {done.returncode} ({clip(last, 120)}); mend it")
        table = np.loadtxt(out, dtype=np.float64, ndmin=2)
    if len(table) != count or not np.isfinite(table).all():
        raise UserError(f"{similarity}: gave {len(table)} scores for {count} pairs or something not finite; mend it")
    return table[:, 0], table[:, 1]
