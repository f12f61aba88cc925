"""From items to tensors: tokenise, decode, batch, prefetch, augment."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional

from tongkuan.attributes import coverage_lines, item_text
from tongkuan.config import Augmentation, ImageEncoder, ModelSettings, TextEncoder
from tongkuan.errors import UserError
from tongkuan.model import locate, unreachable
from tongkuan.pictures import PICTURE_FORMATS
from tongkuan.records import Item

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Batch:
    """N items. images uint8 (N, 3, S, S), a row of zeros where has_image (N,) is False; ids and mask int64 (N, T)."""

    images: Tensor
    has_image: Tensor
    ids: Tensor
    mask: Tensor

    def pin(self) -> "Batch":
        """The same batch in memory that a GPU reads by itself, while the CPU does other things."""
        return Batch(*(tensor.pin_memory() for tensor in (self.images, self.has_image, self.ids, self.mask)))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        tensors = (self.images, self.has_image, self.ids, self.mask)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


# ---------------------------------------------------------------------------------------------------------------------
# Text


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One token a character, the most frequent first: for a text encoder that starts from nothing."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    counts = Counter(character for text in texts for character in normalizer.normalize_str(text))
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ordered]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def build_tokenizer(settings: TextEncoder, texts: Iterable[str]) -> Tokenizer:
    """The encoder's own fast tokenizer; for a random encoder, characters of the training texts."""
    kind, place = locate(settings.weights)
    if kind == "random":
        return character_tokenizer(texts)
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # as in model.build_text
        raise unreachable(place, error) from error
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """A picture squashed to (3, size, size), bicubic, RGB."""
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        rgb = image.convert("RGB")
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def normalised(batch: Batch, settings: ImageEncoder) -> Tensor:
    """float32 (N, 3, S, S): RGB / 255 less mean, over deviation; a missing picture is all 0, the mean's grey."""
    mean = torch.tensor(settings.mean, device=batch.images.device).view(1, 3, 1, 1)
    deviation = torch.tensor(settings.deviation, device=batch.images.device).view(1, 3, 1, 1)
    images = (batch.images.float() / 255 - mean) / deviation
    # Channels last is the layout in which convolutions are fastest, on CPU and GPU.
    return (images * batch.has_image.view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)


class ItemStore:
    """Items by id, turned into batches. Decoded pictures and tokens are kept up to `cache_mb`; safe for threads."""

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
        self._tokens: dict[str, list[int]] = {}
        self._room = cache_mb << 20
        self._lock = threading.Lock()
        if tokenizer is not None:
            tokenizer.no_padding()
            tokenizer.enable_truncation(settings.text.max_tokens)
            self._pad = tokenizer.token_to_id("[PAD]") or 0

    def tokens(self, item_ids: Sequence[str]) -> list[list[int]]:
        """Token ids of each item's text, at most max_tokens, [CLS] first."""
        if self.tokenizer is None:
            return [[] for _ in item_ids]
        new = [item_id for item_id in item_ids if item_id not in self._tokens]
        for item_id, encoding in zip(new, self.tokenizer.encode_batch([*map(self.text, new)]), strict=True):
            self._tokens[item_id] = encoding.ids
        return [self._tokens[item_id] for item_id in item_ids]

    def text(self, item_id: str) -> str:
        """What is read of the item."""
        return item_text(self.items[item_id], self.settings.attribute_keys, self.settings.attributes)

    def picture(self, item_id: str) -> str:
        """Name of the item's picture file, empty when it has none or the model looks at none."""
        return self.items[item_id].image_name if self.settings.inputs != "text" else ""

    def image(self, item_id: str) -> NDArray[np.uint8] | None:
        """The item's picture (3, S, S), or None when it has none or it cannot be read (then `unreadable` knows)."""
        name = self.picture(item_id)
        if not name:
            return None
        if (kept := self._images.get(name)) is not None:
            return kept
        try:
            image = read_image(self.image_dir / name, self.settings.image.size)
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
            with self._lock:
                self.unreadable.add(name)
            return None
        with self._lock:
            if self._room >= image.nbytes and name not in self._images:
                self._images[name] = image
                self._room -= image.nbytes
        return image

    def batch(self, item_ids: Sequence[str]) -> Batch:
        """Tensors of the items in this order, texts padded to the longest."""
        size = self.settings.image.size if self.settings.inputs != "text" else 1
        images = np.zeros((len(item_ids), 3, size, size), dtype=np.uint8)
        has_image = np.zeros(len(item_ids), dtype=bool)
        for row, item_id in enumerate(item_ids):
            if (image := self.image(item_id)) is not None:
                images[row], has_image[row] = image, True
        tokens = self.tokens(item_ids)
        width = max(1, *(len(row) for row in tokens))
        ids = np.full((len(item_ids), width), self._pad if self.tokenizer else 0, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row_tokens in enumerate(tokens):
            ids[number, : len(row_tokens)] = row_tokens
            mask[number, : len(row_tokens)] = 1
        return Batch(*(torch.from_numpy(array) for array in (images, has_image, ids, mask)))

    def coverage(self) -> list[str]:
        """Lines on what the items have of the attributes that the model reads; none when it reads no text."""
        if self.settings.inputs == "image":
            return []
        return coverage_lines(self.items.values(), self.settings.attribute_keys, self.settings.attributes)

    def complaint(self) -> str:
        """One line on pictures that count as blank, empty when there are none."""
        if not self.unreadable:
            return ""
        first = self.image_dir / min(self.unreadable)
        return f"{len(self.unreadable)} pictures are missing or unreadable and count as blank, first {first}"


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


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


def augment(
    images: Tensor, mask: Tensor, settings: Augmentation, seed: int, step: int, rows: Sequence[int], batch: int
) -> tuple[Tensor, Tensor]:
    """Changed images (N, 3, S, S) and mask (N, T) of the items `rows` of a global batch of `batch` items.

    What happens to a row depends on seed, step and its place in the global batch alone: not on ranks, nor on
    whether the run was interrupted.
    """
    draws = np.random.default_rng((seed, step, 1)).random((batch, 8), dtype=np.float32)[list(rows)]
    chance = torch.from_numpy(draws).to(images.device)
    if settings.crop or settings.flip:
        scale = 1 - settings.crop * chance[:, 0:2]
        shift = (1 - scale) * (2 * chance[:, 2:4] - 1)
        mirror = torch.where(chance[:, 4] < settings.flip, -1.0, 1.0)
        theta = torch.zeros(len(rows), 2, 3, device=images.device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0] * mirror, scale[:, 1], shift
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if settings.color:
        change = settings.color * (2 * chance[:, 5:7] - 1)
        images = images * (1 + change[:, 0, None, None, None]) + change[:, 1, None, None, None]
    if settings.drop_image:
        images = images * (chance[:, 7] >= settings.drop_image).view(-1, 1, 1, 1)
    if settings.drop_text:
        generator = np.random.default_rng((seed, step, 2))
        keep = generator.random((batch, mask.shape[1] - 1), dtype=np.float32)[list(rows)] >= settings.drop_text
        kept = torch.from_numpy(keep).to(mask.device)
        mask = torch.cat([mask[:, :1], mask[:, 1:] * kept], dim=1)  # [CLS] stays: its output is the text
    return images, mask
