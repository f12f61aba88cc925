"""config.py: presets load, wrong settings are named with the nearest right one."""

from pathlib import Path

import pytest
from worlds import tiny_preset

from tongkuan.config import Settings, load_settings, preset_names
from tongkuan.files import UserError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_its_own_dump(name: str) -> None:
    settings = load_settings(name)
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def test_the_published_runs_say_what_the_paper_says() -> None:
    train = load_settings("ccks2022-63").train
    assert (train.learning_rate, train.final_learning_rate, train.weight_decay) == (2e-6, 1e-7, 1e-6)
    assert (train.steps, train.pairs, train.clip_norm, train.seed) == (100_000, 8, 0.5, 0)
    other = load_settings("ccks2022-64")
    assert other.train.clip_norm == 0.1
    assert other.model == load_settings("ccks2022-63").model


def test_an_override_replaces_one_value_and_takes_numbers_as_people_write_them() -> None:
    settings = load_settings("demo", ["train.learning_rate=1e-4", "train.steps=7", "model.attribute_keys=[货号]"])
    assert (settings.train.learning_rate, settings.train.steps) == (1e-4, 7)
    assert settings.model.attribute_keys == ("货号",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown setting 'train.stepz' (did you mean 'steps'?)"),
        ("model.txt.size=3", "unknown setting 'model.txt' (did you mean 'text'?)"),
        ("trian.steps=3", "unknown setting 'trian' (did you mean 'train'?)"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("train.steps", "section.key=value"),
        ("steps=3", "section.key=value"),
        ("train.steps.more=3", "steps is a value"),
        ("train.steps={", "not YAML"),
        ("train.accumulate=3", "multiple of train.accumulate"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings("demo", [override])
    assert message in str(caught.value)


def test_all_problems_of_a_file_are_shown_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  embedding_size: 9999\ntrain:\n  stesp: 3\n  pairs: x\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_settings(str(path))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:2", f"{path}:5", f"{path}:4"]
    assert "(did you mean 'steps'?)" in lines[2]


@pytest.mark.parametrize("text", ["model: [", "- 1\n- 2\n", "\x00", "{" * 2000])
def test_a_file_that_is_no_mapping_of_sections_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_settings(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'demo'"):
        load_settings("demmo")


def test_a_preset_can_be_a_file(tmp_path: Path) -> None:
    assert load_settings(str(tiny_preset(tmp_path))).model.embedding_size == 8
