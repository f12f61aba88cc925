"""Whether a device learns the same bytes twice, after a resume, and as one rank of several would."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import train_step
from torch import Tensor

from gpu_sections.bench import Bench, arithmetic
from gpu_sections.book import Page, free
from tongkuan.learn.dataloader import Task, load_parts
from tongkuan.learn.run import Run
from tongkuan.learn.step import TrainStep
from tongkuan.model.towers import build
from tongkuan.settings import Settings

SHALLOW = {"depths": [2, 2, 2, 2]}  # of Swin: every kernel of the whole network, in a third of its time and state
LAYERS = {"num_hidden_layers": 2}


@dataclass
class Learning:
    """Some steps from the same weights on."""

    bench: Bench
    task: Task
    settings: Settings

    def steps(self, folder: Path | None = None, first: int = 0, in_group: bool = False) -> dict[str, Tensor]:
        """The weights after step `bench.sizes.compared`, or half of them when a folder is to keep the state.

        With `first`, the state in the folder is gone on from.
        """
        bench, settings, ranks = self.bench, self.settings, self.bench.ranks
        torch.manual_seed(0)
        with bench.device:
            model = build(settings.model, self.task.card.text_config, pretrained=False)
        learner = TrainStep(model.train(), settings, ranks)
        run = Run(folder, settings, ranks) if folder else None
        if run and first:
            run.resume(model, learner.optimizer, learner.scaler)
        if in_group:
            with closing(load_parts(self.task, settings, ranks, 0, self.task.train_store)) as loaded:
                learner.join(next(loaded))
        last = bench.sizes.compared if first or not folder else bench.sizes.compared // 2
        with closing(load_parts(self.task, settings, ranks, first, self.task.train_store)) as loaded:
            for step in range(first, last):
                learner.take(step, loaded)
        if run and not first:
            run.save(last, model, learner.optimizer, learner.scaler)
        return model.state_dict()


def same_bytes(bench: Bench, page: Page) -> None:
    """At bf16, fp32 and bf16 played back; of each again, resumed, in a group, and by deterministic algorithms only."""
    values = bench.settings.model.model_dump()
    values["text"]["config"] |= LAYERS
    if bench.settings.model.image.architecture.startswith("swin_large"):
        values["image"]["arguments"] |= SHALLOW
    model = type(bench.settings.model).model_validate(values)
    task = train_step.make_task(model, bench.made.items, bench.made.images)
    ways: dict[str, dict[str, Any]] = {"bf16": {"precision": "bf16"}, "fp32": {"precision": "fp32"}}
    ways["bf16, CUDA graphs"] = {"precision": "bf16", "cuda_graphs": True}
    for way, options in ways.items():
        train = bench.settings.train.model_copy(update=options)
        learning = Learning(bench, task, bench.settings.model_copy(update={"model": model, "train": train}))
        with page.trying(way), arithmetic(train.precision or "fp32"):
            plain = learning.steps()
            compared(page, f"{way}: again", plain, learning)
            if page.has_time(f"{way}: resumed"):
                resumed(bench, page, f"{way}: resumed", plain, learning)
            if page.has_time(f"{way}: a rank of one in a group"):
                with group_of_one(bench, way):
                    compared(page, f"{way}: a rank of one in a group", plain, learning, in_group=True)
            if page.has_time(f"{way}: deterministic"):
                deterministic(page, f"{way}: deterministic", learning)


def compared(page: Page, name: str, plain: dict[str, Tensor], learning: Learning, in_group: bool = False) -> None:
    """A row on how the same steps, taken anew, differ from `plain`."""
    page.measured(name, *differing(plain, learning.steps(in_group=in_group)))


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str, str]:
    """(tensors that differ, unit, note)."""
    changes = [float((one[name].float() - other[name].float()).abs().max()) for name in one]
    count = sum(not torch.equal(one[name], other[name]) for name in one)
    return count, "tensors differ", f"of {len(one)}, by {max(changes):.1e} at most; fewer layers than published"


def resumed(bench: Bench, page: Page, name: str, plain: dict[str, Tensor], learning: Learning) -> None:
    """A row on how steps differ that were interrupted half-way and resumed from the state on disk."""
    folder = bench.folder / "run"
    learning.steps(folder)
    free()
    page.measured(name, *differing(plain, learning.steps(folder, bench.sizes.compared // 2)))
    for path in folder.glob("*.pt"):
        path.unlink()


def deterministic(page: Page, name: str, learning: Learning) -> None:
    """Rows on the steps by deterministic algorithms: do they differ, what do they cost, where are there none?"""
    started = time.perf_counter()
    learning.steps()
    plain = time.perf_counter() - started
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            started = time.perf_counter()
            first = learning.steps()
            spent = time.perf_counter() - started
            page.measured(name, *differing(first, learning.steps()))
        finally:
            torch.use_deterministic_algorithms(False)
    lacking = {str(each.message).split(" ")[0] for each in met if "deterministic" in str(each.message)}
    note = f"reading and building included; without one: {', '.join(sorted(lacking)) or 'nothing'}"
    page.measured(f"{name}: time", spent / plain, "of the time", note)


@contextmanager
def group_of_one(bench: Bench, name: str) -> Iterator[None]:
    """A process group with one rank: exchange of gradients with nobody."""
    backend = "nccl" if bench.is_gpu else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(bench.folder / f"meeting-{name}"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
