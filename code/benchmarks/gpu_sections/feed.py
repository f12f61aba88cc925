"""Whether pictures are decoded as fast as the device asks for them, and what a cache on disk costs."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torchvision.io import ImageReadMode, decode_jpeg

from gpu_sections.bench import NEEDS_CUDA, Bench, Way, compare, prepared
from gpu_sections.book import Page
from gpu_sections.kernels import predicting
from tongkuan.encode.cache import Cache
from tongkuan.encode.encode import distinct_items, encode
from tongkuan.encode.store import Batch, prefetch
from tongkuan.records.pictures import read_image
from tongkuan.settings import DataSettings

SECONDS = 2.0  # the device is watched, beside nothing and beside decoding


def feed(bench: Bench, page: Page) -> None:
    """Decoding alone and beside the device, the decoder of the device, the cache."""
    for name, part in {"decode": decoding, "decoder": decoders, "cache": cached}.items():
        if page.has_time(name):
            with page.trying(name):
                part(bench, page)


def decoding(bench: Bench, page: Page) -> None:
    """Pictures a second by number of threads, alone and while the device works; and what the device then does."""
    work = predicting(bench)
    with Busy(bench, work) as device:
        before = device.count()
        time.sleep(SECONDS * bench.sizes.seconds)
        alone = device.rate(before)
    page.measured("the device beside nothing", alone, "items/s", f"bf16, batches of {bench.usual}")
    for threads in bench.sizes.threads:
        name = f"decode, {threads} threads"
        if not page.has_time(name):
            return
        pictures = decode(bench, threads)
        page.measured(name, pictures, "pictures/s", "and their texts")
        with Busy(bench, work) as device:
            before = device.count()
            beside = decode(bench, threads)
            rate = device.rate(before)
        page.measured(f"{name}, beside a busy device", beside, "pictures/s", f"{beside / pictures:.0%} of alone")
        page.measured(f"the device beside {threads} threads", rate, "items/s", f"{rate / alone:.0%} of beside nothing")


def decode(bench: Bench, threads: int) -> float:
    """Pictures a second that become batches."""
    store, ids = bench.made.store(), [*bench.made.items]
    jobs = [ids[start : start + bench.usual] for start in range(0, len(ids), bench.usual)]

    def load(job: list[str]) -> Batch:
        batch = store.batch(job)
        return batch.pin() if bench.is_gpu else batch

    started = time.perf_counter()
    for _ in prefetch(jobs, load, threads):
        pass
    return len(ids) / (time.perf_counter() - started)


class Busy:
    """A thread that has the device work as long as this is open."""

    def __init__(self, bench: Bench, work: Callable[[], Any]) -> None:
        self.bench, self.work = bench, work
        self.batches = 0
        self._is_over, self._pool = threading.Event(), ThreadPoolExecutor(1, thread_name_prefix="device")

    def __enter__(self) -> Self:
        self._thread = self._pool.submit(self._run)
        self.rate(self.count())  # until it has begun
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._pool.shutdown()

    def _run(self) -> None:
        while not self._is_over.is_set():
            self.work()
            self.bench.wait()
            self.batches += 1

    def count(self) -> tuple[float, int]:
        """(seconds of a clock, batches done)."""
        return time.perf_counter(), self.batches

    def rate(self, since: tuple[float, int]) -> float:
        """Items a second since a `count`; a batch at least is awaited."""
        started, before = since
        while self.batches == before:
            if self._thread.done():
                self._thread.result()  # raises what it has met
            time.sleep(0.001)
        now, batches = self.count()
        return self.bench.usual * (batches - before) / (now - started)


def decoders(bench: Bench, page: Page) -> None:
    """Pillow, as everywhere here, beside torchvision's decoders in one thread."""
    paths = [bench.made.images / item.image_name for item in bench.made.items.values()][: 4 * bench.usual]
    data = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    size = bench.settings.model.image.size
    ways = {
        "Pillow, one thread": Way(lambda: [read_image(path, size) for path in paths], len(paths)),
        "libjpeg-turbo by torchvision, one thread": Way(
            lambda: [decode_jpeg(each, ImageReadMode.RGB) for each in data], len(paths)
        ),
    }
    if bench.is_gpu:
        on_device = Way(lambda: decode_jpeg(data, ImageReadMode.RGB, device=bench.device), len(paths))
        ways["nvJPEG on the device"] = on_device
    else:
        page.not_measured("nvJPEG on the device", NEEDS_CUDA)
    compare(bench, page, "pictures/s", ways)


def cached(bench: Bench, page: Page) -> None:
    """`predict` without a cache, with an empty one that it fills, and from a full one."""
    made = bench.made.few(bench.sizes.encoded)
    model = prepared(bench, "bf16")
    recipe = bench.folder / "recipe"  # stands for a model file, of which only the hash counts
    numbers = itertools.count()

    def encoded(cache: Cache | None) -> None:
        encode(model, made.store(), distinct_items(made.pairs), DataSettings(), bench.ranks, "bf16", "cache", cache)

    def empty() -> Cache:
        recipe.write_text(str(next(numbers)))
        return Cache(bench.folder / "cache", recipe, "bf16", bench.device)

    full = empty()
    encoded(full)
    ways = {
        "bf16, no cache": Way(lambda: encoded(None), len(made.items)),
        "bf16, a cache is filled": Way(lambda: encoded(empty()), len(made.items), note=lambda: "two fsyncs a batch"),
        "bf16, from the cache": Way(lambda: encoded(full), len(made.items)),
    }
    compare(bench, page, "items/s", ways)
