"""Fill a server with a matched catalogue, and open a filled store. The Parquet files stay the truth.

`./entrypoint.sh match store --out match --store http://localhost:19530`

A collection is filled under another name and takes its own when it is whole: until then the one before answers. The
same command goes on with one that was cut short, batch by batch in the order of the files, and ends with the same rows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tongkuan.base.errors import UserError, entrypoint
from tongkuan.base.terminal import say
from tongkuan.encode.encode import Embeddings
from tongkuan.match.candidates import FIRST_PROBES, LISTS, NEAREST
from tongkuan.match.files import Folder
from tongkuan.match.stores.flat import FaissStore
from tongkuan.match.stores.milvus import MilvusStore, Server, connect, drop, facts_of
from tongkuan.match.stores.source import READ, Source
from tongkuan.match.stores.store import Found, Store

EXACT = 100_000  # listings that a server looks through in a few milliseconds
SEGMENT = 512 << 20  # bytes of vectors, which have lists of their own
MOST_LISTS = 65_536
SAMPLE = 200  # listings on which the recall is measured
RECALL = 0.99
COLLECTION = "tongkuan"
PART = "_part"  # behind the name of a collection that is not whole


@contextmanager
def open_store(folder: Folder, url: str | None = None, collection: str = COLLECTION) -> Iterator[Store]:
    """The store of a catalogue: a collection that `match store` has filled, or without a URL its files in memory.

    UserError when the server is not there, or holds no embeddings of the catalogue's model.
    """
    source = Source.of(folder)
    if url is None:
        yield in_memory(source)
        return
    with connect(url) as server:
        check_model(server, collection, source)
        store = MilvusStore(server, collection)
        if store.facts["made_of"] != source.made_of:
            fill = entrypoint("match", "store", "--out", folder.path, "--store", url)
            say(f"note: {url} was filled before the last change of {folder.path}; bring it up to date: {fill}")
        yield store


def in_memory(source: Source) -> FaissStore:
    """All listings of a catalogue, ready to be searched."""
    store = FaissStore(source.width)
    with tqdm(desc="read", unit="item", total=source.count, disable=None) as progress:
        for batch in source.batches(READ):
            store.upsert(batch.ids, batch.categories, batch.embeddings)
            progress.update(len(batch.ids))
    return store


def match_store(out_dir: Path, url: str, collection: str, replace: bool) -> str:
    """Fill a collection with a matched catalogue, unless it is filled; what it holds."""
    source = Source.of(Folder(out_dir))
    with connect(url) as server:
        store, recall = filled(server, collection, source, replace)
        search = f"{store.probes:,} of {store.lists:,} lists are looked into" if store.lists else "exact search"
        told = "" if recall is None else f", recall {recall:.4f} of the {NEAREST} nearest of a sample"
        line = f"{url}: collection {collection}: {store.count():,} listings, {search}{told}"
    named = () if collection == COLLECTION else ("--collection", collection)
    return f"{line}\nnext: {entrypoint('match', 'query', '--out', out_dir, '--store', url, *named)}"


def filled(server: Server, name: str, source: Source, replace: bool = False) -> tuple[MilvusStore, float | None]:
    """A collection of all listings, and its recall as measured now, None if it was filled before or is exact."""
    if not replace:
        check_model(server, name, source)
    if (facts := facts_of(server, name)) is not None and facts.get("made_of") == source.made_of:
        return MilvusStore(server, name), None
    store = begun(server, f"{name}{PART}", source)
    # Batches came in order, so the first ones are there; the last is sent again, in case it was cut short.
    there = max(0, min(store.count(), source.count) - store.batch)
    with tqdm(desc="store", unit="item", total=source.count, initial=there, disable=None) as progress:
        for batch in source.batches(store.batch, there):
            store.upsert(batch.ids, batch.categories, batch.embeddings)
            progress.update(len(batch.ids))
    if (count := store.count()) != source.count:
        drop(server, store.name)
        raise UserError(f"{server.url}: {count:,} of {source.count:,} listings arrived in {store.name}; fill it again")
    recall = None
    if store.lists:
        store.settle()
        recall = choose_probes(store, source.sample(SAMPLE))
    store.take_name(name)
    return store, recall


def begun(server: Server, name: str, source: Source) -> MilvusStore:
    """The collection that a filling of the same listings has left, else a new one."""
    facts = facts_of(server, name)
    if facts is not None and facts.get("made_of") == source.made_of:
        return MilvusStore(server, name)
    rows = min(source.count, SEGMENT // (4 * source.width))
    lists = 0 if source.count <= EXACT else max(1, min(round(LISTS * math.sqrt(rows)), MOST_LISTS))
    told = {"model": source.model, "made_of": source.made_of}
    return MilvusStore.create(server, name, source.width, lists, told)


def check_model(server: Server, name: str, source: Source) -> None:
    """UserError when the collection holds embeddings of another model, or none of a catalogue."""
    facts = facts_of(server, name)
    if facts is not None and (other := facts.get("model")) != source.model:
        what = f"is of another model, {other[:12]} and not {source.model[:12]}" if other else "is of no catalogue"
        raise UserError(f"{server.url}: collection {name} {what}; name another --collection, or match store --replace")


def choose_probes(store: MilvusStore, sample: Embeddings) -> float:
    """Look into as many lists as the recall of a sample's nearest takes; the recall."""
    store.probes = store.lists
    wanted, probes = store.search(sample, NEAREST), FIRST_PROBES
    while True:
        store.probes = min(probes, store.lists)
        recall = recall_of(store.search(sample, NEAREST), wanted)
        if recall >= RECALL or store.probes == store.lists:
            store.set_probes(store.probes)
            return recall
        probes *= 2


def recall_of(found: Found, wanted: Found) -> float:
    """Share of wanted listings that were found: 0 to 1."""
    pairs = zip(found.ids, wanted.ids, strict=True)
    return float(np.mean([len({*own} & {*all_of_them}) / len(all_of_them) for own, all_of_them in pairs]))
