"""Listings that come and go after a run: what is found is brought up to date, without looking at all pairs again.

`./entrypoint.sh match add --items new.jsonl --data data --model weights/model.safetensors --out match`
`./entrypoint.sh match remove --ids gone.txt --out match`

New listings are held against all others and each other. How dense it is about those that were there stays as it was
until the next full run: a match that hangs on it may be found or missed where a full run decides otherwise. As the
catalogue grows, more are found than missed: of the demo's 1,389 listings, with a fifth of them added, all pairs of a
full run and 13 % more; with half of them added, 26 % more. A group's id stays while the group does; whose group changed
stands in changes/, a file a change:

    changes/part-cNNNNNN-000000.parquet     change, item_id, before, after: of a listing that came or went null
    embeddings/part-cNNNNNN-000000.parquet  the listings that change NNNNNN added
    pairs/part-cNNNNNN-*.parquet            pairs that it found, and older files without pairs of what it removed
    tombstones.parquet                      file, item_id of embeddings that count no more

Killed at any moment, the same command ends with the same bytes; see transaction.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tongkuan.base.errors import UserError, clip, entrypoint, nearest
from tongkuan.base.files import sha256_of, sole_process
from tongkuan.encode.inference import Inference, open_inference, read_no_pairs
from tongkuan.match import files
from tongkuan.match.change import Changed, apply
from tongkuan.match.embed import encode_partitions, sums_of
from tongkuan.match.files import Folder, sum_of
from tongkuan.match.state import State, open_state
from tongkuan.match.transaction import ADDED, NO_CHANGES, read_manifest, settle
from tongkuan.records.items import read_ids

NEW = 0.2  # share of listings since the full run from which on it should be run again


def match_add(items_path: Path, data_dir: Path, model_path: Path, out_dir: Path) -> None:
    """Add the listings of a file, or update those that are there, and print what was found.

    UserError before any encoding when an input is unfit or the model is another than the catalogue's.
    """
    folder = Folder(out_dir)
    read_manifest(folder)
    with ExitStack() as stack:
        stack.enter_context(sole_process(out_dir))
        manifest = read_manifest(folder)
        run = stack.enter_context(open_like(manifest, items_path, data_dir, model_path))
        settle(folder, manifest, keeps_added=True)
        request = sum_of("add", *sums_of(run, run.store, [list(run.items)]))
        if is_done(manifest, request):
            settle(folder, manifest)
            print(f"{folder.groups}: these {len(run.items):,} listings were added by the last change")
            return
        added, blank = encode_added(run, folder, manifest)
        state = open_state(folder)
        added = added.filter(pa.array(~unchanged(state, added)))
        if not added.num_rows:
            settle(folder, manifest)
            print(f"{folder.groups}: all {len(run.items):,} listings are there as they are; nothing has changed")
            return
        removed = np.isin(np.array(state.item_ids, object), added["item_id"].to_pylist())
        blank = sorted({*manifest.get("blank_pictures", []), *blank})
        changed = apply(state, removed, added, request, {"blank_pictures": blank})
    updates = int(removed.sum())
    print(f"{folder.groups}: {added.num_rows - updates:,} listings added, {updates:,} updated")
    print_changed(changed, folder)


def open_like(
    manifest: dict[str, Any], items_path: Path, data_dir: Path, model_path: Path
) -> AbstractContextManager[Inference]:
    """The context of `open_inference` for listings of a file, encoded as those of the catalogue were.

    UserError when the model is another one.
    """
    if model_path.is_file() and sha256_of(model_path) != manifest["sha256"]["model"]:
        raise UserError(f"{model_path}: another model than the catalogue's; name that one, or match run again")
    how = (manifest["precision"], manifest["encode_batch"])
    return open_inference(data_dir, "test", model_path, *how, read=read_no_pairs, items_path=items_path)


def encode_added(run: Inference, folder: Folder, manifest: dict[str, Any]) -> tuple[pa.Table, list[str]]:
    """The embeddings of the run's items, as a file of them is, and the pictures that count as blank."""
    if not run.items:
        raise UserError(f"{run.files['items']}: no items; name a file of one line an item")
    size = manifest["options"]["partition_size"]
    encoded = encode_partitions(run, run.store, list(run.items), folder, ADDED, size)
    parts = [files.made_table(folder.part(ADDED, number), made_of) for number, made_of in enumerate(encoded.sums)]
    return pa.concat_tables([part.replace_schema_metadata(None) for part in parts]), encoded.blank


def unchanged(state: State, added: pa.Table) -> NDArray[np.bool_]:
    """Which added listings are there with the same embedding to the bit, and the same category."""
    place = {item_id: row for row, item_id in enumerate(state.item_ids)}
    rows = np.array([place.get(item_id, -1) for item_id in added["item_id"].to_pylist()])
    is_same = rows >= 0
    known = np.flatnonzero(is_same)
    is_same[known] = (state.embeddings[rows[known]] == files.rows_of(added["e"])[known]).all(axis=1)
    for number, category in enumerate(added["category"].to_pylist()):
        is_same[number] &= category == state.categories[rows[number]]
    return is_same


def match_remove(item_ids: Sequence[str], ids_path: Path | None, out_dir: Path) -> None:
    """Remove listings by id and print what changed. UserError when there is none of an id, and nothing is removed."""
    folder = Folder(out_dir)
    read_manifest(folder)
    wanted = dict.fromkeys([*item_ids, *(read_ids(ids_path) if ids_path is not None else [])])
    if not wanted:
        raise UserError("no ids; name listings to remove, or a file of them with --ids FILE")
    with sole_process(out_dir):
        manifest = read_manifest(folder)
        settle(folder, manifest)
        request = sum_of("remove", sorted(wanted))
        if is_done(manifest, request):
            print(f"{folder.groups}: these {len(wanted):,} listings were removed by the last change")
            return
        state = open_state(folder)
        known = set(state.item_ids)
        if unknown := [item_id for item_id in wanted if item_id not in known]:
            hint = nearest(unknown[0], known)
            more = f", nor of {len(unknown) - 1:,} others" if unknown[1:] else ""
            raise UserError(f"{folder.groups}: no listing {clip(unknown[0])}{more}{hint}; nothing was removed")
        removed = np.array([item_id in wanted for item_id in state.item_ids])
        changed = apply(state, removed, no_listings(), request)
    print(f"{folder.groups}: {len(wanted):,} listings removed")
    print_changed(changed, folder)


def no_listings() -> pa.Table:
    """A file of embeddings without any."""
    none = pa.array([], pa.string())
    return pa.table({"item_id": none, "category": none})


def is_done(manifest: dict[str, Any], request: str) -> bool:
    """Whether the last change was just this: a command that was killed after it has nothing left to do."""
    done: bool = manifest.get("changes", NO_CHANGES)["request"] == request
    return done


def print_changed(changed: Changed, folder: Folder) -> None:
    """What to tell of a change."""
    counts = changed.manifest["counts"]
    print(
        f"{changed.matches:,} matches found; now {counts['listings']:,} listings, {counts['pairs']:,} matches, "
        f"{counts['groups']:,} groups of two or more, the largest {counts['largest']:,}"
    )
    print(f"{changed.moved:,} listings of before are in another group; all changes: {folder.path / changed.log}")
    if changed.new_share > NEW:
        print(
            f"warning: {changed.new_share:.0%} of the listings are new since the full run, and the local means of the "
            "others are of then: match run again with all of them"
        )
    if folder.page.exists():
        print(f"note: {folder.page} shows the groups of the full run")
    print(f"next: {entrypoint('match', 'check', '--out', folder.path)}")
