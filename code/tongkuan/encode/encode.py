"""Encode each distinct item once and keep the embeddings by id.

Batches are formed over all items before they are dealt to ranks and threads, and each is computed by one thread:
so the numbers depend on the items and the model, not on how many ranks or cores did the work.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from tongkuan.base.machine import available_cores, keep_freed_memory, multiplies
from tongkuan.encode.cache import Cache
from tongkuan.encode.store import Batch, ItemStore, background, normalised, prefetch
from tongkuan.model.halves import arrange, check_compiler
from tongkuan.model.towers import halve_weights, pair_scores
from tongkuan.ranks.arithmetic import DTYPES, HALVES, computed_at, own_attention
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair
from tongkuan.settings import DataSettings, ModelSettings, Precision

T = TypeVar("T")
Embeddings = NDArray[np.float32]
# On a CPU: activations of more pixels fall out of its caches (Swin-T at 384: 16 pictures at once take 1.5 x the time).
# And by powers of two: oneDNN is faster at 16 pictures than at 23, and the last batch is more often a whole one.
CACHED_PIXELS = 4 * 384 * 384
WRITES_WAITING = 16  # batches for the cache at most; a disk that is slower than that holds up the rest


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
    most = min(32, max(1, CACHED_PIXELS // model.image.size**2))
    return 1 << most.bit_length() - 1


def chosen_precision(asked: Precision | None, ranks: Ranks) -> Precision:
    """As asked; else bf16 where every rank has a GPU that multiplies it, and fp32 elsewhere. The same on every rank.

    UserError where blocks are to be compiled and nothing can.
    """
    if asked == "bf16-compiled":
        check_compiler(ranks.device)
    if asked is not None:
        return asked
    return "bf16" if all(ranks.gather(ranks.device.type == "cuda" and multiplies("bf16", ranks.device))) else "fp32"


def prepare(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Bring a model that is only to encode to its device and precision."""
    keep_freed_memory(device)
    arrange(model, precision)
    if precision in HALVES:
        halve_weights(model, DTYPES[precision])
    model.to(device)


def slow_precision(device: torch.device, precision: Precision) -> str:
    """A line when a processor computes slower at a precision than at fp32, else nothing."""
    if multiplies(precision, device):
        return ""
    what = "it is computed as fp32" if precision == "tf32" else "fp32 is faster"
    return f"this processor has no instructions for {precision}: {what}; leave --precision out"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """The context in which encoders compute at a precision."""
    return computed_at(precision, device)


def lanes_of(ranks: Ranks) -> int:
    """Batches that threads compute beside each other, one a core; 0 on a GPU, to which the calling thread gives them.

    It gives it the next batch before it waits for the one before.
    """
    return 0 if ranks.device.type == "cuda" else max(1, available_cores() // ranks.world_size)


@dataclass(frozen=True, slots=True)
class Computed:
    """Embeddings of a batch, it may be on their way from a GPU still."""

    numbers: Tensor
    """float32 (N, 2D), in the host's memory."""
    has_image: NDArray[np.bool_]
    event: torch.cuda.Event | None = None
    """After which they are there."""

    def wait(self) -> Embeddings:
        """The numbers, when they are there."""
        found: Embeddings = self.numbers.numpy()
        if self.event is None:
            return found
        self.event.synchronize()
        return found.copy()  # out of the pinned memory, of which there is little


def compute(model: nn.Module, batch: Batch, settings: ModelSettings, device: torch.device) -> Computed:
    """Embeddings of a batch; a GPU is not waited for."""
    has_image = batch.has_image.numpy()
    # In inference mode, autocast would cast weights anew for every batch.
    with torch.no_grad() if torch.is_autocast_enabled(device.type) else torch.inference_mode():
        batch = batch.to(device)
        images = normalised(batch, settings.image)
        numbers = model(images, batch.ids, batch.attended, *batch.words).float().to("cpu", non_blocking=True)
    if device.type != "cuda":
        return Computed(numbers, has_image)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return Computed(numbers, has_image, event)


def one_ahead(made: Iterable[T]) -> Iterator[T]:
    """The same in their order, each when the next one has been made."""
    waiting: deque[T] = deque()
    for each in made:
        waiting.append(each)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


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
    own, lanes = ranks.shard(batches), lanes_of(ranks)

    def load(ids: list[str]) -> Batch | Embeddings:
        if cache and (kept := cache.load(store, ids)) is not None:
            return kept
        batch = store.batch(ids)
        return batch.pin() if ranks.device.type == "cuda" else batch

    def run(loaded: Batch | Embeddings) -> Computed | Embeddings:
        if not isinstance(loaded, Batch):
            return loaded
        with autocast(ranks.device, precision):
            return compute(model, loaded, store.settings, ranks.device)

    found: dict[str, Embeddings] = {}
    progress = tqdm(total=len(item_ids), desc=label, unit="item", disable=None if ranks.is_first else True)
    with (
        one_thread_each(),
        own_attention(),
        autocast(ranks.device, precision),  # around all batches: weights are cast once and not in each of them
        background(WRITES_WAITING) as later,
        progress,
    ):
        loaded = prefetch(own, load, settings.workers)
        computed = prefetch(loaded, run, lanes) if lanes else one_ahead(map(run, loaded))
        for ids, done in zip(own, computed, strict=True):
            numbers = done.wait() if isinstance(done, Computed) else done
            if cache and isinstance(done, Computed):
                later(partial(cache.save, store, ids, done.has_image, numbers))
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
