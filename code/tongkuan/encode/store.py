"""From items to tensors: tokenise, decode, batch, prefetch, augment."""

import functools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tongkuan.base.errors import UserError
from tongkuan.model.trunk import constant
from tongkuan.records import arrays
from tongkuan.records.arrays import fit_tokenizer, padded_tokens, stacked_pictures
from tongkuan.records.attributes import coverage_lines, item_text
from tongkuan.records.items import Item
from tongkuan.records.pictures import SIDE, UnreadableError, prepared_side, read_image
from tongkuan.records.words import Word, words_of
from tongkuan.settings import ImageEncoder, ModelSettings

T = TypeVar("T")
U = TypeVar("U")
LOOKED_AT = 1000  # pictures, to find one that resize has made
LONGEST_ROW = 1 << 16  # bytes, of a ledger

KEPT_BESIDE = 250  # bytes that keeping an array takes beside its numbers: the object, its place in a dictionary
TEXTS_AT_ONCE = 1024  # tokenised together when only their lengths are asked for


@dataclass(frozen=True, slots=True)
class Batch:
    """N items. images uint8 (N, 3, S, S), a row of zeros where has_image (N,) is False; ids and mask int64 (N, T)."""

    images: Tensor
    has_image: Tensor
    ids: Tensor
    mask: Tensor
    words: tuple[Tensor, ...] = field(default=(), kw_only=True)
    """What `padded_words` makes, for a model that reads it."""
    is_padded: bool = field(default=True, kw_only=True)
    """Whether the mask has a 0: known on the host, which would have to wait for a GPU to see it there."""

    @property
    def attended(self) -> Tensor | None:
        """The mask, or None where no text is padded."""
        return self.mask if self.is_padded else None

    def pin(self) -> "Batch":
        """The same batch in memory that a GPU reads by itself, while the CPU does other things."""
        return self.each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        tensors = map(change, (self.images, self.has_image, self.ids, self.mask))
        return Batch(*tensors, words=tuple(map(change, self.words)), is_padded=self.is_padded)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def side_of(image_dir: Path) -> int:
    """Pixels a side of the pictures that resize made in a folder; SIDE where there is none among the first LOOKED_AT.

    Those put there by hand are read as if resize had made them with the others.
    """
    names = made_by_resize(image_dir.parent / "ledger.jsonl")
    try:
        names = sorted(path.name for path in image_dir.iterdir()) if names is None else names
    except OSError:
        names = []
    sides = (prepared_side(image_dir / name) for name in names[:LOOKED_AT])
    return next(filter(None, sides), SIDE)


