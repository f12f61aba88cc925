"""Matched catalogues without a model, and the servers that stores are tested on."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest
from match_worlds import planted

from tongkuan.encode.encode import Embeddings
from tongkuan.match import files
from tongkuan.match.files import Folder
from tongkuan.match.stores.store import Store

CODE = Path(__file__).resolve().parents[1]
LOCKS = CODE / "milvus.lock", CODE / "tests" / "servers.lock"
MODEL = "ab" * 32
WIDTH = 16
# Its clocks tick for clusters: with its own, a collection takes 3 s and each search for what was written 0.2 s.
QUICK = {"proxy.timeTickInterval": 20, "queryCoord.checkInterval": 100, "queryCoord.distPullInterval": 50}


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


def matched(
    path: Path,
    ids: Sequence[str],
    embeddings: Embeddings,
    part: int = 1000,
    model: str = MODEL,
    standing: Sequence[str] | None = None,
) -> Folder:
    """A catalogue as `match run` leaves it, in two categories; its groups name the `standing` listings alone."""
    folder = Folder(path)
    for number, start in enumerate(range(0, len(ids), part)):
        rows = slice(start, start + part)
        own = list(ids[rows])
        columns = {
            "item_id": pa.array(own, pa.string()),
            "category": pa.array([f"c{row % 2}" for row in range(len(ids))][rows], pa.string()),
            "norm": np.linalg.norm(embeddings[rows], axis=1),
            "e": files.matrix(embeddings[rows]),
        }
        files.write_table(
            folder.part("embeddings", number), columns, files.sum_of(model, own, embeddings[rows].tolist())
        )
    files.write_table(folder.groups, {"item_id": pa.array(standing or dict.fromkeys(ids), pa.string())}, "groups")
    folder.manifest.write_bytes(orjson.dumps({"sha256": {"model": model}}))
    return folder


@contextmanager
def milvus_packages(folder: Path) -> Iterator[None]:
    """What the locks of the extra and of the servers hold, importable from here on."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-input", "--require-hashes", "--no-compile"]
    locks = [word for lock in LOCKS for word in ("-r", lock)]
    done = subprocess.run([*pip, "--target", folder, *locks], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@contextmanager
def milvus_server(folder: Path) -> Iterator[str]:
    """The URL of a Milvus server of its own, whose files lie in a folder."""
    from milvus import MilvusServer, MilvusServerConfig

    config = MilvusServerConfig(data_dir=str(folder))
    for setting, milliseconds in QUICK.items():
        config.set(setting, milliseconds)
    server = MilvusServer(config)
    try:
        server.start()
        yield f"http://127.0.0.1:{server.listen_port}"
    finally:
        server.stop()
