"""train.encoders and train.layer_decay: what of the encoders learns, and that the rest costs nothing a step."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import timm
import torch
from safetensors import safe_open
from test_dryrun import line_of, plan
from test_model import random_inputs
from test_one_tower import built
from test_train import losses_of, state_bytes
from torch import nn
from transformers import AutoConfig, AutoModel
from worlds import ONE, snapshot, tiny_preset, tiny_settings, train_words

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.learn.dataloader import Loaded, load_task
from tongkuan.learn.features import FeatureStore
from tongkuan.learn.step import TrainStep, make_optimizer
from tongkuan.learn.train import train
from tongkuan.model.blocks import block_numbers, freeze, numbered
from tongkuan.model.towers import build
from tongkuan.model.trunk import ItemModel
from tongkuan.presets import load_settings
from tongkuan.settings import Settings, TrainSettings

LAYERS = "model.text.config.num_hidden_layers=3"
TOWERS = {"two": (), "shared": ("model.towers=shared",), "one": (*ONE, "train.steps=6")}
LAST = {
    "last-1": ("text.encoder.layer.2.", "image.stages.3.", "image.head.norm."),
    "last-2": ("text.encoder.layer.1.", "text.encoder.layer.2.", "image.stages.2.", "image.stages.3.", "image.head."),
}
"""Where parameters that learn begin, below a trunk; the tiny image encoder has four blocks."""


def start(folder: Path, *overrides: str) -> tuple[Settings, ItemModel]:
    """Settings of three text layers, and a model of which only what they name learns."""
    settings = tiny_settings(folder, LAYERS, *overrides)
    model = built(folder, LAYERS, *overrides)
    freeze(model, settings.train)
    return settings, model


def in_encoder(name: str) -> str:
    """A parameter's name from its encoder on, empty where it is no encoder's."""
    module, _, rest = name.partition(".")
    return rest if module != "projections" and rest.startswith(("text.", "image.")) else ""


# ---------------------------------------------------------------------------------------------------------------------
# What learns


@pytest.mark.parametrize(
    ("towers", "encoders"),
    [
        ("two", "all"),
        ("two", "last-2"),
        ("shared", "frozen"),
        ("shared", "last-1"),
        ("one", "frozen"),
        ("one", "last-2"),
    ],
)
def test_only_what_is_named_changes_in_training(data: Path, tmp_path: Path, towers: str, encoders: str) -> None:
    settings = tiny_settings(tmp_path, LAYERS, *TOWERS[towers], f"train.encoders={encoders}")
    torch.manual_seed(settings.train.seed)
    model = build(settings.model, load_task(settings, data).card.text_config, pretrained=True)
    train(settings, data, tmp_path / "run", tmp_path / "m")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    before = {name: parameter for name, parameter in model.named_parameters() if in_encoder(name)}
    changed = {name for name, parameter in before.items() if not torch.equal(parameter, state["model"][name])}
    prefixes = {"all": ("",), "frozen": ()}.get(encoders, LAST.get(encoders, ()))
    assert changed == {name for name in before if in_encoder(name).startswith(prefixes)}
    assert bool(changed) is (encoders != "frozen")
    held = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert held == len(changed) + len(model.joining()), "what does not learn has no moments"


@pytest.mark.parametrize(
    ("architecture", "arguments", "count"),
    [
        ("tf_efficientnet_lite0", {}, 16),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, 12),
        ("convnext_atto", {}, 12),
        ("swin_tiny_patch4_window7_224", {}, 12),
        ("swin_large_patch4_window12_384", {}, 24),
        ("resnet18", {}, 8),
    ],
)
def test_what_follows_the_last_block_of_a_timm_network_is_part_of_it(
    architecture: str, arguments: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(architecture, num_classes=0, **arguments)
    numbers = block_numbers(encoder)
    names = [name for name, _ in encoder.named_parameters()]
    assert numbers.keys() == set(names)
    assert set(numbers.values()) == set(range(count + 1))
    assert (numbers[names[0]], numbers[names[-1]]) == (0, count)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "deberta-v2"])
def test_a_text_encoders_blocks_are_its_layers(kind: str) -> None:
    with torch.device("meta"):
        encoder = AutoModel.from_config(AutoConfig.for_model(kind, num_hidden_layers=3))
    numbers = block_numbers(encoder)
    assert set(numbers.values()) == {0, 1, 2, 3}
    assert all((number == 0) is name.startswith("embeddings") for name, number in numbers.items())


def test_a_network_that_does_not_tell_its_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.encoders=last-1: the text encoder \(Linear\) does not tell"):
        numbered("text", nn.Linear(2, 2), "train.encoders=last-1")


@pytest.mark.parametrize("wrong", ["none", "last-0", "last-", "last-02", "last-1.5", "LAST-1", "last-１", "1", "[all]"])
def test_another_value_is_one_line(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(UserError, match=r"override .train\.encoders=") as caught:
        tiny_settings(tmp_path, f"train.encoders={wrong}")
    assert len(caught.value.args) == 1


def test_more_blocks_than_there_are_is_one_line_with_the_numbers(data: Path, tmp_path: Path) -> None:
    numbers = "4 blocks are to learn, but the text encoder has 3 and the image encoder has 4; name at most last-3"
    with pytest.raises(UserError, match=f"^train.encoders=last-4: {numbers}$"):
        main(train_words(tmp_path, data, LAYERS, "train.encoders=last-4"))
    assert snapshot(tmp_path).keys() == {"tiny.yaml"}


def test_all_is_the_default_which_no_file_mentions(data: Path, tmp_path: Path, model: Path) -> None:
    settings = tiny_settings(tmp_path, "train.encoders=all", "train.layer_decay=1")
    train(settings, data, tmp_path / "run", tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == model.read_bytes()
    with safe_open(model, "pt") as file:
        said = orjson.loads(file.metadata()["tongkuan"])["facts"]["train"]
    assert said.keys() == TrainSettings.model_fields.keys() - set(TrainSettings.later)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def test_a_frozen_encoder_drops_nothing_out(tmp_path: Path) -> None:
    inputs = random_inputs()
    for encoders, is_same in (("frozen", True), ("last-1", False), ("all", False)):
        _, model = start(tmp_path, "model.text.config.hidden_dropout_prob=0.5", f"train.encoders={encoders}")
        model.train()
        assert torch.equal(model(*inputs), model(*inputs)) is is_same


def test_no_gradient_is_computed_before_the_first_block_that_learns(tmp_path: Path) -> None:
    _, model = start(tmp_path, "model.towers=shared", "train.encoders=last-1")
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("layer.1", "layer.2", "stages.2", "stages.3")):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: seen.update({name[-7:]: output}) or None
            )
    model.train()(*random_inputs())
    assert {name: output.requires_grad for name, output in seen.items()} == {
        "layer.1": False,
        "layer.2": True,
        "tages.2": False,
        "tages.3": True,
    }


def test_recomputed_activations_change_nothing(data: Path, tmp_path: Path) -> None:
    for name in ("false", "true"):
        settings = tiny_settings(tmp_path, LAYERS, "train.encoders=last-2", f"train.checkpoint_activations={name}")
        train(settings, data, tmp_path / name, tmp_path / "m")
    assert losses_of(tmp_path / "true") == pytest.approx(losses_of(tmp_path / "false"), abs=1e-6)


@pytest.mark.parametrize("towers", TOWERS)
def test_steps_on_features_lose_what_steps_with_encoders_lose(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: str
) -> None:
    settings = tiny_settings(tmp_path, *TOWERS[towers], "train.encoders=frozen", "train.negatives=1")
    runs = count_encodings(monkeypatch)
    train(settings, data, tmp_path / "once", tmp_path / "m")
    assert runs == [0] * 6
    monkeypatch.setattr(TrainSettings, "reuses_features", False)
    train(settings, data, tmp_path / "anew", tmp_path / "m")
    assert runs[6:] == [1] * 6
    assert losses_of(tmp_path / "once") == pytest.approx(losses_of(tmp_path / "anew"), abs=1e-5)
    assert len(set(losses_of(tmp_path / "once"))) == 6


def test_augmented_items_are_encoded_at_each_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_encodings(monkeypatch)
    settings = tiny_settings(tmp_path, "train.encoders=frozen", "train.augmentation.drop_text=0.5")
    train(settings, data, tmp_path / "run", tmp_path / "m")
    assert runs == [1] * 6


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often encoders were asked in each step from now on."""
    runs: list[int] = []
    take_step = TrainStep.take

    def counted(learner: TrainStep, step: int, loaded: Iterator[Loaded]) -> Any:
        runs.append(0)
        encoder = learner.model.encoders("image")[0]
        hook = encoder.register_forward_hook(lambda *_: runs.append(runs.pop() + 1))
        taken = take_step(learner, step, loaded)
        hook.remove()
        return taken

    monkeypatch.setattr(TrainStep, "take", counted)
    return runs


