"""Memory that runs out: one line that says what to lower."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import environment
from worlds import tiny_preset, tiny_settings

from tongkuan.cli.exits import describe
from tongkuan.cli.verbs import main
from tongkuan.learn.step import TrainStep
from tongkuan.learn.train import train
from tongkuan.model.towers import TwoTowers


def out_of_memory(*_: object) -> torch.Tensor:
    """What no machine has: the processor's allocator refuses it."""
    return torch.empty(1 << 45)


def test_training_names_what_to_lower(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainStep, "part_loss", out_of_memory)
    with pytest.raises(RuntimeError) as caught:
        train(tiny_settings(tmp_path), data, tmp_path / "run", tmp_path / "model")
    line = describe(caught.value, "train")
    assert "out of memory" in line and "can't allocate memory" in line and "\n" not in line
    for setting in ("train.pairs", "train.accumulate", "train.checkpoint_activations=true", "train.precision=bf16"):
        assert setting in line


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_encoding_names_the_batch(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(TwoTowers, "forward", out_of_memory)
    words = [verb, "--data", data, "--model", model, *(["--submit", tmp_path] if verb == "predict" else [])]
    with pytest.raises(RuntimeError) as caught:
        main(list(map(str, words)))
    line = describe(caught.value, verb)
    assert line.startswith("out of memory (") and "lower --encode-batch" in line and "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_with_too_little_memory_ends_in_one_line(data: Path, tmp_path: Path) -> None:
    limit = 12 << 30  # bytes of addresses: torch alone takes half of them
    own = tmp_path / "data"
    shutil.copytree(data, own, ignore=shutil.ignore_patterns("*.png"))  # blank ones cost no time
    command: Sequence[object] = (
        *(sys.executable, "-m", "tongkuan", "train", "--preset", tiny_preset(tmp_path), "--data", own),
        *("--run", tmp_path / "run", "--model", tmp_path / "model", "model.image.size=12000", "data.workers=1"),
    )
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("tongkuan: out of memory ("), done.stderr[-2000:]
