"""An exported file held against torch: the same embeddings, and how fast each makes them on one core."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from tongkuan.base.errors import FailureError
from tongkuan.encode.encode import one_thread_each
from tongkuan.encode.store import Batch, ItemStore, normalised
from tongkuan.export.encoder import OnnxEncoder

LIMIT = 1e-4  # of any number of an embedding
TURNS = 5
LONG_ENOUGH = 0.5  # seconds of a turn


@dataclass(frozen=True, slots=True)
class Speed:
    """Items a second on one core, a figure a turn."""

    batch: int
    onnx: list[float]
    torch: list[float]

    def line(self) -> str:
        """For the user."""
        ratios = sorted(ours / theirs for ours, theirs in zip(self.onnx, self.torch, strict=True))
        size = "one at a time" if self.batch == 1 else f"{self.batch} at a time"
        return (
            f"speed on one core, {size}: onnxruntime {np.median(self.onnx):,.1f} items/s, torch "
            f"{np.median(self.torch):,.1f}: {ratios[len(ratios) // 2]:.2f} times as many "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} turns)"
        )


def by_torch(model: nn.Module, store: ItemStore, batch: Batch) -> NDArray[np.float32]:
    """Embeddings (N, 2D) as `predict` computes them on a CPU."""
    with torch.inference_mode():
        found: NDArray[np.float32] = model(
            normalised(batch, store.settings.image), batch.ids, batch.mask, *batch.words
        ).numpy()
    return found


def largest_difference(
    encoder: OnnxEncoder, model: nn.Module, store: ItemStore, batches: Sequence[Sequence[str]]
) -> float:
    """Of any number of the embeddings of any listing. FailureError when one is over LIMIT, or is no number.

    Each side reads the listings by itself.
    """
    largest = 0.0
    for item_ids in batches:
        with one_thread_each():
            wanted = by_torch(model, store, store.batch(item_ids))
        items = [store.items[item_id] for item_id in item_ids]
        found = encoder.embed(encoder.feed(items, store.image_dir, blank_unreadable=True))
        differences = np.abs(found - wanted).max(axis=1)
        for item_id, difference in zip(item_ids, differences.tolist(), strict=True):
            if not difference <= LIMIT:
                raise FailureError(
                    f"not exported: ONNX Runtime's embedding of listing {item_id} differs from torch's by "
                    f"{difference:.1e}, more than {LIMIT:.0e}; predict with torch, or train with other encoders"
                )
        largest = max(largest, *differences.tolist())
    return largest


def measure(
    encoder: OnnxEncoder, model: nn.Module, store: ItemStore, batches: Sequence[Sequence[str]], progress: "tqdm[Any]"
) -> Speed:
    """Both in turn, TURNS times, on batches that are read already; `progress` goes on by one a turn."""
    read = [store.batch(item_ids) for item_ids in batches]
    feeds = [
        encoder.feed([store.items[item_id] for item_id in item_ids], store.image_dir, blank_unreadable=True)
        for item_ids in batches
    ]
    count = sum(map(len, batches))
    speed = Speed(max(map(len, batches)), [], [])
    with one_thread_each():
        runs: tuple[Callable[[], object], ...] = (
            lambda: [encoder.embed(feed) for feed in feeds],
            lambda: [by_torch(model, store, batch) for batch in read],
        )
        times = [max(1, round(LONG_ENOUGH / seconds_of(run))) for run in runs]  # this also warms up
        for _ in range(TURNS):
            for run, figures, repeats in zip(runs, (speed.onnx, speed.torch), times, strict=True):
                figures.append(count * repeats / seconds_of(run, repeats))
            progress.update()
    return speed


def seconds_of(run: Callable[[], object], repeats: int = 1) -> float:
    """Wall-clock seconds of some runs."""
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - started


def cut(item_ids: Sequence[str], size: int) -> list[Sequence[str]]:
    """Batches of a size, the last of what is left."""
    return [item_ids[start : start + size] for start in range(0, len(item_ids), size)]