def test_items_of_known_features_have_the_words_they_had(data: Path, tmp_path: Path) -> None:
    store = load_task(tiny_settings(tmp_path, *ONE), data).train_store
    item_ids = sorted(store.items)
    long, short, empty, *_ = item_ids
    store.items[long] = replace(store.items[long], title="杯子 AB1234 " * 9)
    store.items[empty] = replace(store.items[empty], title="", item_attributes="", sku_attributes="")
    assert not store.words(empty) and len(store.words(long)) > len(store.words(short))
    known = FeatureStore(store, item_ids, {"image": torch.arange(len(item_ids)).unsqueeze(1)})
    for chosen in ([empty], [short, long, empty], [long, long], item_ids):
        for _ in range(2):
            batch = known.batch(chosen)
            assert [*batch.raw["image"].flatten()] == [item_ids.index(item_id) for item_id in chosen]
            assert all(map(torch.equal, batch.words, store.batch(chosen).words))
            assert len(batch.words) == 2


@pytest.mark.parametrize(("towers", "encoders"), [("two", "last-1"), ("shared", "frozen"), ("one", "frozen")])
def test_a_run_that_was_stopped_ends_as_an_unbroken_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: str, encoders: str
) -> None:
    settings = tiny_settings(tmp_path, LAYERS, *TOWERS[towers], f"train.encoders={encoders}", "train.layer_decay=0.5")
    train(settings, data, tmp_path / "whole", tmp_path / "m")
    take_step = TrainStep.take

    def stop_at_five(learner: TrainStep, step: int, loaded: Iterator[Loaded]) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return take_step(learner, step, loaded)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "take", stop_at_five)
        train(settings, data, tmp_path / "broken", tmp_path / "m")
    train(settings, data, tmp_path / "broken", tmp_path / "m")
    assert state_bytes(tmp_path / "broken") == state_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("towers", "encoders"), [("two", "last-1"), ("two", "frozen"), ("one", "frozen")])
