"""What encoders say of items that they are asked once: for a fit, and for steps in which no encoder learns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tongkuan.encode.encode import encode
from tongkuan.encode.store import ItemStore, padded_words
from tongkuan.model.trunk import ItemModel
from tongkuan.ranks.group import Ranks
from tongkuan.records.arrays import NO_WORD
from tongkuan.settings import DataSettings

BYTES = 4  # a number


class RawFeatures(nn.Module):
    """A model's raw features in one row an item: what `encode` computes."""

    def __init__(self, model: ItemModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor | None, *_words: Tensor) -> Tensor:
        """float (N, all parts' raw widths)."""
        return torch.cat([*self.model.raw(images, ids, mask).values()], dim=1)


class Joining(nn.Module):
    """A model from its raw features on."""

    def __init__(self, model: ItemModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, raw: Mapping[str, Tensor], *words: Tensor) -> Tensor:
        """As ItemModel.join."""
        return self.model.join(raw, *words)


def features_of(
    model: ItemModel, store: ItemStore, item_ids: Sequence[str], settings: DataSettings, ranks: Ranks
) -> dict[str, Tensor]:
    """Raw features by part, float32 (items, width), computed at fp32. The model is left in evaluation mode."""
    widths = model.widths()
    if not widths:
        return {}
    rows = encode(RawFeatures(model).eval(), store, item_ids, settings, ranks, label="features")
    numbers = torch.from_numpy(np.stack([rows[item_id] for item_id in item_ids]))
    return dict(zip(widths, numbers.split([*widths.values()], dim=1), strict=True))


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """N items by their raw features, in the place of pictures and tokens."""

    raw: dict[str, Tensor]
    """By part, float32 (N, width)."""
    words: tuple[Tensor, ...]
    """As in Batch."""

    def pin(self) -> "FeatureBatch":
        """As Batch.pin."""
        return self.each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "FeatureBatch":
        """The same batch on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> "FeatureBatch":
        """The same batch with every tensor changed."""
        return FeatureBatch({name: change(rows) for name, rows in self.raw.items()}, tuple(map(change, self.words)))


class FeatureStore:
    """Items whose raw features are known, turned into batches; safe for threads.

    Their words are found at the first visit and kept, some 5 KiB an item.
    """

    def __init__(self, store: ItemStore, item_ids: Sequence[str], raw: Mapping[str, Tensor]) -> None:
        self.store, self.raw = store, raw
        self.row_of = {item_id: row for row, item_id in enumerate(item_ids)}
        self._words: dict[str, tuple[Tensor, Tensor]] = {}

    def batch(self, item_ids: Sequence[str]) -> FeatureBatch:
        """Tensors of the items in this order."""
        rows = torch.tensor([self.row_of[item_id] for item_id in item_ids])
        words = self.words(item_ids) if self.store.reads_words else ()
        return FeatureBatch({name: numbers[rows] for name, numbers in self.raw.items()}, words)

    def words(self, item_ids: Sequence[str]) -> tuple[Tensor, ...]:
        """As padded_words has them."""
        for item_id in item_ids:
            if item_id not in self._words:
                self._words[item_id] = padded_words([self.store.words(item_id)])
        halves = zip(*(self._words[item_id] for item_id in item_ids), strict=True)
        return tuple(
            pad_sequence([rows[0] for rows in half], batch_first=True, padding_value=filler)
            for half, filler in zip(halves, NO_WORD, strict=True)
        )
