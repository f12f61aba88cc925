"""A training step of ours beside the published way, and what it may not do between two rows of the log."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import tiny_settings

from tongkuan.learn.batches import BatchSampler, parts
from tongkuan.learn.dataloader import load_task
from tongkuan.learn.step import TrainStep, make_optimizer
from tongkuan.learn.train import Trainer, train
from tongkuan.model.towers import build
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair
from tongkuan.settings import Settings, TrainSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import train_step

ALONE = Ranks(0, 1, torch.device("cpu"))
SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class Waits(TorchDispatchMode):
    """Names of the operators within that a host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func._schema.name) in SYNCHRONISING:
            self.met.append(name)
        return func(*args, **(kwargs or {}))


def small_bench(data: Path, draw: str, recompute: bool = False) -> train_step.Bench:
    """BERT and Swin of real make and small size, steps long enough for a difference to grow."""
    train_options = {"pairs": 4, "draw": draw, "learning_rate": 1e-4, "checkpoint_activations": recompute}
    text = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    image = {"img_size": 32, "window_size": 4, "embed_dim": 16, "num_heads": [2, 2, 2, 2]}
    model = {
        "embedding_size": 16,
        "text": {"config": text, "max_tokens": 48},
        "image": {"architecture": "swin_tiny_patch4_window7_224", "size": 32, "arguments": image},
    }
    settings = Settings.model_validate({"model": model, "train": train_options})
    settings = settings.model_copy(update={"model": train_step.shallow(settings.model, 0.34)})
    return train_step.Bench(settings, load_task(settings, data))


@pytest.mark.parametrize(
    ("draw", "recompute"), [pytest.param("random", False, marks=pytest.mark.slow), ("component", True)]
)
def test_ten_steps_lose_what_the_published_way_loses(data: Path, draw: str, recompute: bool) -> None:
    bench = small_bench(data, draw, recompute)
    published, ours = bench.losses(10)
    assert ours == pytest.approx(published, abs=1e-4)
    assert max(published) - min(published) > 1e-2, "batches must differ for their agreement to say anything"


def test_recomputing_keeps_at_most_a_quarter_of_the_published_ways_bytes(data: Path) -> None:
    published, ours = small_bench(data, "random", recompute=True).kept()
    assert 0 < ours <= published / 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reads_back_no_number(data: Path, tmp_path: Path, precision: str) -> None:
    """Of a mask (N, T), transformers would ask whether it has a 0: a wait a forward of a text encoder.

    Numbers on their way to a GPU are not seen here, where there is none.
    """
    settings = tiny_settings(tmp_path, f"train.precision={precision}", "train.accumulate=2")
    task = load_task(settings, data)
    learner = TrainStep(build(settings.model, task.card.text_config, pretrained=True).train(), settings, ALONE)
    loaded = [
        (part, task.train_store.batch(part.item_ids), torch.tensor([pair.label for pair in part.pairs]))
        for part in itertools.islice(parts(task.train_pairs, settings.train, ALONE, 0), 4)
    ]
    coming = iter(loaded)
    with Waits() as waits:
        for step in range(2):
            loss, norm = learner.take(step, coming)
        for _, batch, _ in loaded:
            for mask in (None, batch.mask):
                learner.model.threshold.states(batch.ids, mask)
    assert waits.met == []
    with Waits() as noticed:
        learner.model.threshold.text(input_ids=loaded[0][1].ids, attention_mask=loaded[0][1].mask)
        float(loss + norm)
    assert len(noticed.met) == 2, "a wait would have been seen"


def test_steps_between_rows_of_the_log_read_none(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one row reads as many numbers after 8 steps as after 4: a read waits for the GPU."""
    read, counts = [], []
    as_float = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: read.append(tensor) or as_float(tensor))
    for steps in (4, 8):
        rare = [f"train.{name}={steps}" for name in ("steps", "log_every", "save_every", "validate_every")]
        train(tiny_settings(tmp_path, *rare), data, tmp_path / f"run{steps}", tmp_path / "model.safetensors")
        counts.append(len(read) - sum(counts))
    assert counts[0] == counts[1] >= 2, "a loss and a norm"


def test_the_wait_for_data_is_shown_but_no_metric(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("tongkuan.learn.train.tqdm.set_postfix", lambda _, **figures: shown.append(figures))
    train(tiny_settings(tmp_path), data, tmp_path / "run", tmp_path / "model.safetensors")
    assert shown and all(figures["data_wait"].endswith(" ms") for figures in shown)
    rows = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    names = {name for row in rows for name in row}
    validation = {"valid_f1", "threshold", "valid_f1_at_0", "valid_average_precision"}
    assert names == {"step", "loss", "gradient_norm", "learning_rate"} | validation


def test_a_component_is_walked_so_that_its_pairs_meet() -> None:
    """A ring of 400 pairs: drawn by chance, 4 pairs have 8 items; walked along, 5."""
    order = np.random.default_rng(0).permutation(400).tolist()
    pairs = [Pair(str(a), str(b), 0) for a, b in zip(order, [*order[1:], order[0]], strict=True)]
    shuffled = [pairs[index] for index in np.random.default_rng(1).permutation(400)]

    def items_a_pair(draw: str) -> float:
        batches = BatchSampler(shuffled, TrainSettings(pairs=4, draw=draw))
        return sum(len({i for p in batches.batch(step) for i in (p.left, p.right)}) for step in range(100)) / 400

    assert items_a_pair("random") > 1.9
    assert items_a_pair("component") < 1.3


def test_the_fused_optimiser_steps_as_the_plain_one(data: Path, tmp_path: Path) -> None:
    """Channels-last weights among them: a kernel that ran over bare memory would mix them up."""
    settings = tiny_settings(tmp_path)
    text_config = load_task(settings, data).card.text_config
    models = []
    for is_plain in (False, True):
        torch.manual_seed(0)
        model = build(settings.model, text_config, pretrained=True)
        optimizer = make_optimizer(model, settings.train)
        assert optimizer.param_groups[0]["fused"]
        if is_plain:
            for group in optimizer.param_groups:
                group["fused"] = group["foreach"] = False
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            optimizer.step()
        models.append(model)
    for fused, plain in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(fused, plain, rtol=1e-5, atol=1e-7)


def speeds_of(run_dir: Path) -> list[float]:
    """Pairs a second as TensorBoard has them."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("pairs_per_second")]


@pytest.mark.parametrize("log_every", [1, 2, 4])
def test_pairs_per_second_are_counted_with_no_terminal_to_show_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """By a clock on which a step of 4 pairs takes half a second; a validation's 100 s are no part of it."""
    assert not sys.stderr.isatty()
    now = [0.0]

    def step(self: TrainStep, *rest: Any) -> Any:
        now[0] += 0.5
        return take_step(self, *rest)

    def validate_slowly(*rest: Any) -> None:
        now[0] += 100
        validate(*rest)

    take_step, validate = TrainStep.take, Trainer.validate
    monkeypatch.setattr("tongkuan.learn.step.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(TrainStep, "take", step)
    monkeypatch.setattr("tongkuan.learn.train.Trainer.validate", validate_slowly)
    settings = tiny_settings(tmp_path, f"train.log_every={log_every}", "train.steps=7", "train.validate_every=3")
    train(settings, data, tmp_path / "run", tmp_path / "model.safetensors")
    speeds = speeds_of(tmp_path / "run")
    assert len(speeds) == math.ceil(7 / log_every)
    assert speeds == pytest.approx([8.0] * len(speeds))
