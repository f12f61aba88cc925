"""Embeddings of a catalogue by partitions, on all ranks: a partition that is there is not encoded again.

Batches are formed within a partition, so that its numbers do not depend on the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tongkuan.base.errors import UserError
from tongkuan.encode.cache import Cache
from tongkuan.encode.encode import Embeddings, batch_size
from tongkuan.encode.inference import Inference
from tongkuan.encode.store import ItemStore
from tongkuan.match import files
from tongkuan.match.files import Folder, partitions, sum_of
from tongkuan.match.machines import HERE, Machines, Part


@dataclass(frozen=True, slots=True)
class Encoded:
    """Partitions on the disk."""

    sums: list[str]
    """Of what each was made of: the same sums, the same embeddings."""
    blank: list[str]
    """Pictures that are missing or unreadable."""


def encode_partitions(
    run: Inference,
    store: ItemStore,
    item_ids: Sequence[str],
    folder: Folder,
    kind: str,
    size: int,
    machines: Machines = HERE,
    wanted: slice | None = None,
) -> Encoded:
    """Encode what is not there yet, `size` items a file. The same on every rank; the first one writes.

    Of `wanted` partitions alone, others may be written by other processes meanwhile, and are left as they are.
    """
    parts = [item_ids[rows] for rows in partitions(len(item_ids), size)]
    numbers = range(len(parts))[wanted or slice(None)]
    sums = run.ranks.gather(list(sums_of(run, store, [parts[n] for n in numbers])) if run.ranks.is_first else [])[0]
    paths = [folder.part(kind, number) for number in numbers]
    absent = run.ranks.gather(files.missing(paths, sums) if run.ranks.is_first else [])[0]
    labels = [f"{kind} {number + 1}/{len(parts)}" for number in numbers]
    todo = [Part(labels[place], parts[numbers[place]], sums[place]) for place in absent]
    for place, done in machines.encode(run, store, todo):
        if run.ranks.is_first:
            store.unreadable |= done.unreadable
            write(paths[absent[place]], store, todo[place].item_ids, done.embeddings, todo[place].made_of)
    if run.ranks.is_first and wanted is None:
        folder.drop_parts(kind, len(parts))
    blank = {name for path in paths for name in files.about(path)["blank"]} if run.ranks.is_first else set()
    return Encoded(sums, sorted(blank))


def sums_of(run: Inference, store: ItemStore, parts: Sequence[Sequence[str]]) -> Iterator[str]:
    """Of each partition, a sum of all that decides its file."""
    # Only for its names: they hold model, processor, versions and code, and of each item its tokens and its picture.
    names = Cache(Path(), run.files["model"], run.precision, run.ranks.device)
    size = batch_size(run.settings, run.card.settings, run.ranks.device)
    for ids in parts:
        categories = [store.items[item_id].category for item_id in ids]
        yield sum_of(names.key(store, ids), list(ids), categories, size)


def write(path: Path, store: ItemStore, item_ids: Sequence[str], embeddings: Embeddings, made_of: str) -> None:
    """One partition's file. UserError when a number is not finite."""
    if not np.isfinite(embeddings).all():
        raise UserError(
            "an embedding holds numbers that are not finite; the model is damaged or --precision is too low for it: "
            "train again"
        )
    columns = {
        "item_id": pa.array(item_ids, pa.string()),
        "category": pa.array([store.items[item_id].category for item_id in item_ids], pa.string()),
        "norm": np.linalg.norm(embeddings, axis=1),
        "e": files.matrix(embeddings),
    }
    blank = sorted({store.picture(item_id) for item_id in item_ids} & store.unreadable)
    files.write_table(path, columns, made_of, {"blank": blank})


def load(folder: Folder, kind: str, encoded: Encoded, num_items: int, width: int) -> Embeddings:
    """All embeddings float32 (N, width) in the order of the items."""
    embeddings = np.empty((num_items, width), np.float32)
    start = 0
    for number, made_of in enumerate(encoded.sums):
        rows = files.rows_of(files.made_table(folder.part(kind, number), made_of)["e"])
        embeddings[start : start + len(rows)] = rows
        start += len(rows)
    return embeddings
