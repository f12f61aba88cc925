"""Picture encoders whose work on a GPU is recorded and played back; a CPU has nothing to record with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import tiny_settings

from tongkuan.base.errors import UserError
from tongkuan.learn import step as learning
from tongkuan.learn.recorded import record_encoders
from tongkuan.learn.step import TrainStep
from tongkuan.learn.train import check_batch
from tongkuan.model.towers import build
from tongkuan.model.trunk import ItemModel
from tongkuan.ranks.group import Ranks

CPU = torch.device("cpu")
SIDE = 32


@pytest.fixture
def model(tmp_path: Path) -> ItemModel:
    torch.manual_seed(0)
    settings = tiny_settings(tmp_path, "model.inputs=image").model
    return build(settings, None, pretrained=False)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that were played back; as torch does, by a module that was recorded learning, of recorded sizes only."""
    found = []

    def record(modules: tuple[nn.Module, ...], samples: tuple[tuple[Tensor], ...], **_: Any) -> tuple[nn.Module, ...]:
        assert not torch.is_autocast_cache_enabled() and all(module.training for module in modules)
        for module, (sample,) in zip(modules, samples, strict=True):

            def play(
                images: Tensor, forward: Callable[[Tensor], Tensor] = module.forward, shape: Any = sample
            ) -> Tensor:
                assert images.shape == shape.shape and images.is_contiguous(memory_format=torch.channels_last)
                found.append(tuple(images.shape))
                return forward(images)

            torch.rand(1)  # dropout, as it was recorded
            module.forward = play  # type: ignore[method-assign]
        return modules

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return found


def embeddings(model: ItemModel, count: int) -> Tensor:
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))
    ids = torch.zeros(count, 0, dtype=torch.int64)
    found: Tensor = model(images, ids, None)
    return found


def learned(model: ItemModel, count: int) -> tuple[Tensor, list[Tensor]]:
    """Embeddings of a step, and its gradients."""
    model.zero_grad()
    found = embeddings(model.train(), count)
    found.square().sum().backward()
    return found.detach(), [each.grad for each in model.parameters() if each.grad is not None]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_what_is_played_back_is_what_would_be_launched(
    model: ItemModel, played: list[tuple[int, ...]], count: int
) -> None:
    expected, expected_gradients = learned(model, count)
    state = torch.get_rng_state()
    record_encoders(model.eval(), 4, SIDE, "fp32", CPU)
    assert not model.training and torch.equal(torch.get_rng_state(), state), "what comes after is drawn as before"
    found, gradients = learned(model, count)
    assert played == [(4, 3, SIDE, SIDE)] * 2, "of both towers, padded"
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_encoding_and_larger_batches_are_launched(model: ItemModel, played: list[tuple[int, ...]]) -> None:
    with torch.no_grad():
        expected = embeddings(model.eval(), 3)
    record_encoders(model, 4, SIDE, "fp32", CPU)
    with torch.no_grad():
        assert torch.equal(embeddings(model.eval(), 3), expected)
    assert embeddings(model.train(), 5).requires_grad
    assert not played


@pytest.mark.parametrize(
    ("device", "overrides", "is_recorded"),
    [
        ("cuda", ("train.cuda_graphs=true",), True),
        ("cuda", (), False),
        ("cpu", ("train.cuda_graphs=true",), False),
        ("cuda", ("train.cuda_graphs=true", "train.encoders=frozen"), False),
    ],
)
def test_only_what_learns_on_a_gpu_is_recorded(
    model: ItemModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    overrides: tuple[str, ...],
    is_recorded: bool,
) -> None:
    settings = tiny_settings(tmp_path, "train.precision=fp32", *overrides)
    if settings.train.encoders == "frozen":
        for encoder in model.encoders("image"):
            encoder.requires_grad_(False)
    asked = []
    monkeypatch.setattr(learning, "record_encoders", lambda *words: asked.append(words[1:]))
    TrainStep(model, settings, Ranks(0, 2, torch.device(device)))
    assert asked == ([(2 * 4 // 2, SIDE, "fp32", torch.device(device))] if is_recorded else [])


@pytest.mark.parametrize("other", ["accumulate=2", "checkpoint_activations=True"])
def test_what_cannot_be_played_back_is_told(tmp_path: Path, other: str) -> None:
    """A second part would write over the gradients of the first; activations cannot be computed again."""
    settings = tiny_settings(tmp_path, "train.cuda_graphs=true", f"train.{other}")
    with pytest.raises(UserError, match=rf"train\.cuda_graphs=true.*train\.{other}; leave one"):
        check_batch(settings.train, Ranks(0, 1, CPU))
