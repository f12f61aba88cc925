"""What this device can do at most, and what it and its software are."""

import importlib.metadata
import subprocess
import time

import torch
from run import multiply_rate, times_a_second

from gpu_sections.bench import ARITHMETICS, NEEDS_CUDA, Bench, arithmetic
from gpu_sections.book import Page
from tongkuan.base.machine import processor_of
from tongkuan.ranks.arithmetic import DTYPES

ASKED = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def limits(bench: Bench, page: Page) -> None:
    """Names, versions and clocks, then matrix multiplications and copies, and the network that all sections run."""
    page.measured("device", processor_of(bench.device))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers")}
    cuda = {"CUDA": torch.version.cuda or "none", "cuDNN": str(torch.backends.cudnn.version() or "none")}
    page.measured("versions", ", ".join(f"{name} {version}" for name, version in {**versions, **cuda}.items()))
    clocks(bench, page)
    size = bench.sizes.matrix
    for way in ARITHMETICS:
        name = f"matrix multiplication, {size}^3, {way}"
        if way == "tf32" and not bench.is_gpu:
            page.not_measured(name, NEEDS_CUDA)
            continue
        with page.trying(name), arithmetic(way):
            rate = multiply_rate(DTYPES[way], size, bench.device, bench.sizes.seconds)
            bench.rates[way] = 1e9 * rate
            page.measured(name, rate / 1000, "TFLOP/s")
    copies(bench, page)
    with page.trying("network"):
        started = time.perf_counter()
        count = sum(parameter.numel() for parameter in bench.made.model.parameters())
        note = f"made with {len(bench.made.items)} items in {time.perf_counter() - started:.0f} s"
        page.measured("network", count / 1e6, "million parameters", note)


def clocks(bench: Bench, page: Page) -> None:
    """What the driver says of the GPU before anything has run."""
    if not bench.is_gpu:
        page.not_measured("clocks", NEEDS_CUDA)
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        page.not_measured("clocks", f"nvidia-smi: {type(error).__name__}")
        return
    page.measured("clocks", "; ".join(lines), note=", ".join(ASKED))


def copies(bench: Bench, page: Page) -> None:
    """Bytes a second within the device, and to it from pinned memory."""
    device, size = bench.device, bench.sizes.copied
    with page.trying("copy within the device"):
        source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
        rate = times_a_second(lambda: target.copy_(source), device, bench.sizes.seconds)
        page.measured("copy within the device", 2 * size * rate / 1e9, "GB/s", "read and written")
    if not bench.is_gpu:
        page.not_measured("copy to the device", NEEDS_CUDA)
        return
    with page.trying("copy to the device"):
        pinned = torch.zeros(size, dtype=torch.uint8).pin_memory()
        rate = times_a_second(lambda: target.copy_(pinned, non_blocking=True), device, bench.sizes.seconds)
        page.measured("copy to the device", size * rate / 1e9, "GB/s", "from pinned memory")
