"""A catalogue's worth of pairs through `predict`: memory, time, whether its progress is true, and a kill half-way.

`PYTHONPATH=code:. .venv/bin/python code/benchmarks/load.py --pairs 200000 --items 100000`
Small random encoders with embeddings of full size, pictures of 32 pixels; about 30 kB of disk a pair.
"""

import argparse
import io
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tongkuan.base.files import sha256_of
from tongkuan.model.encoders import character_tokenizer, text_config_of
from tongkuan.model.modelfile import ModelCard, save_model
from tongkuan.model.towers import build
from tongkuan.presets import load_settings
from tongkuan.records.items import Pair, info_row, item_file, pair_file, pair_row

CODE = Path(__file__).resolve().parents[1]
SHOWN = re.compile(r"predict: +(\d+)%.*?(\d+)/(\d+) \[")


def make_catalogue(folder: Path, num_items: int, num_pairs: int) -> None:
    """Items with texts of 40 to 110 characters and pictures of noise, pairs of any two."""
    generator = np.random.default_rng(0)
    letters = np.array([chr(0x4E00 + number) for number in range(2000)])
    images = folder / "images"
    images.mkdir()
    with item_file(folder, "test").open("wb") as file:
        for number in tqdm(range(num_items), desc="items", unit="item", disable=None):
            title = "".join(generator.choice(letters, generator.integers(40, 110)))
            file.write(info_row({"item_id": str(number), "title": title}, f"{number}.jpg"))
            picture = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            picture.save(images / f"{number}.jpg")
    sides = generator.integers(0, num_items, (num_pairs, 2))
    sides[:, 1] = np.where(sides[:, 0] == sides[:, 1], (sides[:, 1] + 1) % num_items, sides[:, 1])
    distinct = np.unique(sides, axis=0)
    generator.shuffle(distinct)
    with pair_file(folder, "test").open("wb") as file:
        file.writelines(pair_row(Pair(str(left), str(right))) for left, right in distinct)
    settings = load_settings(
        "demo", ["model.embedding_size=512", "model.text.config.max_position_embeddings=140"]
    ).model
    tokenizer = character_tokenizer(["".join(letters)])
    config = text_config_of(settings.text, tokenizer.get_vocab_size())
    torch.manual_seed(0)
    save_model(
        folder / "model",
        build(settings, config, pretrained=False),
        ModelCard(settings, 0.0, config, tokenizer.to_str()),
    )


@dataclass
class Watched:
    """What a run took, and what its progress line said when."""

    seconds: float = 0.0
    peak: int = 0
    """Bytes."""
    shown: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, share of the items shown as done)."""

    def encoding(self) -> float:
        """Seconds from the first to the last batch."""
        return self.shown[-1][0] - self.shown[0][0]

    def progress_error(self) -> float:
        """Largest distance between the share shown and the share of the encoding time that had passed."""
        times, shares = np.array(self.shown).T
        passed = (times - times[0]) / (times[-1] - times[0])
        return float(np.abs(passed - (shares - shares[0]) / (shares[-1] - shares[0])).max())


def run(words: Sequence[object], kill_at: float | None = None) -> Watched:
    """A verb under a terminal of its own, ended by SIGKILL when it says that `kill_at` of the items are done."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    environment = {**os.environ, "PYTHONPATH": f"{CODE}:{CODE.parent}"}
    started, watched = time.perf_counter(), Watched()
    command = [sys.executable, "-P", "-m", "tongkuan", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=child, env=environment)
    os.close(child)
    text = io.StringIO()
    while True:
        try:
            data = os.read(parent, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        text.write(data)
        for match in SHOWN.finditer(data):
            share = int(match[2]) / int(match[3])
            watched.shown.append((time.perf_counter() - started, share))
            if kill_at is not None and share >= kill_at:
                process.send_signal(signal.SIGKILL)
                kill_at = None
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"exit {code}: {text.getvalue()[-2000:]}")
    watched.seconds, watched.peak = time.perf_counter() - started, usage.ru_maxrss * 1024
    return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="for the files (default: the system's for temporary ones)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_catalogue(folder, arguments.items, arguments.pairs)

        def predict(out: str, *more: object, kill_at: float | None = None) -> Watched:
            return run(
                ("predict", "--data", folder, "--model", folder / "model", "--submit", folder / out, *more), kill_at
            )

        whole = predict("whole")
        size = (folder / "whole/result.jsonl").stat().st_size
        digest = sha256_of(folder / "whole/result.jsonl")
        (folder / "whole/result.jsonl").unlink()
        print(
            f"{arguments.pairs:,} pairs of {arguments.items:,} items: {whole.seconds:.0f} s, {whole.encoding():.0f} of "
            f"them encoding, peak {whole.peak / 2**30:.2f} GiB, result {size / 1e9:.2f} GB; the progress shown was off "
            f"by at most {whole.progress_error():.1%}",
            flush=True,
        )
        cache = ("--cache", folder / "cache")
        killed = predict("again", *cache, kill_at=0.5)
        resumed = predict("again", *cache)
        is_same = sha256_of(folder / "again/result.jsonl") == digest
        print(
            f"with a cache: killed at 50 % after {killed.seconds:.0f} s, the same command then took "
            f"{resumed.seconds:.0f} s, {resumed.encoding():.0f} of them encoding; peak {resumed.peak / 2**30:.2f} GiB; "
            f"same bytes: {is_same}"
        )


if __name__ == "__main__":
    main()
