"""--dry-run says what would be done and leaves no trace; settings says where each value comes from."""

import shutil
from pathlib import Path

import pytest
from worlds import snapshot, tiny_preset, tiny_settings

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.dryrun import FEW_PAIRS, MANY_PAIRS, describe_recipe
from tongkuan.learn.train import train
from tongkuan.presets import describe, load_settings, preset_names, resolve


def plan(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines that a dry run prints."""
    capsys.readouterr()
    assert main([*map(str, words), "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def line_of(lines: list[str], start: str) -> str:
    found = [line for line in lines if line.startswith(start)]
    assert len(found) == 1, lines
    return found[0]


def test_a_plan_of_training_counts_and_estimates_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = tiny_preset(tmp_path)
    before = snapshot(tmp_path)
    lines = plan(capsys, "train", "--preset", preset, "--data", data, "train.steps=60", "train.validate_every=20")
    assert "24 pairs, 50.0% the same product, of 18 items" in line_of(lines, "train: ")
    assert "24 pairs" in line_of(lines, "valid: ") and "without a picture file: 0" in line_of(lines, "valid: ")
    assert "60 of 4 pairs; ranks 1; each pair is met 10 times" in line_of(lines, "steps: ")
    assert line_of(lines, "recipe: ") == describe_recipe(24)
    assert "3 validations" in line_of(lines, "time: ") and line_of(lines, "memory of a rank in MiB")
    assert snapshot(tmp_path) == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("num_pairs", "start"),
    [
        (24, "frozen encoders (preset best) suit"),
        (FEW_PAIRS, "frozen encoders (preset best) suit"),
        (FEW_PAIRS + 1, "try both"),
        (MANY_PAIRS - 1, "try both"),
        (MANY_PAIRS, "trained encoders may suit"),
    ],
)
def test_a_plan_says_which_recipe_suits_so_many_pairs(num_pairs: int, start: str) -> None:
    assert describe_recipe(num_pairs).startswith(f"recipe: {start}")


def test_a_dry_run_goes_on_from_what_a_run_has(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset, run = tiny_preset(tmp_path), tmp_path / "run"
    train(tiny_settings(tmp_path), data, run, tmp_path / "model.safetensors")
    before = snapshot(tmp_path)
    words = ("train", "--preset", preset, "--data", data, "--run", run)
    lines = plan(capsys, *words)
    assert "goes on after step 6: 0 of 4 pairs" in line_of(lines, "steps: ")
    assert line_of(lines, "time: ").startswith("time: 00:00: ")
    with pytest.raises(UserError, match="a run of other settings"):
        plan(capsys, *words, "train.seed=1")
    assert snapshot(tmp_path) == before


def test_a_plan_of_predicting_foretells_the_size_of_the_result(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "data"
    shutil.copytree(data, own)
    (own / "images" / "test-0-0.png").unlink()
    submit = tmp_path / "submit"
    words = ("predict", "--data", own, "--model", model, "--submit", submit)
    lines = plan(capsys, *words)
    assert not submit.exists()
    assert "24 pairs of 18 items" in line_of(lines, "test: ") and "file: 1" in line_of(lines, "test: ")
    assert "ms an item" in line_of(lines, "time: ") and line_of(lines, "memory of a rank in MiB")
    main([str(word) for word in words])
    foretold = line_of(lines, "result: ")
    size = (submit / "result.jsonl").stat().st_size
    assert f"24 rows, {size / 1000:.2g}" in foretold


# ---------------------------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize("name", preset_names())
def test_settings_as_shown_are_a_preset_again(name: str, tmp_path: Path) -> None:
    overrides = ["train.steps=123", 'model.attribute_keys=["a: b", "# c"]']
    shown = tmp_path / "shown.yaml"
    shown.write_text(describe(resolve(name, overrides)), encoding="utf-8")
    assert load_settings(str(shown)) == load_settings(name, overrides)


def test_every_value_is_shown_with_where_it_comes_from(tmp_path: Path) -> None:
    path = tiny_preset(tmp_path)
    overrides = ["train.steps=9", "model.text={max_tokens: 12}"]
    shown = describe(resolve(str(path), overrides)).splitlines()

    def origin(key: str) -> str:
        (line,) = [line for line in shown if line.strip().startswith(f"{key}:")]
        return line.partition("  # ")[2]

    number = path.read_text(encoding="utf-8").splitlines().index("  pairs: 4") + 1
    assert origin("pairs") == f"{path}:{number}"
    assert origin("steps") == "override 'train.steps=9'"
    assert origin("clip_norm") == "default"
    # An override of a whole section takes what the file said inside it away.
    assert origin("max_tokens") == "override 'model.text={max_tokens: 12}'"
    assert origin("model_type") == "default" and not any("hidden_size" in line for line in shown)


def test_the_verb_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--preset", "demo", "train.steps=5"]) == 0
    assert "steps: 5" in capsys.readouterr().out
