"""Precision, recall and F1 of a model on labelled pairs, at threshold 0 and at the chosen one, with intervals.

`./entrypoint.sh evaluate --data data --split valid --model weights/model.safetensors`
"""

from pathlib import Path

import numpy as np

from tongkuan.base.errors import entrypoint
from tongkuan.base.metrics import Labels, Scores, best_threshold, intervals, quality_at
from tongkuan.encode.blend import blend
from tongkuan.encode.encode import scores_of, slow_precision
from tongkuan.encode.inference import open_inference, read_labelled_pairs
from tongkuan.records.items import pair_file
from tongkuan.records.labels import contradiction_note, labels_of
from tongkuan.result.precision import cost_line, exact_embeddings, sample_of
from tongkuan.settings import Precision


def evaluate(
    data_dir: Path,
    split: str,
    model_path: Path,
    encode_batch: int | None,
    precision: Precision | None,
    threshold: float | None,
    cache_dir: Path | None = None,
    blended: bool = False,
) -> None:
    """Print the table."""
    reader = read_labelled_pairs
    with open_inference(data_dir, split, model_path, precision, encode_batch, cache_dir, reader) as run:
        # Who asks for a precision asks what it costs; neighbours of an item may be anywhere.
        held = run.pairs if precision is not None or blended else sample_of(run.pairs)
        exact = exact_embeddings(run, held)
        embeddings = run.encode("encode")
    if not run.ranks.is_first:
        return
    chosen = run.card.threshold if threshold is None else threshold
    if blended:
        embeddings, exact = blend(embeddings), exact and blend(exact)
    print(f"{model_path} on {len(run.pairs)} pairs of {split}, {run.precision}{', blended' if blended else ''}")
    scores = scores_of(run.pairs, embeddings)
    best = print_qualities(scores, labels_of(run.pairs), {"as trained": 0.0, "chosen": chosen})
    if exact is not None:
        print(cost_line(held, embeddings, exact, chosen, run.precision))
    notes = (contradiction_note(pair_file(data_dir, split), run.pairs), run.store.warning())
    for line in (slow_precision(run.ranks.device, run.precision), *notes):
        if line:
            print(line)
    words = ["--blend", "--threshold", f"{best:.6g}"] if blended and best is not None else []
    print(f"next: {entrypoint('predict', '--data', data_dir, '--model', model_path, *words)}")


def print_qualities(scores: Scores, labels: Labels, thresholds: dict[str, float]) -> float | None:
    """A row a threshold, F1 with its 95 % bootstrap interval, and the best that any threshold could reach.

    Returns the threshold of that best. Of pairs of one label it says nothing of the model; a line says so in its place.
    """
    print(f"{'threshold':>24} {'F1':>7} {'95 % interval':>17} {'precision':>10} {'recall':>7}")
    for name, threshold in thresholds.items():
        quality = quality_at(scores, labels, threshold)
        low, high = intervals(quality)["f1"]
        figures = f"{quality.f1:7.4f} [{low:.4f}, {high:.4f}] {quality.precision:10.4f} {quality.recall:7.4f}"
        print(f"{name + f' {threshold:.4f}':>24} {figures}")
    if len(np.unique(labels)) == 1:
        value = "1 below all scores" if labels[0] == 1 else "0 at any threshold"
        advice = f"add pairs of label {1 - labels[0]}, or name another --split"
        print(f"note: only pairs of label {labels[0]}: F1 is {value}, so none can be called the best here; {advice}")
        return None
    cut, f1 = best_threshold(scores, labels)
    print(f"{'best on these ' + f'{cut:.4f}':>24} {f1:7.4f}  (an upper bound: chosen on the pairs it is measured on)")
    return cut
