"""Files appear whole or not at all: every artefact of this project is written through `publish`."""

import errno
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

# Only decoders that stay inside the process: Pillow hands EPS, for one, to Ghostscript.
PICTURE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "ICO", "PPM", "JPEG2000")
READ_BLOCK = 1 << 20  # bytes
IMAGE = "TONGKUAN_IMAGE"  # environment: set by the Dockerfile, where folders are there by being mounted
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = re.compile("can't allocate memory|out of memory|ALLOC_FAILED")  # as torch, CUDA and its libraries say it
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.part")  # names of `publish`


class UserError(Exception):
    """Something the user can mend. Its text is one line: file, line, what is wrong, what to do next. Exit code 2."""


class FaultError(Exception):
    """Something that went wrong on the way, whoever caused it. Its text is one line, as UserError's. Exit code 1."""


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


def no_room(error: BaseException) -> int:
    """The number of a full disk's error, else 0. Writers in C++ and Rust hide it in their text or behind it."""
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else 0
    named = re.search(r"\(os error (\d+)\)", str(error))
    if named and int(named[1]) in NO_ROOM:
        return int(named[1])
    return no_room(error.__context__) if error.__context__ else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the processor or of a GPU."""
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(folder: Path, error: OSError) -> Exception:
    """The error to raise for a folder that refuses files: the user's to mend, unless the disk itself failed."""
    if error.errno not in REFUSALS:
        return error
    reason = os.strerror(error.errno or 0).lower()
    advice = ""
    if IMAGE in os.environ:
        user = os.geteuid()
        advice = f": docker run -v {volume(folder, False)}, DIR writable for UID {user}, or --user with its owner"
    return UserError(f"{folder}: cannot write here ({reason}); mount it writable or name another folder{advice}")


def missing(path: Path, told: str) -> UserError:
    """The error to raise for an input that is not there; in the image it ends in what to mount."""
    advice = f"; mount it: docker run -v {volume(path, bool(path.suffix))}" if IMAGE in os.environ else ""
    return UserError(f"{path}: {told}{advice}")


def volume(path: Path, is_file: bool) -> str:
    """What `docker run -v` takes so that `path` is there: data, weights, runs and so on below the top, or elsewhere.

    Never the top or a folder above it: docker refuses /, and a mount there would hide the program.
    """
    path, top = Path(os.path.normpath(path.absolute())), Path.cwd()
    folder = path.parent if is_file else path
    if folder != top and folder.is_relative_to(top):
        folder = top / folder.relative_to(top).parts[0]
    if not top.is_relative_to(folder):
        return f"DIR:{folder}"
    return f"FILE:{path}" if is_file else f"DIR:{top / 'NAME'}"


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


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()
