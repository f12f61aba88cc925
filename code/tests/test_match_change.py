"""Catalogues that grow and shrink: `match add` and `match remove`, and the ids of groups meanwhile."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from benchmarks.catalogue import embedding_table, match_embeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from match_worlds import planted
from test_main import error_of
from test_match_run import match, parts, table
from worlds import make_data, read_jsonl, snapshot, write_jsonl

from tongkuan.base.files import sole_process
from tongkuan.cli.verbs import main
from tongkuan.match import living
from tongkuan.match.change import apply
from tongkuan.match.files import Folder
from tongkuan.match.groups import group
from tongkuan.match.join import Listings, Verdict, read_pairs
from tongkuan.match.options import Options
from tongkuan.match.scores import Catalogue, all_pairs, concatenated
from tongkuan.match.stable import stable_ids
from tongkuan.match.state import State, open_state

VERDICT = Verdict(-20.0, 0.5)


def ids_of(rows: Any) -> list[str]:
    return [f"i{row:03}" for row in rows]


def change(folder: Folder, embeddings: Any, added: Any = (), removed: Any = (), request: str = "") -> State:
    """Rows added and removed by number; the state after it."""
    state = open_state(folder)
    gone = np.isin(np.array(state.item_ids), [*ids_of(removed), *ids_of(added)])
    apply(state, gone, embedding_table(ids_of(added), embeddings[list(added)]), request)
    return open_state(folder)


def pairs_of(folder: Folder) -> dict[tuple[str, str], float]:
    found = parts(folder.path, "pairs")
    return dict(zip(zip(found["left"], found["right"], strict=True), found["scaled"], strict=True))


def group_of(state: State) -> dict[str, str]:
    return dict(zip(state.item_ids, state.groups["group_id"].to_pylist(), strict=True))


def members(groups: dict[str, str]) -> set[frozenset[str]]:
    found: dict[str, set[str]] = {}
    for item_id, group_id in groups.items():
        found.setdefault(group_id, set()).add(item_id)
    return {frozenset(each) for each in found.values()}


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def test_listings_added_one_by_one_find_what_a_full_run_with_the_same_means_finds(tmp_path: Path) -> None:
    """And what a run of all with its own means finds else, or does not find, those means explain."""
    embeddings, products = planted(56)
    folder = match_embeddings(tmp_path / "half", ids_of(range(36)), embeddings[:36], VERDICT, Options())
    for row in range(36, 56):
        state = change(folder, embeddings, added=[row])
    catalogue = Catalogue(embeddings, state.means, np.zeros(56, np.int32))
    wanted = all_pairs(catalogue, np.arange(56, dtype=np.int32), VERDICT.score_floor, VERDICT.threshold)
    names = [(f"i{a:03}", f"i{b:03}") for a, b in zip(wanted.left, wanted.right, strict=True)]
    grown = pairs_of(folder)
    assert grown == pytest.approx(dict(zip(names, wanted.scaled, strict=True)), abs=1e-5)
    whole = match_embeddings(tmp_path / "whole", ids_of(range(56)), embeddings, VERDICT, Options())
    fresh, means = pairs_of(whole), open_state(whole).means
    for found, own, other, others in ((grown, state.means, fresh, means), (fresh, means, grown, state.means)):
        for pair in found.keys() - other.keys():
            rows = [int(side[1:]) for side in pair]
            assert found[pair] + own[rows].sum() - others[rows].sum() <= VERDICT.threshold + 1e-5
    mates = {pair for pair in fresh if products[int(pair[0][1:])] == products[int(pair[1][1:])]}
    assert len(mates) > 60 and len(mates - grown.keys()) < 0.02 * len(mates)


def test_groups_are_those_that_linking_all_pairs_anew_makes(tmp_path: Path) -> None:
    embeddings, _ = planted(90, noise=0.6)
    folder = match_embeddings(tmp_path, ids_of(range(60)), embeddings[:60], VERDICT, Options())
    change(folder, embeddings, added=range(60, 80), removed=[3, 10, 11])
    state = change(folder, embeddings, added=range(80, 90), removed=[70, 20])
    check_groups(state)
    assert sum(len(each) > 1 for each in members(group_of(state))) > 5


def check_groups(state: State) -> None:
    """The groups of the state are the linkage of all its pairs, and what the file says of them is so."""
    listings = Listings.of(state.item_ids, state.embeddings, [""] * len(state.item_ids))
    catalogue = Catalogue(listings.embeddings, state.means[listings.firsts], listings.categories)
    firsts = [state.item_ids[row] for row in listings.firsts]
    pairs = concatenated([read_pairs(state.pairs(name), pa.array(firsts)) for name in state.pair_files])
    linked = group(len(firsts), pairs.left, pairs.right, pairs.scaled, VERDICT.threshold, catalogue.scaled)
    labels = linked.labels[listings.numbers].tolist()
    found = group_of(state)
    assert members(found) == members(dict(zip(state.item_ids, map(str, labels), strict=True)))
    sizes = dict(zip(state.item_ids, state.groups["size"].to_pylist(), strict=True))
    assert all(sizes[item_id] == len(each) for each in members(found) for item_id in each)


@settings(max_examples=15)
@given(drawn=st.data())
def test_ids_of_untouched_groups_never_change(drawn: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever comes and goes, copies among it: groups that no path of pairs leads to from there stay as they are."""
    embeddings, _ = planted(60, noise=0.6)
    embeddings[55:] = embeddings[:5]  # copies
    folder = match_embeddings(tmp_path_factory.mktemp("c"), ids_of(range(40)), embeddings[:40], VERDICT, Options())
    left_alone = 0
    state = open_state(folder)
    for number in range(drawn.draw(st.integers(1, 3))):
        rows = sorted(int(item_id[1:]) for item_id in state.item_ids)
        removed = drawn.draw(st.lists(st.sampled_from(rows), unique=True, max_size=min(6, len(rows) - 1)))
        absent = sorted({*range(60)} - {*rows})
        added = drawn.draw(st.lists(st.sampled_from(absent), unique=True, max_size=6)) if absent else []
        before, old = group_of(state), pairs_of(folder)
        state = change(folder, embeddings, added=added, removed=removed, request=str(number))
        after, new = group_of(state), pairs_of(folder)
        check_groups(state)
        seeds = {*ids_of(added), *ids_of(removed)}
        touched = {item_id for pairs in (old, new) for pair in pairs if seeds & {*pair} for item_id in pair} | seeds
        for item_id, group_id in before.items():
            if not connected(item_id, touched, old | new):
                assert after[item_id] == group_id
                left_alone += 1
        assert len(set(after.values())) == len(members(after))
        log = table(folder.path / f"changes/part-c{number + 1:06}-000000.parquet")
        told = {item_id: (a, b) for item_id, a, b in zip(log["item_id"], log["before"], log["after"], strict=True)}
        all_ids = before.keys() | after.keys()
        wanted = {each: (before.get(each), after.get(each)) for each in all_ids if before.get(each) != after.get(each)}
        assert told == wanted and set(log["change"]) <= {number + 1}
        assert main(["match", "check", "--out", str(folder.path)]) == 0
    assert left_alone > 0


