"""How fast predicting and writing are beside the published way, on the same weights and data, in turn in one process.

`PYTHONPATH=code:. .venv/bin/python code/benchmarks/run.py --items 16 --runs 5`
`--profile` says where our time goes, `--linear` how it grows, `--cache` what a second run takes, `--compile` what
torch.compile brings, `--windows` what windows folded into heads bring. Training is timed by train_step.py, preparing by
resize.py.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
import world
from timm.models.swin_transformer import WindowAttention
from tokenizers import Tokenizer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turn, report

from tongkuan.base.machine import available_cores
from tongkuan.encode.encode import (
    Embeddings,
    autocast,
    batch_size,
    distinct_items,
    encode,
    length_batches,
    one_thread_each,
    prepare,
    slow_precision,
)
from tongkuan.encode.store import ItemStore, normalised
from tongkuan.model.encoders import character_tokenizer, text_config_of
from tongkuan.model.halves import compile_blocks
from tongkuan.model.modelfile import ModelCard, save_model
from tongkuan.model.towers import TwoTowers, build
from tongkuan.ranks.arithmetic import DTYPES
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Item, Pair, info_row, item_file, pair_file, pair_row
from tongkuan.records.result import read_predictions
from tongkuan.result.predict import format_rows, predict, write_result
from tongkuan.settings import DataSettings, ModelSettings, Precision

ROWS = 16_000  # of the writing benchmark, of 1,024 numbers a side
ALONE = Ranks(0, 1, torch.device("cpu"))


def multiply_rate(
    dtype: torch.dtype, size: int = 1024, device: torch.device = ALONE.device, seconds: float = 1.0
) -> float:
    """GFLOP/s of a square matrix multiplication over all cores or on a GPU: the machine's own limit."""
    left, right = torch.rand(2, size, size, device=device).to(dtype)
    return 2 * size**3 * times_a_second(lambda: left @ right, device, seconds) / 1e9


