"""Files appear whole or not at all. What goes to NAME is first written to `.NAME.part` beside it, under a lock.

A fixed name is its own cleaning: the next writer of NAME clears what a killed run left. Writers of one file take turns,
for a file is written in little time. A folder that takes long to fill, as by a download, refuses a second process.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tongkuan.base.errors import FailureError, UserError, no_room, unwritable
from tongkuan.base.terminal import say

READ_BLOCK = 1 << 20  # bytes


def part_of(path: Path) -> Path:
    """Where a file or folder is while it is not whole."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def publish(path: Path, sync: bool = True) -> Iterator[IO[Any]]:
    """As `temporary_file`; at the end the file is brought to the disk and gets the name `path`.

    Without `sync` a power cut may leave it empty: for many small files, written before one that says they are there.
    """
    with temporary_file(path) as file:
        yield file
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        if not is_at(Path(file.name), file.fileno()):
            raise FailureError(f"{path}: replaced while it was written; let nothing else write there and run it again")
        if sync:
            os.fsync(file.fileno())
        Path(file.name).replace(path)
        if sync:
            sync_to_disk(path.parent)


@contextmanager
def temporary_file(path: Path) -> Iterator[IO[Any]]:
    """Open `part_of(path)`, anew and alone; deleted at the end, unless it was renamed. Waits for another writer.

    Raises UserError when the folder takes no files; errors of a full disk name `path`.
    """
    temporary = part_of(path)
    with full_disk_named(path):
        lock = make_alone(temporary)
        try:
            with open(temporary, "wb", opener=lambda *_: os.dup(lock)) as file:
                yield file
        finally:
            if is_at(temporary, lock):
                temporary.unlink()
            os.close(lock)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Let the error of a full disk name `path`, however it was raised."""
    try:
        yield
    except BaseException as error:
        if number := no_room(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def make_alone(path: Path) -> int:
    """Make a file: a descriptor that holds its lock. Never one that is there: it may be a link, or open elsewhere."""
    try:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError, FileNotFoundError):
                return open_locked(path, os.O_CREAT | os.O_EXCL)
            discard(path)
    except OSError as error:
        raise unwritable(path.parent, error) from error


def discard(path: Path) -> None:
    """Delete what a killed run left. A living one is waited for."""
    try:
        lock = open_locked(path, os.O_NOFOLLOW)
        path.unlink()
        os.close(lock)
    except FileNotFoundError:
        pass
    except OSError:  # a link, or another user's file: no process of ours writes it
        path.unlink(missing_ok=True)


def open_locked(path: Path, flags: int) -> int:
    """Open a file and wait for its lock, which the descriptor holds. FileNotFoundError if it has gone by then."""
    descriptor = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"tongkuan: waiting for another process that writes {path}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: the first of two writers ends with an error
    if not is_at(path, descriptor):
        os.close(descriptor)
        raise FileNotFoundError(path)
    return descriptor


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


@contextmanager
def sole_process(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep a second process out of a folder. UserError for that one, and for a folder that takes no files.

    Those that come as `shared` let each other in: each writes files of its own. Errors of a full disk name the folder.
    """
    check_writable(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process fills this folder; wait for its end") from error
        except OSError:
            pass  # some network file systems lock no folders
        with full_disk_named(folder):
            yield
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder for good: its bytes are on the disk before its name is."""
    for path in [*source.rglob("*"), source]:
        sync_to_disk(path)
    source.replace(target)
    sync_to_disk(target.parent)


def sync_to_disk(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raise UserError now rather than after hours of work, if `folder` cannot take files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def check_target(path: Path) -> None:
    """As check_writable, for the folder that a file goes to and for a folder that stands in the file's place."""
    check_writable(path.parent)
    for place in (path, part_of(path)):
        if place.is_dir():
            raise UserError(f"{place}: a folder, where a file goes; name a file in it, or move it away")


def check_apart(output: Path, *inputs: Path) -> None:
    """Raise UserError if `output` is one of the inputs or lies inside one, links followed. Nothing need be there."""
    place = output.resolve()
    for path in inputs:
        if place.is_relative_to(path.resolve()):
            where = "is read here" if place == path.resolve() else f"lies in {path}, which is read"
            raise UserError(f"{output}: {where}, and would be written over; name another folder for what is made")


def check_apart_from_data(data_dir: Path, folders: Iterable[Path], files: Iterable[Path]) -> None:
    """Raise UserError if a verb that reads `data_dir` would write into what resize and split made there.

    An output folder may be any other folder below it; an output file may also lie in it directly.
    """
    inputs = [data_dir / "images", data_dir / "handed_out"]
    for folder in folders:
        check_apart(folder, *inputs)
        if folder.resolve() == data_dir.resolve():
            raise UserError(f"{folder}: is read here; name another folder for what is made, such as {folder / 'made'}")
    for file in files:
        check_apart(file, *inputs)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