def connected(item_id: str, others: set[str], pairs: Any) -> bool:
    """Whether a path of pairs leads from one listing to any of the others."""
    reached, border = {item_id}, {item_id}
    while border:
        border = {side for pair in pairs if border & {*pair} for side in pair} - reached
        reached |= border
    return bool(reached & others)


def test_after_a_merge_the_smallest_id_survives_and_after_a_split_the_largest_part_keeps_it() -> None:
    assert stable_ids(["b", "c", "d"], [0, 0, 0], ["b", "b", "d"], set()) == {0: "b"}
    assert stable_ids(["a", "b", "c"], [0, 0, 0], [None, "b", "b"], set()) == {0: "b"}  # a new one has had no group
    assert stable_ids(["a", "b", "c"], [0, 1, 1], ["a", "a", "a"], set()) == {0: "a~2", 1: "a"}
    assert stable_ids(["a", "b", "c", "d"], [0, 1, 0, 1], ["a"] * 4, set()) == {0: "a", 1: "b"}
    assert stable_ids(["b", "a"], [0, 0], [None, None], {"a"}) == {0: "b"}
    assert stable_ids(["a"], [0], [None], {"a", "a~2"}) == {0: "a~3"}


def test_an_update_of_a_whole_group_keeps_its_id_and_is_no_change_of_group(tmp_path: Path) -> None:
    embeddings, _ = planted(60)
    folder = match_embeddings(tmp_path, ids_of(range(60)), embeddings, VERDICT, Options())
    before = group_of(open_state(folder))
    group_id, own = max((len(each), min(each), each) for each in members(before))[1:]
    renamed = change(folder, embeddings, removed=[int(group_id[1:])])
    assert {group_of(renamed)[each] for each in own - {group_id}} == {group_id}
    rows = sorted(int(each[1:]) for each in own - {group_id})
    state = change(folder, 2 * embeddings, added=rows)
    assert {group_of(state)[f"i{row:03}"] for row in rows} == {group_id} and len(rows) > 1
    assert table(tmp_path / "changes/part-c000002-000000.parquet")["item_id"] == []


