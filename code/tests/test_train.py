"""train.py: schedule, batches, ranks, exact resume."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from commands import ok, run_verb
from safetensors.torch import load_file
from worlds import tiny_preset, tiny_settings

from tongkuan.base.errors import FailureError, UserError
from tongkuan.cli.verbs import main
from tongkuan.learn.batches import BatchSampler, Part, parts
from tongkuan.learn.dataloader import Loaded, load_task
from tongkuan.learn.run import read_state
from tongkuan.learn.step import TrainStep, learning_rate_at
from tongkuan.learn.train import train
from tongkuan.model.towers import build
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair
from tongkuan.settings import Precision, TrainSettings

CPU = torch.device("cpu")


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    return [orjson.loads(line) for line in (run_dir / "metrics.jsonl").read_bytes().splitlines()]


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run_dir) if "loss" in row]


def state_bytes(run_dir: Path) -> dict[str, bytes]:
    """All that a run leaves, as comparable bytes."""
    state = torch.load(run_dir / "last.pt", weights_only=True)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()}
    for number, moments in state["optimizer"]["state"].items():
        tensors |= {f"{number}.{name}": value.numpy().tobytes() for name, value in moments.items()}
    files = {name: (run_dir / name).read_bytes() for name in ("best.safetensors", "metrics.jsonl")}
    return tensors | files


def test_the_learning_rate_falls_as_a_cosine_from_peak_to_final() -> None:
    settings = TrainSettings()
    assert learning_rate_at(0, 2e-6, settings) == pytest.approx(2e-6)
    assert learning_rate_at(50_000, 2e-6, settings) == pytest.approx((2e-6 + 1e-7) / 2)
    assert learning_rate_at(100_000, 2e-6, settings) == pytest.approx(1e-7)
    quarter = 1e-7 + (2e-6 - 1e-7) * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate_at(25_000, 2e-6, settings) == pytest.approx(quarter)
    warm = TrainSettings(warmup_steps=9)
    assert learning_rate_at(0, 2e-6, warm) == pytest.approx(2e-7)


@pytest.mark.parametrize("draw", ["random", "component"])
def test_every_epoch_visits_each_pair_once_in_an_order_of_its_own(draw: str) -> None:
    pairs = [Pair(f"{index // 3}-{index % 3}", f"{index // 3}-x", 0) for index in range(12)]
    batches = BatchSampler(pairs, TrainSettings(pairs=5, seed=3, draw=draw))
    order = [pair for step in range(12) for pair in batches.batch(step)]
    epochs = [order[start : start + 12] for start in range(0, 60, 12)]
    assert all(set(epoch) == set(pairs) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    later = BatchSampler(pairs, TrainSettings(pairs=5, seed=3, draw=draw))
    assert later.batch(7) == order[35:40], "a resumed run draws what an unbroken one does"
    if draw == "component":
        groups = [pair.right for pair in epochs[0]]
        assert all(len(set(groups[start : start + 3])) == 1 for start in range(0, 12, 3))


def test_ranks_and_parts_share_out_the_global_batch(data: Path, tmp_path: Path) -> None:
    task = load_task(tiny_settings(tmp_path), data)
    options = TrainSettings(steps=3, pairs=4, accumulate=2)

    def by_step(count: int) -> list[list[Part]]:
        by_rank = [list(parts(task.train_pairs, options, Ranks(rank, count, CPU), 0)) for rank in range(count)]
        return [[part for rank in by_rank for part in rank if part.step == step] for step in range(3)]

    for one, two in zip(by_step(1), by_step(2), strict=True):
        assert [pair for part in one for pair in part.pairs] == [pair for part in two for pair in part.pairs]
        rows = [{}, {}]  # of each item: the same wherever it is encoded
        for found, whole in zip(rows, (one, two), strict=True):
            for part in whole:
                found.update(zip(part.item_ids, part.rows, strict=True))
        assert rows[0] == rows[1]
        for part in two:
            sides = [
                (part.item_ids[left], part.item_ids[right]) for left, right in zip(part.left, part.right, strict=True)
            ]
            assert sides == [(pair.left, pair.right) for pair in part.pairs]
            assert len(set(part.item_ids)) == len(part.item_ids), "no item twice"


@pytest.mark.slow
def test_training_learns(data: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tmp_path, "train.steps=60", "train.pairs=8", "train.learning_rate=3e-3", "train.validate_every=60"
    )
    train(settings, data, tmp_path / "run", tmp_path / "model.safetensors")
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    valid = [row for row in metrics_of(tmp_path / "run") if "valid_f1" in row]
    assert valid[-1]["valid_f1"] > 0.8


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_settings(tmp_path, f"train.seed={seed}"), data, tmp_path / name, tmp_path / f"{name}.safetensors")
    first, again, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_a_rank_has_as_many_threads_as_asked(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with as many as the machine has cores: sums that are cut otherwise end in other bits."""
    seen, before = [], torch.get_num_threads()

    def learn(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr("tongkuan.learn.train.Trainer.fit", learn)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings(tmp_path, "train.threads=3"), data, tmp_path / "run", tmp_path / "m.safetensors")
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_a_state_is_the_same_in_memory_and_mapped(data: Path, tmp_path: Path) -> None:
    """As it is read for a GPU."""
    train(tiny_settings(tmp_path), data, tmp_path / "run", tmp_path / "model.safetensors")
    last = tmp_path / "run" / "last.pt"
    plain, mapped = read_state(last), read_state(last, is_mapped=True)
    assert plain is not None and mapped is not None and plain["step"] == mapped["step"] == 6
    assert all(torch.equal(tensor, mapped["model"][name]) for name, tensor in plain["model"].items())
    moments = (state["optimizer"]["state"][0]["exp_avg"] for state in (plain, mapped))
    assert torch.equal(*moments)
    last.write_bytes(last.read_bytes()[:-100])
    assert read_state(last, is_mapped=True) is None


