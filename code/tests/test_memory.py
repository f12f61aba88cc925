"""memory.py: the estimate against what real steps take, and that recomputing activations saves what it should."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from worlds import tiny_settings

from tongkuan.encode.store import Batch
from tongkuan.learn.batches import Part
from tongkuan.learn.memory import MemoryEstimate, describe_memory, estimate_memory
from tongkuan.learn.train import Learner, Loaded, make_optimizer, train
from tongkuan.model.towers import TwoTowers, build, checkpoint_activations, text_config_of
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair
from tongkuan.settings import ImageEncoder, Inputs, ModelSettings, Settings, TextEncoder, load_settings

ALONE = Ranks(0, 1, torch.device("cpu"))
# BERT and Swin, as in the published recipe, with dropout and stochastic depth on.
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
MODEL = ModelSettings(
    embedding_size=16,
    text=TextEncoder(config={**BERT, "intermediate_size": 64, "max_position_embeddings": 24}, max_tokens=24),
    image=ImageEncoder(architecture="swin_tiny_patch4_window7_224", size=32, arguments=SWIN),
)


def bert_and_swin(inputs: Inputs = "both", **options: Any) -> tuple[Settings, TwoTowers]:
    """Settings with training options, and their network."""
    model = MODEL.model_copy(update={"inputs": inputs})
    settings = Settings.model_validate({"model": model, "train": {"pairs": 4, **options}})
    return settings, network(settings)


def network(settings: Settings, pretrained: bool = False) -> TwoTowers:
    torch.manual_seed(0)
    text_config = text_config_of(settings.model.text, 60) if settings.model.inputs != "image" else None
    model = build(settings.model, text_config, pretrained).train()
    if settings.train.checkpoint_activations:
        checkpoint_activations(model)
    return model


def estimate(model: TwoTowers, settings: Settings, ranks: Ranks = ALONE) -> MemoryEstimate:
    return estimate_memory(model, make_optimizer(model, settings.train), settings, ranks)


def some_part(settings: Settings) -> Loaded:
    """A part of pairs without common items, texts of full length but one."""
    number, size, width = settings.train.pairs, settings.model.image.size, settings.model.text.max_tokens
    ids = [str(place) for place in range(2 * number)]
    left, right = list(range(number)), list(range(number, 2 * number))
    part = Part(0, [Pair("", "")] * number, ids, left, right, left + right)
    mask = torch.ones(2 * number, width, dtype=torch.int64)
    mask[0, -3:] = 0
    images = torch.randint(0, 256, (2 * number, 3, size, size), dtype=torch.uint8)
    batch = Batch(images, torch.ones(2 * number, dtype=torch.bool), torch.randint(5, 50, mask.shape), mask)
    return part, batch, torch.arange(number) % 2


class Kept(dict[int, torch.UntypedStorage]):
    """Storages by their address."""

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.values())


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[Kept]:
    """What autograd keeps of all that is computed within; each storage once, those of `model` not."""
    kept = Kept()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def measured_peak(learner: Learner, settings: Settings) -> int:
    """The most that a step holds at once beyond what was there before it, as torch's allocator tells."""
    learner.optimizer.zero_grad(set_to_none=True)
    loaded = some_part(settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        learner.step(1, iter([loaded]))
    events = [event for event in told.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.slow
def test_the_estimate_is_within_15_percent_of_a_step_of_the_small_preset() -> None:
    settings = load_settings("small", ["train.pairs=2"])
    model = network(settings, pretrained=True)
    expected = estimate(model, settings)
    learner = Learner(model, settings, ALONE)
    with kept_for_backward(model) as kept:
        learner.step(0, iter([some_part(settings)]))
    assert expected.activations == pytest.approx(kept.num_bytes, rel=0.15)
    kept.clear()

    tensors = [*model.parameters(), *model.buffers()]
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    assert expected.weights == sum(tensor.nbytes for tensor in tensors)
    assert expected.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert expected.optimizer == pytest.approx(sum(moment.nbytes for moment in moments), rel=0.01)

    beyond = expected.peak - expected.weights - expected.optimizer
    assert beyond == pytest.approx(measured_peak(learner, settings), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "recompute"), [("bf16", False), ("bf16", True), ("fp16", False)])
def test_it_holds_for_every_precision_with_and_without_recomputing(precision: str, recompute: bool) -> None:
    settings, model = bert_and_swin(precision=precision, checkpoint_activations=recompute)
    expected = estimate(model, settings)
    assert (expected.copies > 0) == (precision != "fp32")
    learner = Learner(model, settings, ALONE)
    with kept_for_backward(model) as kept:
        learner.part_loss(*some_part(settings))
    assert expected.activations + expected.copies == pytest.approx(kept.num_bytes, rel=0.15)
    learner.step(0, iter([some_part(settings)]))
    beyond = expected.peak - expected.weights - expected.optimizer
    assert beyond == pytest.approx(measured_peak(learner, settings), rel=0.15)


@pytest.mark.slow
def test_activations_grow_with_the_pairs_of_a_part_and_nothing_else_does() -> None:
    few, many = (estimate(*reversed(bert_and_swin("text", pairs=pairs, precision="bf16"))) for pairs in (4, 16))
    assert many.activations == pytest.approx(4 * few.activations, rel=0.01)
    assert (many.weights, many.optimizer, many.copies) == (few.weights, few.optimizer, few.copies)


@pytest.mark.slow
def test_recomputing_is_estimated_to_keep_less() -> None:
    plain, recomputed = (
        estimate(*reversed(bert_and_swin("text", pairs=32, checkpoint_activations=recompute)))
        for recompute in (False, True)
    )
    assert recomputed.activations < 0.4 * plain.activations
    assert recomputed.peak < plain.peak


@pytest.mark.slow
def test_ranks_and_parts_share_the_pairs_out() -> None:
    settings, model = bert_and_swin("text", pairs=16)
    whole, two = estimate(model, settings), estimate(model, settings, Ranks(0, 2, ALONE.device))
    assert two.pairs == 8 and two.activations < whole.activations
    assert (whole.exchange, two.exchange) == (0, two.gradients)
    settings, _ = bert_and_swin("text", pairs=16, accumulate=2)
    parts = estimate(model, settings)
    assert parts.activations == two.activations
    assert parts.peak >= parts.weights + parts.gradients + parts.optimizer + parts.activations


def test_estimating_changes_neither_model_nor_random_state() -> None:
    settings, model = bert_and_swin("text", checkpoint_activations=True)
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    estimate(model, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_pictures_alone_are_estimated_too() -> None:
    settings, model = bert_and_swin("image")
    assert estimate(model, settings).activations > 0


def test_training_says_what_it_will_take_before_it_starts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_settings(tmp_path), data, tmp_path / "run", tmp_path / "model.safetensors")
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("memory of a rank in MiB, estimated: weights ")
    assert all(word in line for word in ("gradients", "optimiser", "activations", "(4 pairs of ", "peak"))


def test_an_encoder_that_cannot_be_estimated_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, model = bert_and_swin("text")
    looks_inside = lambda self, images, ids, mask: images * images.sum().item()  # noqa: E731
    monkeypatch.setattr(TwoTowers, "forward", looks_inside)
    line = describe_memory(model, make_optimizer(model, settings.train), settings, ALONE)
    assert line.startswith("memory: no estimate for these encoders (") and "\n" not in line


def test_a_gpu_that_is_too_small_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, model = bert_and_swin("text")
    expected = estimate(model, settings)
    monkeypatch.setattr("tongkuan.learn.memory.estimate_memory", lambda *_: expected)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (0, expected.peak - 1))
    gpu = Ranks(0, 1, torch.device("cuda", 0))
    assert "train.accumulate" in describe_memory(model, make_optimizer(model, settings.train), settings, gpu)


