"""What an ItemStore keeps in memory is bounded, whatever the number of items, and decides nothing but speed."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import tiny_settings

from tongkuan.encode.encode import encode, length_batches
from tongkuan.encode.store import ItemStore, open_store
from tongkuan.model.encoders import character_tokenizer
from tongkuan.model.modelfile import load_model
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Item, item_file, read_items
from tongkuan.settings import DataSettings

ALONE = Ranks(0, 1, torch.device("cpu"))


def text_store(tmp_path: Path, count: int, cache_mb: int, max_tokens: int = 24) -> ItemStore:
    """Items with titles of 0 to 40 letters and no picture."""
    items = {f"{number}": Item(f"{number}", "杯" * (number * 7 % 41)) for number in range(count)}
    settings = tiny_settings(tmp_path, f"model.text.max_tokens={max_tokens}").model
    return ItemStore(items, tmp_path, settings, character_tokenizer(["杯子"]), cache_mb)


def held_bytes(store: ItemStore) -> int:
    """Of all that the store holds of its items' texts and pictures, dictionaries included."""
    held = 0
    for kept in (store._tokens, store._images):
        held += sys.getsizeof(kept) + sum(sys.getsizeof(array) for array in kept.values())
    return held


@pytest.mark.parametrize("count", [3, 500, 4000])
def test_without_room_nothing_of_a_text_is_kept(tmp_path: Path, count: int) -> None:
    store = text_store(tmp_path, count, cache_mb=0)
    empty = held_bytes(store)
    for item_batch in length_batches(store, list(store.items), 32):
        store.batch(item_batch)
    assert held_bytes(store) == empty


@pytest.mark.parametrize(("count", "cache_mb"), [(6_000, 1), (9_000, 2), (2_000, 1)])
def test_texts_and_pictures_share_one_room(tmp_path: Path, count: int, cache_mb: int) -> None:
    store = text_store(tmp_path, count, cache_mb)
    store.tokens(list(store.items))
    assert 0 < held_bytes(store) <= cache_mb << 20
    kept = len(store._tokens)
    assert (kept == count) is (count == 2_000), "the rest has no room"
    store.tokens(list(store.items))
    assert len(store._tokens) == kept


def test_lengths_are_read_without_holding_all_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked, real = text_store(tmp_path, 5000, cache_mb=0), [], ItemStore.tokens
    monkeypatch.setattr(ItemStore, "tokens", lambda self, ids: asked.append(len(ids)) or real(self, ids))
    batches = length_batches(store, list(store.items), 32)
    assert sum(asked) == 5000 == sum(map(len, batches)) and max(asked) <= 1024
    widths = [store.batch(item_batch).mask.sum(dim=1) for item_batch in batches]
    assert torch.equal(torch.cat(widths), torch.cat(widths).sort().values), "like lengths stand together"


def test_a_batch_without_padding_has_no_mask_to_attend_to(tmp_path: Path) -> None:
    store = text_store(tmp_path, 40, cache_mb=0)
    lengths = dict(zip(store.items, store.lengths(list(store.items)), strict=True))
    short, long = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    assert lengths[short] < lengths[long]
    for batch, is_padded in ((store.batch([short, short]), False), (store.batch([short, long]), True)):
        moved = batch.to(torch.device("cpu"))
        assert [each.attended is None for each in (batch, moved)] == [not is_padded] * 2
        assert bool(batch.mask.all()) is not is_padded
        assert moved.attended is None or torch.equal(moved.attended, batch.mask)


@pytest.mark.parametrize("cache_mb", [1, 1024])
def test_the_limit_changes_no_batch(data: Path, tmp_path: Path, cache_mb: int) -> None:
    items = read_items(item_file(data, "train"))
    settings, texts = tiny_settings(tmp_path).model, [item.title for item in items.values()]
    bare, roomy = (open_store(items, data, settings, character_tokenizer(texts), room) for room in (0, cache_mb))
    batches = length_batches(bare, list(items), 5)
    assert length_batches(roomy, list(items), 5) == batches
    for item_batch in 2 * batches:
        one, two = bare.batch(item_batch), roomy.batch(item_batch)
        for name in ("images", "has_image", "ids", "mask"):
            assert torch.equal(getattr(one, name), getattr(two, name))
            assert getattr(one, name).dtype == getattr(two, name).dtype


def test_the_limit_changes_no_embedding(data: Path, model: Path) -> None:
    items, (network, card) = read_items(item_file(data, "valid")), load_model(model)
    found = []
    for cache_mb in (0, 1024):
        store = open_store(items, data, card.settings, card.open_tokenizer(), cache_mb)
        found.append(encode(network, store, list(items), DataSettings(encode_batch=5), ALONE))
    assert all(np.array_equal(found[0][item_id], found[1][item_id]) for item_id in items)


def test_threads_that_ask_at_once_never_keep_more_than_the_room(tmp_path: Path) -> None:
    store = text_store(tmp_path, 6_000, cache_mb=1)
    ids, start = list(store.items), threading.Barrier(4)

    def ask(_: int) -> list[int]:
        start.wait()
        return [len(row) for first in range(0, len(ids), 50) for row in store.tokens(ids[first : first + 50])]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert held_bytes(store) <= 1 << 20
