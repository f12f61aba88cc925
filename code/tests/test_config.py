"""config.py: presets load, wrong settings are named with the nearest right one."""

from pathlib import Path

import orjson
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from worlds import tiny_preset

from tongkuan.base.errors import UserError
from tongkuan.presets import load_settings, preset_names
from tongkuan.settings import Settings


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


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 100))


@pytest.mark.parametrize(
    "text",
    [
        *("model: [", "- 1\n- 2\n", "\x00", "{" * 2000, "[" * 90_000, "\xff\xfe", "x" * 100_001),
        *(LAUGHS, "model: &a {text: *a}", "&a [*a]", "a: &a {b: 1}\n<<: *a"),
        *("train: 2001-99-99", "train: !!int x", 'train: !!int ""', "train: !!timestamp x", "train: !!bool x"),
        *("train: !!python/object/apply:os.system [false]", "train: !!python/name:os.system", "train: !x 1"),
        *("train: {steps: 1}\ntrain: {pairs: 8}", "train: {steps: 1, steps: 2}", "a: 1\n---\nb: 2"),
        *("train: {steps: " + "9" * 5000 + "}", "train: {steps: !!binary aGVsbG8=}", "? [a]\n: b", "1: 2", "~: 2"),
        *(
            '"a\\nb": 1',
            'train: {"a\\nb": [1]}',
            'model: {attribute_keys: ["\\ud800"]}',
            "train: {steps: [" + "1," * 9000 + "]}",
        ),
        *("model: {image: {arguments: {a: 99999999999999999999}}}", "model: {image: {arguments: {a: !!binary /w==}}}"),
    ],
)
def test_a_file_that_is_no_mapping_of_sections_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_settings(str(path))
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 500


def test_a_value_that_its_type_cannot_take_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  steps: 2001-99-99\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml:2: not YAML \(a value that its type cannot take: 'month must"):
        load_settings(str(path))


@pytest.mark.parametrize("value", ["[" * 5000, "2001-99-99", "*a", "[&a 1, *a]", "!!int x", "!!python/name:os.system"])
def test_a_hostile_override_is_one_line(value: str) -> None:
    with pytest.raises(UserError, match="the value is not YAML") as caught:
        load_settings("demo", [f"train.steps={value}"])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


WORDS = st.sampled_from(
    ["model", "train", "steps", "text", "image", "config", "arguments", "weights", "a\nb", "\u2028"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.integers(0, 3), inner, max_size=3),
    max_leaves=8,
)
MARKUP = st.text(st.sampled_from("modeltrainsx:{}[]&*!<>|-?,#%@'\"\\ \n\t0129.~") | st.characters(), max_size=60)


@given(VALUES.map(lambda value: yaml.dump(value, allow_unicode=True)) | MARKUP)
def test_any_file_is_settings_or_lines_that_name_it(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "wild.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        settings = load_settings(str(path))
    except UserError as error:
        assert all(line.startswith(str(path)) for line in str(error).split("\n"))
    else:
        orjson.dumps(settings.model_dump(mode="json"))


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'demo'"):
        load_settings("demmo")


def test_a_preset_can_be_a_file(tmp_path: Path) -> None:
    assert load_settings(str(tiny_preset(tmp_path))).model.embedding_size == 8
