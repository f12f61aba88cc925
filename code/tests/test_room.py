"""A disk without room: one line, exit code 1, and what was there before is whole."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import environment
from worlds import tiny_preset


def run_without_room(limit: int, *words: object) -> subprocess.CompletedProcess[str]:
    """A verb in a process whose files may not grow past `limit` bytes, as on a disk that fills on the way."""
    command = [sys.executable, "-m", "tongkuan", *map(str, words)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, TensorBoard's curves left out: they are no artefact."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def train_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["train", "--preset", tiny_preset(out.parent), "--data", data, "--run", out, "--model", out / "model"]


def predict_words(data: Path, model: Path, out: Path) -> list[object]:
    return ["predict", "--data", data, "--model", model, "--submit", out]


@pytest.mark.parametrize(("words", "limit"), [(train_words, 20_000), (predict_words, 2_000)])
def test_a_full_disk_is_one_line_and_leaves_earlier_files_whole(
    data: Path, model: Path, tmp_path: Path, words: Callable[[Path, Path, Path], list[object]], limit: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("result.jsonl", "last.txt", "model"):
        (out / name).write_text("from before")
    own = tmp_path / "data"
    shutil.copytree(data, own)
    before = contents(out)
    done = run_without_room(limit, *words(own, model, out))
    assert done.returncode == 1, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("tongkuan: ")]
    assert len(said) == 1 and "File too large; files that were there before are whole" in said[0]
    assert "Traceback" not in done.stderr
    assert contents(out) == before
