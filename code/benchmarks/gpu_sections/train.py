"""Pairs a second of training steps, the published way beside ours, and whether `train --dry-run` tells the memory."""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import reference
import torch
import train_step

from gpu_sections.bench import NEEDS_CUDA, Bench, Way, arithmetic, compare, flops
from gpu_sections.book import Page, free
from tongkuan.dryrun import PROBE_STEPS, peak_bytes, probe_items, probe_steps
from tongkuan.encode.encode import distinct_items
from tongkuan.learn.dataloader import load_parts
from tongkuan.learn.step import TrainStep
from tongkuan.model.towers import checkpoint_activations
from tongkuan.model.trunk import ItemModel
from tongkuan.settings import DataSettings, Precision, Settings


def train(bench: Bench, page: Page) -> None:
    """The published way beside ours, then ours by arithmetic, batch, draw and recomputing, each alone on the device."""
    work, few = 0.0, bench.sizes.pairs[0]
    with page.trying("operations of an item"):
        work = flops_an_item(bench, bench.sizes.published_pairs)
    with page.trying("published way"):
        beside_published(bench, page, work)
    base = None
    for way, options in plan(bench):
        name = f"ours, {way}, {described(options)}"
        if page.has_time(name):
            with page.trying(name):
                rates = compare(bench, page, "pairs/s", {name: ours(bench, work, way, **options)}, base)
                base = base or (rates if options == {"pairs": few} else None)


def beside_published(bench: Bench, page: Page, work: float) -> None:
    """As many pairs as the published runs had on each of their two GPUs."""
    pairs = bench.sizes.published_pairs
    ways = {f"published way, fp32, {pairs} pairs": published(bench, pairs)}
    ways[f"ours, fp32, {pairs} pairs"] = ours(bench, work, "fp32", pairs=pairs)
    compare(bench, page, "pairs/s", ways)


def plan(bench: Bench) -> list[tuple[str, dict[str, Any]]]:
    """(arithmetic, settings) of what is timed; the first is what the others are set beside."""
    few, *others = bench.sizes.pairs
    found: list[tuple[str, dict[str, Any]]] = [(way, {"pairs": few}) for way in ("fp32", "tf32", "bf16")]
    found += [(way, {"pairs": few, "cuda_graphs": True}) for way in ("bf16", "bf16-residual")]
    found += [("bf16", {"pairs": few, "draw": "component"})]
    found += [("bf16", {"pairs": pairs}) for pairs in others]
    found += [("bf16", {"pairs": few, "checkpoint_activations": True})]
    return [*found, *(("bf16", {"pairs": pairs, "checkpoint_activations": True}) for pairs in others)]


def described(options: dict[str, Any]) -> str:
    """Settings in words."""
    draw = f", draw {options['draw']}" if "draw" in options else ""
    graphs = ", CUDA graphs" if "cuda_graphs" in options else ""
    return f"{options['pairs']} pairs{draw}{graphs}{', recomputing' if 'checkpoint_activations' in options else ''}"


def trainer(bench: Bench, **options: Any) -> tuple[train_step.Bench, Settings]:
    """A network of its own, and settings of training with `options`, at fp32 if they do not say."""
    train = bench.settings.train.model_copy(update={"precision": "fp32", **options})
    settings = bench.settings.model_copy(update={"train": train})
    return train_step.Bench(settings, bench.task, bench.ranks), settings


def published(bench: Bench, pairs: int) -> Way:
    """Steps of the published way."""
    trains, _ = trainer(bench, pairs=pairs)
    reference.as_published(trains.model)
    optimizer, loaded = trains.published_optimizer(), trains.loaded(trains.published_input)

    def run() -> None:
        for _ in range(bench.sizes.steps):
            trains.published_step(optimizer, loaded)

    return Way(run, bench.sizes.steps * pairs)