def made_by_resize(ledger: Path) -> list[str] | None:
    """The first pictures of resize's ledger, at most LOOKED_AT; None without one that can be read."""
    try:
        with ledger.open("rb") as file:
            rows = [orjson.loads(line) for line in islice(iter(lambda: file.readline(LONGEST_ROW), b""), LOOKED_AT)]
        return [Path(row["image"]).name for row in rows if row["image"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def normalised(batch: Batch, settings: ImageEncoder) -> Tensor:
    """float32 (N, 3, S, S): RGB / 255 less mean, over deviation; a missing picture is all 0, the mean's grey."""
    mean, deviation = (
        constant(numbers, batch.images.device).view(1, -1, 1, 1) for numbers in (settings.mean, settings.deviation)
    )
    images = (batch.images.float() / 255 - mean) / deviation
    # Channels last is the layout in which convolutions are fastest, on CPU and GPU.
    return (images * batch.has_image.view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)


class ItemStore:
    """Items by id, turned into batches; safe for threads.

    Decoded pictures and tokens are kept, `cache_mb` of both together in each store of each rank; what is beyond is
    read and tokenised at each visit anew.
    """

    def __init__(
        self,
        items: Mapping[str, Item],
        image_dir: Path,
        settings: ModelSettings,
        tokenizer: Tokenizer | None,
        cache_mb: int = 0,
    ) -> None:
        self.items, self.image_dir, self.settings, self.tokenizer = items, image_dir, settings, tokenizer
        self.unreadable: set[str] = set()
        self._images: dict[str, NDArray[np.uint8]] = {}
        self._tokens: dict[str, NDArray[np.int32]] = {}
        self._room = cache_mb << 20
        self._lock = threading.Lock()
        self._padding = 0
        if tokenizer is not None:
            self._padding = fit_tokenizer(tokenizer, settings.text.max_tokens)

    def tokens(self, item_ids: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids (T,) of each item's text, T at most max_tokens, [CLS] first; (0,) for a model without texts."""
        if self.tokenizer is None:
            return [np.zeros(0, dtype=np.int32) for _ in item_ids]
        found = {item_id: kept for item_id in item_ids if (kept := self._tokens.get(item_id)) is not None}
        new = [item_id for item_id in item_ids if item_id not in found]
        for item_id, encoding in zip(new, self.tokenizer.encode_batch([*map(self.text, new)]), strict=True):
            found[item_id] = np.array(encoding.ids, dtype=np.int32)
            self._keep(self._tokens, item_id, found[item_id])
        return [found[item_id] for item_id in item_ids]

    def lengths(self, item_ids: Sequence[str]) -> list[int]:
        """Number of tokens of each item's text."""
        starts = range(0, len(item_ids), TEXTS_AT_ONCE)
        return [len(row) for start in starts for row in self.tokens(item_ids[start : start + TEXTS_AT_ONCE])]

    def _keep(self, kept: dict[str, NDArray[Any]], name: str, array: NDArray[Any]) -> None:
        """Hold an array for the next visit, if there is room."""
        with self._lock:
            size = array.nbytes + KEPT_BESIDE
            if self._room >= size and name not in kept:
                kept[name] = array
                self._room -= size

    def text(self, item_id: str) -> str:
        """What is read of the item."""
        return item_text(self.items[item_id], self.settings.attribute_keys, self.settings.attributes)

    def picture(self, item_id: str) -> str:
        """Name of the item's picture file, empty when it has none or the model looks at none."""
        return self.items[item_id].image_name if self.settings.inputs != "text" else ""

    @functools.cached_property
    def side(self) -> int:
        """What pictures put by hand are squashed to before the model's size, as `side_of` has it."""
        return side_of(self.image_dir)

    def image(self, item_id: str) -> NDArray[np.uint8] | None:
        """The item's picture (3, S, S), or None when it has none or it cannot be read (then `unreadable` knows)."""
        name = self.picture(item_id)
        if not name:
            return None
        if (kept := self._images.get(name)) is not None:
            return kept
        try:
            image = read_image(self.image_dir / name, self.settings.image.size, self.side)
        except UnreadableError:
            with self._lock:
                self.unreadable.add(name)
            return None
        self._keep(self._images, name, image)
        return image

    def batch(self, item_ids: Sequence[str]) -> Batch:
        """Tensors of the items in this order, texts padded to the longest."""
        size = self.settings.image.size if self.settings.inputs != "text" else 1
        ids, mask = padded_tokens(self.tokens(item_ids), self._padding)
        read = (*stacked_pictures([self.image(item_id) for item_id in item_ids], size), ids, mask)
        words = padded_words([self.words(item_id) for item_id in item_ids]) if self.reads_words else ()
        return Batch(*map(torch.from_numpy, read), words=words, is_padded=not mask.all())

    @property
    def reads_words(self) -> bool:
        """Whether the model reads words beside tokens."""
        return self.settings.towers == "one" and self.settings.part_sizes()["words"] > 0

    def words(self, item_id: str) -> list[Word]:
        """The item's words as buckets."""
        return words_of(self.items[item_id], self.settings.attributes)

    def coverage(self) -> list[str]:
        """Lines on what the items have of the attributes that the model reads; none when it reads no text."""
        if self.settings.inputs == "image":
            return []
        return coverage_lines(self.items.values(), self.settings.attribute_keys, self.settings.attributes)

    def warning(self) -> str:
        """One line on pictures that count as blank, empty when there are none."""
        if not self.unreadable:
            return ""
        first = self.image_dir / min(self.unreadable)
        return f"{len(self.unreadable)} pictures are missing or unreadable and count as blank, first {first}"


def padded_words(rows: Sequence[Sequence[Word]]) -> tuple[Tensor, Tensor]:
    """`arrays.padded_words` as tensors."""
    buckets, owners = arrays.padded_words(rows)
    return torch.from_numpy(buckets), torch.from_numpy(owners)


def open_store(
    items: Mapping[str, Item], data_dir: Path, settings: ModelSettings, tokenizer: Tokenizer | None, cache_mb: int
) -> ItemStore:
    """An ItemStore over `data_dir`/images; UserError when items name pictures and that folder is not there."""
    image_dir = data_dir / "images"
    wants = settings.inputs != "text" and any(item.image_name for item in items.values())
    if wants and not image_dir.is_dir():
        raise UserError(f"{image_dir}: no such folder; put the items' pictures there or run ./entrypoint.sh resize")
    return ItemStore(items, image_dir, settings, tokenizer, cache_mb)


def prefetch(jobs: Iterable[T], work: Callable[[T], U], workers: int) -> Generator[U]:
    """work(job) for each job, in order, computed ahead by threads; no more than 2 x workers results wait."""
    with ThreadPoolExecutor(workers, thread_name_prefix="prefetch") as pool:
        waiting: deque[Future[U]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def background(most: int) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Hand over what is to be done in a thread of its own, in the order given; more than `most` at once wait.

    What was handed over is done at the end, also after an error inside. An error of its own is raised at one of the
    next calls, or at the end.
    """
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="background") as pool:

        def later(work: Callable[[], object]) -> None:
            while waiting and (len(waiting) >= most or waiting[0].done()):
                waiting.popleft().result()
            waiting.append(pool.submit(work))

        yield later
        while waiting:
            waiting.popleft().result()
