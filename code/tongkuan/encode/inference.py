"""What every verb that runs a trained model begins with: model, items and pairs read, ranks joined."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tongkuan.base.files import check_writable
from tongkuan.encode.cache import Cache, open_cache
from tongkuan.encode.encode import Embeddings, chosen_precision, distinct_items, encode, prepare
from tongkuan.encode.store import ItemStore, open_store
from tongkuan.model.modelfile import ModelCard, load_model
from tongkuan.model.trunk import ItemModel
from tongkuan.ranks.group import Ranks, join_ranks
from tongkuan.records.items import Item, Pair, item_file, pair_file, read_items, read_pairs
from tongkuan.records.rows import given
from tongkuan.settings import DataSettings, Precision

PairReader = Callable[[Path, Mapping[str, Item], Path], list[Pair]]
"""(pair file, items, item file) -> the pairs to score."""


def read_any_pairs(path: Path, items: Mapping[str, Item], items_path: Path) -> list[Pair]:
    """Pairs with or without labels."""
    return read_pairs(path, items, labels="optional", items_path=items_path)


def read_labelled_pairs(path: Path, items: Mapping[str, Item], items_path: Path) -> list[Pair]:
    """Pairs that all have a label."""
    return read_pairs(path, items, items_path=items_path)


def read_no_pairs(_path: Path, _items: Mapping[str, Item], _items_path: Path) -> list[Pair]:
    """None, of a verb that is about items alone: no file of pairs need be there."""
    return []


@dataclass
class Inference:
    """A model and the pairs of a split that it is to score, the same on every rank."""

    files: dict[str, Path]
    """The files that decide the result: model, items, pairs."""
    model: ItemModel
    card: ModelCard
    items: dict[str, Item]
    pairs: list[Pair]
    store: ItemStore
    ranks: Ranks
    precision: Precision
    """As asked, or as the device has it."""
    settings: DataSettings
    cache_dir: Path | None
    caches: dict[Precision, Cache | None] = field(default_factory=dict)

    @cached_property
    def item_ids(self) -> list[str]:
        """Of all pairs, each once."""
        return distinct_items(self.pairs)

    def encode(
        self,
        label: str,
        precision: Precision | None = None,
        item_ids: Sequence[str] | None = None,
        store: ItemStore | None = None,
    ) -> dict[str, Embeddings]:
        """Embeddings [p ; q] float32 (2D,) of the pairs' or the given items, by id, on every rank.

        `label` stands at the progress bar; `store` has the items when they are of another split. Another precision than
        the run's own must be asked for first: weights that are halved stay so.
        """
        precision = precision or self.precision
        prepare(self.model, self.ranks.device, precision)
        self.caches[precision] = open_cache(self.cache_dir, self.files["model"], precision, self.ranks.device)
        cache, ids = self.caches[precision], self.item_ids if item_ids is None else item_ids
        return encode(self.model, store or self.store, ids, self.settings, self.ranks, precision, label, cache)


@contextmanager
def open_inference(
    data_dir: Path,
    split: str,
    model_path: Path,
    precision: Precision | None,
    encode_batch: int | None = None,
    cache_dir: Path | None = None,
    read: PairReader = read_any_pairs,
    items_path: Path | None = None,
) -> Iterator[Inference]:
    """Read and check all inputs, then join the ranks. UserError before any encoding when one is unfit.

    `items_path`: of items that are no split's, whose pictures lie with the others'.
    """
    if cache_dir is not None:
        check_writable(cache_dir)
    model, card = load_model(model_path)
    items_path, pairs_path = given(items_path or item_file(data_dir, split)), given(pair_file(data_dir, split))
    items = read_items(items_path)
    pairs = read(pairs_path, items, items_path)
    store = open_store(items, data_dir, card.settings, card.open_tokenizer(), cache_mb=0)
    files = {"model": model_path, "items": items_path, "pairs": pairs_path}
    settings = DataSettings(encode_batch=encode_batch)
    with join_ranks() as ranks:
        chosen = chosen_precision(precision, ranks)
        yield Inference(files, model, card, items, pairs, store, ranks, chosen, settings, cache_dir)
