"""Numbers and names of the command line and of settings: taken for what they are, or refused in one line."""

import argparse
import math
import shlex
import subprocess
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run_verb
from hypothesis import example, given
from hypothesis import strategies as st
from worlds import make_data, tiny_preset, tiny_settings

from tongkuan.base.errors import UserError, entrypoint, quote
from tongkuan.base.numbers import Real, Whole
from tongkuan.cli.verbs import VERBS, main, parser_of
from tongkuan.model.encoders import text_config_of
from tongkuan.model.towers import build
from tongkuan.presets import load_settings
from tongkuan.records.result import prediction_row, read_predictions
from tongkuan.settings import Section, Settings

WILD = ("nan", "inf", "-inf", "1e999", "0", "-1", str(2**63), "", " 1", "1_000", "１２", "0x10", "-", "1,5", "½")
SPELLED = (*WILD, ".nan", ".inf", "-.inf", "1.0e+999", "true", "[]", "1:30", "5e-1")  # as YAML reads them
ODD = "my data; rm $x 'q'"


def numeric_options() -> Iterator[tuple[str, argparse.Action]]:
    for verb in VERBS:
        for action in parser_of(verb)._actions:
            assert action.type not in (int, float), f"{verb} {action.dest}: a type that knows no range"
            if isinstance(action.type, Whole | Real):
                yield verb, action


NUMERIC = list(numeric_options())


@pytest.mark.parametrize(
    ("verb", "action"), NUMERIC, ids=[f"{verb}{action.option_strings[0]}" for verb, action in NUMERIC]
)
def test_a_numeric_option_takes_its_range_and_names_itself_otherwise(verb: str, action: argparse.Action) -> None:
    parser, option = parser_of(verb), action.option_strings[0]
    for word in WILD:
        try:
            value = getattr(parser.parse_intermixed_args([f"{option}={word}"]), action.dest)
        except UserError as error:
            line = str(error)
            assert line.startswith(f"./entrypoint.sh {verb}: argument {option}: ") and "\n" not in line
            assert "is no " in line and repr(word) in line and "did you mean" not in line
        else:
            assert word.isascii() and "_" not in word and word == word.strip() and math.isfinite(value)
            kind = action.type
            assert kind.low <= value <= kind.high if isinstance(kind, Whole) else value > kind.above  # type: ignore[union-attr]


