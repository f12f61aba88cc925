"""One tower without steps: what its parts weigh, found from the training pairs with frozen encoders.

Features are computed once an item. Each part's projection is Fisher's discriminants of the training items, and what the
parts weigh is a logistic regression on the pairs' cross-fitted likeness by part: so a pair's score is the log-odds that
it is the same product, and the threshold is 0 by construction.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from tongkuan.encode.encode import distinct_items, one_thread_each
from tongkuan.encode.store import ItemStore
from tongkuan.learn.batches import products_of
from tongkuan.learn.discriminant import cross_fitted, folds_of, set_directions
from tongkuan.model.one import OneTower, Words
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair
from tongkuan.records.labels import labels_of
from tongkuan.records.words import KINDS, Word

WHITENED = ("text", "image")
"""Parts whose components count alike; of the others' those that vary more count more."""
PENALTY = 1e-3  # of squared weights of columns of deviation 1, against the mean loss of a pair
FIRST_ROOT = 0.1
ITERATIONS = 300
NEWTON = 50  # steps
MOSTLY = 0.95  # of the items
LEAST_ITEMS = 20  # that say something by a key, or it gets no slot


@dataclass
class Columns:
    """What the regression sees of the pairs, each float64 (pairs,), in the order of the tower's parts."""

    likeness: list[Tensor] = field(default_factory=list)
    """0 where a side lacks the part; its weight is at least 0."""
    common: list[Tensor] = field(default_factory=list)
    """By kind of word, how much both sides are like the mean training item; of any weight."""
    both: list[Tensor] = field(default_factory=list)
    """By slot, whether both sides have the key; its weight is at most 0."""
    there: list[Tensor] = field(default_factory=list)
    """By projected part, then by kind of word, whether both sides have it."""

    def stacked(self) -> Tensor:
        """What has a weight: (pairs, likeness + common + both)."""
        return torch.stack([*self.likeness, *self.common, *self.both], dim=1)