def test_two_ranks_train_as_one(data: Path, tmp_path: Path, towers: str, encoders: str) -> None:
    for count in (1, 2):
        words = ("--preset", tiny_preset(tmp_path), "--data", data, "--run", tmp_path / f"ranks{count}")
        more = (*TOWERS[towers], f"train.encoders={encoders}", "train.negatives=0")
        own = ("train", *words, "--model", tmp_path / "m", "--nproc", count, *more)
        assert main([*map(str, own)]) == 0
    assert losses_of(tmp_path / "ranks2") == pytest.approx(losses_of(tmp_path / "ranks1"), abs=1e-6)


def test_the_plan_says_what_learns_and_what_is_asked_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("train", "--preset", tiny_preset(tmp_path), "--data", data, LAYERS, "train.steps=60")
    before, trained = snapshot(tmp_path), {}
    for encoders in ("all", "last-1", "frozen"):
        lines = plan(capsys, *words, f"train.encoders={encoders}")
        said = line_of(lines, "parameters: ").replace(",", "").split()
        trained[encoders], whole = int(said[1]), int(said[3])
        assert ("features of 18 items" in line_of(lines, "time: ")) is (encoders == "frozen")
        assert ("more for features" in line_of(lines, "memory ")) is (encoders == "frozen")
    assert whole == trained["all"] > trained["last-1"] > trained["frozen"] == 2 * (16 + 16 + 1) * 8, "two heads"
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# Rates by block


def test_rates_fall_from_the_last_block_to_the_first(tmp_path: Path) -> None:
    rates = ("train.layer_decay=0.5", "train.learning_rate=8e-3", "train.image_learning_rate=16e-3")
    settings, model = start(tmp_path, *rates, "train.head_learning_rate=1e-3")
    groups = make_optimizer(model, settings.train).param_groups
    text, image = [8e-3, 4e-3, 2e-3, 1e-3], [16e-3, 8e-3, 4e-3, 2e-3, 1e-3]
    assert [group["peak"] for group in groups] == pytest.approx([*text, *image, 1e-3])
    name_of = {id(parameter): in_encoder(name) for name, parameter in model.named_parameters()}
    by_rate = [{name_of[id(parameter)] for parameter in group["params"]} for group in groups]
    assert all(name.startswith("text.encoder.layer.2.") for name in by_rate[0])
    assert all(name.startswith("text.embeddings.") for name in by_rate[3])
    assert all(name.startswith(("image.stages.3.", "image.head.norm.")) for name in by_rate[4])
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()]), "of both towers, each once"


def test_blocks_that_do_not_learn_have_no_rate(tmp_path: Path) -> None:
    settings, model = start(tmp_path, "train.layer_decay=0.5", "train.encoders=last-2")
    peaks = [group["peak"] for group in make_optimizer(model, settings.train).param_groups]
    assert peaks == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4, 1e-3])


def test_a_tower_that_reads_nothing_is_refused(tmp_path: Path) -> None:
    nothing = "{text: 4, image: 0, object_colour: 0, whole_colour: 0, words: 0, keys: 4}"
    with pytest.raises(UserError, match=r"model\.parts leave nothing of an item to read"):
        tiny_settings(tmp_path, *ONE, f"model.parts={nothing}", "model.inputs=image")
    load_settings("best")
