"""The ablation: what is there is not run again, intervals go by product, a whole catalogue is counted right."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from worlds import read_jsonl, tiny_preset, write_jsonl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablate
import ablate_table

from tongkuan.base.metrics import average_precision, quality_at
from tongkuan.model.towers import pair_scores
from tongkuan.records.items import Pair

Run = Callable[..., int]


def pairs_of(text: str) -> list[Pair]:
    """`ab1 ac0`: pairs of items a, b and a, c, with their labels."""
    return [Pair(word[0], word[1], int(word[2])) for word in text.split()]


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    """The script on two recipes and two seeds, on a copy of the data."""
    shutil.copytree(data, tmp_path / "shop")
    parts = "{text: 0, image: 0, object_colour: 0, whole_colour: 8, keys: 4}"  # no network takes time to be imported
    tower = f"{tiny_preset(tmp_path)} model.towers=one model.embedding_size=64 'model.parts={parts}'"
    recipes = f'plain: "{tower} train.steps=2"\nfrozen: "{tower} train.steps=0"\n'
    (tmp_path / "recipes.yaml").write_text(recipes, encoding="utf-8")

    def run(*words: str) -> int:
        own = ["--out", tmp_path / "out", "--data", tmp_path / "shop", "--recipes", tmp_path / "recipes.yaml"]
        return ablate.main([*map(str, own), "--seeds", "2", *words])

    return run


def no_training(*_: object) -> None:
    raise AssertionError("trained")


# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_run_again_until_its_pairs_change(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / "out/shop/valid/plain-0.run/run/last.pt"
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b"of a run that was killed")
    assert run() == 0
    table = capsys.readouterr().out
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith(("| plain", "| frozen"))]
    assert [row[:2] for row in rows] == [["| plain", "2"], ["| frozen", "2"]]
    assert (tmp_path / "out/table.md").read_text(encoding="utf-8") + "\n" == table
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out/shop").rglob("*"))
    assert found == ["shop/valid", *(f"shop/valid/{name}-{seed}.json" for name in ("frozen", "plain") for seed in "01")]
    cell = orjson.loads((tmp_path / "out/shop/valid/plain-0.json").read_bytes())
    assert cell["cost"]["pairs"] == 24 + 2 * 4
    assert 18 + 2 * 2 + 18 <= cell["cost"]["encodings"] <= 18 + 2 * 8 + 18, "features, two steps and a validation"

    monkeypatch.setattr(ablate, "train", no_training)
    assert run() == 0
    assert capsys.readouterr().out == table

    pair_file = tmp_path / "shop/item_valid_pair.jsonl"
    write_jsonl(pair_file, read_jsonl(pair_file)[:-1])
    with pytest.raises(AssertionError, match="trained"):
        run()
    assert run("--only") == 0
    assert "| plain" not in capsys.readouterr().out, "results of other pairs are not shown"


def test_errors_of_the_user_are_a_line_and_train_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablate, "train", no_training)
    assert run("--only", "froze") == 2
    assert "did you mean 'frozen'" in capsys.readouterr().err
    for text, told in (("[]", "expected lines"), ("a: b: c", "not to be read"), ("a: small x=1", "section.key=value")):
        (tmp_path / "recipes.yaml").write_text(text, encoding="utf-8")
        assert run() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ablate: ")
        assert told in line
    assert run("--split", "test") == 2, "its pairs have no labels"


def test_products_are_what_label_1_joins() -> None:
    products = ablate_table.products_of(pairs_of("xy0 ab1 bc1 de1 cx0"))
    assert len(set(products.values())) == 4
    assert products["a"] == products["b"] == products["c"]
    assert products["x"] != products["y"]


def test_interval_by_product(tmp_path: Path) -> None:
    pairs = pairs_of("ab1 ac0 cd1 ef1 eg0 gh1 af0 bd0")
    labels = np.array([pair.label for pair in pairs])
    split = ablate_table.Split(
        tmp_path, "valid", pairs, labels, ablate_table.products_of(pairs), np.zeros((0, len(pairs)), dtype=bool), 1, {}
    )
    right = np.array([labels == 1, labels == 1])
    wrong = np.array([np.ones(len(pairs), dtype=bool)])
    found = ablate_table.intervals(split, {"first": right, "again": right, "worse": wrong})
    assert found["first"] == found["again"] == [0.0, 0.0]
    low, high = found["worse"]
    assert low < quality_at(np.ones(len(pairs)), labels, 0.0).f1 - 1 < high <= 0


def test_whole_catalogue_by_hand() -> None:
    """Items 0 and 1 are one product, 2 and 3 another. p is 0; of six pairs three score above the threshold."""
    q = np.array([[1, 0], [1, 0.2], [0.9, 0], [0, 1]], dtype=np.float32)
    found = ablate.catalogue(np.concatenate([np.zeros_like(q), q], axis=1), np.array([0, 0, 1, 1]), 0.5)
    # 0-1: 1 (same), 0-2 and 1-2: .9, 2-3: 0 (same), 0-3: 0, 1-3: .2
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == 0.5
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 6) / 2)


def test_whole_catalogue_in_blocks_is_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    embeddings, products = generator.integers(-2, 3, (40, 6)).astype(np.float32), generator.integers(0, 12, 40)
    left, right = np.triu_indices(40, 1)
    scores, labels = pair_scores(embeddings[left], embeddings[right]), (products[left] == products[right]).astype(int)
    quality = quality_at(scores, labels, 1.0)
    monkeypatch.setattr(ablate, "BLOCK", 7)
    found = ablate.catalogue(embeddings, products, 1.0)
    assert (found["precision"], found["recall"]) == (quality.precision, quality.recall)
    assert found["average_precision"] == pytest.approx(average_precision(scores, labels), abs=1e-12)
