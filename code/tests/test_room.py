"""A disk without room: one line, exit code 1, and what was there before is whole."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import environment
from release_worlds import make_release
from verb_worlds import WRITERS, World
from worlds import snapshot

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


ROOM = {"download": 2_048, "sample": 32_768, "resize": 16_384, "split": 0}
SLOW_ROOM = {"train": 20_480, "predict": 4_096, "weights": 16_384, "plot": 4_096, "report": 16_384}


@pytest.mark.parametrize("verb", [*ROOM, *(pytest.param(verb, marks=pytest.mark.slow) for verb in SLOW_ROOM)])
def test_a_full_disk_is_one_line_and_files_stay(data: Path, model: Path, tmp_path: Path, verb: str) -> None:
    world = World(tmp_path, data, model)
    out = world.out
    with disk(out) as is_disk:
        for name in ("result.jsonl", "last.txt", "model", "a.svg", "a.html", "images/other.jpg"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("from before")
        if verb == "split":
            world.hand_out()
        command = WRITERS[verb](world)
        if verb == "weights":
            command = [*make_release(world.top / "release").words(out / "model")]
        before = snapshot(out)
        done = run_without_room(is_disk, out, (ROOM | SLOW_ROOM)[verb], *command)
        after = snapshot(out)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("tongkuan: ")]
    assert len(said) == 1 and any(words in said[0] for words in FULL), said
    assert "Traceback" not in done.stderr
    assert {name: after.get(name) for name in before} == before
    # What did come before the disk was full came whole; only download keeps a part, and goes on from it.
    kept = [name for name in after if ".part" in name]
    assert kept == [] or verb == "download"
    if verb in ("train", "predict", "weights", "plot", "report", "split"):
        assert after == before
