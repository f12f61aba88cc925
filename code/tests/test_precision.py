"""Precision: set outright, chosen by the device, heads at fp32 whatever it is, and its cost counted."""

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from safetensors import safe_open
from worlds import tiny_settings

from tongkuan.base.errors import UserError
from tongkuan.base.machine import M_ARENA_MAX, keep_freed_memory, multiplies
from tongkuan.cli.verbs import main
from tongkuan.dryrun import PROBE_BATCHES, describe_peak, probe_items
from tongkuan.encode import encode
from tongkuan.encode.encode import chosen_precision, slow_precision
from tongkuan.learn.train import train
from tongkuan.model.modelfile import load_model
from tongkuan.ranks.arithmetic import computed_at, set_tf32, tf32
from tongkuan.ranks.group import Ranks, choose_device, join_ranks
from tongkuan.ranks.place import Place
from tongkuan.records.items import Pair
from tongkuan.result.precision import LEAST, MOST, cost_of, sample_of
from tongkuan.settings import DataSettings, ModelSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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
        assert multiplies("bf16", CPU) is multiplies("bf16-residual", CPU) is is_fast
        assert multiplies("fp32", CPU)
        assert ("fp32 is faster" in slow_precision(CPU, "bf16")) is not is_fast
        assert "tf32: it is computed as fp32" in slow_precision(CPU, "tf32")
    for has in (True, False):  # a T4 has not
        have_bf16(monkeypatch, has)
        assert [multiplies(precision, GPU) for precision in ("fp32", "tf32", "bf16", "fp16")] == [True, has, has, True]
        assert multiplies("bf16-residual", GPU) is has
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
    set_tf32(True, True)
    with join_ranks():
        assert_tf32(False)
        assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not products.allow_bf16_reduced_precision_reduction and not products.allow_fp16_reduced_precision_reduction


def test_attention_is_torchs_own_where_nothing_is_learned(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN plans anew for each shape, of which texts make many."""
    seen = []
    compute = encode.compute

    def computed(*words: Any) -> encode.Computed:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return compute(*words)

    monkeypatch.setattr(encode, "compute", computed)
    main(["predict", "--data", str(data), "--model", str(model), "--submit", str(tmp_path / "s"), "--split", "valid"])
    assert seen and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def assert_tf32(is_on: bool) -> None:
    """By torch's older names and by its newer ones, which torch.compile reads."""
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is is_on
    assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is is_on
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is is_on


def test_tf32_is_on_for_encoders_alone_and_on_a_gpu_alone() -> None:
    set_tf32(False, False)
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
    set_tf32(False, True)  # torch's own default
    with computed_at("fp32", CPU):
        assert_tf32(False)
    assert torch.backends.cudnn.allow_tf32
    set_tf32(False, False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_heads_are_computed_at_fp32_whatever_the_encoders_are(model: Path, precision: str) -> None:
    loaded, _ = load_model(model)
    raw = {name: torch.randn(3, width) for name, width in loaded.widths().items()}
    with torch.inference_mode():
        exact = loaded.joined(raw)
        with computed_at(precision, CPU):
            assert loaded.joined(raw).dtype != torch.float32, "autocast would show"
            torch.testing.assert_close(loaded.join(raw), exact, rtol=0, atol=0)


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


def facts_of(path: Path) -> dict[str, Any]:
    """What a model file says of its training."""
    with safe_open(path, "pt") as file:
        return orjson.loads(file.metadata()["tongkuan"])["facts"]["train"]


def test_training_without_a_word_has_the_bytes_and_the_state_of_fp32_on_a_cpu(data: Path, tmp_path: Path) -> None:
    for name, words in (("plain", []), ("asked", ["train.precision=fp32"])):
        train(tiny_settings(tmp_path, *words), data, tmp_path / name, tmp_path / f"{name}.safetensors")
    plain, asked = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("plain", "asked"))
    assert plain == asked
    # and each goes on from the other's state
    train(tiny_settings(tmp_path, "train.precision=fp32"), data, tmp_path / "plain", tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"a run of other settings \(train\.precision\)"):
        bf16 = tiny_settings(tmp_path, "train.precision=bf16")
        train(bf16, data, tmp_path / "plain", tmp_path / "plain.safetensors")


def test_a_model_says_at_which_precision_a_gpu_has_trained_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tongkuan.learn.train.chosen_precision", lambda asked, _: asked or "bf16")
    train(tiny_settings(tmp_path), data, tmp_path / "run", tmp_path / "gpu.safetensors")
    assert capsys.readouterr().out.startswith("train.precision=bf16, which the GPU multiplies; evaluate says")
    train(tiny_settings(tmp_path, "train.precision=bf16"), data, tmp_path / "other", tmp_path / "asked.safetensors")
    assert facts_of(tmp_path / "gpu.safetensors")["precision"] == "bf16"
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "asked.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# GPUs, where there is none


def test_a_gpu_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(UserError, match=r"GPU 1 cannot be used .*busy or unavailable.*CUDA_VISIBLE_DEVICES") as caught:
        choose_device(Place(1, 2, 1, True))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):  # exits.py has the line for it
        choose_device(Place(1, 2, 1, True))


def test_a_kernel_that_took_too_long_is_not_told_as_the_silence_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tongkuan.ranks.group.find_place", lambda: Place(0, 2))
    monkeypatch.setattr("tongkuan.ranks.group.join", lambda *_: torch.distributed.HashStore())
    with pytest.raises(torch.AcceleratorError), join_ranks():
        raise torch.AcceleratorError("CUDA error: the launch timed out and was terminated")


def test_threads_of_a_gpus_host_keep_arenas_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        def __init__(self, _: None) -> None:
            self.mallopt = lambda what, _: asked.append(what)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    keep_freed_memory(GPU)
    assert asked and M_ARENA_MAX not in asked
    keep_freed_memory(CPU)
    assert M_ARENA_MAX in asked


def test_a_plan_says_what_a_gpu_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bytes_ in (("max_memory_allocated", 3 << 30), ("memory_reserved", 4 << 30)):
        monkeypatch.setattr(torch.cuda, name, lambda _, found=bytes_: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 << 30, 80 << 30))
    assert describe_peak(GPU) == "memory of a rank in MiB: 3,072 at its peak, 14,336 are free for it"
    assert "free" not in describe_peak(CPU)


def test_a_probe_takes_as_many_items_as_all_ranks_have_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tongkuan.encode.encode.available_cores", lambda: 8)
    taken: list[int] = []

    def encode(_model: object, _store: object, item_ids: list[str], *_: object) -> dict[str, Any]:
        taken.append(len(item_ids))
        return {}

    monkeypatch.setattr("tongkuan.dryrun.encode", encode)
    item_ids = [str(number) for number in range(100_000)]
    for ranks, lanes in ((Ranks(0, 1, CPU), 8), (Ranks(0, 4, CPU), 8), (Ranks(0, 2, GPU), 2)):
        store = SimpleNamespace(settings=ModelSettings())
        probe_items(torch.nn.Identity(), store, item_ids, DataSettings(encode_batch=5), ranks, "fp32")
        assert taken[-1] == PROBE_BATCHES * 5 * lanes
