"""plot.py: what the plot says, which bar a pair falls into, and the same bytes for the same result."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import orjson
import pytest
from commands import ok, run_verb
from hypothesis import example, given
from hypothesis import strategies as st
from test_main import error_of

from tongkuan.base.errors import UserError
from tongkuan.base.metrics import quality_at
from tongkuan.report.plot import HEIGHT, MAX_BINS, WIDTH, histogram, plot, render

SIMILARITY = "def compute(a, b): return a[0] * b[0]"


def make_result(folder: Path, scores: list[float], labels: list[int], thresholds: list[float]) -> tuple[Path, Path]:
    """(submit folder, pairs file) of pairs with these scores."""
    folder.mkdir(exist_ok=True)
    (folder / "similarity.py").write_text(SIMILARITY, encoding="utf-8")
    rows, pairs = [], []
    for number, (score, label, threshold) in enumerate(zip(scores, labels, thresholds, strict=True)):
        ids = {"src_item_id": "a", "tgt_item_id": f"b{number}"}
        texts = {"src_item_emb": "[1.0]", "tgt_item_emb": str([score])}
        rows.append(orjson.dumps({**ids, **texts, "threshold": threshold}) + b"\n")
        pairs.append(orjson.dumps({**ids, "item_label": str(label)}) + b"\n")
    (folder / "result.jsonl").write_bytes(b"".join(rows))
    (folder / "pairs.jsonl").write_bytes(b"".join(pairs))
    return folder, folder / "pairs.jsonl"


@pytest.fixture
def result(tmp_path: Path) -> tuple[Path, Path]:
    """Three same pairs, one of them below the threshold, and two different ones, one above: F1 2/3."""
    return make_result(tmp_path / "submit", [3, 2, -4, 1.7, -1], [1, 1, 1, 0, 0], [-0.62] * 5)


def texts_of(svg: str) -> list[str]:
    """What a viewer can read."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


def drawn(scores: list[float], labels: list[int], thresholds: list[float]) -> list[str]:
    return texts_of(
        render(np.array(scores, dtype=np.float64), np.array(labels), np.array(thresholds, dtype=np.float64))
    )


