"""The verb `match run`: its files, and what becomes of them when it is cut short."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_main import error_of
from worlds import make_data, read_jsonl, snapshot, write_jsonl

import tongkuan.encode.inference
from tongkuan.cli.verbs import main
from tongkuan.match import candidates, search
from tongkuan.model.towers import pair_scores


def match(data: Path, model: Path, out: Path, *more: object) -> Path:
    words = ["match", "run", "--data", data, "--model", model, "--out", out, "--partition-size", 7, *more]
    assert main([*map(str, words)]) == 0
    return out


def table(path: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return found


def parts(out: Path, kind: str) -> dict[str, list[Any]]:
    tables = [table(path) for path in sorted((out / kind).glob("part-*.parquet"))]
    return {name: [value for each in tables for value in each[name]] for name in tables[0]}


@pytest.fixture(scope="module")
def whole(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    return match(data, model, tmp_path_factory.mktemp("match") / "out", "--threshold", -4)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Labels of what is encoded from here on."""
    labels: list[str] = []
    encode = tongkuan.encode.inference.encode

    def noted(*arguments: Any) -> Any:
        labels.append(arguments[6])
        return encode(*arguments)

    monkeypatch.setattr(tongkuan.encode.inference, "encode", noted)
    yield labels


def test_every_listing_has_an_embedding_and_a_group(whole: Path, data: Path) -> None:
    ids = [row["item_id"] for row in read_jsonl(data / "item_test_info.jsonl")]
    assert len(list((whole / "embeddings").iterdir())) == 3
    assert parts(whole, "embeddings")["item_id"] == table(whole / "groups.parquet")["item_id"] == ids


def test_pairs_are_those_whose_score_is_above_the_models_threshold(whole: Path) -> None:
    """With a threshold of scaled cosines that lets all through, and 18 listings: every pair is a candidate."""
    embedded, found = parts(whole, "embeddings"), parts(whole, "pairs")
    manifest = json.loads((whole / "manifest.json").read_bytes())
    embeddings, ids = np.array(embedded["e"], np.float32), embedded["item_id"]
    wanted = {}
    for a, left in enumerate(ids):
        for b, right in enumerate(ids):
            score = pair_scores(embeddings[[a]], embeddings[[b]])[0]
            if left < right and score > manifest["score_above"]:
                wanted[left, right] = score
    assert dict(zip(zip(found["left"], found["right"], strict=True), found["score"], strict=True)) == wanted
    assert len(wanted) > 5


def test_groups_are_named_by_their_smallest_id_and_say_how_sure_they_are(whole: Path) -> None:
    groups = table(whole / "groups.parquet")
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups["group_id"]):
        members.setdefault(group, []).append(row)
    assert any(len(rows) > 1 for rows in members.values())
    for group, rows in members.items():
        assert group == min(groups["item_id"][row] for row in rows)
        assert {groups["size"][row] for row in rows} == {len(rows)}
        assert all(0 <= groups["density"][row] <= 1 for row in rows)
        assert (groups["weakest"][rows[0]] is None) == (len(rows) == 1)


def test_the_manifest_says_what_made_it_and_how_much_was_found(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_bytes())
    assert manifest["recall"] == {"of_matches": 1.0, "of_candidates": 1.0}
    assert manifest["threshold"] == {"value": -4.0, "source": "given", "reason": "as given"}
    assert manifest["counts"]["listings"] == 18 and len(manifest["sha256"]["model"]) == 64
    assert manifest["counts"]["pairs"] == len(parts(whole, "pairs")["left"])


