"""encode.py, predict.py, checkpoint.py and evaluate.py on a small trained model."""

from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import save_file
from worlds import write_jsonl

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.encode.encode import encode
from tongkuan.encode.store import open_store
from tongkuan.model.modelfile import load_model
from tongkuan.model.towers import pair_scores
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import item_file, pair_file, read_items, read_pairs
from tongkuan.records.result import read_predictions
from tongkuan.result.predict import predict
from tongkuan.settings import DataSettings

BATCH = 5


def result(submit: Path) -> bytes:
    return (submit / "result.jsonl").read_bytes()


def test_a_result_has_a_row_a_pair_in_order_and_an_embedding_an_item(data: Path, model: Path, tmp_path: Path) -> None:
    predict(data, "test", model, tmp_path, BATCH)
    pairs = read_pairs(pair_file(data, "test"), labels="optional")
    rows = [row for _, row in read_predictions(tmp_path / "result.jsonl")]
    assert [(row.left, row.right) for row in rows] == [(pair.left, pair.right) for pair in pairs]
    by_item: dict[str, set[bytes]] = {}
    for row in rows:
        by_item.setdefault(row.left, set()).add(row.left_embedding.tobytes())
        by_item.setdefault(row.right, set()).add(row.right_embedding.tobytes())
    assert all(len(versions) == 1 for versions in by_item.values())
    assert {row.threshold for row in rows} == {load_model(model)[1].threshold}


@pytest.mark.slow
def test_one_rank_and_two_write_identical_files(data: Path, model: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        words = ("--data", data, "--model", model, "--submit", tmp_path / str(count), "--nproc", count)
        assert main([*map(str, ("predict", *words, "--encode-batch", 5))]) == 0
    assert result(tmp_path / "1") == result(tmp_path / "2")


def test_cores_do_not_change_a_bit(data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores in (1, 3):
        monkeypatch.setattr("tongkuan.encode.encode.available_cores", lambda cores=cores: cores)
        predict(data, "test", model, tmp_path / str(cores), BATCH)
    assert result(tmp_path / "1") == result(tmp_path / "3")


def test_swapped_sides_have_the_same_score(data: Path, model: Path, tmp_path: Path) -> None:
    rows = [orjson.loads(line) for line in pair_file(data, "test").read_bytes().splitlines()]
    swapped = tmp_path / "data"
    swapped.mkdir()
    (swapped / "images").symlink_to(data / "images")
    item_file(swapped, "test").write_bytes(item_file(data, "test").read_bytes())
    write_jsonl(
        pair_file(swapped, "test"),
        [{"src_item_id": row["tgt_item_id"], "tgt_item_id": row["src_item_id"]} for row in rows],
    )
    scores = []
    for name, folder in (("a", data), ("b", swapped)):
        predict(folder, "test", model, tmp_path / name, BATCH)
        predictions = [row for _, row in read_predictions(tmp_path / name / "result.jsonl")]
        left = np.stack([row.left_embedding for row in predictions])
        right = np.stack([row.right_embedding for row in predictions])
        scores.append(pair_scores(left, right))
    assert np.array_equal(scores[0], scores[1])


def test_the_manifest_says_what_made_the_result_not_when_or_where(data: Path, model: Path, tmp_path: Path) -> None:
    from tongkuan.base.files import sha256_of

    for name in ("a", "b"):
        predict(data, "test", model, tmp_path / name, BATCH, threshold=0.25)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    manifest = orjson.loads((tmp_path / "a" / "manifest.json").read_bytes())
    assert manifest["sha256"]["model"] == sha256_of(model)
    assert manifest["sha256"]["result"] == sha256_of(tmp_path / "a" / "result.jsonl")
    assert manifest["threshold"] == 0.25
    assert torch.__version__.startswith(manifest["versions"]["torch"])
    assert str(tmp_path) not in orjson.dumps(manifest).decode()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_give_nearly_the_same_scores(data: Path, model: Path, precision: str) -> None:
    network, card = load_model(model)
    items = read_items(item_file(data, "valid"))
    store = open_store(items, data, card.settings, card.open_tokenizer(), 0)
    one = Ranks(0, 1, torch.device("cpu"))
    exact = encode(network, store, list(items), DataSettings(encode_batch=BATCH), one)
    rough = encode(network, store, list(items), DataSettings(encode_batch=BATCH), one, precision)
    for item_id in items:
        assert rough[item_id] == pytest.approx(exact[item_id], abs=0.05)


def test_a_failure_leaves_the_result_alone(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(data, "test", model, tmp_path, BATCH)
    before = result(tmp_path)

    def fail(*_: object) -> bytes:
        raise RuntimeError("disk gone")

    monkeypatch.setattr("tongkuan.result.predict.prediction_row", fail)
    with pytest.raises(RuntimeError):
        predict(data, "test", model, tmp_path, BATCH, threshold=9.0)
    assert result(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "result.jsonl", "similarity.py"]


def test_evaluate_prints_the_chosen_threshold(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, card = load_model(model)
    main(["evaluate", "--data", str(data), "--model", str(model), "--encode-batch", "5"])
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("chosen"))
    assert float(row[1]) == pytest.approx(card.threshold, abs=1e-4)
    assert float(row[2]) == pytest.approx(card.facts["valid_f1"], abs=1e-4)


def test_a_model_that_was_cut_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path / "cut.safetensors")


def test_a_model_of_other_settings_is_refused_by_the_first_wrong_weight(model: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(model, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wrong = {"tongkuan": metadata["tongkuan"].replace('"embedding_size":8', '"embedding_size":16')}
    save_file(tensors, tmp_path / "other.safetensors", metadata=wrong)
    with pytest.raises(UserError, match=r"disagree at threshold\.head\.weight; this is a model of other settings"):
        load_model(tmp_path / "other.safetensors")