@pytest.mark.slow
def test_the_published_size_is_estimated_in_seconds() -> None:
    settings = load_settings("ccks2022-63")
    config = {"model_type": "bert", "vocab_size": 21128}  # its other sizes are BERT's own
    with torch.device("meta"):
        model = build(settings.model, config, pretrained=False)
    model.to_empty(device="cpu")  # nobody writes to it, so it takes no memory
    start = time.process_time()  # on one thread; what else the machine does must not count
    found = estimate(model, settings, Ranks(0, 2, ALONE.device))
    assert time.process_time() - start < 15
    assert found.pairs == 4
    assert 20e9 < found.peak < 42e9, "42 GB as published, with attention that kept its weights"


def test_recomputing_changes_no_gradient_and_each_of_the_four_encoders_keeps_less() -> None:
    """With dropout and stochastic depth: what is recomputed must draw the same numbers."""
    gradients, kept = [], []
    for recompute in (False, True):
        settings, model = bert_and_swin(checkpoint_activations=recompute)
        torch.manual_seed(0)
        _, batch, _ = some_part(settings)
        images = batch.images.float()
        model(images, batch.ids, batch.mask).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append([])
        for tower in (model.threshold, model.commodity):
            with kept_for_backward(model) as of_text:
                tower.text(input_ids=batch.ids, attention_mask=batch.mask)
            with kept_for_backward(model) as of_image:
                tower.image(images)
            kept[-1] += [of_text.num_bytes, of_image.num_bytes]
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)
    for plain, recomputed in zip(*kept, strict=True):
        assert recomputed < 0.4 * plain
