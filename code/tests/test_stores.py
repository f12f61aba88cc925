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
from store_worlds import MODEL, WIDTH, exact, ids_of, matched, milvus_packages, milvus_server, names, some
from test_main import error_of

from tongkuan.base.errors import UserError
from tongkuan.match.options import STORE_TOKEN
from tongkuan.match.stores import fill
from tongkuan.match.stores.fill import match_store, open_store
from tongkuan.match.stores.flat import FaissStore
from tongkuan.match.stores.milvus import MilvusStore, connect
from tongkuan.match.stores.store import Store

New = Callable[[], Store]
"""A new, empty store of embeddings of WIDTH numbers."""
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
    for unknown in ("none", "", '" or category != "', "_"):
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
    patch.setattr(fill, "SAMPLE", 100)
    ids, embeddings = names(5000), some(5000)
    catalogue = matched(folder, ids, embeddings)
    told = match_store(folder, url, name, False)
    assert " of 283 lists are looked into, recall " in told
    with open_store(catalogue, url, name) as store:
        found, wanted = store.search(embeddings[:100], 10).ids, exact(embeddings, embeddings[:100], ids, 10)
        assert isinstance(store, MilvusStore) and store.probes <= 283
        assert (
            np.mean([len({*own} & {*all_of_them}) / 10 for own, all_of_them in zip(found, wanted, strict=True)]) >= 0.99
        )
        assert [own[0] for own in found] == ids[:100]
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
    patch.setenv(STORE_TOKEN, "root:sesame")
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
