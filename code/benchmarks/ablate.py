"""Recipes x seeds x data folders -> a table: how right, how sure the difference is, and what it costs.

`PYTHONPATH=code:. .venv/bin/python -P code/benchmarks/ablate.py --out runs/ablate --data DIR DIR --seeds 5`
A recipe is a line `name: preset override override` of a YAML file (`--recipes`); the first is the reference.

Each recipe, seed and data folder is a cell: it trains, scores, and leaves one result file. A cell whose file was made
by the same settings, pairs and items is not run again; one that was killed starts anew, or its cost would be half told.
Pictures and the program itself are not compared: after a change of either name another --out.
"""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
import torch
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from tongkuan.base.errors import FailureError, UserError, clip, nearest
from tongkuan.base.files import check_writable, publish, sole_process
from tongkuan.base.metrics import average_precision, quality_at, ratio
from tongkuan.base.numbers import Whole
from tongkuan.encode.encode import Embeddings, scores_of
from tongkuan.encode.inference import open_inference, read_labelled_pairs
from tongkuan.encode.store import Batch, ItemStore
from tongkuan.learn.train import train
from tongkuan.presets import load_settings, parse_yaml, reason_of
from tongkuan.settings import Settings

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out

from ablate_table import DRAWS, LEAST_PAIRS, WORSE, Cell, Split, open_split, table_of

RECIPES = {
    "small": "small",
    "shared": "small model.towers=shared",
    "words+colour": "best model.parts.text=0 model.parts.image=0",
    "encoders": "best model.parts.words=0 model.parts.object_colour=0 model.parts.whole_colour=0",
    "best": "best",
}
BLOCK = 128  # items at once against all others; 20,000 items take 0.4 GB and some 4 minutes, twice as many 4 x the time


def read_recipes(path: Path) -> dict[str, str]:
    """`preset override override` by name."""
    try:
        found, _ = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not to be read as YAML ({reason_of(error)}); mend it") from error
    if not isinstance(found, dict) or not found or not all(isinstance(line, str) for line in found.values()):
        raise UserError(f"{path}: expected lines of name: preset override override; found {clip(found)}")
    return {str(name): line for name, line in found.items()}


def settings_of(line: str, seed: int) -> Settings:
    """The settings of a recipe's line with a seed."""
    try:
        preset, *overrides = shlex.split(line) or [""]
    except ValueError as error:
        raise UserError(f"{clip(line)}: {str(error).lower()}; close the quotation mark") from error
    return load_settings(preset, [*overrides, f"train.seed={seed}"])


# ---------------------------------------------------------------------------------------------------------------------
# A cell


@contextmanager
def items_counted() -> Iterator[list[int]]:
    """Sizes of all batches of items that go through a model within, each item once a batch."""
    sizes: list[int] = []
    own = ItemStore.batch

    def batch(self: ItemStore, item_ids: Sequence[str]) -> Batch:
        sizes.append(len(item_ids))
        return own(self, item_ids)

    ItemStore.batch = batch  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        ItemStore.batch = own  # type: ignore[method-assign]


def key_of(settings: Settings, split: Split) -> dict[str, Any]:
    """What decides a result."""
    said = settings.model_dump(mode="json", context={"everything": True})
    return {"settings": said, "split": split.name, "sha256": split.hashes}


def load_cell(path: Path, key: Mapping[str, Any]) -> Cell | None:
    """A result file, if it was made by the same."""
    if not path.is_file():
        return None
    cell: Cell = orjson.loads(path.read_bytes())
    return cell if cell["made_by"] == key else None


def run_cell(settings: Settings, split: Split, path: Path) -> None:
    """Train, score and publish the result file; what was trained is deleted."""
    work = path.with_suffix(".run")
    with sole_process(work), redirect_stdout(sys.stderr):
        shutil.rmtree(work / "run", ignore_errors=True)
        model_path, threads, started = work / "model.safetensors", torch.get_num_threads(), time.perf_counter()
        with items_counted() as sizes:
            train(settings, split.folder, work / "run", model_path)
        cost = {
            "minutes": (time.perf_counter() - started) / 60,
            "encodings": sum(sizes),
            "pairs": pairs_seen(settings, split),
        }
        torch.set_num_threads(threads)
        with open_inference(split.folder, split.name, model_path, "fp32", read=read_labelled_pairs) as run:
            embeddings, threshold = run.encode("score"), run.card.threshold
        scores, labels = scores_of(split.pairs, embeddings), split.labels
        result = {
            "made_by": key_of(settings, split),
            "threshold": threshold,
            "f1": quality_at(scores, labels, threshold).f1,
            "f1_at_0": quality_at(scores, labels, 0.0).f1,
            "average_precision": average_precision(scores, labels),
            "catalogue": catalogue(
                np.stack([embeddings[item_id] for item_id in split.products]),
                np.array([*split.products.values()]),
                threshold,
            ),
            "cost": cost,
            "labels": labels.tolist(),
            "scores": scores.tolist(),
        }
        shutil.rmtree(work)
        with publish(path) as file:
            file.write(orjson.dumps(result))


def pairs_seen(settings: Settings, split: Split) -> int:
    """Visits to labelled pairs: of steps, and of the regression that one tower starts from."""
    first = split.num_train_pairs if settings.model.towers == "one" else 0
    return settings.train.steps * settings.train.pairs + first


