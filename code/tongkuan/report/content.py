"""What stands on the page: facts for the template, data for the scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.calibration import probabilities
from tongkuan.base.files import sha256_of
from tongkuan.base.metrics import Scores, average_precision, best_threshold, quality_at
from tongkuan.records.attributes import AttributeStyle
from tongkuan.records.items import Item
from tongkuan.report import charts, figures, views
from tongkuan.report.page import packed, slider
from tongkuan.report.problems import Contradiction, Twin
from tongkuan.report.result import Result

MAX_PICTURE_BYTES = 8_000_000  # in base64; the rest of 15 MB is for texts and the chart library
MAX_PROBLEMS = 50  # listed of a kind
MAX_TWINS_PICTURED = 20


@dataclass(frozen=True, slots=True)
class Subject:
    """What the page is about."""

    result: Result
    items: dict[str, Item]
    pictures: views.Pictures
    manifest: Mapping[str, Any]
    comparison: figures.Comparison | None
    probability: figures.Probabilities

    @property
    def axis(self) -> tuple[Scores, float, str]:
        """(scores (N,), threshold, title): with thresholds of their own, pairs stand by the distance to them."""
        if (threshold := self.result.threshold) is not None:
            return self.result.scores, threshold, "score"
        return self.result.margins, 0.0, "score less the pair's own threshold"

    @property
    def style(self) -> AttributeStyle:
        """How the model that made the result reads attributes."""
        return "published" if self.model_setting("attributes") == "published" else "quoted"

    def model_setting(self, name: str) -> object:
        """A setting of the model, None when the manifest does not say."""
        settings = self.manifest.get("model_settings")
        return settings.get(name) if isinstance(settings, dict) else None

    def lacking(self) -> NDArray[np.bool_]:
        """(N,): one of the pair's pictures is missing."""
        lacks = {item_id: self.pictures.state(item.image_name) != views.NAMED for item_id, item in self.items.items()}
        return np.array([lacks[pair.left] or lacks[pair.right] for pair in self.result.pairs])


def marks(subject: Subject) -> list[dict[str, Any]]:
    """Thresholds with a name, each a button beside the slider."""
    scores, threshold, _ = subject.axis
    best, _ = best_threshold(scores, subject.result.labels)
    found = [{"name": "chosen", "value": threshold}, {"name": "best on these pairs", "value": best}]
    if subject.result.threshold not in (None, 0.0):
        found.insert(0, {"name": "as trained", "value": 0.0})
    return found


def headline(subject: Subject) -> dict[str, Any]:
    """Figures with intervals at threshold 0 and at the chosen one, counts, and the comparison."""
    result = subject.result
    scores, labels = result.scores, result.labels
    chosen = result.threshold
    name = "each pair's own threshold" if chosen is None else f"threshold {chosen:.6g}, chosen".replace("-", "−")
    name = "threshold 0, as trained and chosen" if chosen == 0 else name
    rows: list[tuple[str, float | Scores]] = [(name, result.thresholds)]
    if chosen != 0:
        rows.insert(0, ("threshold 0, as trained", 0.0))
    table = [
        {"name": text, "quality": quality_at(scores, labels, cut), **figures.estimates(scores, labels, cut)}
        for text, cut in rows
    ]
    lacking = subject.lacking()
    counts = {
        "pairs": len(labels),
        "same product": int(labels.sum()),
        "different products": int((labels == 0).sum()),
        "items": len(subject.items),
        "pairs lacking a picture": int(lacking.sum()),
    }
    axis_scores, _, axis = subject.axis
    best, best_f1 = best_threshold(axis_scores, labels)
    return {
        "table": table,
        "chosen": table[-1],
        "counts": counts,
        "average_precision": average_precision(axis_scores, labels),
        "axis": axis,
        "best": {"threshold": best, "f1": best_f1},
        "probability": subject.probability,
        "at_threshold": at_threshold(subject),
        "comparison": subject.comparison,
    }


def at_threshold(subject: Subject) -> float | None:
    """The calibrated probability at the threshold, None when there is no such or pairs have thresholds of their own."""
    threshold, scaling = subject.result.threshold, subject.probability.scaling
    if threshold is None or scaling is None:
        return None
    return float(probabilities(np.array([threshold]), scaling)[0])


