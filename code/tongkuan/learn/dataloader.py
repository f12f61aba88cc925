"""The data of training: both splits read and checked, and the parts of steps as tensors, decoded ahead."""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor

from tongkuan.base.errors import UserError
from tongkuan.encode.store import Batch, ItemStore, open_store, prefetch
from tongkuan.learn.batches import Part, parts
from tongkuan.learn.features import FeatureBatch, FeatureStore
from tongkuan.model.encoders import build_tokenizer, text_config_of
from tongkuan.model.modelfile import ModelCard
from tongkuan.ranks.group import Ranks
from tongkuan.records.attributes import item_text
from tongkuan.records.items import Pair, item_file, pair_file, read_items, read_pairs
from tongkuan.records.labels import NAMES, contradiction_note, labels_of, only_label
from tongkuan.settings import Settings

Loaded = tuple[Part, Batch | FeatureBatch, Tensor]
"""A part, its items, and the labels of its pairs, int64 (pairs,)."""


@dataclass(frozen=True, slots=True)
class Task:
    """What there is to learn from and to validate on."""

    train_pairs: list[Pair]
    train_store: ItemStore
    valid_pairs: list[Pair]
    valid_store: ItemStore
    card: ModelCard
    """Settings, tokenizer and text configuration of the model to be."""
    notes: tuple[str, ...] = ()
    """A line on each thing that the labels leave open."""

    @property
    def is_undecided(self) -> bool:
        """Whether the validation pairs have one label, by which no threshold can be chosen."""
        return only_label(self.valid_pairs) is not None


def load_task(settings: Settings, data_dir: Path) -> Task:
    """Read and check both splits before anything costs time."""
    items, pairs, notes = {}, {}, []
    for split in ("train", "valid"):
        path = item_file(data_dir, split)
        items[split] = read_items(path)
        pairs[split] = read_pairs(pair_file(data_dir, split), items[split], items_path=path)
        notes.append(contradiction_note(pair_file(data_dir, split), pairs[split]))
    check_train_labels(pair_file(data_dir, "train"), pairs["train"])
    notes.append(valid_labels_note(pair_file(data_dir, "valid"), pairs["valid"]))
    model = settings.model
    tokenizer, text_config = None, None
    if model.has_text:
        texts = (item_text(item, model.attribute_keys, model.attributes) for item in items["train"].values())
        tokenizer = build_tokenizer(model.text, texts)
        text_config = text_config_of(model.text, tokenizer.get_vocab_size())
    card = ModelCard(model, 0.0, text_config, tokenizer.to_str() if tokenizer else None)
    stores = [
        open_store(items[split], data_dir, model, card.open_tokenizer(), settings.data.cache_mb)
        for split in ("train", "valid")
    ]
    return Task(pairs["train"], stores[0], pairs["valid"], stores[1], card, tuple(filter(None, notes)))


def facts_of(task: Task, settings: Settings) -> dict[str, Any]:
    """What must be the same on all ranks for them to learn one thing, as plain values."""
    facts = settings.model_dump(mode="json", include={"model": True, "train": True, "data": {"encode_batch"}})
    stores, pairs = (task.train_store, task.valid_store), (task.train_pairs, task.valid_pairs)
    listed = ([*store.items.values()] for store in stores)
    read: dict[str, Any] = {"items": [*listed], "pairs": [*pairs], "tokenizer": task.card.tokenizer}
    read["text encoder"] = task.card.text_config
    return facts | {name: hashlib.sha256(orjson.dumps(value)).hexdigest() for name, value in read.items()}


def check_train_labels(path: Path, pairs: Sequence[Pair]) -> None:
    """UserError when all pairs have one label: the loss then falls without an end, whatever the items are."""
    if (label := only_label(pairs)) is not None:
        raise UserError(
            f"{path}: all {len(pairs):,} pairs have label {label}, from which a model only learns to call any pair "
            f"{NAMES[label]}; add pairs of label {1 - label}, or split train and valid anew: ./entrypoint.sh split"
        )


def valid_labels_note(path: Path, pairs: Sequence[Pair]) -> str:
    """A line when all pairs have one label, else nothing."""
    if (label := only_label(pairs)) is None:
        return ""
    return (
        f"note: {path}: only pairs of label {label}: no threshold can be chosen there and no step called the best, so "
        f"the last step's model is kept, with threshold 0, as trained; add pairs of label {1 - label}, or split train "
        "and valid anew: ./entrypoint.sh split"
    )


def load_parts(
    task: Task, settings: Settings, ranks: Ranks, first_step: int, store: ItemStore | FeatureStore
) -> Generator[Loaded]:
    """`parts` with their items as tensors of a store and their labels, decoded ahead."""

    def load(part: Part) -> Loaded:
        batch = store.batch(part.item_ids)
        return part, batch.pin() if ranks.device.type == "cuda" else batch, torch.from_numpy(labels_of(part.pairs))

    return prefetch(parts(task.train_pairs, settings.train, ranks, first_step), load, settings.data.workers)
