"""SIGKILL at many moments of train, resize, download and predict: the same command then ends with the same bytes."""

import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from PIL import Image
from worlds import tiny_preset

pytestmark = pytest.mark.slow
RANDOM, AIMED = 22, 8  # moments over the length of a run; moments at which a file is being written
TESTS = Path(__file__).resolve().parent
Words = list[str]


class Verbs:
    """Runs verbs in processes that start at once, see kills.py."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(TESTS / "kills.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def start(self, words: Words) -> int:
        """The process id of a verb that has just begun."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(words) + "\n")
        self.server.stdin.flush()
        return int(self._answer())

    def finish(self, words: Words) -> float:
        """Run a verb to its end; the seconds that took."""
        started = time.monotonic()
        self.start(words)
        assert self._answer() == "0", words
        return time.monotonic() - started

    def kill(self, words: Words, moment: Callable[[], object]) -> bool:
        """Run a verb up to a moment; whether it was killed before its end."""
        process = self.start(words)
        moment()
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        return self._answer() == str(-signal.SIGKILL)

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


@pytest.fixture
def verbs() -> Iterator[Verbs]:
    verbs = Verbs()
    yield verbs
    verbs.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, TensorBoard's curves left out: they hold the time, and are no artefact."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    if record := found.get("raw/.download.json"):  # has the time at which each file came
        found["raw/.download.json"] = re.sub(rb'"time_ns": \d+', b"", record)
    return found


def after(seconds: float) -> Callable[[Path], None]:
    return lambda _: time.sleep(seconds)


def writing(count: int, seconds: float, folder: Path) -> None:
    """Return in the midst of the count-th temporary file below a folder, or after so many seconds."""
    seen: set[str] = set()
    deadline = time.monotonic() + seconds
    while len(seen) < count and time.monotonic() < deadline:
        for path, _, names in os.walk(folder):
            seen.update(f"{path}/{name}" for name in names if name.endswith((".part", ".join")))


def check_kills(verbs: Verbs, tmp_path: Path, command: Callable[[Path], Words]) -> None:
    """`command(folder)` fills a folder. Kill it at each moment, run it again, compare with a folder never killed."""
    verbs.finish(command(tmp_path / "warm"))
    length = verbs.finish(command(tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    draw = random.Random(0)
    moments: list[Callable[[Path], object]] = [after(draw.uniform(0, length)) for _ in range(RANDOM)]
    moments += [functools.partial(writing, draw.randint(1, 6), 2 * length) for _ in range(AIMED)]
    killed = litter = 0
    for number, moment in enumerate(moments):
        folder = tmp_path / f"broken{number}"
        folder.mkdir()
        killed += verbs.kill(command(folder), functools.partial(moment, folder))
        litter += any(name.endswith((".part", ".join")) for name in contents(folder))
        verbs.finish(command(folder))
        assert contents(folder) == whole, f"moment {number}"
        shutil.rmtree(folder)
    print(f"{killed} of {len(moments)} killed under way, {litter} of them in a write; a whole run takes {length:.2f} s")
    assert killed >= 0.8 * len(moments) and litter >= AIMED // 2


def test_train(verbs: Verbs, data: Path, tmp_path: Path) -> None:
    """With dropout and augmentation, so that every generator must be where it was."""
    settings = (
        "train.steps=12",
        "train.augmentation.flip=0.5",
        "model.text.config.hidden_dropout_prob=0.1",
        "model.image.arguments.drop_path_rate=0.2",
    )
    words = ["train", "--preset", str(tiny_preset(tmp_path)), "--data", str(data), *settings]
    check_kills(verbs, tmp_path, lambda out: [*words, "--run", str(out / "run"), "--model", str(out / "weights/m")])


@pytest.mark.parametrize("cache", [False, True])
def test_predict(verbs: Verbs, data: Path, model: Path, tmp_path: Path, cache: bool) -> None:
    words = ["predict", "--data", str(data), "--model", str(model), "--encode-batch", "2"]

    def command(out: Path) -> Words:
        return [*words, "--submit", str(out / "submit"), *(["--cache", str(out / "cache")] if cache else [])]

    check_kills(verbs, tmp_path, command)


def hand_out(raw: Path) -> Path:
    """Two splits of the organiser's files, pictures in a zip."""
    raw.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for number in range(40):
                picture = io.BytesIO()
                pixels = generator.integers(0, 256, (240, 200, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(picture, "JPEG" if number % 2 else "PNG")
                archive.writestr(zipfile.ZipInfo(f"{split}{number}.jpg"), picture.getvalue())
        (raw / f"item_{split}_images.zip").write_bytes(buffer.getvalue())
        items = [{"item_id": f"{split}{n}", "item_image_name": f"{split}{n}.jpg"} for n in range(40)]
        pairs = [{"src_item_id": f"{split}0", "tgt_item_id": f"{split}{n}", "item_label": "1"} for n in range(40)]
        for kind, rows in (("info", items), ("pair", pairs)):
            (raw / f"item_{split}_{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return raw


def test_resize(verbs: Verbs, tmp_path: Path) -> None:
    words = ["resize", "--raw", str(hand_out(tmp_path / "raw")), "--size", "64", "--workers", "1"]
    check_kills(verbs, tmp_path, lambda out: [*words, "--data", str(out / "data")])


def test_download(verbs: Verbs, tmp_path: Path) -> None:
    """From a folder, the archive of one split in parts that are joined."""
    raw = hand_out(tmp_path / "raw")
    archive = raw / "item_train_images.zip"
    whole = archive.read_bytes()
    archive.unlink()
    step = len(whole) // 5 + 1
    for number, letter in enumerate("abcde"):
        (raw / f"{archive.name}.parta{letter}").write_bytes(whole[number * step : (number + 1) * step])
    words = ["download", "--from", str(raw)]
    check_kills(verbs, tmp_path, lambda out: [*words, "--raw", str(out / "raw")])