def test_there_are_as_many_numeric_options_as_people_may_get_wrong() -> None:
    names = {action.option_strings[0] for _, action in NUMERIC}
    wanted = {"--threshold", "--encode-batch", "--nproc", "--grid", "--products", "--size", "--workers", "--ratio"}
    wanted |= {"--nnodes", "--node-rank"}
    assert names == wanted | {"--seed", "--items", "--top", "--candidates", "--recall", "--partition-size"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("predict --threshold nan", "argument --threshold: 'nan' is no finite number"),
        ("predict --encode-batch 0", "argument --encode-batch: '0' is no whole number from 1 to 65,536"),
        ("train --nproc -3", "argument --nproc: '-3' is no whole number from 1 to 1,024"),
        ("evaluate --threshold -inf", "argument --threshold: '-inf' is no finite number"),
        ("weights --threshold nan", "argument --threshold: 'nan' is no finite number"),
        ("split --ratio 0", "argument --ratio: '0' is no finite number above 0"),
        ("demo --products 5", "argument --products: '5' is no whole number from 24 to 100,000"),
    ],
)
def test_a_wrong_number_is_answered_with_the_option_the_value_and_the_range(words: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        main(words.split())
    assert told in str(caught.value)


def test_a_wrong_number_ends_a_process_with_one_line_and_exit_code_2() -> None:
    done = run_verb("split", "--seed", "1e999")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in done.stderr and "argument --seed: '1e999' is no whole number" in done.stderr


@pytest.mark.parametrize("word", ["-1e-3", "-.5", "-0.25", "-2"])
def test_a_negative_number_is_a_value_and_no_option(word: str) -> None:
    assert parser_of("predict").parse_intermixed_args(["--threshold", word]).threshold == float(word)


def test_more_ranks_than_the_machine_serves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--nproc 1000: more than \d+ ranks \(without a GPU\); ask for at most"):
        main(["train", "--nproc", "1000"])
    with pytest.raises(UserError, match="--nproc 1000"):
        main(["demo", "--nproc", "1000", "--run", "/nonexistent"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"--nproc 2: more than 1 ranks \(1 to be seen, and a rank takes one\)"):
        main(["predict", "--nproc", "2"])


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def numeric_fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, how many numbers it holds: 0 for one) of every setting that is a number or a tuple of some."""
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from numeric_fields(kind, f"{prefix}{name}.")
        elif kind in (int, float) or isinstance(kind, types.UnionType | typing._UnionGenericAlias):  # type: ignore[attr-defined]
            yield f"{prefix}{name}", 0
        elif typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind):
            yield f"{prefix}{name}", len(typing.get_args(kind))


FIELDS = dict(numeric_fields(Settings))


def numbers_of(settings: Any, name: str) -> list[Any]:
    for part in name.split("."):
        settings = getattr(settings, part)
    return list(settings) if isinstance(settings, tuple) else [settings]


@pytest.mark.parametrize("name", FIELDS)
def test_a_numeric_setting_takes_finite_numbers_in_its_range_or_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    for spelled in SPELLED:
        value = f"'{spelled}'" if spelled != spelled.strip() else spelled
        text = f"[{', '.join([value] * FIELDS[name])}]" if FIELDS[name] else value
        try:
            settings = load_settings(str(tmp_path / "empty.yaml"), [f"{name}={text}"])
        except UserError as error:
            assert all(name in line or "not YAML" in line for line in str(error).split("\n"))
        else:
            for number in numbers_of(settings, name):
                assert number is None or (type(number) in (int, float) and math.isfinite(number))


def test_the_walk_over_settings_finds_them() -> None:
    assert {"train.steps", "train.betas", "train.augmentation.crop", "data.encode_batch", "train.threads"} <= set(
        FIELDS
    )
    assert FIELDS["model.image.deviation"] == 3 and len(FIELDS) > 28


@pytest.mark.parametrize(
    "override",
    [
        *("train.betas=[0.9, 1]", "train.betas=[-0.1, 0.9]", "model.image.deviation=[0, 1, 1]", "train.clip_norm=0"),
        *("model.image.deviation=[0.2, -0.2, 0.2]", "train.learning_rate=0", "train.augmentation.flip=1.01"),
        *("model.image.size=0", "model.text.max_tokens=-1", "train.steps=1e18", "train.seed=4294967296"),
        *("model.image.arguments={a: [1, {b: .nan}]}", "model.text.config={hidden_dropout_prob: .inf}"),
        "model.text.config={model_type: bert, num_hidden_layers: -1}",
        "model.text.config={model_type: bert, hidden_size: 0}",
        *("data.cache_mb=-1", "train.pairs=false", "train.steps=2.5", "model.embedding_size=513"),
    ],
)
def test_a_setting_out_of_its_range_is_named(override: str) -> None:
    with pytest.raises(UserError, match="input should"):
        load_settings("demo", [override])


@pytest.mark.parametrize(
    "override",
    [
        "model.text.config={model_type: bert, hidden_size: 10, num_attention_heads: 3}",
        "model.text.config={model_type: bert, hidden_size: ten}",
        "model.text.config={model_type: bert, hidden_dropout_prob: 7}",
        *("model.image.arguments={depths: -1}", "model.image.arguments={dims: [8, 8, 8, -16], depths: [1, 1, 1, 1]}"),
        "model.image.arguments={no: 1}",
    ],
)
def test_a_network_that_cannot_be_is_one_line_that_names_the_setting(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        settings = tiny_settings(tmp_path, override).model
        build(settings, text_config_of(settings.text, 50), pretrained=True)
    assert override.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [("train.steps=500.0", 500), ("train.steps=1e3", 1000), ("train.steps=010", 10), ("train.steps='70'", 70)],
)
def test_a_whole_number_may_be_written_in_several_ways_and_none_is_octal(override: str, value: int) -> None:
    steps = load_settings("demo", [override]).train.steps
    assert (steps, type(steps)) == (value, int)


# ---------------------------------------------------------------------------------------------------------------------
# Writer and checker


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30))
@example(1e308)
@example(-0.0)
@example(5e-324)
@example(7)
def test_a_threshold_that_is_taken_is_read_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, number: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "wild-threshold.jsonl"
    threshold = Real()(repr(number))
    path.write_bytes(prediction_row("a", b"[1.0]", "b", b"[2.0]", threshold))
    ((_, row),) = read_predictions(path)
    assert row.threshold == threshold == float(number)


@pytest.mark.parametrize("word", ["1e308", "-0.0", "5e-324", "3", "-1e-3"])
def test_what_predict_writes_check_and_verify_take(
    word: str, data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data), "--model", str(model), "--submit", str(tmp_path)]
    assert main(["predict", *common, "--threshold", word]) == 0
    assert main(["check", "--submit", str(tmp_path), "--pairs", str(data / "item_test_pair.jsonl")]) == 0
    if word == "3":
        assert main(["verify", *common]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Paths in lines


PLAIN = [ODD, "a b", "$HOME", "`x`", "-n", "~", "a'b\"c", "\\", "杯子", "*", "#x", "!", ""]
WORDS = [*PLAIN, "x\ny", "tab\t", "\x1b[31m", "\udcff", "'\n\\"]


def test_a_command_to_type_gives_the_shell_the_very_words() -> None:
    command = entrypoint(*WORDS)
    assert command.isprintable()
    script = f"function ./entrypoint.sh {{ printf '%s\\0' \"$@\"; }}\n{command}\n"
    done = subprocess.run(["bash", "--norc"], input=script.encode(), capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [word.encode("utf-8", "surrogateescape") for word in WORDS]
    assert shlex.split(entrypoint(*PLAIN))[1:] == PLAIN


def test_a_path_that_begins_like_an_option_stays_a_path() -> None:
    assert quote(Path("-x y")) == "'./-x y'" and quote("--data") == "--data"


@pytest.mark.parametrize("name", ["new\nline", "esc\x1b[2J", "tab\there", "\u2028", "rtl\u202e"])
@pytest.mark.parametrize("words", ["check --submit {} --pairs {}", "resize --raw {}", "predict --model {}", "{}"])
def test_an_odd_path_does_not_break_the_line_of_an_error(tmp_path: Path, words: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        main([word.format(tmp_path / name) if "{" in word else word for word in words.split()])
    assert str(caught.value).isprintable()


def next_words(out: str) -> list[str]:
    """The words of the one `next:` line, as bash hands them over."""
    (line,) = [line for line in out.splitlines() if "next: " in line]
    words = shlex.split(line.partition("next: ")[2])
    done = subprocess.run(
        ["bash", "-c", f"function ./entrypoint.sh {{ printf '%s\\0' \"$@\"; }}; {line.partition('next: ')[2]}"],
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().split("\0")[:-1] == words[1:]
    return words


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / ODD
    folder.mkdir()
    return folder


def test_the_next_line_of_a_results_verbs_works(odd: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, submit, own = make_data(odd / "data", num_products=2), odd / "submit", odd / "model.safetensors"
    own.write_bytes(model.read_bytes())
    pairs, labelled = data / "item_test_pair.jsonl", data / "item_valid_pair.jsonl"
    steps = {
        "predict": (["--data", data, "--model", own, "--submit", submit], ["check", "--submit", submit]),
        "verify": (["--data", data, "--model", own, "--submit", submit], ["check", "--submit", submit]),
        "check": (["--submit", submit, "--pairs", pairs], ["score", "--submit", submit]),
        "evaluate": (["--data", data, "--model", own], ["predict", "--data", data, "--model", own]),
        "settings": (["--preset", tiny_preset(odd)], ["train", "--preset", odd / "tiny.yaml"]),
    }
    for verb, (words, wanted) in steps.items():
        assert main([verb, *map(str, words)]) == 0
        typed = next_words(capsys.readouterr().out)
        assert typed[1 : 1 + len(wanted)] == list(map(str, wanted))
        parser_of(typed[1]).parse_intermixed_args(typed[2:])
    words = ["--data", data, "--split", "valid", "--model", own, "--submit", submit]
    assert main(["predict", *map(str, words)]) == 0
    capsys.readouterr()
    assert main(["score", "--submit", str(submit), "--pairs", str(labelled)]) == 0
    assert next_words(capsys.readouterr().out)[1:4] == ["report", "--submit", str(submit)]


def test_the_next_line_of_each_verb_of_data_can_be_typed(
    odd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, data = odd / "raw", odd / "data"
    assert main(["sample", "--raw", str(raw), "--products", "24"]) == 0
    assert next_words(capsys.readouterr().out) == ["./entrypoint.sh", "resize", "--raw", str(raw)]
    assert main(["download", "--from", str(raw), "--raw", str(odd / "copy")]) == 0
    assert next_words(capsys.readouterr().out) == ["./entrypoint.sh", "resize", "--raw", str(odd / "copy")]
    assert main(["resize", "--raw", str(raw), "--data", str(data), "--size", "8", "--workers", "1"]) == 0
    assert next_words(capsys.readouterr().out) == ["./entrypoint.sh", "split", "--data", str(data)]
    assert main(["split", "--data", str(data)]) == 0
    assert next_words(capsys.readouterr().out) == ["./entrypoint.sh", "train", "--data", str(data)]
