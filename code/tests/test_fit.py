"""fit.py: one tower found from pairs by the verb itself: the same bytes always, and what it weighs is what it saw."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ok, run_verb
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from test_explain import A, change, each_part, effect_of, explanation_of, predicted
from test_main import error_of
from test_train import metrics_of, state_bytes
from torch import Tensor
from worlds import ONE, make_data, read_jsonl, tiny_settings, train_words, write_jsonl

from tongkuan.cli.verbs import main
from tongkuan.encode.encode import scores_of
from tongkuan.encode.inference import open_inference, read_labelled_pairs
from tongkuan.learn import fit
from tongkuan.learn.fit import LEAST_ITEMS, PENALTY, Columns, centre, corrections, most_likely_constant, regression
from tongkuan.learn.step import TrainStep
from tongkuan.learn.train import train
from tongkuan.model.modelfile import load_model
from tongkuan.model.one import OneTower
from tongkuan.records.words import KINDS, bucket


def run(*words: object) -> None:
    """A verb that ends well."""
    assert main([*map(str, words)]) == 0


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with as many items as a key needs to get a slot; no test writes to it."""
    return make_data(tmp_path_factory.mktemp("goods") / "data", num_products=LEAST_ITEMS // 3 + 1)


@pytest.fixture(scope="module")
def fitted(goods: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a step, in a folder of its own; no test writes to it."""
    folder = tmp_path_factory.mktemp("fitted")
    run(*train_words(folder, goods, *ONE))
    return folder / "m"


@pytest.fixture
def own(goods: Path, tmp_path: Path) -> Path:
    """A data folder to change."""
    return shutil.copytree(goods, tmp_path / "data")


def tower_of(model: Path) -> OneTower:
    tower, _ = load_model(model)
    assert isinstance(tower, OneTower)
    return tower


def result(data: Path, model: Path, submit: Path, *more: object) -> bytes:
    """What predict writes."""
    run("predict", "--data", data, "--model", model, "--submit", submit, *more)
    return (submit / "result.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Through the verb


def test_it_tells_products_apart_without_a_step(fitted: Path) -> None:
    (row,) = metrics_of(fitted.parent / "run")
    assert row["step"] == 0
    assert row["valid_f1"] > 0.95 and row["valid_f1_at_0"] > 0.95, "the threshold is near 0 by construction"


def test_a_common_key_gets_a_slot_and_weighs_and_a_rare_one_does_not(own: Path, fitted: Path, tmp_path: Path) -> None:
    words = tower_of(fitted).words
    assert words is not None
    number, _ = (len(KINDS) + bucket(key) for key in ("型号", "产地"))
    slot = int(words.group_of[number])
    assert slot >= len(KINDS) and float(words.scales[slot].detach()) > 0
    path = own / "item_train_info.jsonl"
    rows = [row if place < LEAST_ITEMS - 1 else row | {"item_pvs": ""} for place, row in enumerate(read_jsonl(path))]
    write_jsonl(path, rows)
    run(*train_words(tmp_path, own, *ONE))
    rare = tower_of(tmp_path / "m").words
    assert rare is not None and int(rare.group_of[number]) == -1


def test_the_same_command_again_does_not_fit_again(
    goods: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fitted.parent / "run", tmp_path / "run")
    monkeypatch.setattr("tongkuan.learn.train.fit", lambda *_: pytest.fail("fitted again"))
    run(*train_words(tmp_path, goods, *ONE))
    assert (tmp_path / "m").read_bytes() == fitted.read_bytes()
    assert state_bytes(tmp_path / "run") == state_bytes(fitted.parent / "run")


def test_another_run_gives_the_same_bytes(goods: Path, fitted: Path, tmp_path: Path) -> None:
    run(*train_words(tmp_path, goods, *ONE))
    assert (tmp_path / "m").read_bytes() == fitted.read_bytes()


def test_threads_and_batches_ahead_do_not_change_a_bit(
    goods: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tongkuan.encode.encode.available_cores", lambda: 3)
    run(*train_words(tmp_path, goods, *ONE, "data.workers=5"))
    assert (tmp_path / "m").read_bytes() == fitted.read_bytes()


@pytest.mark.slow
def test_one_rank_and_two_fit_the_same_bytes(goods: Path, fitted: Path, tmp_path: Path) -> None:
    ok(run_verb(*train_words(tmp_path, goods, "--nproc", 2, *ONE)))
    assert (tmp_path / "m").read_bytes() == fitted.read_bytes()
    more = (*train_words(tmp_path, goods, "--nproc", 2, *ONE, "train.steps=2"), "--run", tmp_path / "steps")
    ok(run_verb(*more))


def test_a_second_prediction_encodes_nothing(
    goods: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = result(goods, fitted, tmp_path / "plain")
    cache = ("--cache", tmp_path / "cache")
    assert result(goods, fitted, tmp_path / "s", *cache) == plain
    monkeypatch.setattr(OneTower, "forward", lambda *_: pytest.fail("encoded"))
    assert result(goods, fitted, tmp_path / "s", *cache) == plain


def test_a_changed_attribute_that_no_token_shows_is_a_miss(own: Path, fitted: Path, tmp_path: Path) -> None:
    """Words are read of all keys, not only of those in the text."""
    cache = ("--cache", tmp_path / "cache")
    before = result(own, fitted, tmp_path / "s", *cache)
    change(own, A, item_pvs="型号#:#A0#;#产地#:#A1")
    after = result(own, fitted, tmp_path / "s", *cache)
    assert after == result(own, fitted, tmp_path / "plain") != before


def test_the_other_verbs_run_on_it(goods: Path, fitted: Path, tmp_path: Path) -> None:
    inputs = ("--data", goods, "--model", fitted)
    first = result(goods, fitted, tmp_path / "submit")
    run("evaluate", *inputs, "--precision", "bf16")
    run("explain", *inputs, "--grid", 2, "--out", tmp_path / "explain.html")
    run("verify", "--submit", tmp_path / "submit", *inputs)
    run("predict", *inputs, "--dry-run")
    run(*train_words(tmp_path, goods, *ONE, "--dry-run"))
    assert (tmp_path / "submit" / "result.jsonl").read_bytes() == first


@pytest.mark.slow
def test_a_run_without_a_step_has_its_report_and_its_score(
    goods: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(goods, fitted, tmp_path / "submit")
    rows = read_jsonl(goods / "item_test_pair.jsonl")
    write_jsonl(answers := tmp_path / "a.jsonl", [row | {"item_label": "1100"[at % 4]} for at, row in enumerate(rows)])
    judged = ("--submit", tmp_path / "submit", "--pairs", answers)
    run("report", *judged, "--data", goods, "--run", fitted.parent / "run")
    capsys.readouterr()
    run("score", *judged)
    assert float(capsys.readouterr().out.partition("F1")[2].split()[0]) > 0.95


@each_part
def test_explained_without_a_part_it_scores_as_if_never_there(
    own: Path, fitted: Path, tmp_path: Path, part: str, fields: dict[str, str]
) -> None:
    explanation = explanation_of(own, fitted)
    assert explanation.score == pytest.approx(predicted(own, fitted, tmp_path / "whole"), abs=1e-5)
    change(own, A, **fields)
    found = predicted(own, fitted, tmp_path / "left")
    assert effect_of(explanation, part).left == pytest.approx(found, abs=1e-5)
    assert found != pytest.approx(explanation.score, abs=1e-3)


def test_without_encoders_it_trains_and_predicts(goods: Path, tmp_path: Path) -> None:
    run(*train_words(tmp_path, goods, *ONE, "model.parts.text=0", "model.parts.image=0"))
    tower, card = load_model(tmp_path / "m")
    assert card.text_config is None and card.tokenizer is None
    assert tower.encoders("text") == tower.encoders("image") == []
    assert result(goods, tmp_path / "m", tmp_path / "s")
    (row,) = metrics_of(tmp_path / "run")
    assert row["valid_f1"] > 0.95


@pytest.mark.parametrize("inputs", ["text", "image"])
def test_one_input_alone_is_fitted(goods: Path, tmp_path: Path, inputs: str) -> None:
    run(*train_words(tmp_path, goods, *ONE, f"model.inputs={inputs}"))
    assert result(goods, tmp_path / "m", tmp_path / "s")


def test_items_without_pictures_texts_or_anything_are_fitted(own: Path, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        path = own / f"item_{split}_info.jsonl"
        lost: list[dict[str, str]] = [{}, {"item_image_name": ""}, {"title": "", "item_pvs": ""}]
        lost.append(lost[1] | lost[2])
        write_jsonl(path, [row | lost[place % 4] for place, row in enumerate(read_jsonl(path))])
    run(*train_words(tmp_path, own, *ONE))
    assert all(tensor.isfinite().all() for tensor in tower_of(tmp_path / "m").state_dict().values())
    assert b"NaN" not in result(own, tmp_path / "m", tmp_path / "s").replace(b"nan", b"NaN")


def test_listings_that_are_all_alike_are_fitted(own: Path, tmp_path: Path) -> None:
    """Nothing varies, so nothing weighs; no number is lost over it."""
    for split in ("train", "valid"):
        path = own / f"item_{split}_info.jsonl"
        rows = read_jsonl(path)
        same = {name: rows[0][name] for name in ("title", "item_pvs", "item_image_name")}
        write_jsonl(path, [row | same for row in rows])
    run(*train_words(tmp_path, own, *ONE))
    assert all(tensor.isfinite().all() for tensor in tower_of(tmp_path / "m").state_dict().values())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("train.steps=0",), "train.steps=0 leaves two towers as they start; take steps, or set model.towers=one"),
        (("train.steps=0", "model.towers=shared"), "train.steps=0 leaves two towers"),
        ((*ONE, "model.embedding_size=16"), "do not fit in model.embedding_size=16"),
        ((*ONE, "model.parts.words=47"), "do not fit in model.embedding_size=64"),
        ((*ONE, "model.parts.keys=55"), "do not fit in model.embedding_size=64"),
        ((*ONE, "model.parts.views=4"), "model.parts.views"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(
    goods: Path, tmp_path: Path, overrides: tuple[str, ...], line: str
) -> None:
    assert line in error_of(*train_words(tmp_path, goods, *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parts", ["words: 46", "keys: 54"])
def test_parts_may_fill_the_embedding(goods: Path, tmp_path: Path, parts: str) -> None:
    name, _, count = parts.partition(": ")
    run(*train_words(tmp_path, goods, *ONE, f"model.parts.{name}={count}"))


# ---------------------------------------------------------------------------------------------------------------------
# Steps after the fit


def test_steps_go_on_from_the_fit_and_a_stopped_run_ends_as_an_unbroken_one(
    goods: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, *ONE, "train.steps=3")
    train(settings, goods, tmp_path / "whole", tmp_path / "whole.m")
    take, fits, starts = TrainStep.take, [], []

    def stop_at_two(step: TrainStep, number: int, loaded: Iterator[Any]) -> tuple[Tensor, Tensor]:
        if number == 0:
            starts.append({name: tensor.clone() for name, tensor in step.model.state_dict().items()})
        if number == 2:
            raise KeyboardInterrupt
        return take(step, number, loaded)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "take", stop_at_two)
        train(settings, goods, tmp_path / "broken", tmp_path / "broken.m")
    monkeypatch.setattr("tongkuan.learn.train.fit", lambda *_: fits.append(1))
    train(settings, goods, tmp_path / "broken", tmp_path / "broken.m")
    assert fits == [], "what was fitted is in the checkpoint"
    assert state_bytes(tmp_path / "broken") == state_bytes(tmp_path / "whole")
    assert (tmp_path / "broken.m").read_bytes() == (tmp_path / "whole.m").read_bytes()
    before = tower_of(fitted).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in starts[0].items())
    after = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    moved = {name.partition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {"trunk", "projections", "words", "bias"}


# ---------------------------------------------------------------------------------------------------------------------
# What it weighs


def test_with_words_alone_a_score_is_the_log_odds_of_the_regression(
    goods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the sketch, which is wide here."""
    seen: list[Tensor] = []

    def noted(columns: Columns, labels: Tensor) -> tuple[Tensor, ...]:
        found = regression(columns, labels)
        terms = (columns.likeness, columns.common, columns.both)
        sums = [weights @ torch.stack(rows) for weights, rows in zip(found[:3], terms, strict=True)]
        seen.append(sum(sums) + found[3])
        return found

    monkeypatch.setattr(fit, "regression", noted)
    more = ("model.inputs=text", "model.parts.text=0", "model.embedding_size=512")
    run(*train_words(tmp_path, goods, *ONE, *more))
    with open_inference(goods, "train", tmp_path / "m", "fp32", read=read_labelled_pairs) as opened:
        scores = scores_of(opened.pairs, opened.encode("train"))
    log_odds = seen[0].numpy()
    assert log_odds.std() > 1
    assert np.abs(scores - log_odds).max() < 0.2 * log_odds.std()


def columns_of(generator: np.random.Generator, pairs: int) -> tuple[Columns, Tensor]:
    """Two of likeness, one of commonness, one of both, each with a say in the labels."""
    rows = torch.from_numpy(generator.normal(size=(4, pairs)) * np.array([[1.0], [0.2], [3.0], [1.0]]) + 0.5)
    odds = 1.5 * rows[0] + 5 * rows[1] - 0.4 * rows[2] - 1.0 * rows[3] - 0.3
    labels = torch.from_numpy(generator.random(pairs)) < torch.sigmoid(odds)
    return Columns([rows[0], rows[1]], [rows[2]], [rows[3]]), labels.double()


def test_weights_are_those_of_a_logistic_regression() -> None:
    columns, labels = columns_of(np.random.default_rng(0), 400)
    likeness, common, both, bias = regression(columns, labels)
    rows = torch.stack([*columns.likeness, *columns.common, *columns.both], dim=1).numpy()
    mean, deviation = rows.mean(axis=0), rows.std(axis=0, ddof=1)
    by_sklearn = LogisticRegression(C=1 / (2 * PENALTY * len(rows)), tol=1e-10, max_iter=1000)
    by_sklearn.fit((rows - mean) / deviation, labels.numpy())
    expected = by_sklearn.coef_[0] / deviation
    assert torch.cat([likeness, common, both]).numpy() == pytest.approx(expected, rel=1e-3)
    assert float(bias) == pytest.approx(by_sklearn.intercept_[0] - expected @ mean, rel=1e-3)


def test_likeness_never_counts_against_and_a_key_on_both_sides_never_for() -> None:
    columns, labels = columns_of(np.random.default_rng(1), 400)
    columns.likeness[0], columns.both[0] = -columns.likeness[0], -columns.both[0]
    columns.likeness[1] = torch.full_like(labels, 0.7)
    likeness, common, both, _ = regression(columns, labels)
    assert likeness.numpy() == pytest.approx(0, abs=1e-3) and both.numpy() == pytest.approx(0, abs=1e-3)
    assert (likeness >= 0).all() and (both <= 0).all() and float(common) < -0.2
    assert float(likeness[1]) == 0, "what never varies weighs nothing"


def test_likeness_is_told_from_what_it_usually_is_where_both_sides_have_the_part() -> None:
    has = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
    columns = Columns(likeness=[torch.tensor([0.2, 0.4, 0.0, 0.6]).double(), -has, has], there=[has, has])
    usual = fit.centre(columns)
    assert usual.numpy() == pytest.approx([0.4, 0.0], abs=1e-6), "a part that is unlike on the whole gives nothing back"
    assert columns.likeness[0].numpy() == pytest.approx([-0.2, 0.0, 0.0, 0.2], abs=1e-6)
    assert torch.equal(columns.likeness[1], -has) and torch.equal(columns.likeness[2], has), "a key's stays"


def test_without_a_part_pairs_are_called_the_same_as_often_as_they_are() -> None:
    """A part that tells well is usually alike in half of the pairs; taking the mean away would call all different."""
    generator = np.random.default_rng(0)
    labels = torch.from_numpy((np.arange(400) < 120).astype(np.float64))
    strong, weak = (torch.from_numpy(generator.normal(0.1 * clear * labels.numpy(), 0.1)) for clear in (8, 1))
    columns = Columns(likeness=[strong, weak], there=[torch.ones(400, dtype=torch.float64)] * 2)
    usual = centre(columns)
    likeness, _, _, bias = regression(columns, labels)
    stacked, taken = torch.stack(columns.likeness, dim=1), likeness * usual
    more = corrections(columns, [[0], [1]], likeness, taken, stacked @ likeness + bias, labels)
    without = stacked[:, 1] * likeness[1] + bias
    assert torch.sigmoid(without).mean() < 0.7 * labels.mean()
    assert torch.sigmoid(without + more[0]).mean() == pytest.approx(float(labels.mean()))
    assert (taken + more >= 0).all()


@given(st.integers(0, 2**32 - 1), st.floats(-20, 20))
def test_the_most_likely_constant_makes_the_mean_probability_the_share_of_same_pairs(seed: int, base: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(40, generator=generator, dtype=torch.float64) + base
    labels = (torch.rand(40, generator=generator) < 0.4).double()
    labels[:2] = torch.tensor([0.0, 1.0])
    assert torch.sigmoid(scores + most_likely_constant(scores, labels)).mean() == pytest.approx(float(labels.mean()))


def test_pairs_of_one_label_alone_say_nothing_of_a_constant() -> None:
    assert most_likely_constant(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)) == 0