def fit(tower: OneTower, store: ItemStore, pairs: Sequence[Pair], features: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Set all of a tower but its encoders from labelled pairs and `features_of` their items; the same on every rank."""
    item_ids = distinct_items(pairs)
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    left, right = (torch.tensor([row_of[getattr(pair, side)] for pair in pairs]) for side in ("left", "right"))
    labels = torch.from_numpy(labels_of(pairs)).double()
    raw = {name: rows.double() for name, rows in features.items()}
    columns = Columns()
    with one_thread_each(), torch.no_grad():  # how a sum is cut among threads changes its last bits
        product_of = products_of(pairs)
        products = torch.tensor([product_of[item_id] for item_id in item_ids])
        folds = folds_of(products)
        for name, projection in tower.projected():
            has = raw[name].any(dim=1)
            columns.there.append((has[left] & has[right]).double())
            part = (raw[name], products, projection.size, name in WHITENED)
            columns.likeness.append(cross_fitted(*part, folds, left, right))
            set_directions(projection, *part)
        if tower.words is not None:
            words = [store.words(item_id) for item_id in item_ids]
            learn_words(tower.words, words)
            sides = tqdm(
                zip(left.tolist(), right.tolist(), strict=True),
                desc="words",
                unit="pair",
                total=len(pairs),
                disable=None if ranks.is_first else True,
            )
            means, usually_common = add_words(columns, tower.words, words, sides)
        usual = centre(columns)
        with torch.enable_grad():
            likeness, common, both, bias = regression(columns, labels)
        scores = columns.stacked() @ torch.cat([likeness, common, both]) + bias
        taken = likeness[: len(usual)] * usual
        more = corrections(columns, lost_together(tower), likeness, taken, scores, labels)
        lack, bias = (taken + more).sqrt(), bias + more.sum()
        for (_, projection), weight, root in zip(tower.projected(), likeness, lack, strict=False):
            projection.scale.copy_(weight.sqrt())
            projection.lack.copy_(root)
        if tower.words is not None:
            tower.words.scales.copy_(likeness[-len(tower.words.scales) :].sqrt())
            tower.words.lack.copy_(torch.cat([lack[-len(KINDS) :], (-both).sqrt()]))
            tower.words.usual.copy_(common * usually_common)
            tower.words.generic.copy_(common @ means)
            # What is taken from both sides is given back; the last numbers of p and q make 1 more.
            bias = bias + 2 * (common * usually_common).sum() - 1
        tower.bias.copy_(torch.stack([-bias, bias]).clamp(min=0).sqrt())


def centre(columns: Columns) -> Tensor:
    """Take from likeness what it usually is where both sides have a part, so that lacking it tells as much: nothing.

    Returns that mean by projected part and kind, float64 (parts,), at least 0.
    """
    usual = torch.zeros(len(columns.there), dtype=torch.float64)
    for place, there in enumerate(columns.there):
        mean = (columns.likeness[place] * there).sum() / there.sum().clamp(min=1)
        usual[place] = mean.clamp(min=0)
        columns.likeness[place] = columns.likeness[place] - usual[place] * there
    return usual


def lost_together(tower: OneTower) -> list[list[int]]:
    """Places of the parts that an item lacks at once: all of its picture, its text, and each kind of word."""
    names = [name for name, _ in tower.projected()]
    pictured = [place for place, name in enumerate(names) if name != "text"]
    kinds = len(KINDS) if tower.words is not None else 0
    alone = [place for place in range(len(names) + kinds) if place not in pictured]
    return [places for places in (pictured, *([place] for place in alone)) if places]


def corrections(
    columns: Columns, lost: Sequence[Sequence[int]], likeness: Tensor, taken: Tensor, scores: Tensor, labels: Tensor
) -> Tensor:
    """What to take away besides `taken` where both sides have a part: float64 (parts,), together at least 0.

    The mean likeness is not enough: where it tells same from different pairs well, hardly any pair has it. So training
    pairs are scored without the parts, and the constant that makes their labels most likely is what lacking them says.
    """
    more = torch.zeros_like(taken)
    for places in lost:
        there = torch.stack([columns.there[place] for place in places], dim=1).any(dim=1)
        rest = scores - sum(likeness[place] * columns.likeness[place] for place in places)
        usual = taken[places].sum()
        constant = most_likely_constant(rest[there], labels[there]).clamp(min=-usual)
        used = (likeness[places] > 0).double()
        more[places] = constant * (taken[places] / usual if usual > 0 else used / used.sum().clamp(min=1))
    return more


def most_likely_constant(scores: Tensor, labels: Tensor) -> Tensor:
    """To add to scores (N,), so that they are log-odds of labels on average. 0 when all labels are the same."""
    constant = torch.zeros((), dtype=torch.float64)
    if not 0 < labels.sum() < len(labels):
        return constant
    for _ in range(NEWTON):  # convex and one number: Newton's steps, each at most 1 long
        chances = torch.sigmoid(scores + constant)
        curvature = (chances * (1 - chances)).sum().clamp(min=1e-12)
        constant += ((labels - chances).sum() / curvature).clamp(-1, 1)
    return constant


# ---------------------------------------------------------------------------------------------------------------------
# Words


def learn_words(words: Words, items: Sequence[Sequence[Word]]) -> None:
    """The idf of every bucket, and a slot for the commonest keys, those of as many items by number."""
    items_with = Counter(bucket for own in items for bucket in {word.bucket for word in own})
    counts = torch.zeros(len(words.idf), dtype=torch.float64)
    counts[[*items_with]] = torch.tensor([*items_with.values()], dtype=torch.float64)
    words.idf.copy_(torch.log((1 + len(items)) / (1 + counts)))
    keys = Counter(owner for own in items for owner in {word.owner for word in own} if owner >= len(KINDS))
    common = sorted((key for key, count in keys.items() if count >= LEAST_ITEMS), key=lambda key: (-keys[key], key))
    for slot, owner in enumerate(common[: len(words.lack) - len(KINDS)]):
        words.group_of[owner] = len(KINDS) + slot


def add_words(
    columns: Columns, words: Words, items: Sequence[Sequence[Word]], sides: Iterable[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Append the exact columns of words, by kind, then by slot: the sketch only adds noise to them.

    Returns the mean item by kind, float64 (kinds, BUCKETS), and how like it items usually are, (kinds,), of kinds that
    hardly any item lacks: how to judge an item without them is not to be learned.
    """
    group_of, idf = words.group_of.cpu().numpy(), words.idf.double().cpu().numpy()
    units: list[list[dict[int, float]]] = []  # of each item, by group
    for own in items:
        groups: list[dict[int, float]] = [{} for _ in words.scales]
        for word in own:
            if (group := group_of[word.owner]) >= 0 and idf[word.bucket] > 0:
                groups[group][word.bucket] = idf[word.bucket]
        units.append([normalised(group) for group in groups])
    means = np.zeros((len(KINDS), len(idf)))
    for own_units in units:
        for mean, group in zip(means, own_units, strict=False):
            mean[[*group]] += np.array([*group.values()]) / len(items)
    common = np.array([[dot(group, mean) for mean, group in zip(means, own, strict=False)] for own in units])
    has = np.array([[bool(group) for group in own[: len(KINDS)]] for own in units])
    usual = common.mean(axis=0) * (has.mean(axis=0) >= MOSTLY)
    rows = [
        [
            *(overlap(a, b) for a, b in zip(units[one], units[other], strict=True)),
            *(common[one] + common[other]),
            *(float(bool(a and b)) for a, b in zip(units[one], units[other], strict=True)),
        ]
        for one, other in sides
    ]
    slots = len(words.scales) - len(KINDS)
    found = torch.tensor(rows, dtype=torch.float64).T.split([len(words.scales), len(KINDS), len(KINDS), slots])
    for list_of, part in zip((columns.likeness, columns.common, columns.there, columns.both), found, strict=True):
        list_of += part
    return torch.from_numpy(means), torch.from_numpy(usual)


def overlap(a: dict[int, float], b: dict[int, float]) -> float:
    """Inner product, summed in the order of buckets."""
    return sum((a[bucket] * b[bucket] for bucket in sorted(a.keys() & b.keys())), 0.0)


def normalised(weights: dict[int, float]) -> dict[int, float]:
    """Of norm 1."""
    norm = sum(weight * weight for weight in weights.values()) ** 0.5
    return {bucket: weight / norm for bucket, weight in weights.items()}


def dot(weights: dict[int, float], other: NDArray[np.float64]) -> float:
    """Inner product with a vector of all buckets."""
    return float(sum(weight * other[bucket] for bucket, weight in weights.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def regression(columns: Columns, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of likeness, commonness and both, and the bias: log-odds of labels float64 (pairs,)."""
    stacked = columns.stacked()
    mean, deviation = stacked.mean(dim=0), stacked.std(dim=0)
    scale = torch.where(deviation > 1e-9, 1 / deviation.clamp(min=1e-9), 0.0)  # a column that says nothing weighs 0
    inputs = (stacked - mean) * scale
    signs = torch.tensor([1.0] * len(columns.likeness) + [0.0] * len(columns.common) + [-1.0] * len(columns.both))
    root = torch.where(signs == 0, 0.0, FIRST_ROOT).double().requires_grad_()
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([root, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def weights() -> Tensor:
        return torch.where(signs == 0, root, signs * root.square())

    def loss() -> Tensor:
        optimizer.zero_grad()
        own = weights()
        error = functional.binary_cross_entropy_with_logits(inputs @ own + bias, labels)
        total = error + PENALTY * own.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    found = weights().detach() * scale
    likeness, common, both = found.split([len(columns.likeness), len(columns.common), len(columns.both)])
    return likeness, common, both, bias.detach() - found @ mean
