"""explain: scores without a part are those of listings that never had it, and the page says so to anybody."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from browsers import assert_accessible, assert_quiet, emulate, opened
from commands import ok, run_verb
from report_worlds import CLOSING, IMAGE, SCRIPT
from worlds import make_data, read_jsonl, tiny_settings, write_jsonl

from tongkuan.base.calibration import fit_platt, probabilities
from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.encode.store import open_store
from tongkuan.learn.train import train
from tongkuan.model.towers import pair_scores
from tongkuan.records.items import Pair, read_items, read_pairs
from tongkuan.records.labels import labels_of
from tongkuan.records.result import read_predictions
from tongkuan.report.explain import WHOLE, occlude, variants_of
from tongkuan.report.explained import Effect, Explanation, row_of
from tongkuan.result.predict import predict

A, B = "test-0-0", "test-1-0"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A data folder to change."""
    return make_data(tmp_path / "data")


def explanation_of(data: Path, model: Path, pair: tuple[str, str] = (A, B), grid: int = 2) -> Explanation:
    return occlude(pair, data, "test", model, None, "fp32", grid)[0]


def effect_of(explanation: Explanation, part: str) -> Effect:
    (found,) = [effect for effect in explanation.effects if effect.part == part]
    return found


def predicted(data: Path, model: Path, submit: Path) -> float:
    """The score that predict gives to A and B."""
    predict(data, "test", model, submit)
    for _, row in read_predictions(submit / "result.jsonl"):
        if (row.left, row.right) == (A, B):
            both = (np.float32(row.left_embedding)[None], np.float32(row.right_embedding)[None])
            return float(pair_scores(*both)[0])
    raise AssertionError("not predicted")


each_part = pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("picture", {"item_image_name": ""}),
        ("title", {"title": ""}),
        ("型号", {"item_pvs": "产地#:#杭州"}),
        ("title and attributes", {"title": "", "item_pvs": ""}),
    ],
)
"""What is taken from a listing, as explain names it, and what then stands in its row."""


def change(data: Path, item_id: str, **fields: str) -> None:
    path = data / "item_test_info.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    write_jsonl(path, [row | fields if row["item_id"] == item_id else row for row in rows])


def test_the_whole_score_is_that_of_predict(data: Path, model: Path, tmp_path: Path) -> None:
    explanation = explanation_of(data, model)
    assert explanation.score == pytest.approx(predicted(data, model, tmp_path / "submit"), abs=1e-5)
    assert explanation.score == pytest.approx(explanation.commodity - explanation.adaptive, abs=1e-9)
    assert explanation.called(explanation.score) == (explanation.score > explanation.threshold)


@each_part
def test_without_a_part_it_scores_as_if_never_there(
    own: Path, model: Path, tmp_path: Path, part: str, fields: dict[str, str]
) -> None:
    effect = effect_of(explanation_of(own, model), part)
    change(own, A, **fields)
    assert effect.left == pytest.approx(predicted(own, model, tmp_path / "left"), abs=1e-5)
    change(own, B, **fields)
    assert effect.both == pytest.approx(predicted(own, model, tmp_path / "both"), abs=1e-5)


def test_sides_swapped_the_same_is_said_of_the_other_side(data: Path, model: Path) -> None:
    one, other = explanation_of(data, model), explanation_of(data, model, (B, A))
    assert one.score == other.score
    assert [replace(effect, left=effect.right, right=effect.left) for effect in other.effects] == one.effects
    for side, mirrored in zip(one.patches, reversed(other.patches), strict=True):
        assert side is not None and mirrored is not None
        assert np.array_equal(side.changes, mirrored.changes)


def test_the_verdict_is_told_for_each_side(data: Path, model: Path) -> None:
    explanation = replace(explanation_of(data, model), score=2.0, threshold=1.0)
    assert row_of(explanation, Effect("型号", 1.0, 1.5, -1.0))["flips"] == ["left", "both"]
    assert row_of(explanation, Effect("型号", None, 1.5, 1.5))["flips"] == []
    assert row_of(replace(explanation, threshold=2.0), Effect("型号", None, 2.5, 2.0))["flips"] == ["right"]


@pytest.mark.slow
def test_the_precision_asked_for_is_that_of_the_page(data: Path, model: Path, tmp_path: Path) -> None:
    pages = []
    for precision in ("fp32", "bf16"):
        main(["explain", *words(data, model, tmp_path / f"{precision}.html", "--precision", precision)])
        pages.append((tmp_path / f"{precision}.html").read_text(encoding="utf-8"))
    assert all(f"<dd>{precision}</dd>" in page for precision, page in zip(("fp32", "bf16"), pages, strict=True))


@pytest.mark.slow
def test_two_ranks_make_the_page_of_one(data: Path, model: Path, tmp_path: Path) -> None:
    main(["explain", *words(data, model, tmp_path / "1.html")])
    out = ok(run_verb("explain", *words(data, model, tmp_path / "2.html"), "--nproc", 2))
    assert out.count("next: open it in a browser") == 1
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_a_patch_is_grey_where_it_covers_and_the_patches_cover_all(data: Path) -> None:
    items = read_items(data / "item_test_info.jsonl")
    store = open_store(items, data, tiny_settings(data.parent).model, None, cache_mb=0)
    variants = variants_of(store, items[A], 3)  # 32 pixels are not 3 equal parts
    picture = variants[WHOLE].image
    assert picture is not None
    times_covered = np.zeros(picture.shape[1:], dtype=int)
    for name, variant in variants.items():
        if name.startswith("patch "):
            assert variant.image is not None
            is_covered = (variant.image != picture).any(axis=0)
            times_covered += is_covered
            assert len(np.unique(variant.image[:, is_covered], axis=1).T) == 1
    assert (times_covered == 1).all()


