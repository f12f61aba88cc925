"""Asking a matched catalogue about a listing, and whether it is whole: `match query` and `match check`."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks.catalogue import match_embeddings
from match_worlds import planted
from test_main import error_of
from test_match_run import match, parts, table
from worlds import read_jsonl, snapshot, write_jsonl

from tongkuan.base.errors import FailureError
from tongkuan.base.files import sha256_of
from tongkuan.cli.verbs import main
from tongkuan.match.candidates import unit_rows
from tongkuan.match.files import Folder
from tongkuan.match.join import Verdict
from tongkuan.match.options import Options
from tongkuan.match.query import Searcher
from tongkuan.match.state import open_state
from tongkuan.match.stores.fill import open_store
from tongkuan.match.transaction import read_manifest, staged


@pytest.fixture(scope="module")
def whole(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    return match(data, model, tmp_path_factory.mktemp("match") / "out", "--threshold", 0)


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(whole, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def searcher_of(tmp_path: Path, num_listings: int = 300) -> tuple[Searcher, np.ndarray]:
    embeddings, _ = planted(num_listings)
    embeddings[7] = embeddings[3]
    ids = [f"i{row:03}" for row in range(num_listings)]
    folder = match_embeddings(tmp_path, ids, embeddings, Verdict(-5.0, 0.3), Options())
    return Searcher.of(open_state(folder)), embeddings


def test_a_store_that_names_the_nearest_gives_the_same_answers(tmp_path: Path) -> None:
    searcher, embeddings = searcher_of(tmp_path)
    with open_store(searcher.state.folder) as store:
        asked = Searcher.of(searcher.state, store)
        for row in (0, 3, 250):
            assert asked.stored(f"i{row:03}", 8) == searcher.stored(f"i{row:03}", 8)
        assert asked.new(embeddings[9] * 1.5, "", 5) == searcher.new(embeddings[9] * 1.5, "", 5)
        store.upsert(["since"], [""], embeddings[:1])  # which the files do not have yet
        assert asked.stored("i000", 8) == searcher.stored("i000", 8)


def test_the_nearest_come_in_the_order_of_their_cosines_with_what_the_run_says_of_each_pair(tmp_path: Path) -> None:
    searcher, embeddings = searcher_of(tmp_path)
    units = unit_rows(embeddings).astype(np.float64)
    found = parts(tmp_path, "pairs")
    numbers = zip(found["score"], found["scaled"], strict=True)
    pairs = dict(zip(zip(found["left"], found["right"], strict=True), numbers, strict=True))
    groups = dict(zip(searcher.state.item_ids, searcher.group_ids, strict=True))
    matches = 0
    for row in (0, 3, 7, 299):
        cosines = units @ units[row]
        cosines[row] = -2
        hits = searcher.stored(f"i{row:03}", 20)
        assert {hit.item_id for hit in hits} == {f"i{other:03}" for other in np.argsort(-cosines)[:20]}
        assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)
        for hit in hits:
            first = "i003" if row == 7 else f"i{row:03}"  # a copy has the pairs of the listing that it is one of
            pair = tuple(sorted((first, hit.item_id)))
            if hit.item_id not in ("i003", "i007"):
                assert hit.is_match == (pair in pairs)
            if pair in pairs:
                assert (hit.score, hit.scaled) == pytest.approx(pairs[pair], abs=1e-6)
                matches += hit.is_match
            assert hit.group_id == groups[hit.item_id]
    assert matches > 8


def test_a_new_listing_that_is_a_copy_is_told_what_the_stored_one_is_told(tmp_path: Path) -> None:
    searcher, embeddings = searcher_of(tmp_path)
    new = searcher.new(embeddings[10], "", 6)
    assert new[0].item_id == "i010" and new[0].cosine == 1.0
    assert new[1:] == searcher.stored("i010", 5)


def test_more_than_there_are_gives_all(tmp_path: Path) -> None:
    searcher, embeddings = searcher_of(tmp_path, 12)
    assert len(searcher.stored("i000", 50)) == 11 and len(searcher.new(embeddings[0] + 1, "", 50)) == 12


def test_a_query_of_a_hundred_thousand_listings_takes_less_than_a_fifth_of_a_second(tmp_path: Path) -> None:
    searcher, _ = searcher_of(tmp_path)
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(100_000, 256)).astype(np.float32)
    ids = [f"i{row:06}" for row in range(100_000)]
    columns = {"item_id": ids, "group_id": ids, "mean": np.zeros(100_000)}
    other = {"item_ids": ids, "categories": ids, "embeddings": embeddings, "groups": pa.table(columns)}
    searcher = Searcher.of(dataclasses.replace(searcher.state, **other))
    times = []
    for row in range(5):
        started = time.process_time()
        assert searcher.new(embeddings[row] + 0.1, "", 10)[0].item_id == ids[row]
        times.append(time.process_time() - started)
    assert np.median(times) < 0.2


def test_a_stored_and_a_new_listing_are_looked_up_by_the_verb(
    whole: Path, data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(whole)
    row = read_jsonl(data / "item_test_info.jsonl")[4]
    main(["match", "query", "--item", row["item_id"], "--top", "3", "--out", str(whole)])
    stored = capsys.readouterr().out.splitlines()
    assert len(stored) == 6 and row["item_id"] in stored[0] and stored[-1].startswith("next: ")
    write_jsonl(tmp_path / "new.jsonl", [row | {"item_id": "new\x1b[31m"}])
    words = ["--json", tmp_path / "new.jsonl", "--data", data, "--model", model, "--top", 1, "--out", whole]
    main(["match", "query", *map(str, words)])
    new = capsys.readouterr().out.splitlines()
    assert "\x1b" not in new[0] and new[2].split()[-2:] == [f"{row['item_id']},", group_of(whole, row["item_id"])]
    assert float(new[2].split()[2]) == pytest.approx(1, abs=1e-4)
    assert snapshot(whole) == before


def group_of(out: Path, item_id: str) -> str:
    groups = table(out / "groups.parquet")
    return str(groups["group_id"][groups["item_id"].index(item_id)])


def test_errors_of_a_query_are_one_line(whole: Path, data: Path, model: Path, tmp_path: Path) -> None:
    query, out = ("match", "query"), ("--out", whole)
    assert "no listing 'test-0-9' (did you mean 'test-0-" in error_of(*query, "--item", "test-0-9", *out)
    assert "one listing at a time" in error_of(*query, "--item", "a", "--json", tmp_path / "a", *out)
    write_jsonl(tmp_path / "two", [{"item_id": "a"}, {"item_id": "b"}])
    new = ("--data", data, "--model", model, *out, "--json")
    assert "2 items; put one listing there" in error_of(*query, *new, tmp_path / "two")
    assert "no such file" in error_of(*query, *new, tmp_path / "none")
    assert "so no finished catalogue" in error_of(*query, "--out", tmp_path / "none")
    broken = shutil.copytree(whole, tmp_path / "broken")
    (broken / "groups.parquet").write_bytes(b"PAR1")
    assert "see ./entrypoint.sh match check" in error_of(*query, "--out", broken)


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def faults(out: Path) -> list[str]:
    with pytest.raises(FailureError) as caught:
        main(["match", "check", "--out", str(out)])
    return str(caught.value).splitlines()


def test_a_whole_catalogue_is_said_to_be_so_with_its_recall(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "check", "--out", str(whole)]) == 0
    out = capsys.readouterr().out
    assert "18 listings" in out and "recall 1.0000 of matches" in out


def test_each_damaged_or_missing_file_is_a_line(own: Path) -> None:
    names = sorted(json.loads((own / "manifest.json").read_bytes())["files"])
    assert len(names) == 10
    for name in names[1:]:
        content = bytearray((own / name).read_bytes())
        content[-20] ^= 1
        (own / name).write_bytes(content)
    (own / names[0]).unlink()
    lines = faults(own)
    assert [line.split(":")[0] for line in lines] == [str(own / name) for name in names]
    assert "no such file" in lines[0] and "not the file that manifest.json names" in lines[1]


def changed_table(out: Path, name: str, column: str, values: object) -> None:
    """Put other values into a file and its sum into the manifest, as a fault of the program would."""
    found = pq.read_table(out / name)
    place = found.column_names.index(column)
    pq.write_table(found.set_column(place, column, pa.array(values, found.schema.field(column).type)), out / name)
    manifest = json.loads((out / "manifest.json").read_bytes())
    manifest["files"][name] = sha256_of(out / name)
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_files_that_do_not_fit_each_other_are_told(whole: Path, tmp_path: Path) -> None:
    groups, pairs = table(whole / "groups.parquet"), table(whole / "pairs/part-000000.parquet")
    ids, left = groups["item_id"], pairs["left"]
    wrong = {
        ("groups.parquet", "item_id"): (["x", *ids[1:]], "other listings than the embeddings"),
        ("groups.parquet", "size"): ([size + 1 for size in groups["size"]], "groups have another size"),
        ("embeddings/part-000000.parquet", "item_id"): ([ids[1], *ids[1:7]], "other listings"),
        ("pairs/part-000000.parquet", "left"): (["a", *left[1:]], "1 pairs name listings that are not there"),
        ("pairs/part-000000.parquet", "score"): ([-99.0, *pairs["score"][1:]], "1 pairs are below a threshold"),
        ("pairs/part-000000.parquet", "cosine"): ([0.5 for _ in left], "cosine of a pair is not that"),
    }
    for number, ((name, column), (values, line)) in enumerate(wrong.items()):
        out = shutil.copytree(whole, tmp_path / str(number))
        changed_table(out, name, column, values)
        assert any(line in each for each in faults(out)), (name, column, faults(out))


def test_counts_of_another_catalogue_are_told(own: Path) -> None:
    manifest = json.loads((own / "manifest.json").read_bytes())
    manifest["counts"] |= {"pairs": 1, "largest": 99}
    manifest["recall"]["of_matches"] = 2.0
    (own / "manifest.json").write_text(json.dumps(manifest))
    lines = faults(own)
    assert len(lines) == 3 and "1 pairs, but files have" in lines[0] and "99 largest" in lines[1]
    assert "recall" in lines[2]


def test_a_change_that_was_killed_before_its_last_steps_is_read_as_done(own: Path) -> None:
    """Between the manifest and the move of the new groups to their name."""
    assert main(["match", "remove", "test-0-0", "--out", str(own)]) == 0
    wanted, folder = snapshot(own), Folder(own)
    (own / "groups.parquet").rename(staged(folder, "groups.parquet", 1))
    (own / "groups.parquet").write_bytes(b"the old ones")
    (own / "pairs/part-c000009-000000.parquet").write_bytes(b"of a change that never took place")
    assert main(["match", "check", "--out", str(own)]) == 0
    assert "test-0-0" not in open_state(folder).item_ids
    assert main(["match", "remove", "test-0-0", "--out", str(own)]) == 0
    assert snapshot(own) == wanted


def test_who_reads_meanwhile_has_the_state_of_before_or_after(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change between the manifest and the files: what was read counts not, and is read again."""
    from tongkuan.match import state

    load, calls = state.load, []

    def interrupted(folder: Folder, manifest: dict[str, object]) -> object:
        calls.append(manifest)
        if len(calls) == 1:
            main(["match", "remove", "test-0-0", "--out", str(own)])
        return load(folder, manifest)

    monkeypatch.setattr(state, "load", interrupted)
    assert "test-0-0" not in open_state(Folder(own)).item_ids


def test_a_manifest_that_names_files_elsewhere_is_refused(own: Path) -> None:
    manifest = read_manifest(Folder(own))
    manifest["files"]["pairs/../../part-0.parquet"] = ""
    (own / "manifest.json").write_text(json.dumps(manifest))
    assert "'files' is not as match run writes it" in error_of("match", "check", "--out", own)
