"""A result scored as the judges do, its pairs in an order that does not depend on the result file's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tongkuan.base.errors import UserError, missing, nearest
from tongkuan.base.metrics import Labels, Scores
from tongkuan.judge.check import judged
from tongkuan.records.items import Item, Pair, item_file, read_items
from tongkuan.records.result import read_predictions
from tongkuan.records.rows import is_given

# How far q.q - p.p may be from the score, in shares of the largest, and still count as the two towers' score.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Result:
    """N pairs, the most surely "same" first. A pair is called the same when its score > its threshold.

    `commodity` (q.q) and `adaptive` (p.p), float64 (N,), are None when similarity.py does not compute q.q - p.p.
    """

    pairs: list[Pair]
    scores: Scores
    thresholds: Scores
    labels: Labels
    commodity: Scores | None
    adaptive: Scores | None
    notes: list[str]
    """Lines on how the scores came about."""

    @property
    def margins(self) -> Scores:
        """Score less the pair's own threshold; greater than 0 exactly when the pair is called the same."""
        with np.errstate(over="ignore"):
            return self.scores - self.thresholds

    @property
    def threshold(self) -> float | None:
        """The threshold of all pairs, None when pairs have their own."""
        first = float(self.thresholds[0])
        return first if np.all(self.thresholds == first) else None


def read_scored(submit_dir: Path, pairs_path: Path) -> Result:
    """Check and score a result. UserError when it breaks the contract or a pair has no label."""
    found = judged(submit_dir, pairs_path)
    scores, labels, thresholds = found.scores, found.labels, found.thresholds
    pairs, products = [], np.empty((2, len(scores)))
    for number, (_, row) in enumerate(read_predictions(submit_dir / "result.jsonl")):
        pairs.append(Pair(row.left, row.right, int(labels[number])))
        half = len(row.left_embedding) // 2
        each = row.left_embedding * row.right_embedding
        products[:, number] = each[half:].sum(), each[:half].sum()
    commodity, adaptive = products
    has_towers = np.abs(commodity - adaptive - scores).max() <= TOLERANCE * np.abs(products).max(initial=1.0)
    surest = sorted(
        range(len(pairs)), key=lambda n: (thresholds[n] - scores[n], pairs[n].left, pairs[n].right, thresholds[n])
    )
    return Result(
        [pairs[number] for number in surest],
        scores[surest],
        thresholds[surest],
        labels[surest],
        commodity[surest] if has_towers else None,
        adaptive[surest] if has_towers else None,
        found.notes,
    )


def aligned_margins(result: Result, other: Result) -> Scores:
    """The other result's margins in the order of this one's pairs; both hold the same pairs."""

    def by_ids(pairs: Sequence[Pair]) -> NDArray[np.int64]:
        keys = [(pair.left, pair.right, pair.label or 0) for pair in pairs]  # a pair may be listed with both labels
        order = sorted(range(len(pairs)), key=keys.__getitem__)
        return np.array(order, dtype=np.int64)

    margins: Scores = np.empty(len(result.pairs))
    margins[by_ids(result.pairs)] = other.margins[by_ids(other.pairs)]
    return margins


def read_manifest(submit_dir: Path) -> dict[str, Any]:
    """manifest.json of a result, empty when there is none: other programs may write results too."""
    path = submit_dir / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); predict again or delete it") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: expected a JSON object; predict again or delete it")
    return manifest


def find_items(data_dir: Path, pairs: Sequence[Pair], manifest: Mapping[str, Any]) -> dict[str, Item]:
    """The pairs' items: of the split that the manifest names, else of the first item file that has them all."""
    split = manifest.get("split")
    if isinstance(split, str) and is_given(item_file(data_dir, split)):
        paths = [item_file(data_dir, split)]
    else:
        found = [*data_dir.glob("item_*_info.jsonl"), *data_dir.glob("item_*_info.jsonl.gz")]
        paths = sorted({path.with_name(path.name.removesuffix(".gz")) for path in found})
    if not paths:
        raise missing(data_dir, "no item_*_info.jsonl; name the folder that was predicted from with --data")
    ids = dict.fromkeys(item_id for pair in pairs for item_id in (pair.left, pair.right))
    fewest: tuple[int, str, str] | None = None
    for path in paths:
        items = read_items(path)
        unknown = [item_id for item_id in ids if item_id not in items]
        if not unknown:
            return {item_id: items[item_id] for item_id in ids}
        if fewest is None or len(unknown) < fewest[0]:
            fewest = len(unknown), str(path), f"{unknown[0]!r:.60}{nearest(unknown[0], items)}"
    assert fewest is not None
    count, place, first = fewest
    raise UserError(f"{place}: {count} items of the pairs are not here, first {first}; is --data the right folder?")
