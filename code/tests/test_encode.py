"""encode.py: batches that suit the machine, and half precision whose cost is known."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tongkuan.encode.encode import (
    Computed,
    Embeddings,
    batch_size,
    encode,
    one_ahead,
    prepare,
)
from tongkuan.encode.store import open_store
from tongkuan.model.modelfile import load_model
from tongkuan.ranks.arithmetic import computed_at
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import item_file, read_items
from tongkuan.settings import DataSettings, ImageEncoder, ModelSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def embeddings(data: Path, path: Path, is_prepared: bool) -> Embeddings:
    """In bf16, of all validation items (N, 2D)."""
    model, card = load_model(path)
    if is_prepared:
        prepare(model, CPU, "bf16")
    items = read_items(item_file(data, "valid"))
    store = open_store(items, data, card.settings, card.open_tokenizer(), cache_mb=0)
    return np.stack([*encode(model, store, list(items), DataSettings(), Ranks(0, 1, CPU), "bf16").values()])


def test_weights_halved_beforehand_give_the_numbers_of_weights_halved_on_the_way(data: Path, model: Path) -> None:
    np.testing.assert_array_equal(embeddings(data, model, True), embeddings(data, model, False))


def test_halved_weights_take_half_the_memory_but_heads_stay_whole(model: Path) -> None:
    loaded, _ = load_model(model)
    tower = loaded.commodity
    weights = [tower.text.encoder.layer[0].output.dense.weight, tower.head.weight]
    before = [weight.nbytes for weight in weights]
    prepare(loaded, CPU, "bf16")
    assert [weight.nbytes for weight in weights] == [before[0] // 2, before[1]]
    assert weights[1].dtype == torch.float32


@pytest.mark.parametrize(("size", "on_cpu"), [(16, 32), (160, 16), (224, 8), (384, 4), (2000, 1)])
def test_a_batch_of_large_pictures_is_small_on_a_cpu_and_a_power_of_two(size: int, on_cpu: int) -> None:
    settings = ModelSettings(image=ImageEncoder(size=size))
    assert batch_size(DataSettings(), settings, CPU) == on_cpu
    assert batch_size(DataSettings(), settings, GPU) == 32
    assert batch_size(DataSettings(), settings.model_copy(update={"inputs": "text"}), CPU) == 32
    assert batch_size(DataSettings(encode_batch=7), settings, CPU) == 7


def encoded(data: Path, path: Path) -> Embeddings:
    """Of all validation items (N, 2D), in batches of five."""
    model, card = load_model(path)
    items = read_items(item_file(data, "valid"))
    store = open_store(items, data, card.settings, card.open_tokenizer(), cache_mb=0)
    found = encode(model, store, list(items), DataSettings(encode_batch=5), Ranks(0, 1, CPU))
    return np.stack([*found.values()])


def test_batches_that_one_thread_gives_ahead_are_those_of_many(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, on a CPU."""
    many = encoded(data, model)
    monkeypatch.setattr("tongkuan.encode.encode.lanes_of", lambda _: 0)
    np.testing.assert_array_equal(encoded(data, model), many)


def test_numbers_on_their_way_from_a_gpu_are_waited_for_and_taken_out_of_its_memory() -> None:
    arriving = torch.zeros(2, 3)

    class Event:
        def synchronize(self) -> None:
            arriving.fill_(7)

    found = Computed(arriving, np.array([True, False]), Event()).wait()
    arriving.fill_(8)  # for the next batch
    np.testing.assert_array_equal(found, np.full((2, 3), 7, np.float32))


class Casts(TorchDispatchMode):
    """Counts by address how often a tensor is made one of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_to_copy":
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_in_a_validation_of_many_batches(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, on a CPU; the next training step finds nothing of them."""
    monkeypatch.setattr("tongkuan.encode.encode.lanes_of", lambda _: 0)
    loaded, card = load_model(model)
    weight = loaded.commodity.text.encoder.layer[0].output.dense.weight
    items = read_items(item_file(data, "valid"))
    store = open_store(items, data, card.settings, card.open_tokenizer(), cache_mb=0)
    for expected in (1, 2):
        with Casts() as casts:
            encode(loaded, store, list(items), DataSettings(encode_batch=5), Ranks(0, 1, CPU), "bf16")
            assert casts.counts[weight.data_ptr()] == 1
        with torch.no_grad():
            weight += expected
        with Casts() as casts, computed_at("bf16", CPU):
            torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight)
            assert casts.counts[weight.data_ptr()] == 1, "cast anew, since it has changed"


def test_a_batch_is_given_before_the_one_before_is_waited_for() -> None:
    done: list[str] = []
    for number in one_ahead(done.append(f"given {number}") or number for number in range(3)):
        done.append(f"got {number}")
    assert done == ["given 0", "given 1", "got 0", "given 2", "got 1", "got 2"]
