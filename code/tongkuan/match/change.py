"""A change of a matched catalogue: listings removed and added, pairs and groups brought up to date, all at once.

Only components of pairs in which a listing came or went are linked anew, as the run links them; the groups of all
others are not looked at. Local means of listings that were there stay as they were until the next full run, so a pair
may be found or not that a run of all listings would not find or find.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from tongkuan.base.errors import UserError
from tongkuan.match import files
from tongkuan.match.candidates import Rows
from tongkuan.match.groups import Facts, facts, group
from tongkuan.match.join import PAIRS, counted, group_columns
from tongkuan.match.living import Living, added_columns, all_rows, new_matches, without
from tongkuan.match.scores import Numbers, Pairs
from tongkuan.match.stable import stable_ids
from tongkuan.match.state import EMBEDDINGS, State
from tongkuan.match.transaction import CHANGES, OF_A_CHANGE, TOMBSTONES, commit, part_name


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change has done."""

    manifest: dict[str, Any]
    log: str
    """Name of the file that lists whose group changed."""
    moved: int
    """Listings that were there before, and are, in another group."""
    matches: int
    """New pairs."""

    @property
    def new_share(self) -> float:
        """Listings added since the full run, of all: 0 to 1."""
        share: float = self.manifest["changes"]["new"] / self.manifest["counts"]["listings"]
        return share


@dataclass(frozen=True, slots=True)
class Grouped:
    """The group of each of T listings, of which removed ones have none: what is said of those says nothing."""

    group_ids: list[str]
    sizes: NDArray[np.int64]
    densities: Numbers
    weakest: Numbers
    means: Numbers


def apply(
    state: State, removed: NDArray[np.bool_], added: pa.Table, request: str, about: Mapping[str, Any] | None = None
) -> Changed:
    """Remove listings (N,) and add others, as a table of embeddings has them; all on the disk at the end.

    `request` is the sum of what was asked for, by which the same command knows that it is done. An added listing whose
    id is removed is an update. `about` is for the manifest. UserError when nothing would be left.
    """
    if removed.all() and not added.num_rows:
        raise UserError(f"{state.folder.path}: these are all its listings; delete the folder instead")
    options, number = state.options, state.number + 1
    living = living_of(state, removed, added)
    matches = new_matches(living, state.verdict, options.engine, options.candidates, options.recall)
    touched = {living.item_ids[first] for first in living.firsts[rows_touched(living, removed)].tolist()}
    pairs, gone = pairs_left(state, living, removed, touched)
    appended = pa.table(added_columns(living, matches, len(removed)))
    if appended.num_rows:
        pairs[part_name(PAIRS, number, len(state.pair_files))] = appended
    grouped = regroup(state, living, all_rows(list(pairs.values()), living), touched)
    groups = groups_of(living, grouped)
    log, moved = log_of(state, groups)
    tombstones, empty = tombstones_of(state, removed)
    new = {name: columns_of(table) for name, table in pairs.items() if name not in state.manifest["files"]}
    new |= {part_name(CHANGES, number): log, state.folder.groups.name: groups}
    if added.num_rows:
        new[part_name(EMBEDDINGS, number)] = columns_of(added)
    if len(tombstones["file"]):
        new[TOMBSTONES] = tombstones
    changes = {"number": number, "request": request, "new": num_new(state, removed) + added.num_rows}
    num_pairs = sum(table.num_rows for table in pairs.values())
    counts = counted(groups["group_id"].to_pylist(), groups["size"], len(living.firsts), num_pairs)
    facts = {**(about or {}), "counts": counts, "changes": changes}
    manifest = commit(state.folder, state.manifest, new, gone | empty | ({TOMBSTONES} - new.keys()), facts)
    return Changed(manifest, part_name(CHANGES, number), moved, appended.num_rows)


def num_new(state: State, removed: NDArray[np.bool_]) -> int:
    """How many of the listings that stay were added since the full run."""
    since = [number for number, name in enumerate(state.files) if OF_A_CHANGE.search(name)]
    return int(np.isin(state.file_of[~removed], since).sum())


def columns_of(table: pa.Table) -> dict[str, Any]:
    """A table as `files.write_table` takes it."""
    return dict(zip(table.column_names, table.columns, strict=True))


def living_of(state: State, removed: NDArray[np.bool_], added: pa.Table) -> Living:
    """What is there once listings (N,) are removed and others added."""
    count = added.num_rows
    item_ids = [*state.item_ids, *added["item_id"].to_pylist()]
    categories = state.compared_within([*state.categories, *added["category"].to_pylist()])
    embeddings = np.concatenate([state.embeddings, files.rows_of(added["e"])]) if count else state.embeddings
    means = np.r_[state.means, np.full(count, np.nan)]
    return Living.of(item_ids, embeddings, categories, means, np.r_[~removed, np.ones(count, bool)])