def ours(
    bench: Bench, work: float, way: Precision, change: Callable[[ItemModel], Any] | None = None, **options: Any
) -> Way:
    """Steps of ours; `work` is what an item takes, `change` is done to the network first."""
    with arithmetic(way) as precision:
        trains, settings = trainer(bench, precision=precision, **options)
    if settings.train.checkpoint_activations:
        checkpoint_activations(trains.model)
    if change:
        change(trains.model)
    learner = TrainStep(trains.model, settings, bench.ranks)
    loaded = load_parts(bench.task, settings, bench.ranks, 0, bench.task.train_store)
    runs = (bench.sizes.warm_ups + bench.sizes.rounds) * bench.sizes.steps
    items = statistics.mean(len(part.item_ids) for part in itertools.islice(trains.parts(), runs))
    step = itertools.count()

    def run() -> None:
        for _ in range(bench.sizes.steps):
            learner.take(next(step), loaded)

    def note() -> str:
        return f"{items / settings.train.pairs:.2f} items a pair; {1000 * learner.take_times()[1]:.1f} ms a step waited"

    steps = bench.sizes.steps
    return Way(run, steps * settings.train.pairs, way, steps * items * work, note)


@functools.cache
def flops_an_item(bench: Bench, pairs: int) -> float:
    """Of forward and backward, padding included, in a part of `pairs`; nothing is counted twice for recomputing."""
    trains, settings = trainer(bench, pairs=pairs)
    reference.as_published(trains.model)
    learner = TrainStep(trains.model, settings, bench.ranks)
    part, batch, labels = trains.our_input(next(trains.parts()))
    return flops(lambda: learner.part_loss(part, batch.to(bench.device), labels).backward()) / len(part.item_ids)


def memory(bench: Bench, page: Page) -> None:
    """The peak that `train --dry-run` finds by its probe beside that of the steps after it."""
    few, *others = bench.sizes.pairs
    ways: list[tuple[Precision, dict[str, Any]]] = [("fp32", {"pairs": few}), ("bf16", {"pairs": few})]
    ways += [("bf16", {"pairs": few, "cuda_graphs": True})]
    ways += [("bf16", {"pairs": max(others), "checkpoint_activations": True})]
    for way, options in ways:
        name = f"{way}, {described(options)}"
        if page.has_time(name):
            with page.trying(name), arithmetic(way) as precision:
                probe, later, reserved = peaks(bench, precision=precision, **options)
                if not bench.is_gpu:  # the whole process's peak, whatever had it
                    page.not_measured(name, NEEDS_CUDA)
                    continue
                page.measured(f"{name}: the probe's peak", probe / 2**30, "GiB")
                error = f"the probe is off by {probe / later - 1:+.1%}"
                page.measured(f"{name}: {bench.sizes.later} steps later", later / 2**30, "GiB", error)
                page.measured(f"{name}: held by the process", reserved / 2**30, "GiB", "and about 0.5 for CUDA itself")


def peaks(bench: Bench, **options: Any) -> tuple[int, int, int]:
    """Bytes: at most in the probe, at most in it and the steps after it, held at the end."""
    free()
    trains, settings = trainer(bench, **options)
    if settings.train.checkpoint_activations:
        checkpoint_activations(trains.model)
    if bench.is_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    learner, task = TrainStep(trains.model, settings, bench.ranks), bench.task
    probe_steps(learner, load_parts(task, settings, bench.ranks, 0, task.train_store), 0, bench.ranks)
    ids = distinct_items(task.valid_pairs)
    probe_items(trains.model, task.valid_store, ids, DataSettings(), bench.ranks, settings.train.precision)
    probe = peak_bytes(bench.device)
    trains.model.train()
    loaded = load_parts(task, settings, bench.ranks, PROBE_STEPS, task.train_store)
    for step in range(PROBE_STEPS, PROBE_STEPS + bench.sizes.later):
        learner.take(step, loaded)
    bench.wait()
    loaded.close()
    reserved = torch.cuda.memory_reserved(bench.device) if bench.is_gpu else 0
    return probe, peak_bytes(bench.device), reserved
