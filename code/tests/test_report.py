"""report: its numbers against oracles, its problems in the data, and a page that hostile texts cannot break."""

import base64
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from commands import ok, run_verb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_worlds import CLOSING, IMAGE, SCRIPT, World, make_world, write_rows
from scipy import stats  # scikit-learn brings it

from tongkuan.base.calibration import fit_platt, probabilities
from tongkuan.base.errors import UserError
from tongkuan.base.metrics import intervals, quality_at
from tongkuan.records.items import Pair
from tongkuan.report import figures
from tongkuan.report.page import slider
from tongkuan.report.problems import contradictions
from tongkuan.report.report import report


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A result that no test writes to."""
    return make_world(tmp_path_factory.mktemp("world"))


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags and self.tags[-1][0] not in ("script", "style") else ""


def made(world: World, folder: Path, **options: Any) -> str:
    out = folder / "report.html"
    report(world.submit, world.pairs, world.data, out, **options)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the result."""
    return made(world, tmp_path_factory.mktemp("page"))


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'id="data">([^<]*)<', html)
    assert found
    data: dict[str, Any] = orjson.loads(zlib.decompress(base64.b64decode(found[1])))
    return data


def numbers_of(text: str, kind: str) -> Any:
    """An array of the page."""
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def test_the_headline_is_that_of_the_judges_with_the_interval_of_evaluate(html: str, world: World) -> None:
    scores, labels = np.array(world.scores), np.array(world.labels)
    for cut in (0.0, 0.25):
        quality = quality_at(scores, labels, cut)
        for name in ("f1", "precision", "recall"):
            assert f"<b>{getattr(quality, name):.4f}</b>" in html
    low, high = intervals(quality_at(scores, labels, 0.25))["f1"]
    assert f"[{low:.4f}, {high:.4f}]" in html


