"""The page of `explain`: one pair, what its score loses or gains without each part, and a map over each picture."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tongkuan.base.calibration import Platt
from tongkuan.records.attributes import AttributeStyle
from tongkuan.records.items import Item, Pair
from tongkuan.records.pictures import read_image
from tongkuan.report.charts import finished, inline
from tongkuan.report.page import render
from tongkuan.report.views import MAX_VALUE, Pictures, clipped, item_views

MAP_SIDE = 352  # pixels
SPEAKS_FOR, SPEAKS_AGAINST = "speaks for the same", "speaks against"
COLOURS = {SPEAKS_FOR: (0, 104, 165), SPEAKS_AGAINST: (179, 89, 0)}  # as --same and --different of the style
STRONGEST = 3  # patches that are named in words
BAR = 14  # pixels of height


@dataclass(frozen=True, slots=True)
class Effect:
    """The scores without a part of the left listing, of the right one (None: it has none), and of both."""

    part: str
    left: float | None
    right: float | None
    both: float


@dataclass(frozen=True, slots=True)
class Patches:
    """A picture uint8 (3, S, S) as the model sees it, and the score's change when a patch is covered, (G, G)."""

    image: NDArray[np.uint8]
    changes: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Basis:
    """What a probability rests on."""

    scaling: Platt
    source: str
    """Name of the file with the labels."""
    num_pairs: int
    num_encoded: int
    """Listings of those pairs."""
    shortage: str
    """Why it is not calibrated; empty when it is."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that the page says."""

    pair: Pair
    items: tuple[Item, Item]
    style: AttributeStyle
    score: float
    commodity: float
    """q.q"""
    adaptive: float
    """p.p"""
    threshold: float
    probability: float
    """P(same)"""
    basis: Basis
    effects: Sequence[Effect]
    patches: tuple[Patches | None, Patches | None]
    facts: dict[str, str]

    def called(self, score: float) -> bool:
        """Whether a score means the same product."""
        return score > self.threshold

    def verdict(self) -> str:
        """In a word."""
        return "the same product" if self.called(self.score) else "different products"

    def __str__(self) -> str:
        sign = ">" if self.called(self.score) else "<="
        doubt = ", not calibrated" if self.basis.shortage else ""
        score = f"score {self.score:.4f} {sign} {self.threshold:.4f}"
        return f"{self.verdict()}, {score}, P(same) {self.probability:.3f}{doubt}"


def render_explanation(explanation: Explanation, pictures: Pictures) -> bytes:
    """The page."""
    items = {item.item_id: item for item in explanation.items}
    numbers = [list(items).index(item.item_id) for item in explanation.items]
    encoded = {number: pictures.encoded(item.image_name) for number, item in enumerate(items.values())}
    rows = [row_of(explanation, effect) for effect in explanation.effects]
    largest = max((float(np.abs(side.changes).max()) for side in explanation.patches if side), default=0.0)
    maps = [
        {"name": name, **map_of(side, largest, pictures.path(item.image_name))} if side else None
        for name, side, item in zip(("left", "right"), explanation.patches, explanation.items, strict=True)
    ]
    data = {
        "left": numbers[:1],
        "right": numbers[1:],
        "labels": [explanation.pair.label],
        "scores": [explanation.score],
        "commodity": [explanation.commodity],
        "adaptive": [explanation.adaptive],
        "thresholds": None,
        "probabilities": [explanation.probability],
        "calibrated": not explanation.basis.shortage,
        "called": explanation.called(explanation.score),
        "items": item_views(items, pictures, explanation.style),
        "charts": {"effects": effects_chart(rows)} if rows else {},
    }
    facts = {
        "explanation": explanation,
        "ids": [clipped(item.item_id, MAX_VALUE) for item in explanation.items],
        "rows": rows,
        "maps": maps,
        "speaks": (SPEAKS_FOR, SPEAKS_AGAINST),
    }
    return render("explain.html.j2", facts, data, {number: image for number, image in encoded.items() if image})


def row_of(explanation: Explanation, effect: Effect) -> dict[str, Any]:
    """A row of the table: changes of the score, and without the part on which sides the verdict is another."""
    whole = explanation.score
    without = {"left": effect.left, "right": effect.right, "both": effect.both}
    verdict = explanation.called(whole)
    return {
        "part": clipped(effect.part, MAX_VALUE),
        "left": None if effect.left is None else effect.left - whole,
        "right": None if effect.right is None else effect.right - whole,
        "both": effect.both - whole,
        "flips": [
            side for side, score in without.items() if score is not None and explanation.called(score) != verdict
        ],
    }


def effects_chart(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Two bars a part: what taking it from the left listing, and from the right one, does to the score."""
    bars = [
        {
            "part": row["part"],
            "side": side,
            "change": row[side],
            "speaks": SPEAKS_FOR if row[side] < 0 else SPEAKS_AGAINST,
        }
        for row in rows
        for side in ("left", "right")
        if row[side] is not None
    ]
    chart = alt.Chart(inline(bars)).mark_bar().encode(
        x=alt.X("change:Q", title="change of the score without it"),
        y=alt.Y("part:N", title=None, sort=None, axis=alt.Axis(labelLimit=120)),
        yOffset=alt.YOffset("side:N", scale=alt.Scale(domain=["left", "right"])),
        color=alt.Color("speaks:N", legend=None, scale=alt.Scale(domain=[SPEAKS_FOR, SPEAKS_AGAINST])),
        tooltip=[alt.Tooltip("part:N"), alt.Tooltip("side:N"), alt.Tooltip("change:Q", format=".4f")],
    )  # fmt: skip
    said = "Change of the score when a part is taken from the left listing, and from the right one."
    return finished(chart, said) | {"height": 2 * BAR * len(rows) + BAR}


def map_of(side: Patches, largest: float, path: Path | None) -> dict[str, Any]:
    """A picture with its map in base64, the numbers, and the strongest patches in words."""
    order = np.argsort(-np.abs(side.changes), axis=None, kind="stable")[:STRONGEST]
    places = [tuple(map(int, np.unravel_index(place, side.changes.shape))) for place in order]
    words = [
        f"row {row + 1}, column {column + 1}: {side.changes[row, column]:+.4f}".replace("-", "−")
        for row, column in places
        if side.changes[row, column]
    ]
    return {"image": overlay(side, largest, path), "words": words, "changes": side.changes.tolist()}


def overlay(side: Patches, largest: float, path: Path | None) -> str:
    """The picture in grey under its map, as base64 JPEG; the more a patch counts, the more its colour covers.

    From its file, squashed as for the model, whose own version may be of few pixels.
    """
    seen = read_image(path, MAP_SIDE) if path else side.image
    grey = Image.fromarray(seen.transpose(1, 2, 0)).convert("L").convert("RGB")
    picture = np.asarray(grey.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
    colours = np.where(side.changes[..., None] < 0, COLOURS[SPEAKS_FOR], COLOURS[SPEAKS_AGAINST]).astype(np.float64)
    weights = 0.75 * np.abs(side.changes) / (largest or 1.0)
    place = np.arange(MAP_SIDE) * len(side.changes) // MAP_SIDE  # of each pixel, the patch
    colours, weights = colours[place][:, place], weights[place][:, place, None]
    mixed = (picture * (1 - weights) + colours * weights).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(mixed).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
