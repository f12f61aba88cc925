"""How fast a training step is beside the published way, on the same weights and data, in turn in one process.

`PYTHONPATH=code:. .venv/bin/python code/benchmarks/train_step.py --pairs 4 --draw component --runs 5`
At real size and 4 pairs the published way takes 11 GiB; `--depth 0.34` keeps a third of the encoders' layers.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import reference
import torch
import world
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from turns import report

from tongkuan.encode.store import ItemStore, prefetch
from tongkuan.learn.batches import Part, parts
from tongkuan.learn.dataloader import Loaded, Task
from tongkuan.learn.step import TrainStep, learning_rate_at
from tongkuan.model.encoders import character_tokenizer, text_config_of
from tongkuan.model.modelfile import ModelCard
from tongkuan.model.towers import build, checkpoint_activations
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Item
from tongkuan.records.labels import labels_of
from tongkuan.settings import ModelSettings, Settings

T = TypeVar("T")
ALONE = Ranks(0, 1, torch.device("cpu"))
SWIN_DEPTHS = (2, 2, 6, 2)  # Swin-T's
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # both ways must see the same network
Published = tuple[tuple[reference.Side, reference.Side], Tensor]


def still(settings: ModelSettings) -> ModelSettings:
    """`settings` without dropout."""
    values = settings.model_dump()
    values["text"]["config"] |= STILL
    values["image"]["arguments"] |= {"drop_path_rate": 0.0}
    return ModelSettings.model_validate(values)


def shallow(settings: ModelSettings, depth: float) -> ModelSettings:
    """`settings` with a share of the layers, each as large as before, and without dropout."""
    values = still(settings).model_dump()
    values["text"]["config"] |= {"num_hidden_layers": max(1, round(12 * depth))}
    values["image"]["arguments"] |= {"depths": [max(1, round(layers * depth)) for layers in SWIN_DEPTHS]}
    return ModelSettings.model_validate(values)


class Bench:
    """One network; two ways to train it, from the same weights, each with an optimiser of its own."""

    def __init__(self, settings: Settings, task: Task, ranks: Ranks = ALONE) -> None:
        self.settings, self.task, self.ranks = settings, task, ranks
        torch.manual_seed(0)
        with ranks.device:
            model = build(settings.model, task.card.text_config, pretrained=False)
        # Contiguous, as published: the layout of our pictures alone makes the convolutions channels-last.
        self.model = model.to(memory_format=torch.contiguous_format).train()

    def switch(self, is_published: bool) -> None:
        """All written out, for fused attention came after the published entry; nothing recomputed. Or ours."""
        recompute = self.settings.train.checkpoint_activations and not is_published
        reference.write_out(self.model, is_published)
        for tower in (self.model.threshold, self.model.commodity):
            tower.text.activation_checkpointing_disable()  # type: ignore[union-attr, operator]
            tower.image.set_grad_checkpointing(False)  # type: ignore[union-attr, operator]
        if recompute:
            checkpoint_activations(self.model)

    def published_input(self, part: Part) -> Published:
        """Both sides of a part's pairs, and the labels."""
        store, tokenizer = self.task.train_store, self.task.card.open_tokenizer()
        assert tokenizer is not None, "the benchmark's model reads texts"
        left, right = (
            reference.side_inputs([store.items[i] for i in side], self.settings.model, tokenizer, store.image_dir)
            for side in ([pair.left for pair in part.pairs], [pair.right for pair in part.pairs])
        )
        return (left, right), torch.from_numpy(labels_of(part.pairs))

    def our_input(self, part: Part) -> Loaded:
        """The distinct items of a part, and the labels."""
        return part, self.task.train_store.batch(part.item_ids), torch.from_numpy(labels_of(part.pairs))

    def parts(self) -> Iterator[Part]:
        """What steps learn from, from the first on."""
        return parts(self.task.train_pairs, self.settings.train, self.ranks, 0)

    def loaded(self, read: Callable[[Part], T]) -> Iterator[T]:
        """The parts as `read` has them, read ahead by one thread."""
        return prefetch(self.parts(), read, 1)

    def published_optimizer(self) -> torch.optim.Optimizer:
        """Adam as it was: weight by weight."""
        options = self.settings.train
        return torch.optim.Adam(
            self.model.parameters(), options.learning_rate, options.betas, weight_decay=options.weight_decay
        )

    def published_step(self, optimizer: torch.optim.Optimizer, loaded: Iterator[Published]) -> float:
        """One step on the next part: its loss."""
        sides, labels = next(loaded)
        device, clip_norm = self.ranks.device, self.settings.train.clip_norm
        inputs = [reference.on(device, side) for side in sides]
        return reference.training_step(self.model, optimizer, inputs, labels.to(device), clip_norm)[0]

    def published(self) -> Iterator[tuple[float, float]]:
        """(loss, seconds) of each step from the first on; its loader reads ahead too."""
        options = self.settings.train
        optimizer = self.published_optimizer()
        loaded = self.loaded(self.published_input)
        for step in range(options.steps):
            self.switch(is_published=True)
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, options.learning_rate, options)
            loss = self.published_step(optimizer, loaded)
            yield loss, time.perf_counter() - started

    def ours(self, learner: TrainStep) -> Iterator[tuple[float, float]]:
        """(loss, seconds) of each step from the first on."""
        loaded = self.loaded(self.our_input)
        for step in range(self.settings.train.steps):
            self.switch(is_published=False)
            started = time.perf_counter()
            loss, _ = learner.take(step, loaded)
            yield float(loss), time.perf_counter() - started

    def losses(self, steps: int) -> tuple[list[float], list[float]]:
        """Of the first steps, the published way and ours, each from the starting weights."""
        found, start = [], copy.deepcopy(self.model.state_dict())
        for is_published in (True, False):
            self.model.load_state_dict(start)
            run = self.published() if is_published else self.ours(TrainStep(self.model, self.settings, self.ranks))
            found.append([loss for loss, _ in itertools.islice(run, steps)])
        return found[0], found[1]

    def kept(self) -> tuple[float, float]:
        """Bytes a pair that the first forward keeps for backward, the published way and ours; inputs included."""
        part = next(self.parts())
        state = [*self.model.parameters(), *self.model.buffers()]
        self.switch(is_published=True)
        sides, labels = self.published_input(part)
        with LiveStorages(state) as published:
            outcome = reference.pair_loss(self.model, sides, labels)
            before = published.now + sum(tensor.nbytes for side in sides for tensor in side)
        del outcome
        self.switch(is_published=False)
        learner, (_, batch, labels) = TrainStep(self.model, self.settings, self.ranks), self.our_input(part)
        with LiveStorages(state) as ours:
            loss = learner.part_loss(part, batch, labels)
            now = ours.now + batch.ids.nbytes + batch.mask.nbytes
        del loss
        return before / len(part.pairs), now / len(part.pairs)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes that operators allocate and something still holds; views of one storage count once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # not counted; held, for addresses are reused
        self._live: dict[int, object] = {storage._cdata: None for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            # The storage's end is the moment at which a real one would give its bytes back.
            self._live[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size

    def _drop(self, key: int, size: int) -> None:
        del self._live[key]
        self.now -= size


def make_task(settings: ModelSettings, items: dict[str, Item], folder: Path, rounds: int = 1) -> Task:
    """Items with pictures in `folder`, in two pairs a round, labelled by chance; validation does not come into it."""
    generator = np.random.default_rng(3)
    pairs = [replace(pair, label=int(generator.integers(2))) for pair in world.make_pairs(items, rounds)]
    tokenizer = character_tokenizer(world.texts(items))
    text_config = text_config_of(settings.text, tokenizer.get_vocab_size())
    store = ItemStore(items, folder, settings, tokenizer)
    return Task(pairs, store, pairs, store, ModelCard(settings, 0.0, text_config, tokenizer.to_str()))


def bench_steps(bench: Bench, runs: int) -> None:
    """Steps in turn, after one of each that is not counted."""
    learner = TrainStep(bench.model, bench.settings, bench.ranks)
    seconds: tuple[list[float], list[float]] = ([], [])
    both = (bench.published(), bench.ours(learner))
    for run in range(runs + 1):
        for taken, steps in zip(seconds, both, strict=True):
            _, spent = next(steps)
            if run:
                taken.append(spent)
            else:
                learner.take_times()
    pairs = bench.settings.train.pairs
    report("train", "pairs/s", pairs, seconds)
    items = statistics.mean(len(part.item_ids) / pairs for part in itertools.islice(bench.parts(), 1, runs + 1))
    print(
        f"{'':<10}distinct items a pair {items:.2f}; our steps waited {1000 * learner.take_times()[1]:.1f} ms for data"
    )


def bench_losses(bench: Bench, steps: int) -> None:
    published, ours = bench.losses(steps)
    for step, (one, other) in enumerate(zip(published, ours, strict=True)):
        print(f"loss {step:<5}{one:>12.7f}{other:>12.7f}")
    print(f"{'':<10}largest difference {max(abs(a - b) for a, b in zip(published, ours, strict=True)):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="steps of each way, in turn (default 5; 0 for none)")
    parser.add_argument("--losses", type=int, default=0, help="steps whose losses are set side by side (default 0)")
    parser.add_argument("--kept", action="store_true", help="count what a forward keeps for backward")
    parser.add_argument("--pairs", type=int, default=4, help="a step (default 4)")
    parser.add_argument("--items", type=int, default=64, help="of the data, and as many pairs (default 64)")
    parser.add_argument("--draw", choices=("random", "component"), default="random")
    parser.add_argument("--checkpoint-activations", action="store_true", help="ours recomputes; the published way not")
    parser.add_argument("--depth", type=float, default=1.0, help="share of the encoders' layers (default 1)")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("pairs", "draw", "checkpoint_activations")}
    settings = Settings.model_validate({"model": shallow(world.SETTINGS, arguments.depth), "train": options})
    with tempfile.TemporaryDirectory() as folder:
        items = world.make_items(arguments.items, Path(folder))
        bench = Bench(settings, make_task(settings.model, items, Path(folder)))
        print(f"{'':<10}{'published':>12}{'ours':>12} {'':<10}{'ratio':>9}  (spread over {arguments.runs} runs)")
        if arguments.kept:
            published, ours = (size / 2**20 for size in bench.kept())
            print(f"{'kept':<10}{published:>12,.1f}{ours:>12,.1f} {'MiB/pair':<10}{published / ours:>7.2f} x")
        if arguments.runs:
            bench_steps(bench, arguments.runs)
        if arguments.losses:
            bench_losses(bench, arguments.losses)


if __name__ == "__main__":
    main()