def times_a_second(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """How often `work` is done in a second, after once that is not counted."""
    work()
    wait_for(device)
    started, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - started < seconds:
        for _ in range(4 if device.type == "cuda" else 1):  # a GPU would stand still while it is waited for
            work()
            times += 1
        wait_for(device)
    return times / (time.perf_counter() - started)


def wait_for(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class World:
    """Items in as many pairs, and one network of real size."""

    items: dict[str, Item]
    pairs: list[Pair]
    images: Path
    tokenizer: Tokenizer
    model: TwoTowers
    settings: ModelSettings
    ranks: Ranks = ALONE

    def store(self) -> ItemStore:
        """With nothing read yet."""
        return ItemStore(self.items, self.images, self.settings, self.tokenizer)

    def few(self, num_items: int) -> "World":
        """The first items, in as many pairs."""
        items = dict(list(self.items.items())[:num_items])
        return replace(self, items=items, pairs=world.make_pairs(items))

    def published(self, model: TwoTowers, out: Path) -> dict[str, Embeddings]:
        """The same by the published way, with a model of `as_published`."""
        return reference.predict(model, self.settings, self.tokenizer, self.items, self.images, self.pairs, out)

    def ours(
        self, model: TwoTowers, out: Path, precision: Precision = "fp32", data: DataSettings | None = None
    ) -> dict[str, Embeddings]:
        """Decode, tokenise, encode and write."""
        item_ids = distinct_items(self.pairs)
        embeddings = encode(model, self.store(), item_ids, data or DataSettings(), self.ranks, precision)
        write_result(out, format_rows(self.pairs, embeddings, 0.0))
        return embeddings


def make_world(num_items: int, folder: Path, settings: ModelSettings = world.SETTINGS, ranks: Ranks = ALONE) -> World:
    items = world.make_items(num_items, folder / "images", settings.image.size)
    tokenizer = character_tokenizer(world.texts(items))
    torch.manual_seed(0)
    config = text_config_of(settings.text, tokenizer.get_vocab_size())
    with ranks.device:  # where the weights are drawn
        model = build(settings, config, pretrained=False).eval()
    return World(items, world.make_pairs(items), folder / "images", tokenizer, model, settings, ranks)


def largest_difference(one: dict[str, Embeddings], other: dict[str, Embeddings]) -> float:
    return max(float(np.abs(one[item_id] - other[item_id]).max()) for item_id in other)


def bench_predict(made: World, runs: int, precision: Precision, folder: Path) -> None:
    """With the model loaded and nothing cached between runs."""
    published_model, model = reference.as_published(copy.deepcopy(made.model)), copy.deepcopy(made.model)
    prepare(model, ALONE.device, precision)
    print(slow_precision(ALONE.device, precision))
    found: dict[str, Any] = {}

    def published() -> None:
        found["published"] = made.published(published_model, folder / "published")

    def ours() -> None:
        found["ours"] = made.ours(model, folder / "ours", precision)

    report("predict", "pairs/s", len(made.pairs), in_turn(runs, published, ours))
    print(f"{'':<10}largest difference of a number {largest_difference(found['published'], found['ours']):.1e}")


def bench_compile(made: World, runs: int, folder: Path) -> None:
    """Our way as it is, and with its encoders' blocks compiled; compiling itself is told apart."""
    compiled = copy.deepcopy(made.model)
    compile_blocks(compiled)
    prepare(compiled, ALONE.device, "fp32")
    started = time.perf_counter()
    made.ours(compiled, folder / "compiled")
    print(f"{'':<10}the first run, which compiles, takes {time.perf_counter() - started:.0f} s")
    seconds = in_turn(
        runs, lambda: made.ours(made.model, folder / "plain"), lambda: made.ours(compiled, folder / "compiled")
    )
    report("compiled", "pairs/s", len(made.pairs), seconds)


def attend_by(model: nn.Module, kind: type[WindowAttention]) -> None:
    """Have a kind of attention in Swin's windows, of the weights that are there."""
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.__class__ = kind


def bench_windows(made: World, runs: int, folder: Path) -> None:
    """Swin's windows by timm's way, then folded into heads as ours."""
    plain = copy.deepcopy(made.model)
    attend_by(plain, WindowAttention)
    for model in (plain, made.model):
        prepare(model, ALONE.device, "fp32")
    found: dict[str, Any] = {}

    def run(name: str, model: TwoTowers) -> Callable[[], None]:
        return lambda: found.update({name: made.ours(model, folder / name)})

    run("folded", made.model)()  # memory that is kept is there from now on
    report("windows", "pairs/s", len(made.pairs), in_turn(runs, run("plain", plain), run("folded", made.model)))
    print(f"{'':<10}largest difference of a number {largest_difference(found['plain'], found['folded']):.1e}")


def flops_of(made: World) -> float:
    """Floating-point operations of all encoders over all items, padding included."""
    model, store, size = reference.as_published(copy.deepcopy(made.model)), made.store(), made.settings.image.size
    device, counted, lengths = made.ranks.device, [], store.lengths(list(made.items))
    ends = max(lengths) // 2, max(lengths)
    for width in ends:
        ids = torch.zeros(1, width, dtype=torch.long, device=device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=device), ids, torch.ones_like(ids))
        counted.append(counter.get_total_flops())
    # Nearly linear in the tokens: their attention is a hundredth of the whole.
    each = (counted[1] - counted[0]) / (ends[1] - ends[0])
    batches = length_batches(store, list(made.items), batch_size(DataSettings(), made.settings, device))
    widths = [(len(ids), max(map(len, store.tokens(ids)))) for ids in batches]
    return float(sum(count * (counted[0] + each * (width - ends[0])) for count, width in widths))


def profile_predict(made: World, precision: Precision, folder: Path) -> None:
    """Seconds of each part, summed over threads, and the operators that take most of the encoders' time."""
    model, spent = copy.deepcopy(made.model), Counter[str]()
    prepare(model, ALONE.device, precision)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                spent[name] += time.perf_counter() - started

        return run

    store = made.store()
    item_ids, lanes = distinct_items(made.pairs), available_cores()
    model.forward = timed("encoders", model.forward)  # type: ignore[method-assign]
    store.image = timed("decode", store.image)  # type: ignore[method-assign]
    store.tokens = timed("tokenise", store.tokens)  # type: ignore[method-assign]
    started = time.perf_counter()
    embeddings = encode(model, store, item_ids, DataSettings(), ALONE, precision)
    timed("write", lambda: write_result(folder / "ours", format_rows(made.pairs, embeddings, 0.0)))()
    wall = time.perf_counter() - started
    print(f"wall {wall:.2f} s; " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items()))
    limit, rate = multiply_rate(DTYPES[precision]), flops_of(made) / (spent["encoders"] / lanes) / 1e9
    print(f"encoders: {spent['encoders'] / lanes / wall:.0%} of the wall time of {lanes} cores, ", end="")
    print(f"{rate:.0f} GFLOP/s, {rate / limit:.0%} of a {precision} matrix multiplication's {limit:.0f}")
    ids = length_batches(store, item_ids, batch_size(DataSettings(), world.SETTINGS, ALONE.device))[0]
    batch = store.batch(ids)
    # In this thread: the profiler does not see those that were started before it.
    with one_thread_each(), torch.inference_mode(), autocast(ALONE.device, precision):
        images = normalised(batch, world.SETTINGS.image)
        with profile(activities=[ProfilerActivity.CPU]) as operators:
            model(images, batch.ids, batch.mask)
    for line in operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=12).splitlines()[:16]:
        print(line[:100].rstrip())


