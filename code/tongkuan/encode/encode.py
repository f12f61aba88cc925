"""Encode each distinct item once and keep the embeddings by id.

Batches are formed over all items before they are dealt to ranks and threads, and each is computed by one thread:
so the numbers depend on the items and the model, not on how many ranks or cores did the work.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from tongkuan.base.machine import available_cores, keep_freed_memory, multiplies
from tongkuan.encode.cache import Cache
from tongkuan.encode.store import Batch, ItemStore, normalised, prefetch
from tongkuan.model.towers import halve_weights, pair_scores
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair
from tongkuan.settings import DataSettings, ModelSettings, Precision

Embeddings = NDArray[np.float32]
# On a CPU: activations of more pixels fall out of its caches (Swin-T at 384: 16 pictures at once take 1.5 x the time).
CACHED_PIXELS = 4 * 384 * 384
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def distinct_items(pairs: Iterable[Pair]) -> list[str]:
    """Ids of the pairs' items, each once, in first-seen order."""
    return list(dict.fromkeys(item_id for pair in pairs for item_id in (pair.left, pair.right)))


def length_batches(store: ItemStore, item_ids: Sequence[str], size: int) -> list[list[str]]:
    """Batches of items of like text length, so that little is padded; the same for the same items."""
    lengths = dict(zip(item_ids, store.lengths(item_ids), strict=True))
    ordered = sorted(item_ids, key=lambda item_id: (lengths[item_id], item_id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def batch_size(settings: DataSettings, model: ModelSettings, device: torch.device) -> int:
    """Items a batch when only encoding."""
    if settings.encode_batch is not None:
        return settings.encode_batch
    if device.type != "cpu" or model.inputs == "text":
        return 32
    return min(32, max(1, CACHED_PIXELS // model.image.size**2))


def prepare(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Bring a model that is only to encode to its device and precision."""
    keep_freed_memory()
    if precision != "fp32":
        halve_weights(model, DTYPES[precision])
    model.to(device)


def slow_precision(device: torch.device, precision: Precision) -> str:
    """A line when a processor computes slower at a precision than at fp32, else nothing."""
    if multiplies(precision, device):
        return ""
    return f"this processor has no instructions for {precision}: fp32 is faster; leave --precision out"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which encoders compute at a precision; fp32 leaves them alone."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Operators inside run on one thread each: how a sum is cut among threads changes its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode(
    model: nn.Module,
    store: ItemStore,
    item_ids: Sequence[str],
    settings: DataSettings,
    ranks: Ranks,
    precision: Precision = "fp32",
    label: str = "encode",
    cache: Cache | None = None,
) -> dict[str, Embeddings]:
    """Embeddings [p ; q] float32 (2D,) of every item, by id, on every rank. The model is in evaluation mode.

    Batches that the cache holds are not computed again, nor their pictures decoded.
    """
    batches = length_batches(store, item_ids, batch_size(settings, store.settings, ranks.device))
    own = ranks.shard(batches)
    on_gpu = ranks.device.type == "cuda"
    lanes = 1 if on_gpu else max(1, available_cores() // ranks.world_size)

    def load(ids: list[str]) -> tuple[list[str], Batch | Embeddings]:
        if cache and (kept := cache.load(store, ids)) is not None:
            return ids, kept
        batch = store.batch(ids)
        return ids, batch.pin() if on_gpu else batch

    def run(job: tuple[list[str], Batch | Embeddings]) -> Embeddings:
        ids, batch = job
        if not isinstance(batch, Batch):
            return batch
        with torch.inference_mode(), autocast(ranks.device, precision):
            batch = batch.to(ranks.device)
            images = normalised(batch, store.settings.image)
            numbers: Embeddings = model(images, batch.ids, batch.mask, *batch.words).float().cpu().numpy()
        if cache:
            cache.save(store, ids, batch, numbers)
        return numbers

    found: dict[str, Embeddings] = {}
    progress = tqdm(total=len(item_ids), desc=label, unit="item", disable=None if ranks.is_first else True)
    with one_thread_each(), progress:
        loaded = prefetch(own, load, settings.workers)
        for ids, numbers in zip(own, prefetch(loaded, run, lanes), strict=True):
            found.update(zip(ids, numbers, strict=True))
            progress.update(min(len(ids) * ranks.world_size, len(item_ids) - progress.n))
    parts = ranks.gather((found, store.unreadable))
    store.unreadable = set().union(*(unreadable for _, unreadable in parts))
    merged = {item_id: row for part, _ in parts for item_id, row in part.items()}
    return {item_id: merged[item_id] for item_id in item_ids}


def scores_of(pairs: Sequence[Pair], embeddings: dict[str, Embeddings]) -> NDArray[np.float64]:
    """Score of each pair, (N,)."""
    left, right = (
        np.stack([embeddings[item_id] for item_id in side])
        for side in zip(*((p.left, p.right) for p in pairs), strict=True)
    )
    return pair_scores(left, right)
