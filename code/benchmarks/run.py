"""How fast predicting and writing are beside the published way, on the same weights and data, in turn in one process.

`PYTHONPATH=code .venv/bin/python code/benchmarks/run.py --items 16 --runs 5`
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
import world

from tongkuan.config import DataSettings
from tongkuan.data import ItemStore, character_tokenizer
from tongkuan.distributed import ranks
from tongkuan.encode import distinct_items, encode
from tongkuan.model import build, text_config_of
from tongkuan.predict import write_result
from tongkuan.records import Pair

ROWS = 16_000  # of the writing benchmark, of 1,024 numbers a side


def multiply_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of a square matrix multiplication: the machine's own limit."""
    left, right = torch.rand(2, size, size).to(dtype)
    left @ right
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        left @ right
        times += 1
    return 2 * size**3 * times / (time.perf_counter() - started) / 1e9


def in_turn(runs: int, published: Callable[[], Any], ours: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Seconds of each, run by run: the machine's drift meets both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for taken, run in zip(seconds, (published, ours), strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return seconds


def report(name: str, unit: str, amount: int, seconds: tuple[list[float], list[float]]) -> None:
    """A line of the table: medians, and the ratio with its spread over the runs."""
    rates = [amount / statistics.median(taken) for taken in seconds]
    ratios = [published / ours for published, ours in zip(*seconds, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{name:<10}{rates[0]:>12,.2f}{rates[1]:>12,.2f} {unit:<10}{statistics.median(ratios):>7.2f} x  ({spread})",
        flush=True,
    )


def bench_predict(num_items: int, runs: int, folder: Path) -> None:
    """Decode, tokenise, encode and write, with the model loaded and nothing cached between runs."""
    items = world.make_items(num_items, folder / "images")
    pairs = world.make_pairs(items)
    settings = world.SETTINGS
    tokenizer = character_tokenizer(world.texts(items))
    torch.manual_seed(0)
    model = build(settings, text_config_of(settings.text, tokenizer.get_vocab_size()), pretrained=False).eval()
    found: dict[str, Any] = {}

    def published() -> None:
        found["published"] = reference.predict(
            model, settings, tokenizer, items, folder / "images", pairs, folder / "published.jsonl"
        )

    def ours() -> None:
        store = ItemStore(items, folder / "images", settings, tokenizer)
        with ranks() as fellows:
            found["ours"] = encode(model, store, distinct_items(pairs), DataSettings(encode_batch=8), fellows)
        write_result(folder / "ours.jsonl", pairs, found["ours"], 0.0)

    seconds = in_turn(runs, published, ours)
    worst = max(float(np.abs(found["published"][i] - found["ours"][i]).max()) for i in found["ours"])
    report("predict", "pairs/s", len(pairs), seconds)
    print(f"{'':<10}largest difference of a number {worst:.1e}")


def bench_write(runs: int, folder: Path) -> None:
    """Rows of two embeddings of 1,024 numbers, each item in two pairs."""
    generator = np.random.default_rng(0)
    ids = [str(number) for number in range(ROWS)]
    embeddings = dict(zip(ids, generator.normal(size=(ROWS, 1024)).astype(np.float32), strict=True))
    pairs = [Pair(left, right) for left, right in zip(ids, [*ids[1:], ids[0]], strict=True)]

    def published() -> None:
        with (folder / "published.jsonl").open("w") as file:
            for pair in pairs:
                left, right = (str(embeddings[side].tolist()) for side in (pair.left, pair.right))
                file.write(f'{{"src_item_emb": "{left}", "tgt_item_emb": "{right}"}}\n')

    report(
        "write", "rows/s", ROWS, in_turn(runs, published, lambda: write_result(folder / "ours", pairs, embeddings, 0))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=16, help="of predict, and as many pairs (default 16)")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn (default 5)")
    arguments = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix multiplication, {str(dtype).removeprefix('torch.')}: {multiply_rate(dtype):,.0f} GFLOP/s")
    print(f"{'':<10}{'published':>12}{'ours':>12} {'':<10}{'ratio':>9}  (spread over {arguments.runs} runs)")
    with tempfile.TemporaryDirectory() as folder:
        bench_write(arguments.runs, Path(folder))
        bench_predict(arguments.items, arguments.runs, Path(folder))


if __name__ == "__main__":
    main()
