"""Matched catalogues without a model, and the servers that stores are tested on."""

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from commands import wait_for
from match_worlds import planted

from tongkuan.encode.encode import Embeddings
from tongkuan.match import files
from tongkuan.match.files import Folder
from tongkuan.match.stores.store import Store
from tongkuan.match.transaction import write_manifest

CODE = Path(__file__).resolve().parents[1]
LOCKS = CODE / "milvus.lock", CODE / "tests" / "servers.lock"
MODEL = "ab" * 32
WIDTH = 16
# Its clocks tick for clusters: with its own, a collection takes 3 s and each search for what was written 0.2 s.
QUICK = {"proxy.timeTickInterval": 20, "queryCoord.checkInterval": 100, "queryCoord.distPullInterval": 50}

ETCD = """\
name: default
data-dir: {folder}/etcd
listen-client-urls: {client}
advertise-client-urls: {client}
listen-peer-urls: {peer}
initial-advertise-peer-urls: {peer}
initial-cluster: default={peer}
"""


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
    manifest: dict[str, Any] = {name: {} for name in ("options", "counts")} | {"sha256": {"model": model}}
    manifest |= {"precision": "fp32", "encode_batch": 1, "score_above": 0.0}
    manifest |= {"threshold": {"value": 0.0}, "recall": {"of_matches": 1.0}, "files": {folder.groups.name: ""}}
    write_manifest(folder, manifest)
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

    client, peer = free_ports(2)
    config = MilvusServerConfig(data_dir=str(folder), etcd_port=client)
    for setting, milliseconds in QUICK.items():
        config.set(setting, milliseconds)
    # The etcd in it has fixed ports unless a file says otherwise, and another one may run on this machine.
    etcd = folder / "etcd.yaml"
    place = f"  config:\n    path: {etcd}\n  use:\n    embed: true"
    config.template_text = config.template_text.replace("  use:\n    embed: true", place)
    folder.mkdir()
    etcd.write_text(ETCD.format(client=f"http://127.0.0.1:{client}", peer=f"http://127.0.0.1:{peer}", folder=folder))
    server = MilvusServer(config, wait_for_started=False)
    try:
        server.start()
        wait_for(lambda: server.server_proc.poll() is not None or is_up(server.webservice_port), 150)
        assert server.server_proc.poll() is None, (folder / "logs" / "milvus-stdout.log").read_text()[-2000:]
        yield f"http://127.0.0.1:{server.listen_port}"
    finally:
        server.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def is_up(port: int) -> bool:
    """Whether a server says of itself that it is well."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
        return b"OK" in answer.read()
    return False