def test_hostile_texts_are_text_and_lead_nowhere(html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    items = data_of(html)["items"]
    assert items[0][1] == SCRIPT or SCRIPT in [item[1] for item in items]
    assert {IMAGE, CLOSING} <= {item[1] for item in items}
    states = {item[0]: item[5] for item in items}
    assert (states["i0"], states["i1"], states[CLOSING], states["i3"]) == (1, 2, 2, 3)
    pictured = orjson.loads(re.search(r'id="pictures">([^<]*)<', html)[1])  # type: ignore[index]
    outside = [number for number, item in enumerate(items) if item[0] == "i1"]
    assert str(outside[0]) not in pictured and len(pictured) > 50


def test_a_hostile_label_file_and_manifest_are_escaped(tmp_path: Path) -> None:
    own = make_world(tmp_path)
    (own.submit / "manifest.json").write_bytes(orjson.dumps({SCRIPT: IMAGE, "sha256": {"result": "0"}}))
    rows = [orjson.loads(line) for line in own.pairs.read_bytes().splitlines()]
    same = [{"src_item_id": CLOSING, "tgt_item_id": "x", "item_label": "1"}]
    same += [{"src_item_id": "x", "tgt_item_id": "i3", "item_label": str(1 - own.labels[1])}]
    write_rows(own.data / "item_train_pair.jsonl", same + rows[1:2])
    html = made(own, tmp_path)
    assert SCRIPT not in html and IMAGE not in html and CLOSING not in html
    assert SCRIPT in Page(html).text and "not the file of the manifest" in html


def test_a_page_fetches_nothing_and_runs_only_its_own_scripts(html: str) -> None:
    policy = next(a["content"] for tag, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("sha256-") == 2
    assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy
    for _, attributes in Page(html).tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes_in_every_process(
    html: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    words = ("report", "--submit", world.submit, "--pairs", world.pairs, "--data", world.data)
    out = ok(run_verb(*words, "--out", tmp_path / "b.html"))
    assert (tmp_path / "b.html").read_bytes() == html.encode()
    assert "60 pairs" in out and "open it in a browser" in out


def test_another_result_is_compared_pair_by_pair_whatever_its_order(world: World, tmp_path: Path) -> None:
    other = make_world(tmp_path / "other", threshold=-1.0)
    rows = other.submit.joinpath("result.jsonl").read_bytes().splitlines(keepends=True)
    other.submit.joinpath("result.jsonl").write_bytes(b"".join(reversed(rows)))
    html = made(world, tmp_path, against_dir=other.submit)
    scores, labels = np.array(world.scores), np.array(world.labels)
    moved = (scores > -1.0) & (scores <= 0.25)
    won, lost = int(np.sum(moved & (labels == 0))), int(np.sum(moved & (labels == 1)))
    assert won > 0 and lost > 0
    assert f"{moved.sum()} verdicts differ: {won} right only here, {lost} right only there" in html
    assert f"p = {figures.mcnemar(won, lost):.4g}" in html


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_scipys_binomial_test(won: int, lost: int) -> None:
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert figures.mcnemar(won, lost) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_thousands_neither_overflows_nor_lasts() -> None:
    assert figures.mcnemar(9_000, 11_000) == pytest.approx(1.84e-45, rel=0.01)


def test_a_gain_is_measured_on_the_same_draws_so_two_equal_results_gain_nothing() -> None:
    margins = np.random.default_rng(0).normal(size=200)
    labels = (margins + np.random.default_rng(1).normal(size=200) > 0).astype(np.int64)
    same = figures.compare(margins, margins, labels)
    assert (same.gain.low, same.gain.value, same.gain.high, same.p_value) == (0, 0, 0, 1)


def test_calibration_of_scores_that_are_log_odds_is_right_and_of_doubled_ones_is_not() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(0, 2, 20_000)
    labels = (generator.random(20_000) < probabilities(scores)).astype(np.int64)
    found = figures.calibration(probabilities(scores), labels)
    assert found.error < 0.01 and sum(b.count for b in found.bins) == 20_000
    assert sum(b.observed.low <= b.predicted <= b.observed.high for b in found.bins) >= 8
    assert figures.calibration(probabilities(2 * scores), labels).error > 0.05


def test_each_pair_has_its_calibrated_probability_and_the_page_says_from_which_pairs(html: str, world: World) -> None:
    scores, labels = np.array(world.scores), np.array(world.labels)
    data, scaling = data_of(html), fit_platt(scores, labels)
    assert data["calibrated"] is True
    assert numbers_of(data["probabilities"], "<f4") == pytest.approx(probabilities(np.sort(scores)[::-1], scaling))
    text = " ".join(Page(html).text.split())
    assert "calibrated on 60 labelled pairs of answers.jsonl" in text
    assert f"The threshold is at P(same) {probabilities(np.array([0.25]), scaling)[0]:.3f}." in text
    found = figures.calibrated(numbers_of(data["scores"], "<f8"), numbers_of(data["labels"], "u1"), are_log_odds=True)
    assert found.before is not None and found.after is not None
    assert f"{found.after.error:.4f} calibrated, each fifth of the pairs by the others" in text
    assert f"{found.before.error:.4f} of sigmoid(score)," in text


def test_few_labels_leave_the_models_own_probabilities_and_the_page_says_so(tmp_path: Path) -> None:
    own = make_world(tmp_path, num_pairs=30)
    html = made(own, tmp_path)
    data, text = data_of(html), " ".join(Page(html).text.split())
    same = sum(own.labels)
    assert f"not calibrated: that takes 20 pairs of each label, and here are {same} same and {30 - same}" in text
    assert data["calibrated"] is False
    assert numbers_of(data["probabilities"], "<f4") == pytest.approx(probabilities(np.sort(own.scores)[::-1]))
    assert "calibrated on" not in text


@given(st.integers(1, 1000), st.data())
def test_wilsons_interval_is_scipys(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    found = figures.wilson(hits, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_sweep_keeps_both_ends_and_never_more_than_a_screen_shows() -> None:
    scores = np.random.default_rng(0).normal(size=5_000)
    labels = (scores > 0.5).astype(np.int64)
    curve = figures.sweep(scores, labels)
    assert len(curve) <= figures.MAX_POINTS
    assert curve[0][1].recall == 1 and curve[-1][1].true_positives + curve[-1][1].false_positives == 0
    assert [cut for cut, _ in curve] == sorted(cut for cut, _ in curve)


def test_labels_contradict_each_other_directly_and_through_others() -> None:
    same = [Pair("a", "b", 1), Pair("b", "c", 1), Pair("d", "e", 1)]
    other = [Pair("c", "a", 0), Pair("e", "d", 0), Pair("a", "d", 0)]
    found = contradictions({"x.jsonl": same, "y.jsonl": other})
    assert [(one.chain, one.file) for one in found] == [
        (("d", "e"), "y.jsonl"),
        (("a", "b", "c"), "y.jsonl"),
    ]


def test_a_picture_saved_again_is_found_across_train_and_validation(tmp_path: Path) -> None:
    own = make_world(tmp_path)
    with Image.open(own.data / "images" / "0.jpg") as image:
        image.resize((150, 150)).save(own.data / "images" / "again.jpg", quality=60)
    for side, names in (("train", ("0.jpg", "1.jpg")), ("valid", ("2.jpg", "again.jpg", "broken.jpg"))):
        rows: list[dict[str, object]] = [{"item_id": f"{side}-{name}", "item_image_name": name} for name in names]
        write_rows(own.data / f"item_{side}_info.jsonl", rows)
    html = made(own, tmp_path)
    assert "1 pictures of validation" in html and "train-0.jpg" in html and "valid-again.jpg" in html
    assert "valid-2.jpg" not in html


@pytest.mark.parametrize(
    ("low", "high"), [(-3.0, 4.0), (0.0, 0.0), (5.0, 5.0), (-1e300, 1e300), (1e17, 1e17), (-1e-300, 1e-300)]
)
def test_a_slider_covers_all_scores_in_decimal_steps(low: float, high: float) -> None:
    found = slider(low, high)
    first, last = (float(f"{found[end] * found['factor']}e{found['exponent']}") for end in ("first", "last"))
    assert first < low and high < last and found["last"] - found["first"] < 2**53


def test_thresholds_of_their_own_are_shown_as_distances(tmp_path: Path) -> None:
    own = make_world(tmp_path)
    rows = [orjson.loads(line) for line in (own.submit / "result.jsonl").read_bytes().splitlines()]
    thresholds = np.linspace(-1, 1, len(rows))
    for row, threshold in zip(rows, thresholds, strict=True):
        row["threshold"] = float(threshold)
    write_rows(own.submit / "result.jsonl", rows)
    html = made(own, tmp_path)
    quality = quality_at(np.array(own.scores), np.array(own.labels), thresholds)
    assert "each pair&#39;s own threshold" in html and f"<b>{quality.f1:.4f}</b>" in html
    assert data_of(html)["start"] == 0


def test_a_strangers_similarity_has_no_towers_and_no_log_odds(tmp_path: Path) -> None:
    own = make_world(tmp_path)
    (own.submit / "similarity.py").write_text("def compute(a, b): return b[1]", encoding="utf-8")
    html = made(own, tmp_path)
    data = data_of(html)
    assert data["commodity"] is None and "so a score is no log-odds" in html
    assert data["calibrated"] is True and "of sigmoid(score)" not in html, "calibrated all the same"


def test_a_strangers_scores_without_enough_labels_have_no_probability(tmp_path: Path) -> None:
    own = make_world(tmp_path, num_pairs=20)
    (own.submit / "similarity.py").write_text("def compute(a, b): return b[1]", encoding="utf-8")
    html = made(own, tmp_path)
    data = data_of(html)
    assert data["probabilities"] is None and "calibration" not in data["charts"]
    assert "No probabilities are shown" in html and "P(same)" not in Page(html).text


def test_a_run_adds_its_curves(world: World, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": 10, "loss": 2.0},
        {"step": 20, "loss": None},
        {"step": 20, "valid_f1": 0.5},
    ]
    write_rows(tmp_path / "metrics.jsonl", rows)
    html = made(world, tmp_path, run_dir=tmp_path)
    drawn = data_of(html)["charts"]
    assert "training loss" in html and "validation F1 at its best threshold" in html
    assert orjson.dumps(drawn["training-0"]).count(b'"step":10') == 1 and b'"step":20' not in orjson.dumps(
        drawn["training-0"]
    )


def test_bad_input_is_one_line_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    def refused(message: str, data: Path = world.data, out: str = "a.html", **options: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            report(world.submit, world.pairs, data, tmp_path / out, **options)
        assert "\n" not in str(caught.value)

    refused("let --out end in .html", out="a.pdf")
    refused("name the folder that was predicted from", data=tmp_path)
    refused("no such file; name the folder that train --run wrote to", run_dir=tmp_path)
    refused("no such file", against_dir=tmp_path)
    write_rows(tmp_path / "item_test_info.jsonl", [{"item_id": "i5"}])
    refused(r"item_test_info\.jsonl: 119 items of the pairs are not here", data=tmp_path)
    assert not list(tmp_path.glob("*.html"))
