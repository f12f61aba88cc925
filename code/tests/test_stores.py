"""The contract of stores: whoever keeps it may stand behind `match query`. And how a server is filled.

The contract is one test a store, each clause a subtest: a server is slow to start and shall be started once.
"""

import http.server
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from match_worlds import planted
from store_worlds import MODEL, matched, milvus_packages, milvus_server
from test_main import error_of

from tongkuan.base.errors import UserError
from tongkuan.encode.encode import Embeddings
from tongkuan.match.stores import fill
from tongkuan.match.stores.fill import match_store, open_store
from tongkuan.match.stores.flat import FaissStore
from tongkuan.match.stores.milvus import TOKEN, MilvusStore, check_version, connect
from tongkuan.match.stores.source import Source
from tongkuan.match.stores.store import Store

New = Callable[[], Store]
"""A new, empty store of embeddings of WIDTH numbers."""
WIDTH = 16
ODD_IDS = [
    "杯子 300ml",
    "it's",
    'say "hi"',
    "back\\slash",
    '" or key != "',
    "%",
    "new\nline",
    "长" * 200,
    " ",
    "A",
    "a",
]


def some(count: int, seed: int = 0) -> Embeddings:
    return planted(count, WIDTH, seed=seed)[0]


def names(count: int) -> list[str]:
    return [f"id-{number:05}" for number in range(count)]


def ids_of(store: Store, query: Embeddings, k: int, category: str | None = None) -> list[str]:
    return store.search(query[None], k, category).ids[0]


def exact(embeddings: Embeddings, queries: Embeddings, ids: list[str], k: int) -> list[list[str]]:
    """By looking at all, in float64."""
    stored, asked = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (embeddings * 1.0, queries * 1.0))
    cosines = (asked.astype(np.float64) @ stored.T.astype(np.float64)).astype(np.float32)
    return [[ids[row] for row in sorted(range(len(ids)), key=lambda row: (-own[row], ids[row]))[:k]] for own in cosines]


# ---------------------------------------------------------------------------------------------------------------------
# The contract


def what_was_written_and_deleted_is_counted(new: New) -> None:
    store, ids, embeddings = new(), names(30), some(30)
    assert store.count() == 0 and ids_of(store, embeddings[0], 3) == []
    store.upsert(ids[:20], ["c"] * 20, embeddings[:20])
    store.upsert(ids[10:], ["c"] * 20, embeddings[10:])
    assert store.count() == 30
    store.delete(ids[:5])
    assert store.count() == 25


def a_listing_finds_itself_first(new: New) -> None:
    store, ids, embeddings = new(), names(100), some(100)
    store.upsert(ids, ["c"] * 100, embeddings)
    found = store.search(embeddings, 4)
    assert [own[0] for own in found.ids] == ids
    assert all(own[0] == 1 and (np.diff(own) <= 0).all() and own.dtype == np.float32 for own in found.cosines)
    assert [len(own) for own in found.ids] == [len(own) for own in found.cosines] == [4] * 100


def an_upsert_replaces_embedding_and_category(new: New) -> None:
    store, ids, embeddings = new(), names(10), some(20)
    store.upsert(ids, ["old"] * 10, embeddings[:10])
    store.upsert(ids[:3], ["new"] * 3, embeddings[10:13])
    assert store.count() == 10
    assert ids_of(store, embeddings[11], 1) == [ids[1]] and store.search(embeddings[11:12], 1).cosines[0] == 1
    assert store.search(embeddings[1:2], 1).cosines[0] < 1
    assert set(ids_of(store, embeddings[0], 10, "new")) == set(ids[:3])
    assert set(ids_of(store, embeddings[0], 10, "old")) == set(ids[3:])


def the_last_of_two_of_one_id_counts(new: New) -> None:
    store, embeddings = new(), some(3)
    store.upsert(["a", "b", "a"], ["c", "c", "d"], embeddings)
    assert store.count() == 2 and ids_of(store, embeddings[2], 1, "d") == ["a"]
    assert store.search(embeddings[:1], 1).cosines[0] < 1


def deleting_what_is_not_there_is_no_error(new: New) -> None:
    store, embeddings = new(), some(4)
    store.delete(["unknown"])
    store.upsert(names(4), ["c"] * 4, embeddings)
    store.delete(["unknown", names(4)[0], names(4)[0], *ODD_IDS])
    store.delete([])
    assert store.count() == 3
    store.upsert(names(1), ["c"], embeddings[:1])
    assert store.count() == 4 and ids_of(store, embeddings[0], 1) == names(1)