def test_parts_change_memory_not_the_result(data: Path, tmp_path: Path) -> None:
    for name, accumulate in (("whole", 1), ("parts", 2)):
        settings = tiny_settings(tmp_path, f"train.accumulate={accumulate}")
        train(settings, data, tmp_path / name, tmp_path / f"{name}.safetensors")
    assert losses_of(tmp_path / "whole") == pytest.approx(losses_of(tmp_path / "parts"), abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_lower_precisions_train_near_fp32(data: Path, tmp_path: Path, precision: Precision) -> None:
    for name in ("fp32", precision):
        settings = tiny_settings(tmp_path, f"train.precision={name}", "train.checkpoint_activations=true")
        train(settings, data, tmp_path / name, tmp_path / f"{name}.safetensors")
    assert losses_of(tmp_path / precision)[0] == pytest.approx(losses_of(tmp_path / "fp32")[0], rel=0.05)
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / precision))


@pytest.mark.slow
def test_a_run_in_fp16_goes_on_with_its_loss_scale(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two checkpoints, it ends as an unbroken one: weights, moments and the scale of the loss."""
    settings = tiny_settings(tmp_path, "train.precision=fp16")
    train(settings, data, tmp_path / "whole", tmp_path / "whole.safetensors")
    take_step = TrainStep.take

    def stop_at_five(learner: TrainStep, step: int, loaded: Iterator[Loaded]) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return take_step(learner, step, loaded)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "take", stop_at_five)
        train(settings, data, tmp_path / "broken", tmp_path / "broken.safetensors")
    assert last_step(tmp_path / "broken") == 4
    train(settings, data, tmp_path / "broken", tmp_path / "broken.safetensors")
    assert state_bytes(tmp_path / "broken") == state_bytes(tmp_path / "whole")
    scalers = [torch.load(tmp_path / name / "last.pt", weights_only=True)["scaler"] for name in ("whole", "broken")]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] < 2**16, "as steps overflowed, it went on from a lower one"


def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(data: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, "train.precision=fp16")
    task = load_task(settings, data)
    alone = Ranks(0, 1, CPU)
    model = build(settings.model, task.card.text_config, pretrained=True).train()
    learner = TrainStep(model, settings, alone)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = next(parts(task.train_pairs, settings.train, alone, 0))
    loaded = (part, task.train_store.batch(part.item_ids), torch.tensor([pair.label for pair in part.pairs]))
    loss, _ = learner.take(0, iter([loaded]))
    assert math.isfinite(float(loss))
    assert learner.scaler.get_scale() == 2.0**125
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_two_ranks_train_as_one(data: Path, tmp_path: Path) -> None:
    """Losses of the same global batch agree to 1e-6 over ten steps; then rounding has grown to some 1e-6."""
    preset = tiny_preset(tmp_path)

    def words(count: int) -> list[str]:
        run_dir = tmp_path / f"ranks{count}"
        own = ("--preset", preset, "--data", data, "--run", run_dir, "--model", run_dir / "m.safetensors")
        both = ("train.augmentation.crop=0.2", "train.augmentation.drop_text=0.3")
        return [*map(str, ("train", *own, "--nproc", count, "train.steps=20", "train.pairs=8", *both))]

    assert main(words(1)) == 0
    lines = ok(run_verb(*words(2))).splitlines()
    assert len(set(lines)) == len(lines), "said once, by one rank"
    one, two = losses_of(tmp_path / "ranks1"), losses_of(tmp_path / "ranks2")
    assert len(one) == 20
    assert two[:10] == pytest.approx(one[:10], abs=1e-6)
    assert two == pytest.approx(one, abs=1e-5)


def last_step(run_dir: Path) -> int:
    """Of the newest checkpoint, 0 without one."""
    try:
        return int(torch.load(run_dir / "last.pt", weights_only=True)["step"])
    except FileNotFoundError:
        return 0


def test_a_finished_run_started_again_only_puts_its_model_in_place(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    train(tiny_settings(tmp_path), data, tmp_path / "run", model)
    before = model.read_bytes()
    model.unlink()
    train(tiny_settings(tmp_path), data, tmp_path / "run", model)
    assert model.read_bytes() == before


def test_a_run_folder_of_other_settings_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    train(tiny_settings(tmp_path), data, tmp_path / "run", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a run of other settings \(train\.learning_rate\)"):
        other = tiny_settings(tmp_path, "train.learning_rate=5e-3")
        train(other, data, tmp_path / "run", tmp_path / "model.safetensors")


def test_a_batch_that_is_uneven_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tongkuan.learn.train.join_ranks", lambda: nullcontext(Ranks(0, 2, CPU)))
    with pytest.raises(UserError, match="multiple of 2"):
        train(tiny_settings(tmp_path, "train.pairs=5"), data, tmp_path / "run", tmp_path / "model.safetensors")


def test_the_kept_model_is_the_best_and_carries_its_threshold(model: Path) -> None:
    from tongkuan.model.modelfile import load_model

    _, card = load_model(model)
    rows = [row for row in metrics_of(model.parent / "run") if "valid_f1" in row]
    best = max(rows, key=lambda row: row["valid_f1"])
    assert (card.threshold, card.facts["step"]) == (best["threshold"], best["step"])
    assert load_file(model).keys() == load_file(model.parent / "run" / "best.safetensors").keys()


def test_rows_of_a_run_that_stopped_between_two_of_them_are_those_of_an_unbroken_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, "train.log_every=3", "train.save_every=2")
    train(settings, data, tmp_path / "unbroken", tmp_path / "a.safetensors")
    real = TrainStep.take

    def step(self: TrainStep, number: int, loaded: Iterator[Loaded]) -> tuple[torch.Tensor, torch.Tensor]:
        if number == 4:
            raise RuntimeError("power cut")
        return real(self, number, loaded)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(TrainStep, "take", step)
        train(settings, data, tmp_path / "broken", tmp_path / "b.safetensors")
    train(settings, data, tmp_path / "broken", tmp_path / "b.safetensors")
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "damage", ["flipped", pytest.param("cut", marks=pytest.mark.slow), pytest.param("gone", marks=pytest.mark.slow)]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    data: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, run_dir = tiny_settings(tmp_path), tmp_path / "run"
    train(settings, data, run_dir, tmp_path / "a.safetensors")
    whole, files = state_bytes(run_dir), {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    last = bytearray(files["last.pt"])
    if damage == "gone":
        (run_dir / "last.pt").unlink()
    else:
        last[len(last) // 2] ^= 4
        (run_dir / "last.pt").write_bytes(last[: len(last) - 1000] if damage == "cut" else last)
    capsys.readouterr()
    train(settings, data, run_dir, tmp_path / "b.safetensors")
    assert ("last.pt: damaged; going on from" in capsys.readouterr().out) is (damage != "gone")
    assert state_bytes(run_dir) == whole
    assert (run_dir / "metrics.jsonl").read_bytes() == files["metrics.jsonl"]
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_two_damaged_checkpoints_end_the_run_in_one_line(data: Path, tmp_path: Path) -> None:
    settings, run_dir = tiny_settings(tmp_path), tmp_path / "run"
    train(settings, data, run_dir, tmp_path / "a.safetensors")
    for name in ("last.pt", "previous.pt"):
        (run_dir / name).write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"last\.pt and .*previous\.pt: damaged; delete to start the run anew"):
        train(settings, data, run_dir, tmp_path / "b.safetensors")


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_number_that_is_none_in_training_names_step_pairs_and_last_good_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    settings = tiny_settings(tmp_path, "train.log_every=3", "train.save_every=2")
    real, seen, bad = TrainStep.part_loss, [], {"loss": 4, "gradient": 3}[what]

    def part_loss(self: TrainStep, part: Part, *rest: Any) -> torch.Tensor:
        seen.append([f"{pair.left}-{pair.right}" for pair in part.pairs])
        loss = real(self, part, *rest)
        if part.step == bad and what == "gradient":
            self.model.commodity.head.bias.register_hook(lambda gradient: gradient * math.inf)
        return loss * math.nan if part.step == bad and what == "loss" else loss

    monkeypatch.setattr(TrainStep, "part_loss", part_loss)
    with pytest.raises(FailureError) as caught:
        train(settings, data, tmp_path / "run", tmp_path / "model.safetensors")
    line, last = str(caught.value), tmp_path / "run" / "last.pt"
    assert f"the {what} of step {bad + 1} is not a number" in line and f"{last} is the last good state" in line
    assert all(pair in line for pair in seen[bad]) and "\n" not in line
    kept = torch.load(last, weights_only=True)
    assert kept["step"] == {"loss": 4, "gradient": 2}[what]
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())
    monkeypatch.setattr(TrainStep, "part_loss", real)
    train(settings, data, tmp_path / "run", tmp_path / "model.safetensors")
