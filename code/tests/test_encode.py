"""encode.py: batches that suit the machine, and half precision whose cost is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tongkuan.base.machine import multiplies
from tongkuan.cli.verbs import main
from tongkuan.encode.encode import Embeddings, batch_size, encode, prepare, slow_precision
from tongkuan.encode.store import open_store
from tongkuan.model.modelfile import load_model
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import item_file, read_items
from tongkuan.result.evaluate import differences
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


def test_halved_weights_take_half_the_memory(model: Path) -> None:
    loaded, _ = load_model(model)
    weight = loaded.commodity.head.weight.nbytes
    prepare(loaded, CPU, "bf16")
    assert loaded.commodity.head.weight.nbytes == weight // 2


@pytest.mark.parametrize(("size", "on_cpu"), [(16, 32), (160, 23), (384, 4), (2000, 1)])
def test_a_batch_of_large_pictures_is_small_on_a_cpu(size: int, on_cpu: int) -> None:
    settings = ModelSettings(image=ImageEncoder(size=size))
    assert batch_size(DataSettings(), settings, CPU) == on_cpu
    assert batch_size(DataSettings(), settings, GPU) == 32
    assert batch_size(DataSettings(), settings.model_copy(update={"inputs": "text"}), CPU) == 32
    assert batch_size(DataSettings(encode_batch=7), settings, CPU) == 7


def test_the_cost_of_a_lower_precision_is_counted() -> None:
    exact, scores = np.array([-1.0, 0.25, 0.75]), np.array([-1.5, 0.5, 0.75])
    assert "1 of 3 verdicts differ at 0.3000, largest change of a score 0.5" in differences(scores, exact, 0.3, "bf16")
    assert "0 of 3 verdicts differ" in differences(exact, exact, 0.25, "bf16")


def test_evaluate_in_bf16_says_what_it_costs(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--data", str(data), "--model", str(model), "--precision", "bf16"])
    out = capsys.readouterr().out
    assert "bf16 against fp32: " in out
    assert "of 24 verdicts differ" in out
    main(["evaluate", "--data", str(data), "--model", str(model)])
    assert "against" not in capsys.readouterr().out


def test_a_processor_without_the_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, is_fast in (({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda found=capabilities: found)
        assert multiplies("bf16", CPU) is is_fast
        assert multiplies("fp32", CPU)
        assert multiplies("bf16", GPU)
        assert ("fp32 is faster" in slow_precision(CPU, "bf16")) is not is_fast