def data(subject: Subject, shown: Sequence[int]) -> dict[str, Any]:
    """Everything that the scripts read: arrays by pair, items, groups and charts."""
    result, items = subject.result, subject.items
    scores, threshold, axis = subject.axis
    number_of = {item_id: number for number, item_id in enumerate(items)}
    keys = views.attribute_keys(items, subject.model_setting("attribute_keys"), subject.style)
    groups = [
        views.category_group(result.pairs, items),
        *views.presence_groups(result.pairs, items, subject.pictures, keys, subject.style),
    ]
    named = marks(subject)
    curve = figures.sweep(scores, result.labels)
    plotted = {
        "distribution": charts.distribution(scores, result.labels, threshold, axis),
        "precision-recall": charts.precision_recall(curve),
        "f1": charts.f1_over_threshold(curve, axis),
    }
    found = subject.probability
    kinds = {"sigmoid(score)": found.before, "calibrated": found.after}
    if drawn := {name: kind.bins for name, kind in kinds.items() if kind is not None}:
        plotted["calibration"] = charts.calibration(drawn)
    every = [mark["value"] for mark in named]
    low, high = min(float(scores.min()), *every), max(float(scores.max()), *every)
    compared = subject.comparison
    return {
        "left": packed(np.array([number_of[pair.left] for pair in result.pairs], dtype=np.int32)),
        "right": packed(np.array([number_of[pair.right] for pair in result.pairs], dtype=np.int32)),
        "labels": packed(result.labels.astype(np.uint8)),
        "axis": packed(scores),
        "scores": packed(result.scores),
        "thresholds": packed(result.thresholds) if result.threshold is None else None,
        "commodity": None if result.commodity is None else packed(result.commodity.astype(np.float32)),
        "adaptive": None if result.adaptive is None else packed(result.adaptive.astype(np.float32)),
        "probabilities": None if found.values is None else packed(found.values.astype(np.float32)),
        "calibrated": found.scaling is not None,
        "lacking": packed(subject.lacking().astype(np.uint8)),
        "changed": None if compared is None else packed(compared.changed.astype(np.uint8)),
        "groups": [{"name": group.name, "rows": group.rows, "codes": packed(group.codes)} for group in groups],
        "items": views.item_views(items, subject.pictures, subject.style),
        "pictured": list(shown),
        "marks": named,
        "start": threshold,
        "slider": slider(low, high),
        "charts": plotted,
    }


def encode_pictures(subject: Subject) -> tuple[list[int], dict[int, str]]:
    """(numbers of the pairs whose pictures are inside, base64 JPEG by item's number), best pairs first.

    Stops at views.MAX_PICTURED pairs or at MAX_PICTURE_BYTES, whichever comes first.
    """
    number_of = {item_id: number for number, item_id in enumerate(subject.items)}
    changed = None if subject.comparison is None else subject.comparison.changed
    images: dict[int, str] = {}
    shown = []
    size = 0
    for pair_number in views.worth_seeing(subject.result, subject.lacking(), changed):
        pair = subject.result.pairs[pair_number]
        for item_id in (pair.left, pair.right):
            if (number := number_of[item_id]) not in images:
                images[number] = subject.pictures.encoded(subject.items[item_id].image_name)
                size += len(images[number])
        if size > MAX_PICTURE_BYTES:
            break
        shown.append(pair_number)
    return shown, {number: image for number, image in images.items() if image}


def problems(found: Sequence[Contradiction], alike: Sequence[Twin] | None, pictures: views.Pictures) -> dict[str, Any]:
    """The first of each kind, as the template lists them."""

    def side(item: Item, is_pictured: bool) -> dict[str, str]:
        image = pictures.encoded(item.image_name) if is_pictured else ""
        return {"id": item.item_id, "title": views.clipped(item.title, views.MAX_TITLE), "image": image}

    return {
        "contradictions": [asdict(problem) for problem in found[:MAX_PROBLEMS]],
        "num_contradictions": len(found),
        "twins": None if alike is None else [
            {"distance": twin.distance, **{name: side(item, number < MAX_TWINS_PICTURED)
             for name, item in (("train", twin.train), ("valid", twin.valid))}}
            for number, twin in enumerate(alike[:MAX_PROBLEMS])
        ],
        "num_twins": len(alike or ()),
    }  # fmt: skip


def hashes(submit_dir: Path, manifest: Mapping[str, Any]) -> list[tuple[str, str, bool | None]]:
    """(file, SHA-256 as it lies there, whether the manifest says the same; None when it says nothing)."""
    found = manifest.get("sha256")
    known = found if isinstance(found, dict) else {}
    found = []
    for key, name in (("result", "result.jsonl"), ("similarity", "similarity.py")):
        digest = sha256_of(submit_dir / name)
        found.append((name, digest, known[key] == digest if key in known else None))
    return found
