"""What all sections measure on: a device, sizes, a network of random weights with items, and ways set side by side."""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import reference
import torch
import train_step
from run import World, make_world, wait_for
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turn

from gpu_sections.book import Page
from tongkuan.encode.encode import autocast, batch_size, prepare
from tongkuan.encode.store import Batch, normalised
from tongkuan.learn.dataloader import Task
from tongkuan.model.towers import TwoTowers
from tongkuan.presets import load_settings
from tongkuan.ranks.arithmetic import own_attention, tf32
from tongkuan.ranks.group import Ranks
from tongkuan.settings import DataSettings, Precision, Settings

# As published, but with random weights of the same sizes: nothing is downloaded.
PUBLISHED = (
    "ccks2022-63",
    "model.text.weights=random",
    "model.text.config={model_type: bert, vocab_size: 21128}",
    "model.image.weights=random",
)
TINY = (
    "ccks2022-63",
    "model.text.weights=random",
    "model.text.config={model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 16, max_position_embeddings: 16}",
    "model.text.max_tokens=16",
    "model.image.weights=random",
    "model.image.size=32",
    "model.image.architecture=swin_tiny_patch4_window7_224",
    "model.image.arguments={img_size: 32, window_size: 4, embed_dim: 8, depths: [2, 1], num_heads: [2, 2]}",
    "model.embedding_size=16",
)
ARITHMETICS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
WAYS: tuple[Precision, ...] = (*ARITHMETICS, "bf16-residual")
"""To encode; compiling takes a part of its own."""
NEEDS_CUDA = "needs CUDA; this is a CPU"


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    preset: Sequence[str]
    matrix: int  # a side
    copied: int  # bytes
    items: int  # whose verdicts are compared
    encoded: int  # items a run of predict
    published: int  # items a run of the published way
    batches: tuple[int, ...]  # items on the device
    pairs: tuple[int, ...]  # a training step
    published_pairs: int  # a training step of the published way, which keeps more for backward
    steps: int  # a run of training
    later: int  # steps that are watched after the memory's probe
    threads: tuple[int, ...]  # that decode
    compared: int  # steps whose bytes are compared
    rounds: int  # in turn
    warm_ups: int
    seconds: float  # of a rate that is counted by the clock
    compiler: str  # torch.compile's backend


REAL = Sizes(
    preset=PUBLISHED,
    matrix=8192,
    copied=1 << 30,
    items=512,
    encoded=256,
    published=32,
    batches=(32, 64, 128),
    pairs=(8, 1, 24),
    published_pairs=4,
    steps=4,
    later=12,
    threads=(1, 2, 4, 8, 16),
    compared=6,
    rounds=3,
    warm_ups=3,
    seconds=1.0,
    compiler="inductor",
)
# So small that all lines are run on a CPU in seconds; the compiler stops before it makes code.
SMALL = Sizes(
    preset=TINY,
    matrix=64,
    copied=1 << 16,
    items=8,
    encoded=8,
    published=4,
    batches=(2, 4),
    pairs=(2, 1),
    published_pairs=1,
    steps=1,
    later=1,
    threads=(1, 2),
    compared=2,
    rounds=1,
    warm_ups=1,
    seconds=0.01,
    compiler="eager",
)


