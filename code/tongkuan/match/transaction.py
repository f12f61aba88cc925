"""A change of a catalogue's folder takes place as a whole or not at all, and after a kill the next one tidies up.

New files have names that the manifest of before does not know. Then the manifest is renamed into its place: that is the
moment of the change. Then the new groups and tombstones move to the names at which users look for them, and what the
manifest does not name is deleted. `settle` does this last part, and each change begins with it, too.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import orjson

from tongkuan.base.errors import UserError, clip, missing
from tongkuan.base.files import publish, sha256_of, sync_to_disk
from tongkuan.match.files import Folder, sum_of, write_table
from tongkuan.match.options import Options
from tongkuan.settings import Precision

ADDED, CHANGES, TOMBSTONES = "added", "changes", "tombstones.parquet"
KINDS = ("embeddings", "neighbours", "labelled", "pairs", CHANGES, ADDED)
STANDING = ("groups.parquet", TOMBSTONES)  # of one name whatever changes
OF_A_CHANGE = re.compile(r"-c\d{6}")
ADVICE = "run ./entrypoint.sh match run"
FIELDS = {"sha256": dict, "options": dict, "threshold": dict, "score_above": float, "counts": dict, "files": dict}
FIELDS |= {"precision": str, "encode_batch": int, "recall": dict}
NO_CHANGES = {"number": 0, "request": "", "new": 0}  # of a full run
FILE = re.compile(rf"({'|'.join(KINDS)})/part-[c0-9-]+\.parquet|{'|'.join(map(re.escape, STANDING))}")


def part_name(kind: str, change: int, number: int = 0) -> str:
    """A partition's file of a change, which stands behind those of the run and of changes before it by name, too."""
    return f"{kind}/part-c{change:06}-{number:06}.parquet"


def staged(folder: Folder, name: str, change: int) -> Path:
    """Where a file of a standing name is until the manifest knows of it."""
    stem, suffix = name.split(".")
    return folder.path / f"{stem}-c{change:06}.{suffix}"


def own_files(folder: Folder) -> Iterator[Path]:
    """All files of ours but the manifest, whole or not."""
    for kind in KINDS:
        for pattern in ("part-*.parquet", ".part-*.parquet.part"):
            yield from sorted((folder.path / kind).glob(pattern))
    for name in STANDING:
        for pattern in (name, f"{name.split('.')[0]}-c*.parquet", f".{name.split('.')[0]}*.parquet.part"):
            yield from sorted(folder.path.glob(pattern))


def name_of(folder: Folder, path: Path) -> str:
    """A file's name in the manifest."""
    return path.relative_to(folder.path).as_posix()


def file_sums(folder: Folder) -> dict[str, str]:
    """Hex SHA-256 of each whole file by its name, for the manifest of a run."""
    return {name_of(folder, path): sha256_of(path) for path in own_files(folder) if path.suffix == ".parquet"}


def drop_changes(folder: Folder) -> None:
    """Delete what changes have left: a full run makes everything anew."""
    for path in own_files(folder):
        if OF_A_CHANGE.search(path.name) or path.parent.name in (ADDED, CHANGES) or path.name == TOMBSTONES:
            path.unlink()
    drop_empty(folder)


def drop_empty(folder: Folder) -> None:
    """Delete folders that only changes need."""
    for kind in (ADDED, CHANGES):
        with suppress(OSError):
            (folder.path / kind).rmdir()


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a matched catalogue. UserError when there is none, or it is not as `match run` writes it."""
    try:
        content = folder.manifest.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise missing(folder.manifest, f"no such file, so no finished catalogue; {ADVICE}") from None
    try:
        manifest = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{folder.manifest}: not JSON ({error}); {ADVICE} again") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{folder.manifest}: not a JSON object; {ADVICE} again")
    wrong = [name for name, kind in FIELDS.items() if type(manifest.get(name)) is not kind] or unfit_values(manifest)
    if wrong:
        raise UserError(f"{folder.manifest}: {clip(', '.join(wrong))} is not as match run writes it; {ADVICE} again")
    return manifest


def unfit_values(manifest: dict[str, Any]) -> list[str]:
    """Fields of the right kinds whose values are none of ours."""
    wrong = [] if manifest["precision"] in get_args(Precision) else ["precision"]
    wrong += [] if manifest["encode_batch"] > 0 else ["encode_batch"]
    wrong += [] if type(manifest["threshold"].get("value")) is float else ["threshold"]
    wrong += [] if type(manifest["sha256"].get("model")) is str else ["sha256"]
    wrong += [] if type(manifest["recall"].get("of_matches")) is float else ["recall"]
    if not all(map(FILE.fullmatch, manifest["files"])) or STANDING[0] not in manifest["files"]:
        wrong.append("files")
    changes = manifest.get("changes", NO_CHANGES)
    if type(changes) is not dict or any(type(changes.get(name)) is not type(NO_CHANGES[name]) for name in NO_CHANGES):
        wrong.append("changes")
    try:
        Options(**manifest["options"])
    except TypeError:
        wrong.append("options")
    return wrong


def last_change(manifest: dict[str, Any]) -> int:
    """Number of the last change since the full run, 0 without one."""
    return int(manifest.get("changes", NO_CHANGES)["number"])


def write_manifest(folder: Folder, manifest: dict[str, Any]) -> None:
    """Publish a manifest."""
    with publish(folder.manifest) as file:
        file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n")


def settle(folder: Folder, manifest: dict[str, Any], keeps_added: bool = False) -> None:
    """Finish the last change and delete what one that never took place has left, under the folder's lock.

    `keeps_added`: not the encoded listings of an addition, from which the same command goes on.
    """
    for name in STANDING:
        new = staged(folder, name, last_change(manifest))
        if name in manifest["files"] and new.exists():
            new.replace(folder.path / name)
            sync_to_disk(folder.path)
    for path in own_files(folder):
        if name_of(folder, path) not in manifest["files"] and not (keeps_added and path.parent.name == ADDED):
            path.unlink()
    drop_empty(folder)


def commit(
    folder: Folder,
    manifest: dict[str, Any],
    new: Mapping[str, Mapping[str, Any]],
    gone: set[str],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Make a change of new files, as columns by name, of files that are gone and of what to say; the new manifest."""
    change, sums = about["changes"]["number"], {}
    for name, columns in new.items():
        path = staged(folder, name, change) if name in STANDING else folder.path / name
        write_table(path, columns, sum_of(about["changes"]["request"], change, name))
        sums[name] = sha256_of(path)
    kept = {name: own_sum for name, own_sum in manifest["files"].items() if name not in gone}
    manifest = {**manifest, **about, "files": {**kept, **sums}}
    write_manifest(folder, manifest)
    settle(folder, manifest)
    return manifest
