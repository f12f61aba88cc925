"""Checkpoints as people save them are taken for what they hold, or refused in one line that says what was found."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from release_worlds import Release, make_release
from safetensors.torch import load_file, save_file
from test_main import error_of
from torch import nn

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.model.modelfile import load_model
from tongkuan.model.wrappings import STEPS, unwrap

State = dict[str, torch.Tensor]
HERE = Path("x.pth")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def state(original: Release) -> State:
    return dict(torch.load(original.path, weights_only=True)["params"])


@pytest.fixture(scope="module")
def plain(original: Release, tmp_path_factory: pytest.TempPathFactory) -> State:
    """What the import of the released form gives."""
    out = tmp_path_factory.mktemp("plain") / "model.safetensors"
    main(original.words(out))
    return load_file(out)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def inside(state: State, step: str) -> State:
    """A step after the first: the encoders themselves are wrapped."""
    return {key.replace(".", f".{step}.", 1): value for key, value in state.items()}


def old_names(state: State) -> State:
    return {
        re.sub(
            r"(norm\w*\.)bias$", r"\1beta", re.sub(r"(norm\w*\.)weight$", r"\1gamma", key, flags=re.I), flags=re.I
        ): value
        for key, value in state.items()
    }


def strided(value: torch.Tensor) -> torch.Tensor:
    return torch.stack([value, value], dim=-1)[..., 0]


EXTRA = {
    "txt_encoder1.embeddings.position_ids": torch.arange(140)[None],
    "txt_encoder2.pooler.dense.weight": torch.zeros(16, 16),
    "img_encoder1.encoder.layers.0.blocks.1.attention.self.relative_position_index": torch.zeros(16, 16).long(),
    "img_encoder2.encoder.layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
}
Wrap = Callable[[State], Any]
TAKEN: dict[str, Wrap] = {
    "checkpoint.state_dict": lambda s: {"checkpoint": {"state_dict": s, "epoch": 3}, "rng": torch.zeros(4)},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "net": lambda s: {"net": OrderedDict(s), "acc": 91.5, "loss": torch.tensor(0.1)},
    "ema alone": lambda s: {"model_ema": s},
    "the same twice": lambda s: {"model": s, "state_dict": prefixed(s, "module.") and s},
    "module._orig_mod.model.": lambda s: {"model": prefixed(s, "module._orig_mod.model.")},
    "model.module.module.": lambda s: prefixed(s, "model.module.module."),
    "network.": lambda s: {"state_dict": prefixed(s, "network.towers.")},
    "compiled inside": lambda s: {"params": inside(s, "_orig_mod")},
    "old names": lambda s: {"model": prefixed(old_names(s), "module.")},
    "bare": lambda s: s,
    "buffers and a pooler": lambda s: {"net": prefixed(s | EXTRA, "model.")},
    "parameters": lambda s: {"model": {key: nn.Parameter(value) for key, value in s.items()}},
    "no place of their own": lambda s: {"model": {key: strided(value) for key, value in s.items()}},
    "double": lambda s: {"model": {key: value.double() for key, value in s.items()}},
}  # fmt: skip


@pytest.mark.parametrize("form", TAKEN)
def test_a_wrapping_changes_nothing(original: Release, state: State, plain: State, tmp_path: Path, form: str) -> None:
    release = replace(original, path=tmp_path / "mine.ckpt")
    torch.save(TAKEN[form](state), release.path, _use_new_zipfile_serialization=form != "bare")  # torch before 1.6
    main(release.words(tmp_path / "out"))
    other = load_file(tmp_path / "out")
    assert other.keys() == plain.keys() and all(torch.equal(other[key], plain[key]) for key in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_halves_are_widened(original: Release, state: State, plain: State, tmp_path: Path, dtype: torch.dtype) -> None:
    release = replace(original, path=tmp_path / "mine.ckpt")
    torch.save({"model": {key: value.to(dtype) for key, value in state.items()}}, release.path)
    main(release.words(tmp_path / "out"))
    other = load_file(tmp_path / "out")
    assert all(torch.equal(other[key], plain[key].to(dtype).float()) for key in plain)


def test_a_safetensors_file_is_a_checkpoint_too(original: Release, state: State, plain: State, tmp_path: Path) -> None:
    release = replace(original, path=tmp_path / "mine.bin")
    save_file(prefixed(state, "module."), release.path)
    main(release.words(tmp_path / "out"))
    other = load_file(tmp_path / "out")
    assert all(torch.equal(other[key], plain[key]) for key in plain)
    line = error_of(*replace(original, path=tmp_path / "out").words(tmp_path / "again"))
    assert (
        line
        == f"{tmp_path / 'out'}: a model of ours already; ./entrypoint.sh predict --model {tmp_path / 'out'} takes it"
    )
    load_model(tmp_path / "out")


def test_two_state_dicts_are_named_and_the_advice_takes_one(
    original: Release, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = replace(original, path=tmp_path / "two.pth")
    averaged = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, "ema": {"state_dict": averaged}}, release.path)
    line = error_of(*release.words(tmp_path / "out"))
    assert f"2 state dicts in it, 'model' ({len(state)} tensors), 'ema/state_dict' ({len(state)} tensors); " in line
    take = line.rpartition(": ")[2]
    assert take == "torch.save(torch.load(FILE, weights_only=True)['ema']['state_dict'], OUT)"
    exec(take, {"torch": torch, "FILE": release.path, "OUT": tmp_path / "one.pth"})
    main(replace(release, path=tmp_path / "one.pth").words(tmp_path / "out"))
    assert torch.equal(load_file(tmp_path / "out")["threshold.head.bias"], averaged["fc1.bias"])
    torch.save({"params": state, "params_ema": averaged}, release.path)
    main(release.words(tmp_path / "out"))
    assert "note: " in (told := capsys.readouterr().out) and "took 'params', left 'params_ema'" in told
    assert torch.equal(load_file(tmp_path / "out")["threshold.head.bias"], state["fc1.bias"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "optimizer": {"state": {}}, "args": "x"}, "the keys 'epoch', 'optimizer', 'args'"),
        ({"params": {"step": 3}}, "the keys 'params'"),
        ({"state_dict": {"backbone.weight": torch.ones(2)}}, "the keys 'state_dict'"),
        ({f"layer{number}.weight": torch.ones(1) for number in range(9)}, "'layer5.weight', …"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({}, "found nothing"),
        (None, "a NoneType"),
        ({1: {"fc9": 2}}, "the keys 1"),
    ],
)
def test_what_is_no_state_dict_is_described(original: Release, tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "mine.pth")
    line = error_of(*replace(original, path=tmp_path / "mine.pth").words(tmp_path / "out"))
    assert "mine.pth: no {" in line and found in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("pair", [("fc1.bias", "module.fc1.bias"), ("model.fc1.bias", "_orig_mod.model.fc1.bias")])
def test_keys_that_wrappers_alone_tell_apart_are_one_line(pair: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"are both 'fc1\.bias' without what wrappers add; keep one of them") as caught:
        unwrap(dict.fromkeys(pair, torch.ones(2)), HERE)
    assert all(repr(key) in str(caught.value) for key in pair)
    assert unwrap({pair[1]: torch.ones(2)}, HERE)[0].keys() == {"fc1.bias"}
    norms = {"txt_encoder1.LayerNorm.gamma": torch.ones(2), "txt_encoder1.LayerNorm.weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"are both 'txt_encoder1\.LayerNorm\.weight'"):
        unwrap(norms, HERE)


KEYS = st.lists(
    st.sampled_from([*STEPS, "net", "fc1", "txt_encoder2", "LayerNorm", "gamma", "bias", "", "x"]), max_size=4
)
WILD = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.just(torch.ones(1)),
    lambda inner: st.dictionaries(KEYS.map(".".join) | st.integers(), inner, max_size=4) | st.lists(inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=50)
@given(WILD)
def test_any_content_is_tensors_by_name_or_one_line(content: object) -> None:
    try:
        tensors, note = unwrap(content, HERE)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 500
    else:
        assert tensors and all(isinstance(value, torch.Tensor) for value in tensors.values())
        assert len(note.splitlines()) <= 1
        assert not any(step in STEPS for key in tensors for step in key.split(".")[1:])


@given(st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "student."]), max_size=5))
def test_any_prefixes_in_any_order_are_left_out(words: list[str]) -> None:
    state = {"fc1.weight": torch.ones(2), "img_encoder1.layernorm.bias": torch.ones(1)}
    assert unwrap({"x": prefixed(state, "".join(words))}, HERE)[0].keys() == state.keys()


@pytest.mark.parametrize("odd", [np.float64(3), argparse.Namespace(lr=1), nn.Linear(2, 2)])
def test_what_could_run_code_is_refused(original: Release, state: State, tmp_path: Path, odd: object) -> None:
    release = replace(original, path=tmp_path / "mine.pth")
    torch.save({"model": state, "best": odd}, release.path)
    line = error_of(*release.words(tmp_path / "out"))
    assert "holds more than tensors" in line and line.endswith("torch.save(model.state_dict(), FILE)")
    torch.save(state, release.path)
    main(release.words(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["int8", "sparse", "meta", "complex"])
def test_tensors_of_no_plain_numbers_are_named(original: Release, state: State, tmp_path: Path, kind: str) -> None:
    value = state["fc1.weight"]
    odd = {"int8": value.to(torch.int8), "sparse": value.to_sparse(), "meta": value.to("meta"), "complex": value + 0j}
    torch.save({"model": {**state, "fc1.weight": odd[kind]}}, tmp_path / "mine.pth")
    line = error_of(*replace(original, path=tmp_path / "mine.pth").words(tmp_path / "out"))
    assert "1 of no plain numbers (fc1.weight " in line and not (tmp_path / "out").exists()


def test_a_folder_is_no_checkpoint(original: Release, tmp_path: Path) -> None:
    line = error_of(*replace(original, path=tmp_path).words(tmp_path / "out"))
    assert line == f"{tmp_path}: a folder; name the checkpoint's file in it"
