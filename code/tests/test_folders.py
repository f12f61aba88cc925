"""Folders that take no files, and inputs that are not there: said before any work, in the image with what to mount."""

import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from commands import without_root
from test_main import error_of
from verb_worlds import WRITERS, World
from worlds import snapshot

import tongkuan.encode.inference
import tongkuan.judge.check
import tongkuan.learn.train
import tongkuan.model.released
from data_scripts import download, resize, sample
from tongkuan.base import errors
from tongkuan.cli.exits import report_error
from tongkuan.cli.verbs import VERBS, main
from tongkuan.model import encoders as model

for verb in VERBS.values():  # as root: not everybody may read where they are installed
    for target in (verb.function, *verb.instead.values(), *verb.derived.values()):
        if isinstance(target, str):
            importlib.import_module(target.partition(":")[0])


@pytest.fixture(scope="module")
def world(data: Path, model: Path) -> Iterator[World]:
    """`out` has files from before and takes no more. pytest's own folders are private to root; this one is not."""
    with tempfile.TemporaryDirectory() as name:
        found = World(Path(name), data, model)
        found.hand_out()
        (found.out / "split.json").write_text("from before")
        found.judge("score")
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        yield found


@pytest.fixture
def idle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long must not be come to."""

    def work(*_: object, **__: object) -> NoReturn:
        raise AssertionError("it has begun to work")

    for module in (tongkuan.encode.inference, tongkuan.learn.train):
        monkeypatch.setattr(module, "encode", work)
    monkeypatch.setattr(tongkuan.learn.train.Trainer, "fit", work)
    monkeypatch.setattr(tongkuan.judge.check, "run_similarity", work)
    monkeypatch.setattr(tongkuan.model.released, "read_params", work)
    monkeypatch.setattr(model, "download", work)
    monkeypatch.setattr(model, "WEIGHTS_DIR", world.out)
    monkeypatch.setattr(resize, "convert_all", work)
    monkeypatch.setattr(sample, "encode_picture", work)
    monkeypatch.setattr(download, "bring", work)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("verb", WRITERS)
def test_a_folder_that_takes_no_files_is_named_before_any_work(verb: str, world: World) -> None:
    before, mode = snapshot(world.out), world.out.stat().st_mode
    world.top.chmod(0o777)
    world.submit.chmod(0o777)
    world.out.chmod(0o555)
    try:
        with without_root():
            line = error_of(*WRITERS[verb](world))
    finally:
        world.out.chmod(mode)
    assert line.startswith(f"{world.out}") and ": cannot write here (permission denied); " in line
    assert snapshot(world.out) == before


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("verb", [verb for verb in WRITERS if verb not in ("split", "weights fetched")])
def test_a_file_in_the_folders_place_is_named_before_any_work(verb: str, world: World) -> None:
    out = world.top / "out"
    out.rename(world.top / "aside")
    try:
        out.write_text("from before")
        line = error_of(*WRITERS[verb](world))
        assert out.read_text() == "from before"
    finally:
        out.unlink(missing_ok=True)
        (world.top / "aside").rename(out)
    assert line.startswith(f"{out}") and ": cannot write here (" in line


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("words", "place"),
    [
        (lambda world: [*world.train(), "--run", world.top / "run", "--model", world.out], "out"),
        (lambda world: [*world.predict(), "--submit", world.top], "manifest.json"),
        (lambda world: ["weights", "--model", world.model, "--out", world.out], "out"),
    ],
)
def test_a_folder_in_a_files_place_is_named_before_any_work(words: Any, place: str, world: World) -> None:
    (world.top / "manifest.json").mkdir(exist_ok=True)
    assert f"{world.top / place}: a folder, where a file goes; " in error_of(*words(world))


# ---------------------------------------------------------------------------------------------------------------------
# In the image


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the verbs stand in the image, with nothing mounted."""
    monkeypatch.setenv(errors.IMAGE, "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "mount"),
    [
        ("predict", "weights"),
        ("predict --model {model}", "data"),
        ("evaluate --model {model}", "data"),
        ("verify", "submit"),
        ("train --preset {preset}", "data"),
        ("check --pairs data/item_test_pair.jsonl", "data"),
        ("score --pairs {answers}", "submit"),
        ("plot --pairs {answers}", "submit"),
        ("report --pairs {answers} --submit {submit}", "data"),
        ("resize", "data"),
        ("split", "data"),
        ("attributes", "data"),
        ("weights --model weights/63.pth", "weights"),
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_in_the_image_a_missing_input_ends_in_what_to_mount(
    words: str, mount: str, is_there: bool, app: Path, world: World
) -> None:
    if is_there:  # mounted, and empty
        (app / mount).mkdir()
    line = error_of(*(word.format_map(vars(world)) for word in words.split()))
    assert line.startswith(f"{mount}") and line.endswith(f"; mount it: docker run -v DIR:{app}/{mount}")


def test_in_the_image_an_input_from_elsewhere_is_mounted_where_it_was_named(app: Path) -> None:
    assert error_of("predict", "--model", "/release/a.safetensors").endswith(": docker run -v DIR:/release")
    assert error_of("resize", "--raw", "/my/raw").endswith(": docker run -v DIR:/my/raw")


@pytest.mark.parametrize(
    ("path", "is_file", "volume"),
    [
        ("runs/demo/weights/model.safetensors", True, "DIR:{app}/runs"),
        ("data", False, "DIR:{app}/data"),
        ("data.v2", False, "DIR:{app}/data.v2"),
        ("../else/where", False, "DIR:{app.parent}/else/where"),
        # Docker refuses to mount /, and a mount over the top would hide the program.
        ("/model.safetensors", True, "FILE:/model.safetensors"),
        ("model.safetensors", True, "FILE:{app}/model.safetensors"),
        (".", False, "DIR:{app}/NAME"),
        ("..", False, "DIR:{app}/NAME"),
        ("/", False, "DIR:{app}/NAME"),
    ],
)
def test_what_is_mounted_never_hides_the_program(path: str, is_file: bool, volume: str, app: Path) -> None:
    assert errors.volume(Path(path), is_file) == volume.format(app=app)


def test_in_the_image_a_folder_that_takes_no_files_ends_in_how_to_mount_it(app: Path) -> None:
    (app / "submit").write_text("in the way")
    line = error_of("predict")
    assert line.startswith("submit: cannot write here (")
    assert f"docker run -v DIR:{app}/submit, DIR writable for UID {os.geteuid()}, or --user with its owner" in line


def test_a_folder_that_lets_nobody_in_is_one_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """As a mounted folder of another user; the mode that keeps its owner out, too, if that is not root."""
    closed, submit = world.top / "closed", world.top / "open"
    shutil.copytree(world.data, closed / "data")
    submit.mkdir()
    submit.chmod(0o777)
    words = ["predict", "--data", closed / "data", "--model", closed / "model.safetensors", "--submit", submit]
    closed.chmod(0o000)
    try:
        with without_root(), pytest.raises(PermissionError) as caught:
            main([*map(str, words)])
    finally:
        closed.chmod(0o700)
    assert report_error(caught.value, "predict") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"tongkuan: {closed}") and ": not to be reached as UID " in told and told.count("\n") == 1


def test_elsewhere_nobody_is_told_to_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(errors.IMAGE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert "docker" not in error_of("predict") + error_of("resize")
