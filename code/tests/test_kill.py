"""SIGKILL at many moments of verbs that write: the same command then ends with the same bytes, and with no others."""

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import environment
from PIL import Image
from resize_worlds import hand_out
from worlds import make_data, read_jsonl, tiny_preset, write_jsonl

pytestmark = pytest.mark.slow
RANDOM, AIMED = 9, 6  # moments over the length of a run; moments at which a file is being written
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


@pytest.fixture(scope="module")
def verbs() -> Iterator[Verbs]:
    """One for all, since each verb has a process of its own and the imports take seconds."""
    verbs = Verbs()
    yield verbs
    verbs.close()


def contents(folder: Path) -> dict[str, object]:
    """Every file by its path, TensorBoard's curves left out: they hold the time, and are no artefact."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return {str(path.relative_to(folder)): content(path) for path in paths}


def content(path: Path) -> object:
    """A file's bytes, but for what is the same in other bytes."""
    if path.suffix == ".pt":  # a pickle tells which of its equal texts were one object
        return plain(torch.load(path, weights_only=True))
    if path.name == ".download.json":  # has the time at which each file came
        return re.sub(rb'"time_ns": \d+', b"", path.read_bytes())
    return path.read_bytes()


def plain(value: Any) -> object:
    """Tensors as bytes."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def after(seconds: float) -> Callable[[Path], None]:
    return lambda _: time.sleep(seconds)


def writing(count: int, seconds: float, folder: Path) -> None:
    """Return in the midst of a write, once so many files are or were below a folder, or after so many seconds.

    Finished files count too: most writes are over before anybody looks, and a count of them alone is never reached.
    """
    seen: set[str] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        names = [f"{path}/{name}" for path, _, found in os.walk(folder) for name in found]
        seen.update(names)
        if len(seen) >= count and any(name.endswith(".part") for name in names):
            return


def check_kills(
    verbs: Verbs, tmp_path: Path, writes: int, command: Callable[[Path], Words], start: Path | None = None
) -> None:
    """`command(folder)` fills a folder, in so many writes. Killed at each moment, it ends as one never killed.

    With `start` each folder begins as a copy of that one.
    """
    if start is not None:
        shutil.copytree(start, tmp_path / "warm")
        shutil.copytree(start, tmp_path / "whole")
    verbs.finish(command(tmp_path / "warm"))
    length = verbs.finish(command(tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    draw = random.Random(0)
    killed = litter = tries = 0
    while killed < RANDOM + AIMED:
        tries += 1
        assert tries <= 3 * (RANDOM + AIMED), "most were done before they were killed"
        folder = tmp_path / f"broken{tries}"
        if start is None:
            folder.mkdir()
        else:
            shutil.copytree(start, folder)
        moment = after(draw.uniform(0, length))
        if tries <= 2 * AIMED:
            moment = functools.partial(writing, draw.randint(1, writes), 2 * length)
        if verbs.kill(command(folder), functools.partial(moment, folder)):
            killed += 1
            litter += any(path.name.endswith(".part") for path in folder.rglob("*"))
            verbs.finish(command(folder))
        found = contents(folder)
        assert found.keys() == whole.keys(), f"try {tries}"
        assert [name for name in whole if found[name] != whole[name]] == [], f"try {tries}"
        shutil.rmtree(folder)
    print(f"killed {killed} times, {litter} of them in a write; a whole run takes {length:.2f} s")
    assert litter >= 2, "writes of pictures are over in no time, but not all"


def test_train(verbs: Verbs, data: Path, tmp_path: Path) -> None:
    """With dropout and augmentation, so that every generator must be where it was."""
    settings = (
        "train.steps=12",
        "train.augmentation.flip=0.5",
        "model.text.config.hidden_dropout_prob=0.1",
        "model.image.arguments.drop_path_rate=0.2",
    )
    words = ["train", "--preset", str(tiny_preset(tmp_path)), "--data", str(data), *settings]
    check_kills(verbs, tmp_path, 9, lambda out: [*words, "--run", str(out / "run"), "--model", str(out / "weights/m")])


@pytest.mark.parametrize("cache", [False, True])
def test_predict(verbs: Verbs, data: Path, model: Path, tmp_path: Path, cache: bool) -> None:
    words = ["predict", "--data", str(data), "--model", str(model), "--encode-batch", "2"]

    def command(out: Path) -> Words:
        return [*words, "--submit", str(out / "submit"), *(["--cache", str(out / "cache")] if cache else [])]

    check_kills(verbs, tmp_path, 3, command)


def test_match(verbs: Verbs, data: Path, model: Path, tmp_path: Path) -> None:
    """With several partitions, and the labelled listings of valid."""
    words = ["match", "run", "--data", str(data), "--model", str(model), "--partition-size", "5"]
    check_kills(verbs, tmp_path, 14, lambda out: [*words, "--out", str(out / "match")])


@pytest.fixture
def matched(verbs: Verbs, model: Path, tmp_path: Path) -> Path:
    """A folder with data, a matched catalogue and `new.jsonl`: listings to add, and three to update."""
    top = tmp_path / "start"
    data = make_data(top / "data")
    rows = read_jsonl(data / "item_test_info.jsonl")
    write_jsonl(data / "item_test_info.jsonl", rows[:12])
    write_jsonl(top / "new.jsonl", [*rows[12:], *(row | {"title": "红茶"} for row in rows[:3])])
    words = ["match", "run", "--data", data, "--model", model, "--partition-size", "4", "--out", top / "match"]
    verbs.finish([*map(str, words), "--threshold", "-4"])
    return top


def test_match_add(verbs: Verbs, matched: Path, model: Path, tmp_path: Path) -> None:
    """Embeddings by partitions, then the change: pairs with removed listings, new ones, groups, tombstones, the log."""
    words = ["match", "add", "--data", str(matched / "data"), "--model", str(model), "--items"]
    own = [*words, str(matched / "new.jsonl"), "--out"]
    check_kills(verbs, tmp_path, 12, lambda top: [*own, str(top / "match")], matched)


def test_match_remove(verbs: Verbs, matched: Path, tmp_path: Path) -> None:
    words = ["match", "remove", "test-0-0", "test-1-1", "test-3-2", "--out"]
    check_kills(verbs, tmp_path, 5, lambda top: [*words, str(top / "match")], matched)


def raw_of(folder: Path, how: str = "zip") -> Path:
    """Two splits of the organiser's files, pictures in a zip, that of train perhaps in parts."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        pictures = {}
        for number in range(40):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (240, 200, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG" if number % 2 else "PNG")
            pictures[f"{split}{number}.jpg"] = buffer.getvalue()
        hand_out(folder, split, pictures, how=how if split == "train" else "zip")
    return folder


def test_resize(verbs: Verbs, tmp_path: Path) -> None:
    words = ["resize", "--raw", str(raw_of(tmp_path / "raw")), "--size", "64", "--workers", "1"]
    check_kills(verbs, tmp_path, 80, lambda out: [*words, "--data", str(out / "data")])


def test_sample(verbs: Verbs, tmp_path: Path) -> None:
    check_kills(verbs, tmp_path, 30, lambda out: ["sample", "--products", "24", "--raw", str(out / "raw")])


def test_download(verbs: Verbs, tmp_path: Path) -> None:
    """From a folder, the archive of one split in parts that are joined."""
    words = ["download", "--from", str(raw_of(tmp_path / "raw", "parts"))]
    check_kills(verbs, tmp_path, 12, lambda out: [*words, "--raw", str(out / "raw")])
