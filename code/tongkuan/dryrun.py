"""What `train` and `predict` would do: counts, memory, and the time that a short probe lets expect. Writes nothing.

`./entrypoint.sh train --preset small --data data --dry-run`
"""

import resource
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tongkuan.base.machine import available_cores
from tongkuan.encode.encode import Embeddings, batch_size, distinct_items, encode, settle
from tongkuan.encode.store import ItemStore, open_store
from tongkuan.learn.memory import describe_memory, mebibytes
from tongkuan.learn.train import Learner, Loaded, check_batch, load_parts, load_task
from tongkuan.model.modelfile import Run, load_model
from tongkuan.model.towers import TwoTowers, build, checkpoint_activations
from tongkuan.ranks.group import Ranks, ranks
from tongkuan.records.items import (
    Pair,
    components,
    format_embedding,
    item_file,
    pair_file,
    prediction_row,
    read_items,
    read_pairs,
)
from tongkuan.result.evaluate import labels_of
from tongkuan.settings import DataSettings, Precision, Settings

NEXT = "next: the same command without --dry-run"
PROBE_STEPS = 5
PROBE_BATCHES = 5  # a core or a GPU


def plan_training(settings: Settings, data_dir: Path, run_dir: Path) -> None:
    """Print what `train` with these settings would do. UserError as train's."""
    task, options = load_task(settings, data_dir), settings.train
    with ranks() as fellows:
        check_batch(options, fellows)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        model = build(settings.model, task.card.text_config, pretrained=True).to(fellows.device)
        if options.checkpoint_activations:
            checkpoint_activations(model)
        learner = Learner(model, settings, fellows)
        lines = [
            describe_pairs("train", task.train_pairs, task.train_store),
            describe_pairs("valid", task.valid_pairs, task.valid_store),
            *(task.train_store.coverage() if fellows.is_first else ()),
            describe_memory(model, learner.optimizer, settings, fellows) if fellows.is_first else "",
        ]
        done = Run(run_dir, settings, fellows).resume(model, learner.optimizer, learner.scaler)
        step_seconds = probe_steps(learner, load_parts(task, settings, fellows, done), done, fellows)
        item_ids = distinct_items(task.valid_pairs)
        _, item_seconds = probe_items(model, task.valid_store, item_ids, settings.data, fellows, options.precision)
    if not fellows.is_first:
        return
    left = options.steps - done
    epochs = options.steps * options.pairs / len(task.train_pairs)
    validations = sum(
        step % options.validate_every == 0 or step == options.steps for step in range(done + 1, options.steps + 1)
    )
    validation = item_seconds * len(item_ids)
    start = f"{run_dir} goes on after step {done:,}: " if done else ""
    lines += [
        f"steps: {start}{left:,} of {options.pairs} pairs; ranks {fellows.count}; each pair is met {epochs:.3g} times",
        f"time: {duration(left * step_seconds + validations * validation)}: {step_seconds:.3g} s a step, "
        f"{validations} validations of {validation:.3g} s; from a probe of {PROBE_STEPS} steps",
        *task.notes,
    ]
    print("\n".join([*lines, NEXT]))


def plan_prediction(data_dir: Path, split: str, model_path: Path, settings: DataSettings, precision: Precision) -> None:
    """Print what `predict` would do. UserError as predict's."""
    model, card = load_model(model_path)
    items_path = item_file(data_dir, split)
    items = read_items(items_path)
    pairs = read_pairs(pair_file(data_dir, split), items, labels="optional", items_path=items_path)
    store = open_store(items, data_dir, card.settings, card.open_tokenizer(), cache_mb=0)
    item_ids = distinct_items(pairs)
    with ranks() as fellows:
        warning = settle(model, fellows.device, precision)
        embeddings, item_seconds = probe_items(model, store, item_ids, settings, fellows, precision)
    if not fellows.is_first:
        return
    text = float(np.mean([len(format_embedding(numbers)) for numbers in embeddings.values()]))
    bare = float(np.mean([len(prediction_row(p.left, b"", p.right, b"", card.threshold)) for p in pairs[:1000]]))
    size = len(pairs) * (bare + 2 * text)
    held = len(item_ids) * (8 * card.settings.embedding_size + text)
    lines = [
        describe_pairs(split, pairs, store),
        *store.coverage(),
        f"memory of a rank in MiB: {mebibytes(peak_bytes(fellows.device))} at its peak in the probe, "
        f"{mebibytes(int(held))} more for embeddings and rows",
        f"time: {duration(item_seconds * len(item_ids))} to encode: {1000 * item_seconds:.3g} ms an item; from a probe "
        f"of {len(embeddings)} items",
        f"result: {len(pairs):,} rows, {tqdm.format_sizeof(size, 'B')}",
    ]
    print("\n".join([*lines, *filter(None, [warning]), NEXT]))


def describe_pairs(split: str, pairs: Sequence[Pair], store: ItemStore) -> str:
    """Counts of a split's pairs, its items and what they lack."""
    item_ids = distinct_items(pairs)
    labels = labels_of(pairs) if all(pair.label is not None for pair in pairs) else None
    same = f", {labels.mean():.1%} the same product," if labels is not None else ""
    missing = sum(
        not (name := store.picture(item_id)) or not (store.image_dir / name).is_file() for item_id in item_ids
    )
    groups = len(components(pairs))
    return (
        f"{split}: {len(pairs):,} pairs{same} of {len(item_ids):,} items in {groups:,} components; "
        f"items without a picture file: {missing:,}"
    )


def probe_steps(learner: Learner, loaded: Generator[Loaded], first_step: int, fellows: Ranks) -> float:
    """Seconds a training step: the median of PROBE_STEPS but the first, which warms up; 0 when no step is left."""
    count, seconds = min(PROBE_STEPS, learner.settings.train.steps - first_step), []
    learner.model.train()
    with closing(loaded), tqdm(total=count, desc="probe", unit="step", disable=quiet(fellows)) as progress:
        for step in range(first_step, first_step + count):
            started = time.perf_counter()
            loss, _ = learner.step(step, loaded)
            float(loss)  # waits for the device
            seconds.append(time.perf_counter() - started)
            progress.update()
    return float(np.median(seconds[1:] or seconds or [0.0]))


def probe_items(
    model: TwoTowers,
    store: ItemStore,
    item_ids: Sequence[str],
    settings: DataSettings,
    fellows: Ranks,
    precision: Precision,
) -> tuple[dict[str, Embeddings], float]:
    """Embeddings of items from all over, and the seconds that an item took, reading it included."""
    lanes = 1 if fellows.device.type == "cuda" else available_cores()
    size = batch_size(settings, store.settings, fellows.device) * lanes * fellows.count
    chosen = list(item_ids[:: max(1, len(item_ids) // (PROBE_BATCHES * size))])[: PROBE_BATCHES * size]
    model.eval()
    encode(model, store, chosen[-size:], settings, fellows, precision, "warm up")
    started = time.perf_counter()
    embeddings = encode(model, store, chosen, settings, fellows, precision, "probe")
    return embeddings, (time.perf_counter() - started) / len(chosen)


def quiet(fellows: Ranks) -> bool | None:
    """tqdm's `disable`: on the first rank as the terminal has it."""
    return None if fellows.is_first else True


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has had, of the GPU's when there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    """As tqdm writes it: H:MM:SS or MM:SS."""
    return str(tqdm.format_interval(round(seconds)))
