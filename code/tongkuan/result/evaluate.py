"""Precision, recall and F1 of a model on labelled pairs, at threshold 0 and at the chosen one, with intervals.

`./entrypoint.sh evaluate --data data --split valid --model weights/model.safetensors`
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tongkuan.base.errors import entrypoint
from tongkuan.base.files import check_writable
from tongkuan.base.metrics import Labels, Scores, best_threshold, intervals, quality_at
from tongkuan.encode.cache import open_cache
from tongkuan.encode.encode import distinct_items, encode, scores_of, settle
from tongkuan.encode.store import open_store
from tongkuan.model.modelfile import load_model
from tongkuan.ranks.group import ranks
from tongkuan.records.items import Pair, item_file, pair_file, read_items, read_pairs
from tongkuan.records.labels import contradiction_note
from tongkuan.settings import DataSettings, Precision


def labels_of(pairs: Sequence[Pair]) -> Labels:
    """int64 (N,) of labelled pairs."""
    return np.array([pair.label for pair in pairs], dtype=np.int64)


def evaluate(
    data_dir: Path,
    split: str,
    model_path: Path,
    settings: DataSettings,
    precision: Precision,
    threshold: float | None,
    cache_dir: Path | None = None,
) -> None:
    """Print the table."""
    if cache_dir is not None:
        check_writable(cache_dir)
    model, card = load_model(model_path)
    items_path = item_file(data_dir, split)
    items = read_items(items_path)
    pairs = read_pairs(pair_file(data_dir, split), items, items_path=items_path)
    store = open_store(items, data_dir, card.settings, card.open_tokenizer(), cache_mb=0)
    with ranks() as fellows:
        cache = open_cache(cache_dir, model_path, precision, fellows.device)
        item_ids = distinct_items(pairs)
        exact = None
        if precision != "fp32":  # before the weights are halved
            exact_cache = open_cache(cache_dir, model_path, "fp32", fellows.device)
            settle(model, fellows.device, "fp32")
            exact = encode(model, store, item_ids, settings, fellows, "fp32", "fp32", exact_cache)
        warning = settle(model, fellows.device, precision)
        embeddings = encode(model, store, item_ids, settings, fellows, precision, cache=cache)
        if not fellows.is_first:
            return
    chosen = card.threshold if threshold is None else threshold
    print(f"{model_path} on {len(pairs)} pairs of {split}, {precision}")
    scores = scores_of(pairs, embeddings)
    print_qualities(scores, labels_of(pairs), {"as trained": 0.0, "chosen": chosen})
    if exact is not None:
        print(differences(scores, scores_of(pairs, exact), chosen, precision))
    for line in (warning, contradiction_note(pair_file(data_dir, split), pairs)):
        if line:
            print(line)
    if complaint := store.complaint():
        print(complaint)
    print(f"next: {entrypoint('predict', '--data', data_dir, '--model', model_path)}")


def differences(scores: Scores, exact: Scores, threshold: float, precision: Precision) -> str:
    """One line on what a lower precision costs: verdicts that differ from fp32, and the largest change of a score."""
    changed = int(((scores > threshold) != (exact > threshold)).sum())
    return (
        f"{precision} against fp32: {changed} of {len(exact)} verdicts differ at {threshold:.4f}, "
        f"largest change of a score {np.abs(scores - exact).max():.2g}"
    )


def print_qualities(scores: Scores, labels: Labels, thresholds: dict[str, float]) -> None:
    """A row a threshold, F1 with its 95 % bootstrap interval, and the best that any threshold could reach.

    Of pairs of one label that best says nothing of the model; a line says so in its place.
    """
    print(f"{'threshold':>24} {'F1':>7} {'95 % interval':>17} {'precision':>10} {'recall':>7}")
    for name, threshold in thresholds.items():
        quality = quality_at(scores, labels, threshold)
        low, high = intervals(quality)["f1"]
        figures = f"{quality.f1:7.4f} [{low:.4f}, {high:.4f}] {quality.precision:10.4f} {quality.recall:7.4f}"
        print(f"{name + f' {threshold:.4f}':>24} {figures}")
    if len(np.unique(labels)) == 1:
        told = "1 below all scores" if labels[0] == 1 else "0 at any threshold"
        advice = f"add pairs of label {1 - labels[0]}, or name another --split"
        print(f"note: only pairs of label {labels[0]}: F1 is {told}, so none can be called the best here; {advice}")
        return
    cut, f1 = best_threshold(scores, labels)
    print(f"{'best on these ' + f'{cut:.4f}':>24} {f1:7.4f}  (an upper bound: chosen on the pairs it is measured on)")