def rows_touched(living: Living, removed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows of added listings, and of copies of removed ones."""
    rows = living.numbers[np.r_[np.flatnonzero(removed), np.arange(len(removed), len(living.item_ids))]]
    return np.unique(rows[rows >= 0])


def pairs_left(
    state: State, living: Living, removed: NDArray[np.bool_], touched: set[str]
) -> tuple[dict[str, pa.Table], set[str]]:
    """Files of pairs without removed listings, those that named some under new names; and the names that are gone.

    What `without` says of `touched`.
    """
    heirs: dict[str, str | None] = {}
    for listing in np.flatnonzero(removed).tolist():
        row = int(living.numbers[listing])
        first = int(living.firsts[row]) if row >= 0 else len(removed)
        heirs[state.item_ids[listing]] = state.item_ids[first] if first < len(removed) else None
    found: dict[str, pa.Table] = {}
    gone = set()
    for place, name in enumerate(state.pair_files):
        table = state.pairs(name)
        other = without(table, heirs, touched) if heirs else None
        if other is None:
            found[name] = table
            continue
        gone.add(name)
        if other.num_rows:
            found[part_name(PAIRS, state.number + 1, place)] = other
    return found, gone


def regroup(state: State, living: Living, pairs: Pairs, touched: set[str]) -> Grouped:
    """Link the components of touched listings anew; all other groups are as they were."""
    count, total = len(living.firsts), len(living.item_ids)
    ones = np.ones(len(pairs), dtype=bool)
    graph = coo_matrix((ones, (pairs.left, pairs.right)), (count,) * 2)
    _, labels = connected_components(graph, directed=False)
    seeds = [row for row, first in enumerate(living.firsts.tolist()) if living.item_ids[first] in touched]
    is_touched = np.isin(labels, labels[seeds])
    rows = np.flatnonzero(is_touched).astype(np.int32)
    linked, about = link(state, living, pairs.where(is_touched[pairs.left]), rows)
    of_row = np.full(count, -1)
    of_row[rows] = np.arange(len(rows))
    place = np.where(living.is_there & (living.numbers >= 0), of_row[living.numbers], -1)
    own = np.flatnonzero(place >= 0)
    old_ids = state.groups["group_id"].to_pylist()
    before = dict(zip(state.item_ids, old_ids, strict=True))
    own_ids = [living.item_ids[listing] for listing in own.tolist()]
    is_own = np.zeros(total, bool)
    is_own[own] = True
    num_added = total - len(old_ids)
    taken = {old_ids[listing] for listing in np.flatnonzero(living.is_there & ~is_own).tolist()}
    clusters = linked[place[own]].tolist()
    names = stable_ids(own_ids, clusters, [before.get(item_id) for item_id in own_ids], taken)
    group_ids = [*old_ids, *[""] * num_added]
    for listing, cluster in zip(own.tolist(), clusters, strict=True):
        group_ids[listing] = names[cluster]
    columns = []
    for name, found in (("size", about.sizes), ("density", about.densities), ("weakest", about.weakest)):
        column = np.r_[state.groups[name].to_numpy().astype(np.float64), np.zeros(num_added)]
        column[own] = found[place[own]]
        columns.append(column)
    sizes, densities, weakest = columns
    return Grouped(group_ids, sizes.astype(np.int64), densities, weakest, living.catalogue.means[living.numbers])


def link(state: State, living: Living, pairs: Pairs, rows: Rows) -> tuple[NDArray[np.int64], Facts]:
    """Labels and `facts` of some rows, of all whose pairs are given."""
    place = np.full(len(living.firsts), -1, np.int32)
    place[rows] = np.arange(len(rows))
    catalogue = living.catalogue
    left, right = place[pairs.left], place[pairs.right]
    linked = group(
        len(rows),
        left,
        right,
        pairs.scaled,
        state.verdict.threshold,
        lambda own: catalogue.scaled(rows[own]),
        state.options.groups,
    )
    copies = living.copies[rows]
    return linked.labels, facts(linked.labels, copies, left, right, lambda own: catalogue.scores(rows[own]))


def log_of(state: State, groups: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The change of each listing's group, by id, and how many of those that were there before and are have another."""
    before = dict(zip(state.item_ids, state.groups["group_id"].to_pylist(), strict=True))
    after = dict(zip(groups["item_id"].to_pylist(), groups["group_id"].to_pylist(), strict=True))
    ids = sorted(item_id for item_id in before.keys() | after.keys() if before.get(item_id) != after.get(item_id))
    columns = {
        "change": np.full(len(ids), state.number + 1, np.int32),
        "item_id": pa.array(ids, pa.string()),
        "before": pa.array([before.get(item_id) for item_id in ids], pa.string()),
        "after": pa.array([after.get(item_id) for item_id in ids], pa.string()),
    }
    return columns, sum(item_id in before and item_id in after for item_id in ids)


def groups_of(living: Living, grouped: Grouped) -> dict[str, Any]:
    """The file of groups."""
    there = np.flatnonzero(living.is_there)
    return group_columns(
        [living.item_ids[listing] for listing in there.tolist()],
        [grouped.group_ids[listing] for listing in there.tolist()],
        grouped.sizes[there],
        grouped.densities[there],
        grouped.weakest[there],
        grouped.means[there],
    )


def tombstones_of(state: State, removed: NDArray[np.bool_]) -> tuple[dict[str, Any], set[str]]:
    """The file of tombstones, and the files of embeddings of which every listing is removed: those need none."""
    left = np.bincount(state.file_of[~removed], minlength=len(state.files))
    empty = {state.files[number] for number in np.flatnonzero(left == 0).tolist()}
    rows = np.flatnonzero(removed).tolist()
    dead = state.tombstones | {(state.files[state.file_of[row]], state.item_ids[row]) for row in rows}
    ordered = sorted(each for each in dead if each[0] not in empty)
    columns = {
        "file": pa.array([file for file, _ in ordered], pa.string()),
        "item_id": pa.array([item_id for _, item_id in ordered], pa.string()),
    }
    return columns, empty