def test_a_removed_listing_leaves_its_copies_with_its_pairs(tmp_path: Path) -> None:
    embeddings, _ = planted(40)
    embeddings[30] = embeddings[31] = embeddings[0]
    folder = match_embeddings(tmp_path, ids_of(range(40)), embeddings, VERDICT, Options())
    mates = {pair: value for pair, value in pairs_of(folder).items() if "i000" in pair}
    assert len(mates) > 3
    change(folder, embeddings, removed=[0])
    left = {pair: value for pair, value in pairs_of(folder).items() if "i030" in pair}
    wanted = {tuple(sorted("i030" if side == "i000" else side for side in pair)): mates[pair] for pair in mates}
    wanted.pop(("i030", "i030"))
    assert left == wanted and ("i030", "i031") in left


def test_an_index_finds_what_looking_at_all_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, _ = planted(200)
    folders = []
    for name, work in (("all", 1e9), ("index", 0)):
        folder = match_embeddings(tmp_path / name, ids_of(range(150)), embeddings[:150], VERDICT, Options(recall=1.0))
        monkeypatch.setattr(living, "EXACT_WORK", work)
        monkeypatch.setattr("tongkuan.match.search.FEW", 0)
        change(folder, embeddings, added=range(150, 200))
        folders.append(folder)
    assert pairs_of(folders[0]) == pytest.approx(pairs_of(folders[1]), abs=0.03) and len(pairs_of(folders[0])) > 200


def test_a_file_of_which_every_listing_is_removed_goes(tmp_path: Path) -> None:
    embeddings, _ = planted(30)
    folder = match_embeddings(tmp_path, ids_of(range(20)), embeddings[:20], VERDICT, Options())
    change(folder, embeddings, added=range(20, 25))
    change(folder, embeddings, added=range(20, 25), removed=[1])  # updates of all that the first one added
    names = [path.name for path in sorted((tmp_path / "embeddings").iterdir())]
    assert names == ["part-000000.parquet", "part-c000002-000000.parquet"]
    assert table(tmp_path / "tombstones.parquet") == {"file": ["embeddings/part-000000.parquet"], "item_id": ["i001"]}


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


