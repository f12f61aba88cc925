"""How fast `best` is beside the published way with encoders of the same size: to predict and to learn, in turn.

`PYTHONPATH=code:. .venv/bin/python code/benchmarks/best.py --items 96 --runs 5`
The published way calls two towers for each side of each pair and pads texts; ours reads an item once, with one trunk
and two heads (`shared`), or with the parts of `best` (`one`), which learns without a step. Weights are random: the time
does not depend on them. Rows: `shared` and `one` predict; `a step` trains all of `shared`; `train` is each pair once by
the published way, and all that `train` does of these pairs with the preset.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import reference
import run
import torch
import train_step
import world
from turns import in_turn, report

from tongkuan.encode.encode import distinct_items, prepare
from tongkuan.learn.dataloader import Task, load_parts
from tongkuan.learn.features import features_of
from tongkuan.learn.fit import fit
from tongkuan.learn.step import TrainStep
from tongkuan.model.one import OneTower
from tongkuan.model.towers import TwoTowers, build
from tongkuan.model.trunk import ItemModel
from tongkuan.presets import load_settings
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Item
from tongkuan.settings import DataSettings, ModelSettings, Settings

ALONE = Ranks(0, 1, torch.device("cpu"))


class Sized:
    """One set of items, and networks of the preset's encoders in each form."""

    def __init__(self, preset: str, num_items: int, rounds: int, step: int, folder: Path) -> None:
        self.settings, self.rounds, self.step, self.folder = load_settings(preset), rounds, step, folder
        model = self.settings.model
        self.items: dict[str, Item] = world.make_items(num_items, folder / "images", model.image.size)
        self.forms: dict[str, ModelSettings] = {
            "two": ModelSettings(text=model.text, image=model.image, embedding_size=model.embedding_size),
            "one": model,
        }
        self.forms["shared"] = self.forms["two"].model_copy(update={"towers": "shared"})

    def task(self, form: str) -> Task:
        """The items in their pairs, labelled by chance."""
        return train_step.make_task(self.forms[form], self.items, self.folder / "images", self.rounds)

    def model(self, form: str, task: Task) -> ItemModel:
        """Of random weights."""
        torch.manual_seed(0)
        return build(self.forms[form], task.card.text_config, pretrained=False)

    def predicting(self, form: str) -> Callable[[], object]:
        """The pairs of all items predicted, by the published way if in its form."""
        task, out = self.task(form), self.folder / form
        tokenizer, pairs = task.card.open_tokenizer(), world.make_pairs(self.items, self.rounds)
        assert tokenizer is not None
        model = self.model(form, task).eval()
        if isinstance(model, TwoTowers):
            published = reference.as_published(model)
            settings, images = self.forms[form], self.folder / "images"
            return lambda: reference.predict(published, settings, tokenizer, self.items, images, pairs, out)
        prepare(model, ALONE.device, "fp32")
        made = run.World(self.items, pairs, self.folder / "images", tokenizer, model, self.forms[form])
        return lambda: made.ours(model, out)

    def fitting(self) -> Callable[[], object]:
        """What `train` does of all pairs with parts and no steps: features of each item once, then the regression."""
        task = self.task("one")
        tower = self.model("one", task)
        assert isinstance(tower, OneTower)

        def learn() -> None:
            new = copy.deepcopy(tower)
            raw = features_of(new, task.train_store, distinct_items(task.train_pairs), DataSettings(), ALONE)
            fit(new, task.train_store, task.train_pairs, raw, ALONE)

        return learn

    def training(self, form: str) -> tuple[Settings, Task]:
        """Steps that train all of the encoders."""
        draw = "random" if form == "two" else "component"
        train = {"pairs": self.step, "draw": draw, "steps": 10**6, "precision": "fp32"}
        return Settings.model_validate({"model": self.forms[form].model_dump(), "train": train}), self.task(form)

    def published_steps(self) -> Iterator[object]:
        """Step by step, by the published way."""
        return train_step.Bench(*self.training("two")).published()

    def our_steps(self) -> Iterator[object]:
        """Step by step, a trunk with two heads."""
        settings, task = self.training("shared")
        step = TrainStep(self.model("shared", task).train(), settings, ALONE)
        loaded = load_parts(task, settings, ALONE, 0, task.train_store)
        return (step.take(number, loaded) for number in count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="best", help="whose encoders (default best)")
    parser.add_argument("--items", type=int, default=96, help="of the data (default 96)")
    parser.add_argument("--runs", type=int, default=5, help="of each way, in turn (default 5)")
    parser.add_argument("--step", type=int, default=reference.BATCH, help="pairs of a training step (default 4)")
    parser.add_argument("--rounds", type=int, default=1, help="of pairs, each item in two pairs a round (default 1)")
    arguments = parser.parse_args()
    # Gradients of random weights, not of trained ones, shrink to numbers that a CPU is slow with.
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        runs, step = arguments.runs, arguments.step
        sized = Sized(arguments.preset, arguments.items, arguments.rounds, step, Path(folder))
        pairs = arguments.rounds * arguments.items
        print(f"{'':<10}{'published':>12}{'ours':>12} {'':<10}{'ratio':>9}  (spread over {runs} runs)")
        published = sized.predicting("two")
        for form in ("shared", "one"):
            report(form, "pairs/s", pairs, in_turn(runs, published, sized.predicting(form)))
        steps, ours = sized.published_steps(), sized.our_steps()
        for each in (steps, ours):
            next(each)
        report("a step", "pairs/s", step, in_turn(runs, lambda: next(steps), lambda: next(ours)))
        epoch = pairs // step
        seconds = in_turn(runs, lambda: [*islice(steps, epoch)], sized.fitting())
        report("train", "pairs/s", epoch * step, seconds)


if __name__ == "__main__":
    main()
