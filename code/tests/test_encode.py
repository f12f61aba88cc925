"""encode.py: batches that suit the machine, and half precision whose cost is known."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from tongkuan.base.arithmetic import computed_at, set_tf32, tf32
from tongkuan.base.machine import multiplies
from tongkuan.cli.verbs import main
from tongkuan.encode.encode import (
    Embeddings,
    batch_size,
    chosen_precision,
    encode,
    one_ahead,
    prepare,
    slow_precision,
)
from tongkuan.encode.store import open_store
from tongkuan.model.modelfile import load_model
from tongkuan.ranks.group import Ranks, join_ranks
from tongkuan.records.items import Pair, item_file, read_items
from tongkuan.result.precision import LEAST, MOST, cost_of, sample_of
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


@pytest.mark.parametrize(("size", "on_cpu"), [(16, 32), (160, 23), (384, 4), (2000, 1)])
def test_a_batch_of_large_pictures_is_small_on_a_cpu(size: int, on_cpu: int) -> None:
    settings = ModelSettings(image=ImageEncoder(size=size))
    assert batch_size(DataSettings(), settings, CPU) == on_cpu
    assert batch_size(DataSettings(), settings, GPU) == 32
    assert batch_size(DataSettings(), settings.model_copy(update={"inputs": "text"}), CPU) == 32
    assert batch_size(DataSettings(encode_batch=7), settings, CPU) == 7


def test_the_cost_of_a_lower_precision_is_counted() -> None:
    exact, scores = np.array([-1.0, 0.25, 0.75]), np.array([-1.5, 0.5, 0.75])
    line = cost_of(scores, exact, 0.3, "bf16")
    assert line.startswith("bf16 against fp32: 1 of 3 verdicts differ at 0.3000, largest change of a score 0.5; --prec")
    assert cost_of(exact, exact, 0.25, "bf16").endswith("0 of 3 verdicts differ at 0.2500, largest change of a score 0")


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
        assert ("fp32 is faster" in slow_precision(CPU, "bf16")) is not is_fast
        assert "tf32: it is computed as fp32" in slow_precision(CPU, "tf32")
    for has in (True, False):  # a T4 has not
        have_bf16(monkeypatch, has)
        assert [multiplies(precision, GPU) for precision in ("fp32", "tf32", "bf16", "fp16")] == [True, has, has, True]
        assert ("no instructions for bf16: fp32 is faster" in slow_precision(GPU, "bf16")) is not has


def have_bf16(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    """A GPU that multiplies bf16, or one that would only imitate it."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: has or including_emulation)


def test_without_a_word_a_gpu_that_has_bf16_takes_it_and_all_else_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        have_bf16(monkeypatch, has)
        assert chosen_precision(None, Ranks(0, 1, GPU)) == ("bf16" if has else "fp32")
        assert chosen_precision(None, Ranks(0, 1, CPU)) == "fp32"
        assert chosen_precision("tf32", Ranks(0, 1, GPU)) == "tf32"

    class Mixed(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, False]

    have_bf16(monkeypatch, True)
    assert chosen_precision(None, Mixed(0, 2, GPU)) == "fp32", "where one rank has none, all compute alike"


def test_arithmetic_is_set_outright_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    set_tf32(True)
    with join_ranks():
        assert_tf32(False)
        assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert not products.allow_bf16_reduced_precision_reduction and not products.allow_fp16_reduced_precision_reduction


def assert_tf32(is_on: bool) -> None:
    """By torch's older names and by its newer ones, which torch.compile reads."""
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is is_on
    assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is is_on
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is is_on


def test_tf32_is_on_for_encoders_alone_and_on_a_gpu_alone() -> None:
    set_tf32(False)
    for precision in ("fp32", "tf32", "bf16"):
        for device in (CPU, GPU):
            with tf32(precision == "tf32" and device.type == "cuda"):
                assert_tf32(precision == "tf32" and device is GPU)
                with computed_at("fp32", CPU):
                    assert_tf32(False)
                assert_tf32(precision == "tf32" and device is GPU)
            assert_tf32(False)
    with pytest.raises(RuntimeError, match="a fault"), tf32(True):
        raise RuntimeError("a fault")
    assert_tf32(False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_heads_are_computed_at_fp32_whatever_the_encoders_are(model: Path, precision: str) -> None:
    loaded, _ = load_model(model)
    raw = {name: torch.randn(3, width) for name, width in loaded.widths().items()}
    with torch.inference_mode():
        exact = loaded.joined(raw)
        with computed_at(precision, CPU):
            assert loaded.joined(raw).dtype != torch.float32, "autocast would show"
            torch.testing.assert_close(loaded.join(raw), exact, rtol=0, atol=0)


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


def test_a_batch_is_given_before_the_one_before_is_waited_for() -> None:
    done: list[str] = []
    for number in one_ahead(done.append(f"given {number}") or number for number in range(3)):
        done.append(f"got {number}")
    assert done == ["given 0", "given 1", "got 0", "given 2", "got 1", "got 2"]


def test_verdicts_are_compared_on_pairs_from_all_over() -> None:
    pairs = [Pair(str(number), "x") for number in range(20_000)]
    for count, taken in ((0, 0), (5, 5), (100, LEAST), (2_000, 100), (20_000, MOST)):
        found = sample_of(pairs[:count])
        assert len(found) == len({pair.left for pair in found}) == taken
        assert found == sample_of(pairs[:count])
        if count > MOST:
            assert sum(int(pair.left) < count // 2 for pair in found) == taken // 2


def test_predict_says_what_a_lower_precision_costs_on_some_pairs(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--data", str(data), "--model", str(model), "--submit", str(tmp_path / "s")]
    for precision, verdicts in (("bf16", "of 24 verdicts differ"), ("tf32", "0 of 24 verdicts differ"), ("fp32", "")):
        main([*words, "--precision", precision])
        out = capsys.readouterr().out
        assert (f"{precision} against fp32: " in out and verdicts in out) == (precision != "fp32")
        assert orjson.loads((tmp_path / "s" / "manifest.json").read_bytes())["precision"] == precision


def test_the_default_of_a_gpu_is_written_and_compared_on_some_pairs(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tongkuan.encode.inference.chosen_precision", lambda asked, _: asked or "bf16")
    monkeypatch.setattr("tongkuan.result.precision.LEAST", 3)
    inputs = ["--data", str(data), "--model", str(model)]
    main(["predict", *inputs, "--submit", str(tmp_path / "s")])
    assert "of 3 verdicts differ" in capsys.readouterr().out
    main(["verify", *inputs, "--submit", str(tmp_path / "s")])
    said = capsys.readouterr()
    assert "rebuilt to the byte" in said.out and "against" not in said.out
    for words, count in (([], 3), (["--precision", "bf16"], 24), (["--blend"], 24)):
        main(["evaluate", *inputs, *words])
        out = capsys.readouterr().out
        assert "24 pairs of valid, bf16" in out and f"of {count} verdicts differ" in out
