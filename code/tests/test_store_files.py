"""What stores are made of when there is no server: files, options, and what is refused before one is asked."""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from store_worlds import exact, ids_of, matched, names, some
from test_main import error_of

from tongkuan.base.errors import UserError
from tongkuan.match.files import write_table
from tongkuan.match.stores.fill import open_store
from tongkuan.match.stores.milvus import check_version
from tongkuan.match.stores.source import Source


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
    write_table(folder.part("embeddings", 0), {"item_id": names(9)}, "")
    assert "part-000000.parquet: damaged, gone or not made by match run" in error_of(*words, folder.path)
    folder = matched(tmp_path / "others", names(9), some(9), standing=["x"])
    assert "listings that have no embedding" in error_of(*words, folder.path)
    folder.manifest.write_text("[]")
    assert "not a JSON object" in error_of(*words, folder.path)


def test_without_pymilvus_the_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
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
