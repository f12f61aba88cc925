"""A store on a Milvus server. `./entrypoint.sh match store --out match --store http://localhost:19530`

A collection has a row a listing: key, item_id, category, e. Keys and categories are sums of what users wrote, so that a
filter holds nothing but hexadecimal digits. e is a unit row and the metric the inner product, which then is the cosine:
by COSINE, Milvus 2.3 never finds a row of zeros again. Tested with milvus-lite 3.2 and a server of 2.3.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from tongkuan.base.errors import UserError, clip, pip_install
from tongkuan.encode.encode import Embeddings
from tongkuan.match.options import STORE_TOKEN
from tongkuan.match.stores.store import Found, Hits, answer, checked_units, rows_to_store

OLDEST = (2, 3)  # version of a server: the first that replaces rows and gives vectors back
SECONDS = 60  # for a call; pymilvus itself tries for minutes
SECONDS_TO_CONNECT = 10
STANDSTILL = 600  # seconds
LONGEST_ID = 65_535  # bytes, of Milvus' texts
MOST = 16_384  # that Milvus finds at once
ANSWER = 32 << 20  # bytes of vectors, at most, of an answer
WRITTEN = 8 << 20  # and of what is sent at once
PREFIX = "tongkuan."  # of our properties of a collection
PROBES = f"{PREFIX}probes"


@dataclass(frozen=True, slots=True)
class Server:
    """A connection, whose errors are lines."""

    url: str
    client: Any
    token: str

    def ask(self, call: str, *words: Any, **more: Any) -> Any:
        """Call the client. UserError when the server refuses or does not answer."""
        with self.told():
            return getattr(self.client, call)(*words, timeout=SECONDS, **more)

    @contextmanager
    def told(self, advice: str = "see the server's log") -> Iterator[None]:
        """Let errors of the server be the user's, without the token, whatever stands in them."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, RpcError) as error:
            reason = str(getattr(error, "message", "") or error)
            for secret in (self.token, *self.token.split(":")):
                reason = reason.replace(secret, "…") if secret else reason
            raise UserError(f"{self.url}: {clip(reason, 200)}; {advice}") from None


@contextmanager
def connect(url: str) -> Iterator[Server]:
    """A server, or a file of milvus-lite. UserError when it is not there, no Milvus, or too old."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import pymilvus
    except ModuleNotFoundError as error:
        install = pip_install("--no-deps", "--require-hashes", "-r", "code/milvus.lock")
        raise UserError(f"--store needs {error.name}, which is not installed: {install}") from error
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints tracebacks of what it raises, too
    token = os.environ.get(STORE_TOKEN, "")
    with Server(url, None, token).told(f"is it a Milvus server that runs, and is its token in {STORE_TOKEN}?"):
        client = pymilvus.MilvusClient(url, token=token, timeout=SECONDS_TO_CONNECT)
    try:
        server = Server(url, client, token)
        check_version(url, str(server.ask("get_server_version")))
        yield server
    finally:
        client.close()


def check_version(url: str, version: str) -> None:
    """UserError for a server that is too old. What has no number of the form v2.3 is tried."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise UserError(f"{url}: Milvus {clip(version)} is too old; it takes {'.'.join(map(str, OLDEST))} or later")