def a_category_is_searched_alone_whatever_its_name(new: New) -> None:
    store, ids, embeddings = new(), names(len(ODD_IDS) * 4), some(len(ODD_IDS) * 4)
    categories = [ODD_IDS[row % len(ODD_IDS)] for row in range(len(ids))]
    store.upsert(ids, categories, embeddings)
    for category in ODD_IDS:
        wanted = {own for own, name in zip(ids, categories, strict=True) if name == category}
        assert set(ids_of(store, embeddings[0], len(ids), category)) == wanted
    for unknown in ("none", "", '" or category != "', "%"[:0] + "_"):
        assert ids_of(store, embeddings[0], 5, unknown) == []


def any_text_is_an_id(new: New) -> None:
    store, embeddings = new(), some(len(ODD_IDS))
    store.upsert(ODD_IDS, ["c"] * len(ODD_IDS), embeddings)
    assert [own[0] for own in store.search(embeddings, 1).ids] == ODD_IDS
    for left, item_id in enumerate(ODD_IDS, 1):
        store.delete([item_id])
        assert store.count() == len(ODD_IDS) - left


def more_neighbours_than_listings_are_all_of_them(new: New) -> None:
    store, ids, embeddings = new(), names(7), some(7)
    store.upsert(ids, ["c"] * 7, embeddings)
    assert store.search(embeddings, 1000).ids == exact(embeddings, embeddings, ids, 7)


def a_row_of_zeros_has_cosine_0_with_every_other(new: New) -> None:
    store, embeddings = new(), np.eye(4, WIDTH, dtype=np.float32)
    embeddings[1], embeddings[3] = 0, -embeddings[0]
    store.upsert(names(4), ["c"] * 4, embeddings)
    found = store.search(embeddings[:2], 4)
    assert found.ids == [[names(4)[row] for row in order] for order in ([0, 1, 2, 3], [0, 1, 2, 3])]
    assert [own.tolist() for own in found.cosines] == [[1, 0, 0, -1], [0, 0, 0, 0]]


def equal_cosines_come_in_the_order_of_ids(new: New) -> None:
    """More copies than are asked for; some are longer than others."""
    store, embeddings = new(), some(1).repeat(300, axis=0)
    embeddings[::3] *= 4
    ids = np.random.default_rng(0).permutation(names(300)).tolist()
    store.upsert(ids, ["c"] * 300, embeddings)
    assert ids_of(store, embeddings[0], 5) == names(5)
    assert store.search(embeddings[:1], 5).cosines[0].tolist() == [1] * 5


def two_stores_do_not_see_each_other(new: New) -> None:
    one, two, embeddings = new(), new(), some(5)
    one.upsert(names(5), ["c"] * 5, embeddings)
    two.upsert(["other"], ["c"], embeddings[:1])
    assert (one.count(), two.count()) == (5, 1)
    assert ids_of(one, embeddings[0], 1) == names(1) and ids_of(two, embeddings[0], 9) == ["other"]
    one.delete(["other"])
    assert two.count() == 1


def the_nearest_of_5000_are_those_of_looking_at_all(new: New) -> None:
    store, ids, embeddings = new(), names(5000), some(5000)
    store.upsert(ids, ["c"] * 5000, embeddings)
    assert store.search(embeddings[:50], 10).ids == exact(embeddings, embeddings[:50], ids, 10)


def what_no_store_can_hold_is_refused_in_a_line(new: New) -> None:
    store, embeddings = new(), some(2)
    with pytest.raises(UserError, match=f"embeddings of 3 numbers, the store holds {WIDTH}"):
        store.search(np.ones((1, 3), np.float32), 1)
    embeddings[1, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        store.upsert(["a", "b"], ["c", "c"], embeddings)
    assert store.count() == 0


CONTRACT = [
    what_was_written_and_deleted_is_counted,
    a_listing_finds_itself_first,
    an_upsert_replaces_embedding_and_category,
    the_last_of_two_of_one_id_counts,
    deleting_what_is_not_there_is_no_error,
    a_category_is_searched_alone_whatever_its_name,
    any_text_is_an_id,
    more_neighbours_than_listings_are_all_of_them,
    a_row_of_zeros_has_cosine_0_with_every_other,
    equal_cosines_come_in_the_order_of_ids,
    two_stores_do_not_see_each_other,
    the_nearest_of_5000_are_those_of_looking_at_all,
    what_no_store_can_hold_is_refused_in_a_line,
]
STORES = len(CONTRACT) + 1  # one clause takes two


def test_faiss_keeps_the_contract(subtests: pytest.Subtests) -> None:
    for clause in CONTRACT:
        with subtests.test(clause.__name__):
            clause(lambda: FaissStore(WIDTH))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["milvus-lite", "milvus-server"])