@pytest.mark.parametrize("lost", ["embeddings/part-000001.parquet", "neighbours/part-000002.parquet", "manifest.json"])
def test_what_is_lost_is_made_again_and_nothing_else(
    lost: str, whole: Path, data: Path, model: Path, tmp_path: Path, encoded: list[str]
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    match(data, model, tmp_path / "out", "--threshold", -4)
    assert snapshot(tmp_path / "out") == snapshot(whole)
    assert encoded == (["embeddings 2/3"] if "embeddings" in lost else [])


@pytest.mark.parametrize("kind", ["embeddings", "neighbours", "pairs"])
def test_a_damaged_file_is_made_again(kind: str, whole: Path, data: Path, model: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    path = out / kind / "part-000000.parquet"
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    (out / kind / "part-000001.parquet").write_bytes(b"PAR1")
    match(data, model, out, "--threshold", -4)
    assert snapshot(out) == snapshot(whole)


def test_another_size_of_partitions_leaves_no_file_of_the_first(data: Path, model: Path, tmp_path: Path) -> None:
    out = match(data, model, tmp_path / "out")
    match(data, model, out, "--partition-size", 100)
    assert snapshot(out) == snapshot(match(data, model, tmp_path / "new", "--partition-size", 100))


def test_a_changed_item_costs_its_own_partition(model: Path, tmp_path: Path, encoded: list[str]) -> None:
    data = make_data(tmp_path / "data")
    match(data, model, tmp_path / "out", "--threshold", 0)
    encoded.clear()
    rows = read_jsonl(data / "item_test_info.jsonl")
    rows[8]["title"] = "杯子"
    write_jsonl(data / "item_test_info.jsonl", rows)
    match(data, model, tmp_path / "out", "--threshold", 0)
    assert encoded == ["embeddings 2/3"]
    assert snapshot(tmp_path / "out") == snapshot(match(data, model, tmp_path / "new", "--threshold", 0))


def test_copies_are_in_one_group_and_paired_with_the_first(model: Path, tmp_path: Path) -> None:
    """More copies than candidates: they do not hide what else is near."""
    data = make_data(tmp_path / "data")
    rows = read_jsonl(data / "item_test_info.jsonl")
    rows += [rows[4] | {"item_id": f"copy-{number}"} for number in range(30)]
    write_jsonl(data / "item_test_info.jsonl", rows)
    # One batch and one partition: how far a text is padded would otherwise change the last bits.
    more = ("--encode-batch", 64, "--partition-size", 64, "--candidates", 10)
    out = match(data, model, tmp_path / "out", *more)
    groups = table(out / "groups.parquet")
    group = dict(zip(groups["item_id"], groups["group_id"], strict=True))
    assert {group[f"copy-{number}"] for number in range(30)} == {group["test-1-1"]} == {"copy-0"}
    found = parts(out, "pairs")
    pairs = set(zip(found["left"], found["right"], strict=True))
    assert {(f"copy-{number}", "test-1-1") for number in range(30)} <= pairs
    assert not any(left.startswith("copy") and right.startswith("copy") for left, right in pairs)


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_every_engine_finds_the_same_in_a_small_catalogue(
    engine: str, whole: Path, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FEW", 0)
    monkeypatch.setattr(candidates, "FIRST_PROBES", 1000)  # all lists
    out = match(data, model, tmp_path / "out", "--threshold", -4, "--engine", engine)
    assert parts(out, "pairs")["left"] and sorted_pairs(out) == sorted_pairs(whole)
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert (manifest["probes"] is not None) == (engine == "faiss")


def sorted_pairs(out: Path) -> list[tuple[Any, ...]]:
    found = parts(out, "pairs")
    return sorted(zip(found["left"], found["right"], found["score"], found["cosine"], strict=True))


def test_within_a_category_no_pair_crosses(model: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    rows = read_jsonl(data / "item_test_info.jsonl")
    write_jsonl(
        data / "item_test_info.jsonl",
        [row | {"cate_name": f"c{number % 2}"} for number, row in enumerate(rows)],
    )
    out = match(data, model, tmp_path / "out", "--threshold", -4, "--within", "category")
    category = {row["item_id"]: number % 2 for number, row in enumerate(rows)}
    found = parts(out, "pairs")
    assert found["left"] and all(category[a] == category[b] for a, b in zip(found["left"], found["right"], strict=True))


def test_the_threshold_says_where_it_comes_from(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    match(data, model, tmp_path / "valid")
    assert "chosen on 18 labelled listings of valid" in capsys.readouterr().out
    pairs = read_jsonl(data / "item_test_pair.jsonl")
    write_jsonl(data / "item_test_pair.jsonl", [row | {"item_label": "1"} for row in pairs[:2]])
    match(data, model, tmp_path / "own")
    assert "chosen on 3 labelled listings of test" in capsys.readouterr().out
    for path in data.glob("*_pair.jsonl"):
        path.unlink()
    match(data, model, tmp_path / "none")
    assert "without labels" in capsys.readouterr().out
    assert not (tmp_path / "none" / "labelled").exists() and (tmp_path / "valid" / "labelled").exists()


def test_blank_pictures_are_told_of_whether_or_not_they_were_looked_at_now(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    (data / "images" / "test-2-1.png").unlink()
    for _ in range(2):
        manifest = match(data, model, tmp_path / "out") / "manifest.json"
        assert json.loads(manifest.read_bytes())["blank_pictures"] == ["test-2-1.png"]
        assert "count as blank, first 'test-2-1.png'" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    match(data, model, tmp_path / "out", "--dry-run")
    out = capsys.readouterr().out
    assert "test: 18 listings, 3 partitions" in out and "disk: " in out and "time: " in out
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(data: Path, model: Path, tmp_path: Path) -> None:
    words = ("match", "run", "--data", data, "--model", model, "--out")
    assert "is no finite number" in error_of(*words, tmp_path, "--threshold", "high")
    assert "--recall: '1.1' is no finite number above 0 up to 1" in error_of(*words, tmp_path, "--recall", 1.1)
    assert "is read here" in error_of(*words, data)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "item_test_info.jsonl").write_text("")
    empty = ("match", "run", "--data", tmp_path / "data", "--model", model, "--out", tmp_path / "out")
    assert "no items" in error_of(*empty)
    assert not (tmp_path / "out" / "embeddings").exists()


@pytest.mark.slow
def test_two_ranks_write_what_one_does(whole: Path, data: Path, model: Path, tmp_path: Path) -> None:
    out = match(data, model, tmp_path / "out", "--threshold", -4, "--nproc", 2)
    assert snapshot(out) == snapshot(whole)
