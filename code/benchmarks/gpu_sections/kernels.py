"""Which kernels run: attention's by name, and how much of the time the device works."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_sections.bench import NEEDS_CUDA, Bench, prepared
from gpu_sections.book import Page
from tongkuan.learn.dataloader import load_parts
from tongkuan.learn.step import TrainStep
from tongkuan.ranks.arithmetic import own_attention
from tongkuan.settings import Precision

FUSED = "aten::_scaled_dot_product_"  # what an attention is called that was chosen
MATH = "aten::_scaled_dot_product_attention_math"
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
SHOWN = 12  # kernels
PASSES: tuple[tuple[Precision, bool], ...] = (("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True))
"""(precision, whether gradients are asked for)."""


def kernels(bench: Bench, page: Page) -> None:
    """Of single blocks the kernels of attention, then of whole passes the time and the launches."""
    for name, run in blocks(bench).items():
        for precision, learns in PASSES:
            what = f"{name}, {precision}, {'forward and backward' if learns else 'forward'}"
            if page.has_time(what):
                with page.trying(what):
                    with nullcontext() if learns else own_attention():
                        found = attention_of(partial(run, learns), bench, precision)
                    judge(page, what, found, bench.is_gpu)
    for name, make in {"predict, a batch": predicting, "train, a step": training}.items():
        if page.has_time(name):
            with page.trying(name):
                describe(page, name, bench, make(bench))


def blocks(bench: Bench) -> dict[str, Callable[[bool], None]]:
    """Each part whose attention is looked at; with True it learns."""
    tower = bench.made.model.commodity
    stage = tower.image.layers[0]  # type: ignore[union-attr, index]
    height, width = stage.blocks[0].input_resolution
    pictures = torch.randn(min(8, bench.usual), height, width, stage.blocks[0].norm1.normalized_shape[0])
    pictures = pictures.to(bench.device)
    ids = bench.batch(8).ids
    padded = torch.ones_like(ids)
    padded[:4, -4:] = 0

    def passed(block: Callable[[], torch.Tensor], learns: bool) -> None:
        with torch.set_grad_enabled(learns):
            result = block()
        if learns:
            result.float().sum().backward()
            bench.made.model.zero_grad(set_to_none=True)

    return {
        "Swin block, plain": lambda learns: passed(lambda: stage.blocks[0](pictures), learns),
        "Swin block, shifted": lambda learns: passed(lambda: stage.blocks[1](pictures), learns),
        "text, padded": lambda learns: passed(lambda: tower.states(ids, padded), learns),
        "text, full": lambda learns: passed(lambda: tower.states(ids, None), learns),
    }


def attention_of(work: Callable[[], Any], bench: Bench, precision: Precision) -> Counter[str]:
    """How often each attention was chosen."""
    with bench.computing(precision):
        events = events_of(work, bench)
    return Counter(event.name for event in events if event.name.startswith(FUSED) and "backward" not in event.name)


def judge(page: Page, what: str, found: Counter[str], is_strict: bool) -> None:
    """A row of the attention that was chosen. Written out, or none, fails where there are kernels to choose."""
    names = ", ".join(f"{name.removeprefix('aten::')} x {count}" for name, count in sorted(found.items()))
    if not is_strict:
        page.measured(what, names or "none", note="of a CPU: says nothing of a GPU")
    elif found[MATH] or not found:
        page.failed(what, f"attention is not fused: {names or 'no attention was chosen at all'}")
    else:
        page.measured(what, names)


def predicting(bench: Bench) -> Callable[[], Any]:
    """A forward of a batch that is on the device, in bf16, as predict does it."""
    model, inputs = prepared(bench, "bf16").eval(), bench.inputs(bench.batch(bench.usual))

    def run() -> None:
        with bench.encoding("bf16"):
            model(*inputs)

    return run


def training(bench: Bench) -> Callable[[], Any]:
    """A step in bf16 at the published batch, its input read ahead."""
    train = bench.settings.train.model_copy(update={"precision": "bf16"})
    settings = bench.settings.model_copy(update={"train": train})
    learner = TrainStep(prepared(bench, "fp32").train(), settings, bench.ranks)
    loaded = load_parts(bench.task, settings, bench.ranks, 0, bench.task.train_store)
    return lambda: learner.take(0, loaded)


def events_of(work: Callable[[], Any], bench: Bench) -> list[Any]:
    """What the profiler saw of one `work`, after one that it did not see."""
    work()
    bench.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_gpu else [])]
    with profile(activities=activities) as profiled:
        work()
        bench.wait()
    return list(profiled.events() or [])


def describe(page: Page, name: str, bench: Bench, work: Callable[[], Any]) -> None:
    """Rows of a pass: how long the device works, how long the host takes to launch it, and for what."""
    whole, host = [], []
    for run in range(bench.sizes.warm_ups + bench.sizes.rounds):
        bench.wait()
        started = time.perf_counter()
        work()
        launched = time.perf_counter() - started
        bench.wait()
        if run >= bench.sizes.warm_ups:
            whole.append(1000 * (time.perf_counter() - started))
            host.append(1000 * launched)
    times, calls = summed(events_of(work, bench))
    page.measured(f"{name}: wall", whole, "ms")
    if not bench.is_gpu:
        page.not_measured(f"{name}: kernels, launches, waits", NEEDS_CUDA)
        return
    page.measured(f"{name}: the host has launched it after", host, "ms", "as long as wall: it waits, or is the slower")
    busy = sum(times.values()) / 1000
    page.measured(f"{name}: kernels", busy, "ms", f"{busy / min(whole):.0%} of the shortest wall")
    page.measured(f"{name}: launches", sum(calls[each] for each in LAUNCHES), "", f"{len(times)} kinds of kernels")
    waits = sum(calls[each] for each in WAITS) - 1  # one is ours
    page.measured(f"{name}: the host waits", waits, "times", f"of {', '.join(WAITS)}")
    for kernel, spent in times.most_common(SHOWN):
        page.measured(f"{name}: {kernel[:70]}", spent / 1000, "ms", f"{spent / 1000 / busy:.0%} of the kernels")


def summed(events: Iterable[Any]) -> tuple[Counter[str], Counter[str]]:
    """(microseconds by kernel on the device, calls by name on the host)."""
    times, calls = Counter[str](), Counter[str]()
    for event in events:
        if event.device_type == DeviceType.CPU:
            calls[event.name] += 1
        elif not event.is_user_annotation:  # which spans kernels that are counted themselves
            times[event.name] += event.self_device_time_total
    return times, calls
