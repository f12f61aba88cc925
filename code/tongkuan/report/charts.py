"""The page's charts as Vega-Lite, without colours or sizes of text: the page sets those to its theme.

A chart that follows the slider reads the data set "now": one row with threshold, precision, recall and f1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

from tongkuan.base.metrics import Labels, Quality, Scores
from tongkuan.report.figures import MAX_POINTS, Bin
from tongkuan.report.plot import histogram

HEIGHT = 220
NOW = alt.NamedData(name="now")
SHARE = alt.Scale(domain=[0, 1])

# Figures of metrics.jsonl and what they are called; others are drawn by their own name.
CURVES = {
    "loss": "training loss",
    "valid_f1": "validation F1 at its best threshold",
    "valid_f1_at_0": "validation F1 at threshold 0",
    "valid_average_precision": "validation average precision",
    "threshold": "threshold chosen on validation",
    "gradient_norm": "gradient norm before clipping",
    "learning_rate": "learning rate",
}


def finished(chart: Any, description: str) -> dict[str, Any]:
    """As wide as its place on the page; the description is what a screen reader says."""
    spec: dict[str, Any] = chart.properties(
        width="container", height=HEIGHT, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    ).to_dict()
    return spec | {"description": description}


def inline(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def at_threshold() -> alt.Chart:
    """A rule where the slider stands."""
    rule: alt.Chart = alt.Chart(NOW).mark_rule(strokeDash=[5, 3], strokeWidth=1.5, clip=True).encode(x="threshold:Q")
    return rule


def fixed(low: float, high: float) -> alt.Scale:
    """A scale that does not follow the data: else every move of the slider would draw the whole chart anew."""
    return alt.Scale(domain=[low, high], nice=False, zero=False)


def distribution(margins: Scores, labels: Labels, threshold: float, axis: str) -> dict[str, Any]:
    """Outlined histograms of same and different pairs, each in shares of its kind so that a rare one is seen."""
    edges, counts = histogram(margins, labels, threshold)
    totals = counts.sum(axis=1)
    rows = [
        {"kind": kind, "score": float(edge), "share": float(count) / max(int(total), 1)}
        for kind, kind_counts, total in zip(("different", "same"), counts, totals, strict=True)
        for edge, count in zip(edges, [*kind_counts, 0], strict=True)
    ]
    area = alt.Chart(inline(rows)).mark_area(interpolate="step-after", line={"strokeWidth": 1.5}, opacity=0.4)
    area = area.encode(
        x=alt.X("score:Q", title=axis, scale=fixed(float(edges[0]), float(edges[-1]))),
        y=alt.Y("share:Q", title="share of the pairs of a kind", stack=None, axis=alt.Axis(format=".1~%")),
        color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=["same", "different"])),
    )
    said = f"Histogram of the scores of {totals[1]} same and {totals[0]} different pairs, with the threshold."
    return finished(alt.layer(area, at_threshold()), said)


def precision_recall(curve: Sequence[tuple[float, Quality]]) -> dict[str, Any]:
    """Precision over recall as the threshold falls, and where the slider stands."""
    rows = [
        {"threshold": cut, "recall": quality.recall, "precision": quality.precision, "f1": quality.f1}
        for cut, quality in curve
        if quality.true_positives + quality.false_positives  # nothing called: no precision
    ]
    x = alt.X("recall:Q", title="recall", scale=SHARE)
    y = alt.Y("precision:Q", title="precision", scale=SHARE)
    tips = [alt.Tooltip(f"{name}:Q", format=".4f") for name in ("threshold", "precision", "recall", "f1")]
    line = alt.Chart(inline(rows)).mark_line().encode(x=x, y=y, order="threshold:Q", tooltip=tips)
    point = alt.Chart(NOW).mark_point(size=120, filled=True, opacity=1, clip=True).encode(x=x, y=y, tooltip=tips)
    return finished(alt.layer(line, point), "Precision over recall, with a point at the threshold.")


def f1_over_threshold(curve: Sequence[tuple[float, Quality]], axis: str) -> dict[str, Any]:
    """F1 at every threshold, and where the slider stands."""
    rows = [{"threshold": cut, "f1": quality.f1} for cut, quality in curve]
    x = alt.X("threshold:Q", title=axis, scale=fixed(curve[0][0], curve[-1][0]))
    y = alt.Y("f1:Q", title="F1", scale=SHARE)
    tips = [alt.Tooltip(f"{name}:Q", format=".4f") for name in ("threshold", "f1")]
    line = alt.Chart(inline(rows)).mark_line().encode(x=x, y=y, tooltip=tips)
    point = alt.Chart(NOW).mark_point(size=120, filled=True, opacity=1, clip=True).encode(x=x, y=y, tooltip=tips)
    return finished(alt.layer(line, at_threshold(), point), "F1 over the threshold, with a point where it stands.")


def calibration(kinds: Mapping[str, Sequence[Bin]]) -> dict[str, Any]:
    """The share of same pairs over P(same) by each kind of probability, against the diagonal where both agree."""
    rows = [
        {"kind": kind, "predicted": b.predicted, "observed": b.observed.value, "low": b.observed.low,
         "high": b.observed.high, "pairs": b.count}
        for kind, bins in kinds.items() for b in bins
    ]  # fmt: skip
    x = alt.X("predicted:Q", title="P(same)", scale=SHARE)
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=[*kinds][::-1]))
    y_title = "share that is the same product"
    ends = inline([{"predicted": end, "observed": end} for end in (0, 1)])
    diagonal = alt.Chart(ends).mark_line(strokeDash=[2, 4], strokeWidth=1).encode(x=x, y="observed:Q")
    reach = alt.Chart(inline(rows)).mark_rule(strokeWidth=1.5)
    reach = reach.encode(x=x, y=alt.Y("low:Q", title=y_title), y2="high:Q", color=colour)
    tips = [
        alt.Tooltip("kind:N"),
        alt.Tooltip("pairs:Q"),
        alt.Tooltip("predicted:Q", format=".4f"),
        alt.Tooltip("observed:Q", format=".4f"),
    ]
    points = alt.Chart(inline(rows)).mark_point(size=70, filled=True, opacity=1)
    points = points.encode(x=x, y=alt.Y("observed:Q", title=y_title, scale=SHARE), color=colour, tooltip=tips)
    return finished(alt.layer(diagonal, reach, points), "Share of pairs that are the same product over P(same).")


def training(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(name, chart) of each figure that a run logged, in the order of CURVES, then by name."""
    logged = sorted({name for row in rows for name in row if name != "step"})
    names = [name for name in CURVES if name in logged] + [name for name in logged if name not in CURVES]
    charts = []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if is_number(row.get(name)) and is_number(row.get("step"))]
        if not points:
            continue
        kept = [points[index] for index in spread(len(points))]
        data = inline([{"step": step, "value": value} for step, value in kept])
        tips = [alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".4~g")]
        line = alt.Chart(data).mark_line(point=len(kept) <= MAX_POINTS // 10).encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            tooltip=tips,
        )  # fmt: skip
        title = CURVES.get(name, name)
        charts.append((title, finished(line, f"{title} over training steps.")))
    return charts


def spread(count: int) -> NDArray[np.int64]:
    """At most MAX_POINTS of `count` places, evenly apart, ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))


def is_number(value: object) -> bool:
    """JSON numbers; what was not finite has become null in the file."""
    return isinstance(value, int | float) and not isinstance(value, bool)
