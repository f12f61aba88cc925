"""Whether a matched catalogue is whole: sums, counts, what its files say of each other, and the recall as it is now.

`./entrypoint.sh match check --out match`
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from tongkuan.base.errors import FailureError, clip
from tongkuan.base.files import sha256_of
from tongkuan.match.candidates import SEED
from tongkuan.match.files import Folder
from tongkuan.match.join import Listings, counted, measured_recall, read_pairs
from tongkuan.match.scores import ROUNDING, Catalogue, Pairs, concatenated, exact_cosines, exact_scores
from tongkuan.match.state import State, load, named, table_of
from tongkuan.match.transaction import CHANGES, STANDING, last_change, name_of, own_files, read_manifest, staged

SAMPLE = 10_000  # pairs that are scored again
LOST = 0.05  # of recall, that another sample does not explain


def match_check(out_dir: Path) -> None:
    """Print what the catalogue holds and its recall. FailureError with a line a fault when something is wrong."""
    folder = Folder(out_dir)
    while True:
        manifest = read_manifest(folder)
        notes: list[str] = []
        faults = list(faults_of(folder, manifest, notes))
        if read_manifest(folder) == manifest:
            break
    if faults:
        raise FailureError(*faults)
    print("\n".join(notes))
    print(f"next: read {folder.groups} and {folder.path / 'pairs'} with any tool for Parquet")


def faults_of(folder: Folder, manifest: dict[str, Any], notes: list[str]) -> Iterator[str]:
    """A line on each fault; `notes` are for when there is none. What hangs on damaged files is not looked at."""
    damaged = list(file_faults(folder, manifest))
    yield from damaged
    if damaged:
        return
    try:
        state = load(folder, manifest)
        tables = [state.pairs(name) for name in state.pair_files]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        yield f"{folder.path}: files do not fit each other: {error}; match run again"
        return
    wrong = [*id_faults(state), *group_faults(state), *log_faults(state)]
    yield from wrong
    if wrong:
        return
    listings = Listings.of(state.item_ids, state.embeddings, state.compared_within(state.categories))
    catalogue = Catalogue(listings.embeddings, state.means[listings.firsts], listings.categories)
    first_ids = pa.array(state.item_ids, pa.string()).take(pa.array(listings.firsts))
    pairs = concatenated([read_pairs(table, first_ids) for table in tables])
    yield from pair_faults(state, tables)
    yield from number_faults(state, catalogue, pairs)
    yield from count_faults(state, listings, sum(table.num_rows for table in tables))
    recall, was = measured_recall(catalogue, pairs, state.verdict), float(manifest["recall"]["of_matches"])
    if recall < was - LOST:
        yield f"{folder.path}: recall {recall:.4f} of matches on a sample, {was:.4f} in the manifest; match run again"
    left = [path for path in own_files(folder) if name_of(folder, path) not in manifest["files"]]
    notes.append(f"{folder.path}: whole, {len(manifest['files'])} files, {len(state.item_ids):,} listings")
    notes.append(f"recall {recall:.4f} of matches, on a sample held against all listings")
    if left and last_change(manifest):
        notes.append(f"note: {len(left)} files are not of this catalogue; the next change deletes them")


def file_faults(folder: Folder, manifest: dict[str, Any]) -> Iterator[str]:
    """Files that are missing or are not those of the manifest."""
    for name, wanted in tqdm(sorted(manifest["files"].items()), desc="sums", unit="file", disable=None):
        path = folder.path / name
        if name in STANDING and (new := staged(folder, name, last_change(manifest))).exists():
            path = new
        try:
            found = sha256_of(path)
        except OSError as error:
            yield f"{path}: {(error.strerror or 'not readable').lower()}; match run again makes it anew"
            continue
        if found != wanted:
            yield f"{path}: not the file that {folder.manifest.name} names; match run again makes it anew"


def id_faults(state: State) -> Iterator[str]:
    """Listings that stand there twice, and tombstones of none."""
    path = state.folder.groups
    for item_id, count in Counter(state.item_ids).items():
        if count > 1:
            yield f"{path}: {clip(item_id)} stands there {count} times; match run again"
    there = set[tuple[str, str]]()
    for name in sorted({file for file, _ in state.tombstones} & {*state.files}):
        there |= {(name, item_id) for item_id in table_of(state.folder.path / name)["item_id"].to_pylist()}
    for file, item_id in sorted(state.tombstones - there):
        yield f"{path.with_name('tombstones.parquet')}: no {clip(item_id)} in {clip(file)}; match run again"


def group_faults(state: State) -> Iterator[str]:
    """Groups whose size is not that of their listings."""
    ids, sizes = state.groups["group_id"].to_pylist(), state.groups["size"].to_pylist()
    counts = Counter(ids)
    wrong = sorted({group_id for group_id, size in zip(ids, sizes, strict=True) if counts[group_id] != size})
    if wrong:
        yield f"{state.folder.groups}: {len(wrong):,} groups have another size, first {clip(wrong[0])}; match run again"
    if not np.isfinite(state.means).all():
        yield f"{state.folder.groups}: a mean is no finite number; match run again"


def log_faults(state: State) -> Iterator[str]:
    """Changes that are not logged, and listings that the log has in another group."""
    names = named(state.manifest, CHANGES)
    if len(names) != state.number:
        yield f"{state.folder.path / CHANGES}: {len(names)} files for {state.number} changes; match run again"
        return
    last: dict[str, str | None] = {}
    for number, name in enumerate(names, start=1):
        table = table_of(state.folder.path / name)
        if set(table["change"].to_pylist()) - {number}:
            yield f"{state.folder.path / name}: not change {number}; match run again"
        last |= dict(zip(table["item_id"].to_pylist(), table["after"].to_pylist(), strict=True))
    now = dict(zip(state.item_ids, state.groups["group_id"].to_pylist(), strict=True))
    wrong = sorted(item_id for item_id, group_id in last.items() if now.get(item_id) != group_id)
    if wrong:
        yield f"{state.folder.path / CHANGES}: {len(wrong):,} listings are in another group, first {clip(wrong[0])}"


def pair_faults(state: State, tables: list[pa.Table]) -> Iterator[str]:
    """Pairs of listings that are not there, that stand twice or the wrong way round, or that are no matches."""
    where, ids = state.folder.path / "pairs", pa.array(state.item_ids, pa.string())
    if not tables:
        return
    table = pa.concat_tables([each.replace_schema_metadata(None) for each in tables]).combine_chunks()
    is_there = pc.and_(*(pc.is_in(table[side], ids) for side in ("left", "right")))
    verdict = state.verdict
    is_match = pc.and_(
        pc.greater(table["score"], verdict.score_floor), pc.greater(table["scaled"], verdict.threshold - ROUNDING)
    )
    checks = {
        "name listings that are not there": is_there,
        "have the larger id left": pc.less(table["left"], table["right"]),
    }
    for what, holds in checks.items():
        if count := table.num_rows - (pc.sum(holds).as_py() or 0):
            yield f"{where}: {count:,} pairs {what}; match run again"
    if count := table.num_rows - table.group_by(["left", "right"]).aggregate([]).num_rows:
        yield f"{where}: {count:,} pairs stand there twice; match run again"
    is_copy = pc.equal(table["cosine"], np.float32(1))
    if count := pc.sum(pc.invert(pc.or_(is_match, is_copy))).as_py():
        yield f"{where}: {count:,} pairs are below a threshold; match run again"


def number_faults(state: State, catalogue: Catalogue, pairs: Pairs) -> Iterator[str]:
    """Numbers of a sample of pairs that are not those of their embeddings."""
    chosen = np.zeros(len(pairs), bool)
    chosen[np.random.default_rng(SEED).choice(len(pairs), min(SAMPLE, len(pairs)), replace=False)] = True
    pairs = pairs.where(chosen)
    cosines = exact_cosines(catalogue.embeddings, pairs.left, pairs.right)
    scaled = 2 * cosines - catalogue.means[pairs.left] - catalogue.means[pairs.right]
    found = {
        "score": (pairs.scores, exact_scores(catalogue.embeddings, pairs.left, pairs.right)),
        "cosine": (pairs.cosines, cosines),
        "scaled": (pairs.scaled, scaled),
    }
    for name, (stored, computed) in found.items():
        if not np.allclose(stored, computed, rtol=ROUNDING, atol=ROUNDING):
            yield f"{state.folder.path / 'pairs'}: {name} of a pair is not that of its embeddings; match run again"


def count_faults(state: State, listings: Listings, num_pairs: int) -> Iterator[str]:
    """Counts of the manifest that are not those of the files."""
    sizes = state.groups["size"].to_numpy()
    found = counted(state.groups["group_id"].to_pylist(), sizes, len(listings.firsts), num_pairs)
    for name, count in found.items():
        if (said := state.manifest["counts"].get(name)) != count:
            yield f"{state.folder.manifest}: {clip(said)} {name}, but files have {count:,}; match run again"