def key_of(text: str) -> str:
    """What stands for an id or a category in keys and filters."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class MilvusStore:
    """A Store that is a collection of a server, of embeddings of `width` numbers."""

    def __init__(self, server: Server, name: str) -> None:
        """Open one that is there. UserError when it is not, or none of ours."""
        self.server, self.name = server, name
        facts = facts_of(server, name)
        if facts is None:
            raise UserError(
                f"{server.url}: no collection {name}; ./entrypoint.sh match store --help says how to fill it"
            )
        self.facts = facts
        self.width, self.lists = int(self.facts["width"]), int(self.facts["lists"])
        self.probes = int(self.facts.get("probes", self.lists))
        server.ask("load_collection", name)

    @classmethod
    def create(
        cls, server: Server, name: str, width: int, lists: int = 0, facts: Mapping[str, str] | None = None
    ) -> "MilvusStore":
        """An empty one in the place of any of that name: exact, or with inverted lists, of which all are looked into.

        `facts` are kept with it. UserError when a collection has the name that is none of ours.
        """
        drop(server, name)
        with server.told():
            from pymilvus import DataType

            schema = server.client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=32)
            schema.add_field("item_id", DataType.VARCHAR, max_length=LONGEST_ID)
            schema.add_field("category", DataType.VARCHAR, max_length=32)
            schema.add_field("e", DataType.FLOAT_VECTOR, dim=width)
            index = server.client.prepare_index_params()
            kind: dict[str, Any] = {"index_type": "FLAT", "params": {}}
            if lists:
                kind = {"index_type": "IVF_FLAT", "params": {"nlist": lists}}
            index.add_index("e", metric_type="IP", **kind)
        told = {**(facts or {}), "width": str(width), "lists": str(lists)}
        server.ask(
            "create_collection",
            name,
            schema=schema,
            index_params=index,
            consistency_level="Strong",  # what was written is found, whoever wrote it
            properties={f"{PREFIX}{fact}": value for fact, value in told.items()},
        )
        return cls(server, name)

    @property
    def batch(self) -> int:
        """Rows that are sent at once."""
        return max(1, min(10_000, WRITTEN // (4 * self.width + 256)))

    def upsert(self, ids: Sequence[str], categories: Sequence[str], embeddings: Embeddings) -> None:
        """See Store."""
        ids, categories, units = rows_to_store(ids, categories, embeddings, self.width)
        for item_id in ids:
            if len(item_id.encode()) > LONGEST_ID:
                raise UserError(f"item_id {clip(item_id)}: over {LONGEST_ID:,} bytes, which Milvus does not take")
        rows = [
            {"key": key_of(item_id), "item_id": item_id, "category": key_of(category), "e": unit}
            for item_id, category, unit in zip(ids, categories, units, strict=True)
        ]
        for start in range(0, len(rows), self.batch):
            self.server.ask("upsert", self.name, rows[start : start + self.batch])

    def delete(self, ids: Sequence[str]) -> None:
        """See Store."""
        for start in range(0, len(ids), self.batch):
            self.server.ask("delete", self.name, ids=[key_of(item_id) for item_id in ids[start : start + self.batch]])

    def count(self) -> int:
        """See Store."""
        return int(self.server.ask("query", self.name, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def search(self, embeddings: Embeddings, k: int, category: str | None = None) -> Found:
        """See Store. With lists it finds what lies in those that are looked into."""
        units = checked_units(embeddings, self.width)
        most = max(1, min(MOST, ANSWER // (4 * self.width)))
        if k > most:
            raise UserError(f"{k:,} nearest of a listing: {self.server.url} finds {most:,} at most")
        condition = "" if category is None else f'category == "{key_of(category)}"'
        parameters = {"nprobe": self.probes} if self.lists else {}

        def look_up(queries: Embeddings, asked: int) -> list[Hits]:
            at_once = max(1, ANSWER // (4 * self.width * asked))
            return [
                hits_of(hits, self.width)
                for start in range(0, len(queries), at_once)
                for hits in self.server.ask(
                    "search",
                    self.name,
                    data=list(queries[start : start + at_once]),
                    anns_field="e",
                    limit=asked,
                    filter=condition,
                    output_fields=["item_id", "e"],
                    search_params={"metric_type": "IP", "params": parameters},
                    consistency_level="Strong",
                )
            ]

        return answer(look_up, units, k, most)

    def settle(self) -> None:
        """Bring what was written to the server's disk and into its index. UserError when that stands still."""
        ask, rows = self.server.ask, self.count()
        ask("flush", self.name)
        with tqdm(desc="index", unit="row", total=rows, disable=None) as progress:
            last, since = -1, time.monotonic()
            while pending := int(ask("describe_index", self.name, "e").get("pending_index_rows", 0)):
                progress.update(max(0, rows - pending) - progress.n)
                if pending != last:
                    last, since = pending, time.monotonic()
                if time.monotonic() - since > STANDSTILL:
                    raise UserError(f"{self.server.url}: its index of {self.name} does not grow; see the server's log")
                time.sleep(0.5)
        # Loaded anew it searches what is indexed, and no longer the rows as they came.
        ask("release_collection", self.name)
        ask("load_collection", self.name)

    def take_name(self, name: str) -> None:
        """Stand in the place of the collection of that name."""
        drop(self.server, name)
        self.server.ask("rename_collection", self.name, name)
        self.name = name
        self.server.ask("load_collection", name)

    def set_probes(self, probes: int) -> None:
        """Of all lists, look into so many, now and whenever it is opened."""
        self.probes = probes
        self.server.ask("alter_collection_properties", self.name, {PROBES: str(probes)})


def hits_of(hits: Any, width: int) -> Hits:
    """What the client says of one query."""
    entities = [hit["entity"] for hit in hits]
    units = np.array([entity["e"] for entity in entities], np.float32).reshape(-1, width)
    products = np.array([hit["distance"] for hit in hits], np.float32)
    return Hits(products, [entity["item_id"] for entity in entities], units)


def facts_of(server: Server, name: str) -> dict[str, str] | None:
    """What is kept with a collection; None when there is none. UserError for one that is none of ours."""
    if not server.ask("has_collection", name):
        return None
    properties = server.ask("describe_collection", name).get("properties", {})
    facts = {key.removeprefix(PREFIX): value for key, value in properties.items() if key.startswith(PREFIX)}
    if not all(facts.get(name, "").isdecimal() for name in ("width", "lists")):
        raise UserError(f"{server.url}: collection {name} is none of ours; name another --collection")
    return facts


def drop(server: Server, name: str) -> None:
    """Delete a collection of ours, if it is there."""
    if facts_of(server, name) is not None:
        server.ask("drop_collection", name)
