"""Which towers there are: shared ones, and settings of before that there was a choice."""

from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_model import random_inputs
from test_one_tower import built
from torch import Tensor
from worlds import read_jsonl, tiny_settings, train_words

from tongkuan.cli.verbs import main
from tongkuan.learn.train import train
from tongkuan.model.modelfile import load_model
from tongkuan.model.towers import whiten_head
from tongkuan.model.trunk import ItemModel
from tongkuan.presets import Resolved, describe, load_settings, parse_yaml
from tongkuan.settings import ModelSettings, Parts, Settings

# ---------------------------------------------------------------------------------------------------------------------
# Shared towers


def test_shared_towers_have_half_the_encoders_of_two(tmp_path: Path) -> None:
    two, shared = (built(tmp_path, f"model.towers={towers}") for towers in ("two", "shared"))

    def count(model: ItemModel) -> int:
        return sum(p.numel() for kind in ("text", "image") for each in model.encoders(kind) for p in each.parameters())

    assert count(two) == 2 * count(shared) > 0
    assert sum(p.numel() for p in two.joining()) == sum(p.numel() for p in shared.joining())


def test_shared_towers_are_two_heads_of_one_trunk(tmp_path: Path) -> None:
    model, (images, ids, mask) = built(tmp_path, "model.towers=shared"), random_inputs()
    with torch.inference_mode():
        whole = model(images, ids, mask)
        features = model.trunk.features(images, ids, mask)
        for (trunk, head), half in zip(model.heads(), whole.split(8, dim=1), strict=True):
            assert trunk is model.trunk
            assert torch.allclose(head(features), half, atol=1e-6)
    assert not torch.allclose(whole[:, :8], whole[:, 8:])


def test_whitening_gives_shared_towers_both_heads(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []

    def noted(head: torch.nn.Linear, features: Tensor, norm: float) -> None:
        whiten_head(head, features, norm)
        norms.append(float((features @ head.weight.T + head.bias).square().sum(dim=1).mean().sqrt().detach()))

    monkeypatch.setattr("tongkuan.learn.train.whiten_head", noted)
    settings = tiny_settings(tmp_path, "model.towers=shared", "train.whiten=true", "train.steps=1")
    train(settings, data, tmp_path / "run", tmp_path / "m")
    assert len(norms) == 2 and norms[1] > 5 * norms[0] > 0, "likeness first, thresholds near 0"


def test_shared_towers_train_and_predict(data: Path, tmp_path: Path) -> None:
    assert main(train_words(tmp_path, data, "model.towers=shared")) == 0
    words = ("predict", "--data", data, "--model", tmp_path / "m", "--submit", tmp_path / "submit")
    assert main([*map(str, words)]) == 0
    assert len(read_jsonl(tmp_path / "submit" / "result.jsonl")) == 24


# ---------------------------------------------------------------------------------------------------------------------
# Settings

OLD = {"inputs", "embedding_size", "attributes", "attribute_keys", "text", "image"}
"""All that the first models say of their settings."""
SIZES = st.integers(0, 512)
PARTS = st.builds(Parts, text=SIZES, image=SIZES, views=st.integers(1, 3), words=SIZES | st.none(), keys=SIZES)
SETTINGS = st.builds(
    ModelSettings, towers=st.sampled_from(["two", "shared", "one"]), parts=st.just(Parts()) | PARTS
).map(lambda model: Settings(model=model))


@pytest.mark.parametrize("preset", ["ccks2022-63", "ccks2022-64", "demo", "small"])
def test_a_model_of_a_published_preset_says_what_it_said_before_there_were_towers_and_parts(preset: str) -> None:
    """So the same training gives the same bytes."""
    settings = load_settings(preset)
    assert settings.model_dump(mode="json")["model"].keys() == OLD
    assert settings.model.towers == "two"


def test_a_model_file_from_before_opens(model: Path) -> None:
    with safe_open(model, "pt") as file:
        said = orjson.loads(file.metadata()["tongkuan"])["settings"]
    assert said.keys() == OLD
    loaded, card = load_model(model)
    assert (card.settings.towers, card.settings.parts) == ("two", Parts())
    assert {name.partition(".")[0] for name in loaded.state_dict()} == {"threshold", "commodity"}


@pytest.mark.parametrize(
    ("preset", "lines"), [("demo", ("  towers: two", "    views: 1")), ("best", ("  towers: one",))]
)
def test_the_verb_settings_shows_towers_and_parts(
    capsys: pytest.CaptureFixture[str], preset: str, lines: tuple[str, ...]
) -> None:
    assert main(["settings", "--preset", preset]) == 0
    shown = {line.partition("#")[0].rstrip() for line in capsys.readouterr().out.splitlines()}
    assert shown >= {*lines, "    keys: 60", "    words: null"}


@settings(max_examples=30)
@given(SETTINGS)
def test_only_settings_that_are_no_default_are_dumped_and_they_read_back_equal(chosen: Settings) -> None:
    dumped = chosen.model_dump(mode="json")
    assert ("towers" in dumped["model"]) is (chosen.model.towers != "two")
    assert ("parts" in dumped["model"]) is (chosen.model.parts != Parts())
    assert Settings.model_validate(dumped) == chosen
    shown, _ = parse_yaml(describe(Resolved(chosen, {}, {})))
    assert shown["model"].keys() == ModelSettings.model_fields.keys()
    assert shown["model"]["parts"].keys() == Parts.model_fields.keys()
    assert Settings.model_validate(shown) == chosen