def test_milvus_keeps_the_contract_and_is_filled(
    kind: str, subtests: pytest.Subtests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with milvus_packages(tmp_path / "packages"):
        place = (
            milvus_server(tmp_path / "server") if kind == "milvus-server" else nullcontext(str(tmp_path / "lite.db"))
        )
        with place as url:
            with connect(url) as server, ThreadPoolExecutor(8) as threads:
                # Made together, for the server takes 3 s for each, most of which it waits.
                made = threads.map(lambda number: MilvusStore.create(server, f"c{number}", WIDTH), range(STORES))
                for clause in CONTRACT:
                    with subtests.test(clause.__name__):
                        clause(made.__next__)
            for number, filling in enumerate(FILLING):
                with subtests.test(filling.__name__), monkeypatch.context() as patch:
                    filling(url, f"f{number}", tmp_path / f"f{number}", patch)


# ---------------------------------------------------------------------------------------------------------------------
# Filling a server, in a collection of each test's own


def a_filled_server_answers_as_the_files_do(url: str, name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    ids, embeddings = names(2500), some(2500)
    catalogue = matched(folder, ids, embeddings, standing=ids[3:])
    told = match_store(folder, url, name, False)
    assert f"collection {name}: 2,497 listings, exact search" in told and "next: ./entrypoint.sh match query" in told
    with open_store(catalogue, url, name) as server, open_store(catalogue) as memory:
        for category in (None, "c1"):
            found, wanted = (store.search(embeddings[:20], 10, category) for store in (server, memory))
            assert found.ids == wanted.ids
            assert all(np.array_equal(a, b) for a, b in zip(found.cosines, wanted.cosines, strict=True))
    assert "2,497 listings" in match_store(folder, url, name, False)


def a_filling_that_was_cut_short_goes_on(url: str, name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    ids, embeddings = names(1000), some(1000)
    catalogue = matched(folder, ids, embeddings, part=300)
    patch.setattr(MilvusStore, "batch", 128)
    sent: list[str] = []
    upsert = MilvusStore.upsert

    def cut(store: MilvusStore, own: list[str], *more: object) -> None:
        if len(sent) > 500:
            raise KeyboardInterrupt
        upsert(store, own, *more)  # type: ignore[arg-type]
        sent.extend(own)

    patch.setattr(MilvusStore, "upsert", cut)
    with pytest.raises(KeyboardInterrupt):
        match_store(folder, url, name, False)
    with pytest.raises(UserError, match=f"no collection {name}"), open_store(catalogue, url, name):
        pass
    patch.setattr(MilvusStore, "upsert", lambda *words: (sent.extend(words[1]), upsert(*words)))
    there = len(sent)
    match_store(folder, url, name, False)
    assert 1000 <= len(sent) <= 1000 + 2 * 128 and there > 500
    with open_store(catalogue, url, name) as store:
        assert store.count() == 1000
        assert store.search(embeddings, 3).ids == exact(embeddings, embeddings, ids, 3)


def lists_are_looked_into_until_the_recall_is_reached(
    url: str, name: str, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(fill, "EXACT", 0)
    ids, embeddings = names(5000), some(5000)
    catalogue = matched(folder, ids, embeddings)
    told = match_store(folder, url, name, False)
    assert " of 283 lists are looked into, recall " in told
    with open_store(catalogue, url, name) as store:
        found, wanted = store.search(embeddings[:200], 10).ids, exact(embeddings, embeddings[:200], ids, 10)
        assert isinstance(store, MilvusStore) and store.probes <= 283
        assert (
            np.mean([len({*own} & {*all_of_them}) / 10 for own, all_of_them in zip(found, wanted, strict=True)]) >= 0.99
        )
        assert [own[0] for own in found] == ids[:200]
        store.upsert(["new"], ["c"], -embeddings[:1])
        assert ids_of(store, -embeddings[0], 1) == ["new"]


def another_model_is_refused_and_a_changed_catalogue_takes_the_place(
    url: str, name: str, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    ids, embeddings = names(20), some(20)
    first = matched(folder / "first", ids, embeddings)
    other = matched(folder / "other", ids, embeddings, model="cd" * 32)
    match_store(first.path, url, name, False)
    for attempt in (lambda: match_store(other.path, url, name, False), open_store(other, url, name).__enter__):
        with pytest.raises(UserError, match=f"{name} is of another model, {MODEL[:12]} and not cdcd"):
            attempt()
    assert "20 listings" in match_store(other.path, url, name, True)
    match_store(matched(other.path, ids[:15], embeddings[:15], model="cd" * 32).path, url, name, False)
    with open_store(other, url, name) as store:
        assert store.count() == 15


def a_strangers_collection_is_left_alone(url: str, name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    catalogue = matched(folder, names(3), some(3))
    with connect(url) as server:
        server.client.create_collection(name, dimension=4)
    for replace in (False, True):
        with pytest.raises(UserError, match="none of ours"):
            match_store(folder, url, name, replace)
    with pytest.raises(UserError, match="none of ours"), open_store(catalogue, url, name):
        pass
    with connect(url) as server:
        assert name in server.client.list_collections()


def what_is_no_server_is_told_of_without_the_token(
    url: str, name: str, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setenv(TOKEN, "root:sesame")
    patch.setattr("tongkuan.match.stores.milvus.SECONDS_TO_CONNECT", 2)
    matched(folder, names(3), some(3))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        for place in ("http://127.0.0.1:1", f"http://127.0.0.1:{stranger.server_port}"):
            line = error_of("match", "store", "--out", folder, "--store", place)
            assert line.count("\n") <= 1 and "is it a Milvus server" in line and "sesame" not in line
        stranger.shutdown()


FILLING = [
    a_filled_server_answers_as_the_files_do,
    a_filling_that_was_cut_short_goes_on,
    lists_are_looked_into_until_the_recall_is_reached,
    another_model_is_refused_and_a_changed_catalogue_takes_the_place,
    a_strangers_collection_is_left_alone,
    what_is_no_server_is_told_of_without_the_token,
]


# ---------------------------------------------------------------------------------------------------------------------
# Without a server


def test_without_a_server_the_files_are_searched_less_what_was_removed(tmp_path: Path) -> None:
    ids, embeddings = names(25), some(25)
    folder = matched(tmp_path, ids, embeddings, part=10, standing=ids[1:])
    with open_store(folder) as store:
        assert store.count() == 24
        assert ids_of(store, embeddings[0], 24) == exact(embeddings[1:], embeddings[:1], ids[1:], 24)[0]


def test_of_a_listing_that_stands_in_two_files_the_later_one_counts(tmp_path: Path) -> None:
    embeddings = some(6)
    source = Source.of(matched(tmp_path, ["a", "b", "c", "d", "b", "e"], embeddings, part=3))
    batches = list(source.batches(2))
    assert [batch.ids for batch in batches] == [["a", "c"], ["d", "b"], ["e"]] and source.count == 5
    assert np.array_equal(batches[1].embeddings[1], embeddings[4])
    assert [batch.ids for batch in source.batches(2, 3)] == [["b", "e"]]
    assert np.array_equal(source.sample(2), embeddings[[0, 5]])


def test_a_folder_that_is_no_catalogue_is_one_line(tmp_path: Path) -> None:
    words = ("match", "store", "--store", "http://127.0.0.1:1", "--out")
    assert "no finished catalogue; run ./entrypoint.sh match run" in error_of(*words, tmp_path / "none")
    folder = matched(tmp_path / "damaged", names(9), some(9))
    folder.part("embeddings", 0).write_bytes(b"PAR1")
    assert "part-000000.parquet: damaged, gone or not made by match run" in error_of(*words, folder.path)
    folder = matched(tmp_path / "others", names(9), some(9), standing=["x"])
    assert "listings that have no embedding" in error_of(*words, folder.path)
    folder.manifest.write_text("[]")
    assert "names no model" in error_of(*words, folder.path)


def test_without_pymilvus_the_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    folder = matched(tmp_path, names(3), some(3)).path
    line = error_of("match", "store", "--out", folder, "--store", "http://localhost:19530")
    assert "needs pymilvus, which is not installed" in line and "--require-hashes -r code/milvus.lock" in line


@pytest.mark.parametrize(
    "url",
    ["localhost:19530", "file:///x", "http://", "http://me:sesame@host", "http://host/?token=sesame", "http://h:x"],
)
def test_what_is_no_url_of_a_server_is_refused_without_being_shown(url: str) -> None:
    line = error_of("match", "store", "--store", url)
    assert "argument --store: no http://HOST:PORT; a token goes into TONGKUAN_STORE_TOKEN" in line
    assert "sesame" not in line


def test_a_name_that_milvus_would_not_take_is_refused() -> None:
    for name in ("", "a b", "1a", "杯", "a" * 201):
        assert "argument --collection" in error_of("match", "store", "--store", "http://h:1", "--collection", name)


@pytest.mark.parametrize(
    ("version", "is_new"), [("v2.2.16", False), ("2.3.0", True), ("v2.6.1-dev", True), ("x", True)]
)
def test_a_server_that_is_too_old_is_refused(version: str, is_new: bool) -> None:
    with nullcontext() if is_new else pytest.raises(UserError, match=r"is too old; it takes 2\.3 or later"):
        check_version("http://h:1", version)