def catalogue(embeddings: Embeddings, products: NDArray[np.int64], threshold: float) -> dict[str, float]:
    """Precision and recall at the threshold, and average precision, of all pairs of N items.

    embeddings [p ; q] float32 (N, 2D), products int64 (N,): a pair is the same when its products are. Blocks are
    computed twice, first for the pairs that are the same, so that no more than a block is ever kept of the others.
    """
    numbers = embeddings.astype(np.float64)
    signed = numbers * np.where(np.arange(numbers.shape[1]) < numbers.shape[1] // 2, -1.0, 1.0)

    def blocks(label: bool) -> Iterator[NDArray[np.float64]]:
        for start in tqdm(range(0, len(numbers), BLOCK), desc="all pairs", unit="block", disable=None):
            rows = np.arange(start, min(start + BLOCK, len(numbers)))
            later = rows[:, None] < np.arange(len(numbers))
            yield (signed[rows] @ numbers.T)[later & ((products[rows, None] == products) == label)]

    positives = np.concatenate([*blocks(True)])
    levels, counts = np.unique(positives, return_counts=True)
    false_at, false_alarms = np.zeros(len(levels) + 1, dtype=np.int64), 0
    for scores in blocks(False):
        false_alarms += int((scores > threshold).sum())
        false_at += np.bincount(np.searchsorted(levels, scores, side="right"), minlength=len(levels) + 1)
    # At a level, all that reaches it is called the same.
    true, false = counts[::-1].cumsum()[::-1], false_at[::-1].cumsum()[::-1][1:]
    hits = int((positives > threshold).sum())
    return {
        "precision": ratio(hits, hits + false_alarms),
        "recall": ratio(hits, len(positives)),
        "average_precision": float((counts * true / (true + false)).sum()) / max(len(positives), 1),
    }


def report(splits: Sequence[Split], plan: Mapping[tuple[str, str, int], tuple[Path, dict[str, Any]]]) -> str:
    """The whole table, of the cells that are there."""
    name = splits[0].name
    chosen = "the pairs measured here, so F1 is a little too high" if name == "valid" else "valid, not on these pairs"
    lines = [
        f"# Recipes on {name}\n",
        f"Each model's threshold, and its step where it takes any, were chosen on {chosen}. [95 %]: {DRAWS:,} draws of "
        "products; how seeds differ is in sd alone. AP: average precision. All: all pairs of the split's items, at the "
        "same threshold. Minutes: of training, on this machine, whatever else it did. Encodings: an item through the "
        f"model once, in training. Categories worse: of those with {LEAST_PAIRS} pairs and more, how many have an F1 "
        f"more than {WORSE} below the first recipe's.\n",
    ]
    for split in splits:
        cells: dict[str, list[Cell]] = {}
        for (folder, recipe, _), (path, key) in plan.items():
            if folder == split.folder.name and (cell := load_cell(path, key)) is not None:
                cells.setdefault(recipe, []).append(cell)
        lines.append(table_of(split, cells))
    return "\n".join(lines)


def ablate(
    out: Path, data: Sequence[Path], seeds: int, recipes: Mapping[str, str], only: Sequence[str] | None, split_name: str
) -> None:
    """Run what is asked and not there, then write and print the table of all that is there."""
    for name in only or ():
        if name not in recipes:
            raise UserError(f"{clip(name)}: no such recipe{nearest(name, recipes)}; name some of {', '.join(recipes)}")
    if len({folder.resolve().name for folder in data}) < len(data):
        raise UserError("--data: two folders of one name; their results would be mixed up: rename one")
    settings = {(name, seed): settings_of(line, seed) for seed in range(seeds) for name, line in recipes.items()}
    splits = [open_split(folder.resolve(), split_name) for folder in data]
    check_writable(out)
    plan = {}
    for (name, seed), own in settings.items():
        for split in splits:
            path = out / split.folder.name / split_name / f"{quote(name, safe='+ ')}-{seed}.json"
            plan[split.folder.name, name, seed] = (path, key_of(own, split))
    by_name = {split.folder.name: split for split in splits}
    asked = [cell for cell in plan if only is None or cell[1] in only]
    for number, cell in enumerate(asked, 1):
        folder, name, seed = cell
        path, key = plan[cell]
        is_there = load_cell(path, key) is not None
        told = "there already" if is_there else "training"
        print(f"{number} of {len(asked)}: {name}, seed {seed}, {folder}: {told}", file=sys.stderr, flush=True)
        if not is_there:
            run_cell(settings[name, seed], by_name[folder], path)
    table = report(splits, plan)
    with publish(out / "table.md") as file:
        file.write(table.encode())
    print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results and table.md go; go on with the same")
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="data folders with train and valid")
    parser.add_argument("--seeds", type=Whole(1, 1000), default=1, help="0 .. SEEDS - 1 of each (default 1)")
    parser.add_argument("--recipes", type=Path, help="a YAML file instead of the recipes that stand in the script")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="recipes to run; with no name, only the table")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="measured on (default valid)")
    arguments = parser.parse_args(argv)
    try:
        recipes = read_recipes(arguments.recipes) if arguments.recipes else RECIPES
        ablate(arguments.out, arguments.data, arguments.seeds, recipes, arguments.only, arguments.split)
    except (UserError, FailureError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("ablate: interrupted; the same command goes on with the cell that was being made", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
