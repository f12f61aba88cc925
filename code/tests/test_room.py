"""A disk without room: one line, exit code 1, and what was there before is whole."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from commands import environment, ok, run_verb
from test_release import make_release
from worlds import tiny_preset, write_jsonl

Words = Callable[[Path, Path, Path], list[object]]  # of a data folder, a model and the folder that fills up
SIZE = 8 << 20  # bytes of the disk
FULL = ("No space left on device; files", "File too large; files")


@contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """A small real disk at `folder` where one may be mounted; whether it is one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder]
    is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def run_without_room(is_disk: bool, folder: Path, room: int, *words: object) -> subprocess.CompletedProcess[str]:
    """A verb that has `room` bytes more on the disk at `folder`; without a disk, whose files may not grow past that."""
    filler = folder / "filler"
    if is_disk:
        status = os.statvfs(folder)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - room)

    def limit() -> None:
        if not is_disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "tongkuan", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240, preexec_fn=limit)
    filler.unlink(missing_ok=True)
    return done


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, TensorBoard's curves left out: they are no artefact."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def train_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["train", "--preset", tiny_preset(data.parent), "--data", data, "--run", out, "--model", out / "model"]


def predict_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["predict", "--data", data, "--model", model, "--submit", out]


def raw_of(data: Path) -> Path:
    """The same items as the organiser would hand them out."""
    raw = data.parent / "raw"
    for split in ("train", "valid", "test"):
        shutil.copytree(data / "images", raw / f"item_{split}_images")
        for kind in ("info", "pair"):
            shutil.copy(data / f"item_{split}_{kind}.jsonl", raw)
    return raw


def download_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["download", "--from", raw_of(data), "--raw", out]


def sample_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["sample", "--products", 40, "--raw", out]


def resize_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["resize", "--raw", raw_of(data), "--data", out]


def split_words(data: Path, model: Path, out: Path) -> list[object]:
    (out / "handed_out").mkdir()
    for split in ("train", "valid"):  # two components
        for kind in ("info", "pair"):
            shutil.copy(data / f"item_{split}_{kind}.jsonl", out / "handed_out")
    return ["split", "--data", out]


def weights_words(data: Path, model: Path, out: Path) -> list[object]:
    release = make_release(data.parent / "release")
    size = f"model.image.size={release.size}"
    words = ["weights", "--model", release.path, "--text-encoder", release.encoder, "--out", out / "model"]
    return [*words, size, *release.overrides()]


def judge_words(data: Path, model: Path) -> list[object]:
    """--submit and --pairs of a result with answers."""
    submit, answers = data.parent / "submit", data.parent / "answers.jsonl"
    ok(run_verb(*predict_words(data, model, submit)))
    rows = map(orjson.loads, (data / "item_test_pair.jsonl").read_bytes().splitlines())
    write_jsonl(answers, [row | {"item_label": str(number % 2)} for number, row in enumerate(rows)])
    return ["--submit", submit, "--pairs", answers]


def plot_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["plot", *judge_words(data, model), "--out", out / "a.svg"]


def report_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["report", *judge_words(data, model), "--data", data, "--out", out / "a.html"]


@pytest.mark.parametrize(
    ("words", "room"),
    [
        pytest.param(train_words, 20_480, marks=pytest.mark.slow),
        pytest.param(predict_words, 4_096, marks=pytest.mark.slow),
        (download_words, 2_048),
        (sample_words, 32_768),
        (resize_words, 16_384),
        (split_words, 0),
        pytest.param(weights_words, 16_384, marks=pytest.mark.slow),
        pytest.param(plot_words, 4_096, marks=pytest.mark.slow),
        pytest.param(report_words, 16_384, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_earlier_files_whole(
    data: Path, model: Path, tmp_path: Path, words: Words, room: int
) -> None:
    own, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    with disk(out) as is_disk:
        for name in ("result.jsonl", "last.txt", "model", "a.svg", "a.html", "images/other.jpg"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("from before")
        command = words(own, model, out)
        before = contents(out)
        done = run_without_room(is_disk, out, room, *command)
        after = contents(out)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("tongkuan: ")]
    assert len(said) == 1 and any(words in said[0] for words in FULL), said
    assert "Traceback" not in done.stderr
    assert {name: after.get(name) for name in before} == before
    # What did come before the disk was full came whole; only download keeps a part, and goes on from it.
    kept = [name for name in after if ".part" in name]
    assert kept == [] or command[0] == "download"
    if command[0] in ("train", "predict", "weights", "plot", "report", "split"):
        assert after == before
