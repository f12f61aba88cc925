"""Items and pairs a second when nothing is learned: the published way beside ours, and batches on the device."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference
import torch
from run import flops_of

from gpu_sections.bench import WAYS, Bench, Way, arithmetic, compare, prepared
from gpu_sections.book import Page
from tongkuan.settings import Precision


def predict(bench: Bench, page: Page) -> None:
    """All of it, from files to a result, then what the device does alone."""
    with page.trying("predict"):
        whole(bench, page)
    for way in ("bf16", "bf16-residual", "fp16", "tf32"):
        if page.has_time(f"forward alone, {way}"):
            with page.trying(f"forward alone, {way}"):
                batches(bench, page, way)


def whole(bench: Bench, page: Page) -> None:
    """Pairs a second where each item is in two: the published way encodes four sides where we encode one item."""
    few, made = bench.made.few(bench.sizes.published), bench.made.few(bench.sizes.encoded)
    published = reference.as_published(copy.deepcopy(made.model))
    out, work = bench.folder, flops_of(made)
    ways = {
        "published way, fp32": Way(lambda: few.published(published, out / "published"), len(few.pairs)),
    }
    for way in WAYS:
        ways[f"ours, {way}"] = Way(
            ours(bench, way, out / way), len(made.pairs), way, work, lambda: f"batches of {bench.usual}"
        )
    compare(bench, page, "pairs/s", ways)


def ours(bench: Bench, way: Precision, out: Path) -> Callable[[], Any]:
    """Decode, tokenise, encode and write, at an arithmetic."""
    made = bench.made.few(bench.sizes.encoded)
    with arithmetic(way) as precision:
        model = prepared(bench, precision)
    return lambda: made.ours(model, out, precision)


def batches(bench: Bench, page: Page, way: Precision) -> None:
    """Items a second of batches that lie on the device."""
    ways = {}
    with arithmetic(way) as precision:
        model = prepared(bench, precision)

    def forward(inputs: tuple[torch.Tensor | None, ...]) -> None:
        with bench.encoding(precision):
            model(*inputs)

    for size in bench.sizes.batches:
        inputs = bench.inputs(bench.batch(size))
        work = size * bench.forward_flops
        ways[f"forward alone, {way}, batch {size}"] = Way(lambda inputs=inputs: forward(inputs), size, way, work)
    compare(bench, page, "items/s", ways)
