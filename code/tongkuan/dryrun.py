"""What `train`, `predict` and `match run` would do: counts, memory, and the time by a short probe. Writes nothing.

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

from tongkuan.encode.encode import Embeddings, batch_size, distinct_items, encode, lanes_of, prepare, slow_precision
from tongkuan.encode.inference import open_inference, read_no_pairs
from tongkuan.encode.store import ItemStore
from tongkuan.learn.batches import BatchSampler
from tongkuan.learn.dataloader import Loaded, Task, load_parts
from tongkuan.learn.features import BYTES, FeatureStore, features_of
from tongkuan.learn.run import Run
from tongkuan.learn.step import TrainStep
from tongkuan.learn.train import open_training
from tongkuan.match.options import Options
from tongkuan.match.search import MULTIPLY_ADDS, plan_search
from tongkuan.model.one import OneTower
from tongkuan.model.trunk import ItemModel
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair, components
from tongkuan.records.labels import labels_of
from tongkuan.records.result import format_embedding, prediction_row
from tongkuan.settings import DataSettings, Precision, Settings

NEXT = "next: the same command without --dry-run"
PROBE_STEPS = 5
PROBE_BATCHES = 5  # a core or a GPU


def dry_run_training(settings: Settings, data_dir: Path, run_dir: Path) -> None:
    """Print what `train` with these settings would do. UserError as train's."""
    options = settings.train
    with open_training(settings, data_dir) as (settings, task, model, ranks):
        step = TrainStep(model, settings, ranks)
        run = Run(run_dir, settings, ranks)
        fits = run.is_new and isinstance(model, OneTower)
        done = run.resume(model, step.optimizer, step.scaler)
        reuses = options.reuses_features and done < options.steps
        described = distinct_items(task.train_pairs) if fits or reuses else []
        step_seconds = probe_steps(step, load_probe(task, model, settings, ranks, done), done, ranks)
        item_ids = distinct_items(task.valid_pairs)
        _, item_seconds = probe_items(model, task.valid_store, item_ids, settings.data, ranks, step.precision)
    if not ranks.is_first:
        return
    left = options.steps - done
    epochs = options.steps * options.pairs / len(task.train_pairs)
    validations = sum(
        step % options.validate_every == 0 or step == options.steps for step in range(done + 1, options.steps + 1)
    )
    validations += fits and not options.steps  # of the fit alone
    validation, describing = item_seconds * len(item_ids), item_seconds * len(described)
    held = BYTES * len(described) * sum(model.widths().values()) if reuses else 0
    start = f"{run_dir} goes on after step {done:,}: " if done else ""
    met = f"each pair is met {epochs:.3g} times"
    lines = [
        describe_pairs("train", task.train_pairs, task.train_store),
        describe_pairs("valid", task.valid_pairs, task.valid_store),
        *task.train_store.coverage(),
        describe_trained(model),
        f"{describe_peak(ranks.device)} in {PROBE_STEPS} steps and a validation's batches"
        f"{f', {mebibytes(held)} more for features' if held else ''}",
        f"steps: {start}{left:,} of {options.pairs} pairs; ranks {ranks.world_size}; {met}",
        f"time: {duration(describing + left * step_seconds + validations * validation)}: "
        f"{f'{describing:.3g} s for the features of {len(described):,} items, ' if described else ''}"
        f"{step_seconds:.3g} s a step, "
        f"{validations} validations of {validation:.3g} s; from a probe of {PROBE_STEPS} steps",
        *task.notes,
    ]
    print("\n".join([*lines, NEXT]))


def dry_run_prediction(
    data_dir: Path, split: str, model_path: Path, encode_batch: int | None, precision: Precision | None
) -> None:
    """Print what `predict` would do. UserError as predict's."""
    with open_inference(data_dir, split, model_path, precision, encode_batch) as run:
        pairs, card, item_ids = run.pairs, run.card, run.item_ids
        prepare(run.model, run.ranks.device, run.precision)
        embeddings, item_seconds = probe_items(run.model, run.store, item_ids, run.settings, run.ranks, run.precision)
    if not run.ranks.is_first:
        return
    text = float(np.mean([len(format_embedding(numbers)) for numbers in embeddings.values()]))
    bare = float(np.mean([len(prediction_row(p.left, b"", p.right, b"", card.threshold)) for p in pairs[:1000]]))
    size = len(pairs) * (bare + 2 * text)
    held = len(item_ids) * (8 * card.settings.embedding_size + text)
    lines = [
        describe_pairs(split, pairs, run.store),
        *run.store.coverage(),
        f"{describe_peak(run.ranks.device)} in the probe, {mebibytes(int(held))} more for embeddings and rows",
        f"time: {duration(item_seconds * len(item_ids))} to encode: {1000 * item_seconds:.3g} ms an item; from a probe "
        f"of {len(embeddings)} items",
        f"result: {len(pairs):,} rows, {tqdm.format_sizeof(size, 'B')}",
    ]
    print("\n".join([*lines, *filter(None, [slow_precision(run.ranks.device, run.precision)]), NEXT]))


