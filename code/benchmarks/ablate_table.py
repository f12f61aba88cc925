"""The table of ablate.py: a split's pairs and products, intervals by product, and the rows.

The interval is of the difference in F1, averaged over seeds, when *products* are drawn with replacement: an item's
product is all that pairs of label 1 join it to. A pair of two products counts as often as both were drawn together
(the product of their numbers), a pair within one product as often as that one. Pairs share items, so drawing pairs
would call the interval too narrow; so would the mean of the two numbers, by which each side moves a pair only by half.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tongkuan.base.files import sha256_of
from tongkuan.base.metrics import Labels, quality_at
from tongkuan.encode.encode import distinct_items
from tongkuan.encode.inference import read_labelled_pairs
from tongkuan.records.items import Pair, components, item_file, pair_file, read_items, read_pairs

DRAWS = 2000
DRAWS_AT_ONCE = 50
LEAST_PAIRS = 20  # of a category that is looked at by itself
WORSE = 0.02  # of F1, which a category may lose
COLUMNS = (
    "recipe, seeds, F1, sd, F1 - first [95 %], F1 at 0, AP, all: precision, all: recall, all: AP, minutes, encodings, "
    "pairs seen, categories worse"
)
Cell = dict[str, Any]
"""What a result file holds."""


@dataclass(frozen=True)
class Split:
    """The labelled pairs that are asked of a data folder, and what they tell of products."""

    folder: Path
    name: str
    pairs: list[Pair]
    labels: Labels
    products: dict[str, int]
    categories: NDArray[np.bool_]
    """(categories of LEAST_PAIRS and more, pairs): whether a side of the pair is in the category."""
    num_train_pairs: int
    hashes: dict[str, str]
    """sha256 by name of the files that decide the result."""

    @property
    def sides(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The products of the pairs' left and right items, (pairs,) each."""
        left, right = ([self.products[getattr(pair, side)] for pair in self.pairs] for side in ("left", "right"))
        return np.array(left), np.array(right)


def open_split(folder: Path, name: str) -> Split:
    """Read and check a split. UserError when a pair has no label."""
    items = read_items(item_file(folder, name))
    pairs = read_labelled_pairs(pair_file(folder, name), items, item_file(folder, name))
    of_pairs = [{items[pair.left].category, items[pair.right].category} for pair in pairs]
    rows = [[category in sides for sides in of_pairs] for category in sorted(set().union(*of_pairs))]
    large = [row for row in rows if sum(row) >= LEAST_PAIRS]
    files = [path(folder, split) for split in sorted({"train", "valid", name}) for path in (item_file, pair_file)]
    return Split(
        folder,
        name,
        pairs,
        np.array([pair.label for pair in pairs]),
        products_of(pairs),
        np.array(large, dtype=bool).reshape(-1, len(pairs)),
        len(read_pairs(pair_file(folder, "train"))),
        {path.name: sha256_of(path) for path in files},
    )


def products_of(pairs: Sequence[Pair]) -> dict[str, int]:
    """A number for each item's product, as far as pairs of label 1 tell; items of none are products of their own."""
    same = [pair for pair in pairs if pair.label == 1]
    joined = [distinct_items(same[index] for index in group) for group in components(same)]
    known = {item_id: number for number, group in enumerate(joined) for item_id in group}
    for item_id in distinct_items(pairs):
        known.setdefault(item_id, len(joined) + len(known))
    numbers = {product: number for number, product in enumerate(dict.fromkeys(known.values()))}
    return {item_id: numbers[product] for item_id, product in known.items()}


def f1_of(decisions: NDArray[np.bool_], labels: Labels, weights: NDArray[Any]) -> NDArray[np.float64]:
    """F1, its mean over seeds, of decisions (seeds, pairs) when pairs count by each row of weights (rows, pairs)."""
    same, weights = labels == 1, weights.astype(np.float64)
    hits, called = weights @ (decisions & same).T, weights @ decisions.T  # (rows, seeds)
    whole = called + (weights @ same)[:, None]
    found: NDArray[np.float64] = np.divide(2 * hits, whole, out=np.zeros_like(hits), where=whole > 0).mean(axis=1)
    return found


def intervals(split: Split, decisions: Mapping[str, NDArray[np.bool_]], draws: int = DRAWS) -> dict[str, list[float]]:
    """By recipe, the 95 % interval of its F1 less that of the first, over products drawn with replacement."""
    generator, (left, right) = np.random.default_rng(0), split.sides
    num_products = int(max(left.max(), right.max())) + 1
    differences: dict[str, list[NDArray[np.float64]]] = {name: [] for name in decisions}
    for start in tqdm(range(0, draws, DRAWS_AT_ONCE), desc="intervals", unit="block", disable=None):
        size = min(DRAWS_AT_ONCE, draws - start)
        drawn = generator.multinomial(num_products, np.full(num_products, 1 / num_products), size)
        weights = drawn[:, left] * np.where(left == right, 1, drawn[:, right])
        f1 = {name: f1_of(called, split.labels, weights) for name, called in decisions.items()}
        for name, values in f1.items():
            differences[name].append(values - f1[next(iter(f1))])
    return {name: np.quantile(np.concatenate(parts), [0.025, 0.975]).tolist() for name, parts in differences.items()}


def table_of(split: Split, cells: Mapping[str, Sequence[Cell]]) -> str:
    """The lines of a data set; `cells` are of the recipes that have any, by seed."""
    decisions = {
        name: np.array([np.array(cell["scores"]) > cell["threshold"] for cell in own]) for name, own in cells.items()
    }
    bounds = intervals(split, decisions) if cells else {}
    by_category = {name: f1_of(called, split.labels, split.categories) for name, called in decisions.items()}
    num_same = int(split.labels.sum())
    all_same = quality_at(np.ones(len(split.pairs)), split.labels, 0.0).f1
    lines = [
        f"## {split.folder.name}\n",
        f"{len(split.pairs):,} pairs of {len(split.products):,} items, {num_same:,} the same; "
        f"to call all the same has F1 {all_same:.3f}.\n",
        f"| {COLUMNS.replace(', ', ' | ')} |",
        "|---" * len(COLUMNS.split(", ")) + "|",
    ]
    for name, own in cells.items():
        low, high = bounds[name]
        first = next(iter(cells))
        f1 = [cell["f1"] for cell in own]
        change = statistics.mean(f1) - statistics.mean(cell["f1"] for cell in cells[first])
        rates = [[cell["f1_at_0"], cell["average_precision"], *cell["catalogue"].values()] for cell in own]
        cost = np.mean([[*cell["cost"].values()] for cell in own], axis=0)
        worse = int((by_category[name] < by_category[first] - WORSE).sum())
        fields = [
            name,
            str(len(own)),
            f"{statistics.mean(f1):.3f}",
            f"{statistics.stdev(f1):.3f}" if len(f1) > 1 else "",
            "" if name == first else f"{change:+.3f} [{low:+.3f}, {high:+.3f}]",
            *(f"{rate:.3f}" for rate in np.mean(rates, axis=0)),
            f"{cost[0]:.1f}",
            *(f"{number:,.0f}" for number in cost[1:]),
            "" if name == first else f"{worse} of {len(split.categories)}",
        ]
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines) + "\n"
