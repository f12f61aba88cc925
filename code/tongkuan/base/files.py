"""Files appear whole or not at all: every artefact of this project is written through `publish`."""

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from tongkuan.base.errors import UserError, no_room, unwritable

READ_BLOCK = 1 << 20  # bytes
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.part")  # names of `publish`


@contextmanager
def publish(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success flush, fsync and rename it there, on any error remove it.

    What killed processes left in the folder goes first. Raises UserError when the folder cannot be written; nothing is
    left behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent.resolve())
        lock, temporary = make_temporary(path)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        encoding = None if "b" in mode else "utf-8"
        with temporary.open(mode, encoding=encoding, newline=None if encoding is None else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                raise RuntimeError(
                    f"{temporary}: replaced by another file while it was written; that is not on the disk"
                )
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(FileNotFoundError):
            temporary.unlink()
        if number := no_room(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        os.close(lock)


def make_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, and a descriptor that holds its lock: as long as it is open, nobody sweeps the file."""
    while True:
        lock, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with suppress(OSError):  # a file system without locks; there nothing is swept either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return lock, Path(name)
        os.close(lock)  # swept by another process before it was locked


@cache  # once a process: a folder may hold many thousands of files
def sweep(folder: Path) -> None:
    """Delete the temporary files of killed processes from `folder`. A living one's are locked, and stay."""
    for path in [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)]:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
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
    if path.is_dir():
        raise UserError(f"{path}: a folder, where a file goes; name a file in it, or move it away")


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
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()