def dry_run_matching(
    data_dir: Path, split: str, model_path: Path, options: Options, encode_batch: int | None, precision: Precision
) -> None:
    """Print what `match run` would do. UserError as its."""
    with open_inference(data_dir, split, model_path, precision, encode_batch, read=read_no_pairs) as run:
        item_ids, width = list(run.items), 2 * run.card.settings.embedding_size
        prepare(run.model, run.ranks.device, run.precision)
        _, item_seconds = probe_items(run.model, run.store, item_ids, run.settings, run.ranks, run.precision)
    if not run.ranks.is_first:
        return
    count = len(item_ids)
    categories = [run.items[item_id].category if options.within == "category" else "" for item_id in item_ids]
    _, codes = np.unique(np.array(categories), return_inverse=True)
    plan = plan_search(options, codes, width)
    lines = [
        f"{split}: {count:,} listings, {-(-count // options.partition_size):,} partitions",
        *run.store.coverage(),
        f"search: {plan.name}, {duration(plan.seconds)} by {MULTIPLY_ADDS / 1e9:.0f} G multiply-adds a second and core",
        f"time: {duration(item_seconds * count)} to encode: {1000 * item_seconds:.3g} ms an item; from a probe",
        f"{describe_peak(run.ranks.device)} in the probe, {mebibytes(plan.memory)} more for embeddings and neighbours",
        f"disk: {tqdm.format_sizeof(plan.disk, 'B')} and the pairs",
    ]
    print("\n".join([*lines, *filter(None, [slow_precision(run.ranks.device, run.precision)]), NEXT]))


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


def describe_trained(model: ItemModel) -> str:
    """How many of a model's parameters learn."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, whole = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    return f"parameters: {trained:,} of {whole:,} are trained"


def load_probe(task: Task, model: ItemModel, settings: Settings, ranks: Ranks, first_step: int) -> Generator[Loaded]:
    """The input of PROBE_STEPS training steps, or of those that are left."""
    end = min(first_step + PROBE_STEPS, settings.train.steps)
    few = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": end})})
    if not settings.train.reuses_features:
        return load_parts(task, few, ranks, first_step, task.train_store)
    sampler = BatchSampler(task.train_pairs, settings.train)
    item_ids = distinct_items(pair for step in range(first_step, end) for pair in sampler.batch(step))
    raw = features_of(model, task.train_store, item_ids, settings.data, ranks) if item_ids else {}
    return load_parts(task, few, ranks, first_step, FeatureStore(task.train_store, item_ids, raw))


def probe_steps(train_step: TrainStep, loaded: Generator[Loaded], first_step: int, ranks: Ranks) -> float:
    """Seconds a training step: the median of PROBE_STEPS but the first, which warms up; 0 when no step is left."""
    count, seconds = min(PROBE_STEPS, train_step.settings.train.steps - first_step), []
    train_step.model.train()
    with closing(loaded), tqdm(total=count, desc="probe", unit="step", disable=quiet(ranks)) as progress:
        for step in range(first_step, first_step + count):
            started = time.perf_counter()
            loss, _ = train_step.take(step, loaded)
            float(loss)  # waits for the device
            seconds.append(time.perf_counter() - started)
            progress.update()
    return float(np.median(seconds[1:] or seconds or [0.0]))


def probe_items(
    model: ItemModel,
    store: ItemStore,
    item_ids: Sequence[str],
    settings: DataSettings,
    ranks: Ranks,
    precision: Precision,
) -> tuple[dict[str, Embeddings], float]:
    """Embeddings of items from all over, and the seconds that an item took, reading it included."""
    size = batch_size(settings, store.settings, ranks.device) * max(1, lanes_of(ranks)) * ranks.world_size
    chosen = list(item_ids[:: max(1, len(item_ids) // (PROBE_BATCHES * size))])[: PROBE_BATCHES * size]
    model.eval()
    encode(model, store, chosen[-size:], settings, ranks, precision, "warm up")
    started = time.perf_counter()
    embeddings = encode(model, store, chosen, settings, ranks, precision, "probe")
    return embeddings, (time.perf_counter() - started) / len(chosen)


def quiet(ranks: Ranks) -> bool | None:
    """tqdm's `disable`: on the first rank as the terminal has it."""
    return None if ranks.is_first else True


def describe_peak(device: torch.device) -> str:
    """The most memory that this process has had, and of a GPU what there is for it: others may hold some."""
    free = ""
    if device.type == "cuda":
        free = f", {mebibytes(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))} are free for it"
    return f"memory of a rank in MiB: {mebibytes(peak_bytes(device))} at its peak{free}"


def mebibytes(size: int) -> str:
    """In the unit of nvidia-smi; small ones with a decimal."""
    number = size / 2**20
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has had, of the GPU's when there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    """As tqdm writes it: H:MM:SS or MM:SS."""
    return str(tqdm.format_interval(round(seconds)))