def test_a_listing_without_a_picture_has_no_map(own: Path, model: Path) -> None:
    change(own, A, item_image_name="")
    explanation = explanation_of(own, model)
    assert explanation.patches[0] is None and explanation.patches[1] is not None
    assert effect_of(explanation, "picture").left is None


def test_a_model_of_texts_is_explained_by_texts(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    train(tiny_settings(tmp_path, "model.inputs=text", "train.steps=2"), data, tmp_path / "run", path)
    explanation = explanation_of(data, path)
    assert explanation.patches == (None, None)
    assert [effect.part for effect in explanation.effects] == ["title and attributes", "title", "型号"]
    main(["explain", *words(data, path, tmp_path / "page.html")])
    assert "There is no picture that this model looks at" in (tmp_path / "page.html").read_text(encoding="utf-8")


def words(data: Path, model: Path, out: Path, *more: object) -> list[str]:
    return [*map(str, ("--pair", A, B, "--data", data, "--model", model, "--grid", 3, "--out", out, *more))]


def test_the_page_is_the_same_bytes_again_and_its_texts_are_escaped(own: Path, model: Path, tmp_path: Path) -> None:
    change(own, A, title=SCRIPT + IMAGE, item_pvs=f"型号#:#{CLOSING}")
    pages = []
    for name in ("one.html", "other.html"):
        main(["explain", *words(own, model, tmp_path / name)])
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    assert not any(text.encode() in pages[0] for text in (SCRIPT, IMAGE, CLOSING))


def test_without_a_pair_it_is_the_first_of_the_split_with_its_label(data: Path, model: Path) -> None:
    explanation = occlude(None, data, "valid", model, None, "fp32", 1)[0]
    assert (explanation.pair.left, explanation.pair.right, explanation.pair.label) == ("valid-0-0", "valid-0-1", 1)
    assert occlude(("valid-0-1", "valid-0-0"), data, "valid", model, None, "fp32", 1)[0].pair.label == 1


def test_without_labels_the_probability_is_the_models_own_and_the_page_says_so(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explanation = explanation_of(data, model)
    assert explanation.probability == pytest.approx(1 / (1 + np.exp(-explanation.score)))
    main(["explain", *words(data, model, tmp_path / "page.html")])
    assert "not calibrated</b>: that takes 20 pairs" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"P(same) {explanation.probability:.3f}, not calibrated" in capsys.readouterr().out


def test_labels_of_the_split_calibrate_the_probability_and_the_pairs_own_does_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_data(tmp_path / "data", num_products=11)  # 22 pairs of each label
    path = own / "item_valid_pair.jsonl"
    pairs = read_pairs(path)

    def explained(pair: Pair) -> Explanation:
        return occlude((pair.left, pair.right), own, "valid", model, None, "fp32", 1)[0]

    predict(own, "valid", model, tmp_path / "submit")
    rows = [row for _, row in read_predictions(tmp_path / "submit" / "result.jsonl")]
    scores = pair_scores(*(np.array([getattr(row, f"{side}_embedding") for row in rows]) for side in ("left", "right")))
    scaling = fit_platt(scores[1:], labels_of(pairs)[1:])
    found = explained(pairs[0])
    assert found.basis.shortage == "" and found.basis.num_pairs == len(pairs) - 1
    assert found.probability == pytest.approx(probabilities(np.array([found.score]), scaling)[0], abs=1e-4)
    assert "P(same)" in str(found) and "not calibrated" not in str(found)
    assert found.facts["listings encoded"] == f"{33 + 2 * 6:,}", "of those pairs, and of the pair with its parts"
    turned = [row | {"item_label": "0"} if number == 0 else row for number, row in enumerate(read_jsonl(path))]
    turned.append(turned[1] | {"tgt_item_id": "gone"})  # of no use, and no error
    write_jsonl(path, turned)
    assert explained(pairs[0]).probability == found.probability
    monkeypatch.setattr("tongkuan.report.explain.MAX_LABELLED", 42)
    assert explained(pairs[0]).basis.num_pairs == 42


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--pair", A, "test-0-00"), "no item 'test-0-00' (did you mean 'test-0-0'?)"),
        (("--grid", "0"), "argument --grid: '0' is no whole number from 1 to 4,096"),
        (("--grid", "33"), "name a number of patches from 1 to 32"),
        (("--out", "page.pdf"), "let --out end in .html"),
    ],
)
def test_bad_usage_is_one_line(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(["explain", *words(data, model, tmp_path / "page.html", *more)])
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_page_is_quiet_and_accessible_in_a_browser(browser: Any, own: Path, model: Path, tmp_path: Path) -> None:
    change(own, A, title=SCRIPT, item_pvs=f"型号#:#{CLOSING}")
    change(own, B, title=IMAGE, item_image_name="")
    page = tmp_path / "page.html"
    main(["explain", *words(own, model, page)])
    emulate(browser)
    opened(browser, page)
    shown = browser.execute_script("return document.body.innerText")
    assert SCRIPT in shown and IMAGE in shown and CLOSING in shown
    assert browser.execute_script("return document.querySelectorAll('#chart-effects svg').length") == 1
    assert_quiet(browser, page)
    for width in (1400, 390):
        for is_dark in (False, True):
            assert_accessible(browser, page, width, is_dark)