def test_it_says_counts_and_figures(
    result: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot(*result, tmp_path / "new" / "scores.svg")
    texts = texts_of((tmp_path / "new" / "scores.svg").read_text(encoding="utf-8"))
    assert {"same (3 pairs)", "different (2 pairs)", "threshold −0.62", "score"} <= set(texts)
    assert "F1 0.6667, precision 0.6667, recall 0.6667 on 5 pairs" in texts
    assert "scores.svg: F1 0.6667" in capsys.readouterr().out


def test_a_drawing_needs_nothing_from_elsewhere(result: tuple[Path, Path], tmp_path: Path) -> None:
    plot(*result, tmp_path / "scores.svg")
    svg = (tmp_path / "scores.svg").read_text(encoding="utf-8")
    assert not re.search(r"<(script|image|style|foreignObject)\b|href=|url\(", svg)
    assert set(re.findall(r'font-family="([^"]*)"', svg)) == {"Liberation Sans, Arial, Helvetica, sans-serif"}


@pytest.mark.slow
def test_the_same_result_gives_the_same_bytes_in_every_process(
    result: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, pairs = result
    plot(submit, pairs, tmp_path / "own.svg")
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # of this process it is another
    ok(run_verb("plot", "--submit", submit, "--pairs", pairs))
    assert (submit / "scores.svg").read_bytes() == (tmp_path / "own.svg").read_bytes()


def test_a_png_is_a_picture(result: tuple[Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    plot(*result, tmp_path / "scores.png")
    with Image.open(tmp_path / "scores.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 10, "something is drawn"


SCORES = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 1)), min_size=1, max_size=50)


@given(SCORES, st.floats(-1e6, 1e6))
@example([(1.0, 1), (1.0, 0)], 1.0)
@example([(-5e-324, 1), (5e-324, 0)], 0.0)
@example([(1e6, 0), (999999.9999999999, 0)], 1e6)
@example([(1e6, 0), (5e-324, 1)], 0.0)
def test_bars_add_up_and_split_as_the_judges_do(pairs: list[tuple[float, int]], threshold: float) -> None:
    scores = np.array([score for score, _ in pairs])
    labels = np.array([label for _, label in pairs])
    edges, counts = histogram(scores, labels, threshold)
    assert counts.shape == (2, len(edges) - 1) and counts.shape[1] <= MAX_BINS and np.all(np.diff(edges) > 0)
    assert counts.sum(axis=1).tolist() == [np.sum(labels == 0), np.sum(labels == 1)]
    quality = quality_at(scores, labels, threshold)
    right = counts[:, int(np.argmin(np.abs(edges - threshold))) :].sum(axis=1)
    assert right.tolist() == [quality.false_positives, quality.true_positives]


def test_pairs_with_thresholds_of_their_own_are_drawn_by_the_distance_to_it() -> None:
    texts = drawn([3, 2], [1, 0], [1, 2.5])
    assert "score less the pair's own threshold" in texts and "threshold 0" in texts
    assert "F1 1.0000, precision 1.0000, recall 1.0000 on 2 pairs" in texts


@pytest.mark.parametrize(
    ("scores", "labels", "legend"),
    [
        ([1, 1, 1], [1, 0, 1], "same (2 pairs)"),
        ([0, 0, 0], [1, 0, 1], "different (1 pairs)"),
        ([1, 2, 3], [0, 0, 0], "same (0 pairs)"),
        ([1, 2, 3], [1, 1, 1], "different (0 pairs)"),
        ([5], [1], "same (1 pairs)"),
        ([1e300, 0, -1e300], [1, 0, 1], "same (2 pairs)"),
        ([1e17, 1e17, 1e17], [1, 0, 1], "same (2 pairs)"),
        ([1e-300, 0, -1e-300], [1, 0, 1], "same (2 pairs)"),
    ],
)
def test_odd_results_are_drawn(scores: list[float], labels: list[int], legend: str) -> None:
    svg = render(np.array(scores, dtype=np.float64), np.array(labels), np.zeros(len(scores)))
    assert {legend, "threshold 0"} <= set(texts_of(svg))
    areas = re.findall(r'kind: (\w+) [^>]*area mark" d="([^"]*)"', svg)
    assert {kind for kind, _ in areas} == {("different", "same")[label] for label in labels}
    for _, path in areas:
        places = [float(number) for number in re.findall(r"[^MLZ,]+", path)]
        assert min(places[1::2]) < HEIGHT == max(places[1::2]) and 0 <= min(places[::2]) < max(places[::2]) <= WIDTH


def test_twenty_thousand_pairs_make_no_larger_plot() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 20_000)
    svg = render(generator.normal(4 * labels, 2), labels, np.zeros(20_000))
    assert len(svg) < 60_000


@pytest.mark.parametrize("thresholds", [[0.0, 0.0], [-1e308, 1e308]])
def test_scores_without_a_finite_span_are_the_users_to_mend(thresholds: list[float]) -> None:
    with pytest.raises(UserError, match="too far apart to plot"):
        drawn([1.7e308, -1.7e308], [1, 0], thresholds)


def test_a_score_that_is_not_finite_is_refused_in_one_line(result: tuple[Path, Path]) -> None:
    submit, pairs = result
    (submit / "similarity.py").write_text("def compute(a, b): return float('inf')", encoding="utf-8")
    assert "not finite" in error_of("plot", "--submit", submit, "--pairs", pairs)
    assert not (submit / "scores.svg").exists()


def test_bad_input_is_refused_as_score_refuses_it(result: tuple[Path, Path], tmp_path: Path) -> None:
    submit, pairs = result
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        plot(submit, tmp_path / "none.jsonl", tmp_path / "a.svg")
    (submit / "similarity.py").rename(submit / "other.py")
    with pytest.raises(UserError, match=r"similarity\.py: no such file"):
        plot(submit, pairs, tmp_path / "a.svg")
    pairs.write_text('{"src_item_id": "a", "tgt_item_id": "b0"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="no item_label"):
        plot(submit, pairs, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.parametrize("name", ["scores.pdf", "scores", "folder.svg"])
def test_a_name_that_is_no_picture_is_refused_first(result: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UserError, match=r"let --out end in \.svg or \.png"):
        plot(*result, tmp_path / name)