def bench_linear(made: World, runs: int, folder: Path) -> None:
    """A quarter of the items, then all of them, in turn."""
    prepare(made.model, ALONE.device, "fp32")
    few = made.few(len(made.items) // 4)
    small, large = in_turn(runs, lambda: few.ours(few.model, folder / "a"), lambda: made.ours(made.model, folder / "b"))
    ratios = [b / a for a, b in zip(small, large, strict=True)]
    print(
        f"{len(few.items)} items {statistics.median(small):.2f} s, {len(made.items)} {statistics.median(large):.2f} s: "
        f"{statistics.median(ratios):.2f} x the time ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def bench_cache(made: World, folder: Path) -> None:
    """The whole verb, twice, model loading included."""
    for path, rows in (
        (
            item_file(folder, "test"),
            [info_row({"item_id": i.item_id, "title": i.title}, i.image_name) for i in made.items.values()],
        ),
        (pair_file(folder, "test"), [pair_row(pair) for pair in made.pairs]),
    ):
        path.write_bytes(b"".join(rows))
    config = text_config_of(world.SETTINGS.text, made.tokenizer.get_vocab_size())
    save_model(folder / "model", made.model, ModelCard(world.SETTINGS, 0.0, config, made.tokenizer.to_str()))
    seconds = []
    for name in ("first", "second"):
        started = time.perf_counter()
        predict(folder, "test", folder / "model", folder / name, cache_dir=folder / "cache")
        seconds.append(time.perf_counter() - started)
    is_same = (folder / "first/result.jsonl").read_bytes() == (folder / "second/result.jsonl").read_bytes()
    print(f"predict {seconds[0]:.1f} s, again {seconds[1]:.1f} s: {seconds[1] / seconds[0]:.1%}; same bytes: {is_same}")


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

    def ours() -> None:
        write_result(folder / "ours", format_rows(pairs, embeddings, 0.0))

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    ours()
    print(f"{'':<10}writing took {(resident('VmHWM') - before) / 1000:.0f} MB above the embeddings")
    for row, pair in zip(read_predictions(folder / "ours"), pairs, strict=True):
        if not np.array_equal(np.float32(row[1].left_embedding), embeddings[pair.left]):
            raise RuntimeError(f"{row[0]}: other numbers than were written")
    report("write", "rows/s", ROWS, in_turn(runs, published, ours))


def resident(name: str) -> int:
    """kB of memory that /proc/self/status has under a name."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=16, help="of predict, and as many pairs (default 16)")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn (default 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="ours (default fp32)")
    modes = ("write", "predict", "profile", "linear", "cache", "compile", "windows")
    for mode in modes:
        parser.add_argument(f"--{mode}", action="store_true", help="only what is named so")
    arguments = parser.parse_args()
    chosen = [mode for mode in modes if getattr(arguments, mode)] or ["write", "predict"]
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix multiplication, {str(dtype).removeprefix('torch.')}: {multiply_rate(dtype):,.0f} GFLOP/s")
    print(f"{'':<10}{'published':>12}{'ours':>12} {'':<10}{'ratio':>9}  (spread over {arguments.runs} runs)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "write" in chosen:
            bench_write(arguments.runs, folder)
        if chosen == ["write"]:
            return
        made = make_world(arguments.items, folder)
        if "predict" in chosen:
            bench_predict(made, arguments.runs, arguments.precision, folder)
        if "profile" in chosen:
            profile_predict(made, arguments.precision, folder)
        if "linear" in chosen:
            bench_linear(made, arguments.runs, folder)
        if "cache" in chosen:
            bench_cache(made, folder)
        if "compile" in chosen:
            bench_compile(made, arguments.runs, folder)
        if "windows" in chosen:
            bench_windows(made, arguments.runs, folder)


if __name__ == "__main__":
    main()