@dataclass(eq=False)
class Bench:
    """A device, and what is made once for all sections."""

    device: torch.device
    sizes: Sizes
    folder: Path
    """For pictures, results and states; emptied at the end."""
    rates: dict[str, float] = field(default_factory=dict)
    """FLOP/s of a matrix multiplication on this device, by ARITHMETICS."""

    @property
    def ranks(self) -> Ranks:
        """One rank on the device."""
        return Ranks(0, 1, self.device)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def settings(self) -> Settings:
        """Of model and training, without dropout: ways are compared."""
        preset, *overrides = self.sizes.preset
        found = load_settings(preset, overrides)
        return found.model_copy(update={"model": train_step.still(found.model)})

    @cached_property
    def made(self) -> World:
        """Items and a network in evaluation mode, at fp32, which no section changes."""
        return make_world(self.sizes.items, self.folder, self.settings.model, self.ranks)

    @cached_property
    def task(self) -> Task:
        """The items' pairs to learn from."""
        return train_step.make_task(self.settings.model, self.made.items, self.made.images)

    def batch(self, size: int) -> Batch:
        """Some items on the device; the same again where there are too few."""
        ids = [*self.made.items]
        chosen = [ids[number % len(ids)] for number in range(size)]
        return self.made.store().batch(chosen).to(self.device)

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the network is called with; no mask where no text is padded."""
        return normalised(batch, self.settings.model.image), batch.ids, batch.attended

    @cached_property
    def usual(self) -> int:
        """Items a batch that `predict` takes on this device, or the most of `sizes`."""
        return min(batch_size(DataSettings(), self.settings.model, self.device), max(self.sizes.batches))

    @cached_property
    def forward_flops(self) -> int:
        """Of a forward, counted in the published way's network, which folds and spares nothing."""
        counted, inputs = reference.as_published(copy.deepcopy(self.made.model)), self.inputs(self.batch(1))
        with torch.no_grad():
            return flops(lambda: counted(*inputs[:2], None))

    def computing(self, precision: Precision) -> AbstractContextManager[None]:
        """As train computes at a precision."""
        return autocast(self.device, precision)

    @contextmanager
    def encoding(self, precision: Precision) -> Iterator[None]:
        """As predict does."""
        with torch.inference_mode(), own_attention(), autocast(self.device, precision):
            yield

    def wait(self) -> None:
        """Until the device has done what it was given."""
        wait_for(self.device)


@contextmanager
def arithmetic(way: Precision) -> Iterator[Precision]:
    """A precision, by which what our encoders do not multiply is multiplied too: plain products, the published way."""
    with tf32(way == "tf32"):
        yield way


def prepared(bench: Bench, precision: Precision) -> TwoTowers:
    """A copy of the network as `predict` makes it ready."""
    model = copy.deepcopy(bench.made.model)
    prepare(model, bench.device, precision)
    return model


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@dataclass
class Way:
    """One way to do a thing: `run` does `amount` of it."""

    run: Callable[[], Any]
    amount: float
    arithmetic: Precision = "fp32"
    flops: float = 0.0
    """Of one run, for the share of what a matrix multiplication reaches; 0 for none."""
    note: Callable[[], str] = str
    """Asked when all is measured."""


def compare(
    bench: Bench, page: Page, unit: str, ways: Mapping[str, Way], base: Sequence[float] | None = None
) -> list[float] | None:
    """Rates of ways, in turn: a row each. A way that fails or does not fit leaves the others.

    Ratios are to the first way, or to rates that `base` has of another comparison. The first way's rates come back.
    """

    def whole(way: Way) -> Callable[[], None]:
        def run() -> None:
            with arithmetic(way.arithmetic):
                way.run()
            bench.wait()

        return run

    ready = {}
    for name, way in ways.items():
        with page.trying(name):
            for _ in range(bench.sizes.warm_ups):
                whole(way)()
            ready[name] = whole(way)
    if not ready:
        return None
    seconds = dict(zip(ready, in_turn(bench.sizes.rounds, *ready.values()), strict=True))
    rates = {name: [ways[name].amount / taken for taken in spent] for name, spent in seconds.items()}
    first = next(iter(rates.values()))
    is_alone = base is None and len(ways) == 1
    for name, found in rates.items():
        way = ways[name]
        ratio = statistics.median(one / other for one, other in zip(found, base or first, strict=True))
        share = shares(bench, way, found)
        page.measured(name, found, unit, "; ".join(filter(None, [share, way.note()])), None if is_alone else ratio)
    return first


def shares(bench: Bench, way: Way, rates: Sequence[float]) -> str:
    """How near a way comes to a matrix multiplication's rate, in words; nothing where that was not measured."""
    arithmetic = way.arithmetic.split("-")[0]
    limit = bench.rates.get(arithmetic)
    if not way.flops or not limit:
        return ""
    reached = statistics.median(rates) / way.amount * way.flops
    return f"{reached / 1e12:.3g} TFLOP/s, {reached / limit:.0%} of the {arithmetic} matrix multiplication"
