"""Which pairs a training step learns from, and how they are dealt to ranks and parts: no tensors, no files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongkuan.encode.encode import distinct_items
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair, components
from tongkuan.settings import TrainSettings


class BatchSampler:
    """Which pairs a step learns from: epochs in seeded orders, end to end, nothing left out."""

    def __init__(self, pairs: Sequence[Pair], settings: TrainSettings) -> None:
        self.pairs, self.settings = pairs, settings
        groups = components(pairs) if settings.draw == "component" else []
        self._groups = [np.array(group) for group in groups]
        self._orders: dict[int, NDArray[np.int64]] = {}

    def batch(self, step: int) -> list[Pair]:
        """The pairs of a step over all ranks; the same whatever came before."""
        first = step * self.settings.pairs
        positions = [divmod(place, len(self.pairs)) for place in range(first, first + self.settings.pairs)]
        epochs = {epoch for epoch, _ in positions}
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self.order(epoch) for epoch in epochs}
        return [self.pairs[int(self._orders[epoch][place])] for epoch, place in positions]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Indices of all pairs in the order of an epoch; pairs of a component stand together if so asked."""
        generator = np.random.default_rng((self.settings.seed, epoch))
        if not self._groups:
            return generator.permutation(len(self.pairs))
        groups = [self._groups[index] for index in generator.permutation(len(self._groups))]
        return np.concatenate([walk(self.pairs, generator.permutation(group)) for group in groups])


def walk(pairs: Sequence[Pair], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of a component from its first on, depth first: each item's pairs follow one another.

    Components are often far larger than a batch: in any other order their pairs would hardly meet.
    """
    touching: dict[str, list[int]] = {}
    for index in group.tolist():
        for item_id in (pairs[index].left, pairs[index].right):
            touching.setdefault(item_id, []).append(index)
    order: dict[int, None] = {}
    ahead = [pairs[group[0]].left]
    while ahead:
        item_id = ahead.pop()
        for index in touching.pop(item_id, ()):
            if index not in order:
                order[index] = None
                ahead.append(pairs[index].right if pairs[index].left == item_id else pairs[index].left)
    return np.array(list(order), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's forward: pairs, their distinct items, and where each pair's sides stand among those."""

    step: int
    pairs: list[Pair]
    item_ids: list[str]
    left: list[int]
    right: list[int]
    rows: list[int]
    """First place of each item among the 2 x pairs sides of the global batch: what augmentation goes by."""
    products: list[int]
    """Number of each item's product, as far as the pairs tell."""


def parts(pairs: Sequence[Pair], settings: TrainSettings, ranks: Ranks, first_step: int) -> Iterator[Part]:
    """Every forward of this rank from `first_step` on, `accumulate` of them a step."""
    size = settings.pairs // (ranks.world_size * settings.accumulate)
    sampler, product_of = BatchSampler(pairs, settings), products_of(pairs)
    for step in range(first_step, settings.steps):
        chosen = sampler.batch(step)
        first_place: dict[str, int] = {}
        for place, item_id in enumerate([pair.left for pair in chosen] + [pair.right for pair in chosen]):
            first_place.setdefault(item_id, place)
        for number in range(settings.accumulate):
            start = (ranks.rank * settings.accumulate + number) * size
            own = chosen[start : start + size]
            item_ids = distinct_items(own)
            place_of = {item_id: place for place, item_id in enumerate(item_ids)}
            left, right = [place_of[pair.left] for pair in own], [place_of[pair.right] for pair in own]
            rows, products = ([of[item_id] for item_id in item_ids] for of in (first_place, product_of))
            yield Part(step, own, item_ids, left, right, rows, products)


def products_of(pairs: Sequence[Pair]) -> dict[str, int]:
    """A number for each item; two that pairs call the same, if by others between, have the same number."""
    same = [pair for pair in pairs if pair.label == 1]
    found: dict[str, int] = {}
    for number, group in enumerate(components(same)):
        found.update(dict.fromkeys(distinct_items(same[place] for place in group), number))
    for item_id in distinct_items(pairs):
        found.setdefault(item_id, len(found))
    return found