@pytest.fixture(scope="module")
def halves(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, `new.jsonl` of six listings that the run in `match` did not have; no test changes it."""
    top = tmp_path_factory.mktemp("halves")
    own = make_data(top / "data")
    rows = read_jsonl(own / "item_test_info.jsonl")
    write_jsonl(own / "item_test_info.jsonl", rows[:12])
    write_jsonl(top / "new.jsonl", rows[12:])
    match(own, model, top / "match", "--threshold", -4)
    return top


@pytest.fixture
def grown(halves: Path, tmp_path: Path) -> Path:
    """A copy of the same that a test may change."""
    return shutil.copytree(halves, tmp_path / "top")


def add(top: Path, model: Path, items: str = "new.jsonl") -> list[str]:
    words = ["match", "add", "--items", top / items, "--data", top / "data", "--model", model, "--out", top / "match"]
    return [*map(str, words)]


def manifest_of(top: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((top / "match/manifest.json").read_bytes())
    return found


def test_added_listings_are_matched_with_the_old_and_with_each_other(
    grown: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(add(grown, model)) == 0
    out = capsys.readouterr().out
    assert "6 listings added, 0 updated" in out and "33% of the listings are new" in out
    found = parts(grown / "match", "pairs")
    new = {row["item_id"] for row in read_jsonl(grown / "new.jsonl")}
    counts = {len({*pair} & new) for pair in zip(found["left"], found["right"], strict=True)}
    assert counts == {0, 1, 2}
    assert len(table(grown / "match/groups.parquet")["item_id"]) == manifest_of(grown)["counts"]["listings"] == 18
    assert main(["match", "check", "--out", str(grown / "match")]) == 0


def test_adding_the_same_again_changes_nothing(grown: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(add(grown, model))
    once = snapshot(grown / "match")
    main(add(grown, model))
    assert "added by the last change" in capsys.readouterr().out and snapshot(grown / "match") == once
    rows = read_jsonl(grown / "new.jsonl")
    write_jsonl(grown / "again.jsonl", [*rows[:5], rows[5] | {"title": "红茶"}])
    main([*add(grown, model, "again.jsonl")])
    assert "0 listings added, 1 updated" in capsys.readouterr().out
    main([*add(grown, model, "again.jsonl")])
    write_jsonl(grown / "some.jsonl", rows[:5])
    changed = snapshot(grown / "match")
    main([*add(grown, model, "some.jsonl")])
    assert "nothing has changed" in capsys.readouterr().out and snapshot(grown / "match") == changed


def test_an_update_replaces_a_listing(grown: Path, model: Path) -> None:
    rows = read_jsonl(grown / "data/item_test_info.jsonl")
    write_jsonl(grown / "new.jsonl", [rows[0] | {"title": "红茶 礼盒", "item_pvs": ""}])
    before = parts(grown / "match", "embeddings")["e"][0]
    main(add(grown, model))
    state = open_state(Folder(grown / "match"))
    assert state.item_ids == [row["item_id"] for row in rows[1:12]] + [rows[0]["item_id"]]
    assert state.embeddings[-1].tolist() != before
    assert table(grown / "match/tombstones.parquet")["item_id"] == [rows[0]["item_id"]]
    assert main(["match", "check", "--out", str(grown / "match")]) == 0


def test_removed_listings_are_in_no_pair_and_no_group(
    grown: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ids = [row["item_id"] for row in read_jsonl(grown / "data/item_test_info.jsonl")]
    (tmp_path / "ids.txt").write_text(f"{ids[1]}\r\n\n{ids[2]}\n")
    words = ["match", "remove", ids[0], "--ids", str(tmp_path / "ids.txt"), "--out", str(grown / "match")]
    assert main(words) == 0
    assert "3 listings removed" in capsys.readouterr().out
    found = parts(grown / "match", "pairs")
    assert not {*found["left"], *found["right"]} & {*ids[:3]} and found["left"]
    assert table(grown / "match/groups.parquet")["item_id"] == ids[3:]
    once = snapshot(grown / "match")
    assert main(words) == 0 and snapshot(grown / "match") == once  # as after a kill
    assert main(["match", "check", "--out", str(grown / "match")]) == 0
    write_jsonl(tmp_path / "items.jsonl", [{"item_id": item_id} for item_id in ids[3:5]])
    assert main(["match", "remove", "--ids", str(tmp_path / "items.jsonl"), "--out", str(grown / "match")]) == 0
    assert table(grown / "match/groups.parquet")["item_id"] == ids[5:]


def test_within_a_category_new_pairs_do_not_cross_either(grown: Path, model: Path) -> None:
    for name in ("data/item_test_info.jsonl", "new.jsonl"):
        rows = [row | {"cate_name": f"c{number % 2}"} for number, row in enumerate(read_jsonl(grown / name))]
        write_jsonl(grown / name, rows)
    match(grown / "data", model, grown / "match", "--threshold", -4, "--within", "category")
    main(add(grown, model))
    embedded, found = parts(grown / "match", "embeddings"), parts(grown / "match", "pairs")
    category = dict(zip(embedded["item_id"], embedded["category"], strict=True))
    pairs = list(zip(found["left"], found["right"], strict=True))
    new = {row["item_id"] for row in read_jsonl(grown / "new.jsonl")}
    assert any(new & {*pair} for pair in pairs) and all(category[a] == category[b] for a, b in pairs)
    assert main(["match", "check", "--out", str(grown / "match")]) == 0


def test_a_full_run_after_changes_is_as_one_in_an_empty_folder(grown: Path, model: Path, tmp_path: Path) -> None:
    main(add(grown, model))
    main(["match", "remove", "test-0-0", "--out", str(grown / "match")])
    match(grown / "data", model, grown / "match", "--threshold", -4)
    whole = match(grown / "data", model, tmp_path / "new", "--threshold", -4)
    assert snapshot(grown / "match") == snapshot(whole)
    assert sorted(path.name for path in (grown / "match").iterdir()) == sorted(path.name for path in whole.iterdir())


class Crashed(BaseException):
    """As if the process were killed."""


def test_a_crash_at_any_rename_or_deletion_is_made_good_by_the_same_command(
    halves: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update and a new listing, so that every kind of file is written, moved and deleted."""
    start = shutil.copytree(halves, tmp_path / "start")
    rows = [*read_jsonl(start / "data/item_test_info.jsonl"), *read_jsonl(start / "new.jsonl")]
    write_jsonl(start / "new.jsonl", [rows[0] | {"title": "红茶"}, rows[12]])
    main(add(shutil.copytree(start, tmp_path / "whole"), model))
    wanted, steps = snapshot(tmp_path / "whole/match"), [0]

    def counted(step: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            steps[0] -= 1
            if steps[0] == 0:
                raise Crashed
            return step(*arguments, **named)

        return run

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    for moment in range(1, 100):
        top = shutil.copytree(start, tmp_path / str(moment))
        steps[0] = moment
        try:
            main(add(top, model))
        except Crashed:
            steps[0] = 0
            main(add(top, model))
            assert snapshot(top / "match") == wanted, f"step {moment}"
        else:
            break
    assert moment > 10


def test_errors_are_one_line_and_nothing_is_changed(
    grown: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(grown / "match")
    out = ("--out", grown / "match")
    assert "run ./entrypoint.sh match run" in error_of("match", "remove", "a", "--out", tmp_path / "none")
    line = error_of("match", "remove", "test-0-0", "test-0-9", *out)
    assert "no listing 'test-0-9' (did you mean 'test-0-" in line and "nothing was removed" in line
    assert "no ids" in error_of("match", "remove", *out)
    ids = [row["item_id"] for row in read_jsonl(grown / "data/item_test_info.jsonl")]
    assert "these are all its listings" in error_of("match", "remove", *ids, *out)
    (tmp_path / "other").write_bytes(model.read_bytes() + b" ")
    assert "another model than the catalogue's" in error_of(*add(grown, tmp_path / "other"))
    (grown / "empty.jsonl").write_text("")
    assert "no items" in error_of(*add(grown, model, "empty.jsonl"))
    with sole_process(grown / "match"):
        assert "another process fills this folder" in error_of("match", "remove", ids[0], *out)
    assert snapshot(grown / "match") == before
    (grown / "match/manifest.json").write_text('{"sha256": {}}')
    assert "is not as match run writes it" in error_of("match", "remove", ids[0], *out)
