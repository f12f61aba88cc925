"""verify.py: a result is rebuilt to the byte, or the input that differs is named."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from commands import ok, run_verb
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tongkuan.base.errors import UserError
from tongkuan.result.predict import predict
from tongkuan.result.verify import differences, verify


@pytest.fixture
def world(data: Path, model: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """(submit, data, model) of the test's own, predicted with all that is not the default."""
    own, copied, submit = tmp_path / "data", tmp_path / "model.safetensors", tmp_path / "submit"
    shutil.copytree(data, own)
    shutil.copy(model, copied)
    predict(own, "test", copied, submit, 7, "bf16", 0.125)
    return submit, own, copied


@pytest.mark.slow
def test_a_result_is_rebuilt_to_the_byte_elsewhere_under_another_hash_seed(
    world: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, data, model = world
    before = {path.name: path.read_bytes() for path in submit.iterdir()}
    moved = data.rename(data.with_name("moved"))
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # of this process it is another
    out = ok(run_verb("verify", "--submit", submit, "--data", moved, "--model", model))
    assert "rebuilt to the byte" in out
    assert {path.name: path.read_bytes() for path in submit.iterdir()} == before


@pytest.mark.slow
def test_two_ranks_rebuild_what_one_has_made(world: tuple[Path, Path, Path]) -> None:
    submit, data, model = world
    words = ("verify", "--submit", submit, "--data", data, "--model", model, "--nproc", 2)
    out = ok(run_verb(*words))
    assert out.count("rebuilt to the byte") == out.count("next: ") == 1
    other_picture(submit, data, model)
    done = run_verb(*words)
    assert done.returncode == 2 and "images_sha256 was" in done.stderr and done.stderr.count("tongkuan: ") == 1


def other_picture(submit: Path, data: Path, model: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(data / "images" / "test-0-0.png")


def other_model(submit: Path, data: Path, model: Path) -> None:
    with safe_open(model, "pt") as file:
        tensors = {name: file.get_tensor(name) + 0.01 for name in file.keys()}  # noqa: SIM118
        save_file(tensors, model, metadata=file.metadata())


def other_items(submit: Path, data: Path, model: Path) -> None:
    path = data / "item_test_info.jsonl"
    path.write_bytes(path.read_bytes().replace("正品".encode(), "大".encode(), 1))


def other_result(submit: Path, data: Path, model: Path) -> None:
    path = submit / "result.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.125", b"0.126", 1))


Change = Callable[[Path, Path, Path], object]


def manifest(edit: Callable[[bytes], bytes]) -> Change:
    def change(submit: Path, data: Path, model: Path) -> None:
        (submit / "manifest.json").write_bytes(edit((submit / "manifest.json").read_bytes()))

    return change


def threshold_of(number: bytes) -> Change:
    return manifest(lambda content: content.replace(b'"threshold": 0.125', b'"threshold": ' + number))


def batch_of(number: object) -> Change:
    return manifest(lambda content: orjson.dumps(orjson.loads(content) | {"encode_batch": number}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_picture, "rebuilt otherwise; images_sha256 was"),
        (other_model, "another model file"),
        (other_items, "another items file"),
        (other_result, "not the file that"),
        (manifest(lambda content: content[:-10]), "not JSON"),
        (batch_of("7"), "'encode_batch' is not as predict writes it"),
        (threshold_of(b"1e999"), "not JSON (number is infinity"),
        (threshold_of(b"NaN"), "not JSON"),
        (threshold_of(b"null"), "'threshold' is not as predict writes it"),
        (batch_of(True), "'encode_batch' is not as predict writes it"),
        (lambda submit, *_: (submit / "manifest.json").unlink(), "no such file"),
    ],
)
def test_what_differs_is_named(world: tuple[Path, Path, Path], change: Change, said: str) -> None:
    change(*world)
    with pytest.raises(UserError) as caught:
        verify(*world)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_is_verified_where_nothing_can_be_written(
    world: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/none")  # no temporary folder, and no file takes a byte
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        verify(*world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "rebuilt to the byte" in capsys.readouterr().out


def test_a_version_that_changed_is_named() -> None:
    before = {"sha256": {}, "versions": {"torch": "1"}, "precision": "fp32"}
    assert differences(before, {**before, "versions": {"torch": "2"}}) == "torch was '1', is '2'"
    assert "all that the manifest names is the same" in differences(before, before)
