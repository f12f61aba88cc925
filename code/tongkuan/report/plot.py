"""Plot how the scores of same and different pairs lie about the threshold, as the paper's figure does.

`./entrypoint.sh plot --submit submit --pairs data/item_valid_pair.jsonl --out submit/scores.svg`
"""

from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from numpy.typing import NDArray

from tongkuan.base.errors import UserError, entrypoint
from tongkuan.base.files import check_writable, publish
from tongkuan.base.metrics import Labels, Quality, Scores, quality_at
from tongkuan.judge.check import judged

MAX_BINS = 80
WIDTH, HEIGHT = 640, 300
# Okabe and Ito's blue and orange: distinct under every common colour blindness, and in grey.
COLOURS = {"same": "#0072b2", "different": "#e69f00"}
# The renderer brings the first, so the layout is the same on every machine; a viewer's Arial is equally wide.
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
STYLE = {
    "background": "white",
    "font": FONT,
    "padding": 16,
    "view": {"stroke": None},
    "title": {"anchor": "start", "frame": "group", "fontSize": 18, "subtitleFontSize": 14, "offset": 12},
    "axis": {"labelFontSize": 13, "titleFontSize": 14, "titleFontWeight": "normal", "gridColor": "#e4e4e4"},
    "axisX": {"grid": False, "titlePadding": 10},
    "axisY": {"format": ".1~%", "titlePadding": 10},
    # The offset leaves room for the threshold's label.
    "legend": {"orient": "top", "offset": 28, "labelFontSize": 14, "symbolType": "square", "symbolOpacity": 0.7},
}


def plot(submit_dir: Path, pairs_path: Path, out: Path) -> None:
    """Score the result as the judges do and publish the plot. UserError before any work when `out` is unfit."""
    if out.suffix not in (".svg", ".png") or out.is_dir():
        raise UserError(f"{out}: no name for a picture; let --out end in .svg or .png")
    check_writable(out.parent)
    found = judged(submit_dir, pairs_path)
    svg = render(found.scores, found.labels, found.thresholds)
    with publish(out) as file:
        file.write(vl_convert.svg_to_png(svg, scale=2) if out.suffix == ".png" else svg.encode())
    quality = quality_at(found.scores, found.labels, found.thresholds)
    print(f"{out}: {quality} on {len(found.scores)} pairs")
    for note in found.notes:
        print(note)
    print(f"next: {entrypoint('report', '--submit', submit_dir, '--pairs', pairs_path)}")


def render(scores: Scores, labels: Labels, thresholds: Scores) -> str:
    """The SVG of scores (N,), labels (N,) and each pair's threshold (N,); the same numbers give the same bytes.

    With one threshold for all the axis shows scores; else each score less its pair's own threshold.
    """
    threshold, axis = float(thresholds[0]), "score"
    quality = quality_at(scores, labels, thresholds)
    if np.any(thresholds != threshold):
        with np.errstate(over="ignore"):  # histogram refuses what is not finite
            scores, threshold, axis = scores - thresholds, 0.0, "score less the pair's own threshold"
    edges, counts = histogram(scores, labels, threshold)
    spec = chart(edges, counts, threshold, axis, quality)
    version = alt.SCHEMA_VERSION.rpartition(".")[0]
    # No base URL is allowed: the data are inside, and rendering must work without a network.
    return vl_convert.vegalite_to_svg(spec, vl_version=version, config=STYLE, allowed_base_urls=[]) + "\n"


def histogram(scores: Scores, labels: Labels, threshold: float) -> tuple[Scores, NDArray[np.int64]]:
    """(edges (B + 1,), counts (2, B) of different and same pairs), B <= MAX_BINS.

    The threshold is an edge, and a bin holds its upper edge, not its lower: what stands right of the threshold are
    exactly the pairs that are called the same.
    """
    low, high = min(float(scores.min()), threshold), max(float(scores.max()), threshold)
    width = (high - low) / (MAX_BINS - 2) or 1.0  # both sides of the threshold may end in a part of a bin
    if not np.isfinite(width):
        raise UserError(f"scores from {low:.6g} to {high:.6g} lie too far apart to plot; mend similarity.py")
    width = max(width, 2 * float(np.spacing(max(abs(low), abs(high)))))  # so that edges are numbers of their own
    places = np.ceil((scores - threshold) / width).astype(np.int64) - 1  # bin 0 begins at the threshold
    places = np.where(scores > threshold, np.maximum(places, 0), np.minimum(places, -1))  # a quotient may round to 0
    first, last = min(int(places.min()), -1), max(int(places.max()), 0)
    counts = [np.bincount(places[labels == label] - first, minlength=last - first + 1) for label in (0, 1)]
    edges: Scores = threshold + width * np.arange(first, last + 2, dtype=np.float64)
    return edges, np.array(counts)


def chart(edges: Scores, counts: NDArray[np.int64], threshold: float, axis: str, quality: Quality) -> dict[str, Any]:
    """Vega-Lite: two outlined histograms, each in shares of its kind so that a rare one is seen, and the threshold."""
    totals = counts.sum(axis=1)
    names = [f"{kind} ({total:,} pairs)" for kind, total in zip(("different", "same"), totals, strict=True)]
    shares = counts / np.maximum(totals, 1)[:, None]
    rows = [
        {"kind": name, "score": float(edge), "share": float(share)}
        for name, total, kind_shares in zip(names, totals, shares, strict=True)
        if total
        for edge, share in zip(edges, [*kind_shares, 0.0], strict=True)
    ]
    colours = alt.Scale(domain=names[::-1], range=[COLOURS["same"], COLOURS["different"]])
    steps = alt.Chart(alt.InlineData(values=rows)).mark_area(
        interpolate="step-after", line={"strokeWidth": 1.5}, opacity=0.4
    )
    steps = steps.encode(
        x=alt.X("score:Q", title=axis, scale=alt.Scale(nice=False, zero=False)),
        y=alt.Y("share:Q", title="share of the pairs of a kind", stack=None),
        color=alt.Color("kind:N", title=None, scale=colours),
    )
    label = "threshold " + f"{threshold:.6g}".replace("-", "−")
    at = alt.Chart(alt.InlineData(values=[{"score": threshold, "label": label}])).encode(x="score:Q")
    line = at.mark_rule(strokeWidth=1.5, strokeDash=[5, 3])
    text = at.mark_text(fontSize=13, y=-10).encode(text="label:N")
    figures = str(quality).replace("  ", ", ")
    title = alt.TitleParams("Scores of same and different pairs", subtitle=f"{figures} on {totals.sum():,} pairs")
    return alt.layer(steps, line, text).properties(width=WIDTH, height=HEIGHT, title=title).to_dict()
