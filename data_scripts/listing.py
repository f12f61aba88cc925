"""Every file of a folder or an archive, and of the archives inside: what it is called and how it is read."""

import dataclasses
import io
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from file_names import decode_names, is_litter
from joined import Joined
from volumes import OTHER, ArchiveError, Volumes, find_volumes, is_part, open_volumes
from zips import MAX_ENTRIES, STORED, DamagedError, Entry, data_start, read_table, unpack

from tongkuan.errors import UserError

MAX_INNER = 10_000  # archives inside archives
# What those may unpack to, all together; pictures are packed already, so honest ones grow little.
MAX_SPOOL_RATIO = 50  # times the size of the files that they lie in,
MAX_SPOOL_BYTES = 1 << 30  # or this if it is more
MAX_NOTES = 5  # of a kind; the ledger names all that is lost


@dataclass(frozen=True, slots=True)
class Packed:
    """An entry of one of a source's archives."""

    archive: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Lost:
    """What is there and cannot be read: why, and the line to refuse a source by that holds nothing else."""

    detail: str
    line: str = ""


Key: TypeAlias = str | Packed | Lost  # a str is a file's path
Group: TypeAlias = tuple[Path, Volumes]  # an archive's files in their folder
Found: TypeAlias = tuple[bytes, str | None, Key | Group]  # a path's bytes, its text where that is known, what it is


class Spool:
    """Unpacked archives one after the other, in a file without a name: it goes with this process, however that ends."""

    def __init__(self) -> None:
        self.size = 0
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        self.path = f"/proc/{os.getpid()}/fd/{self.file.fileno()}"  # worker processes open it by this

    def add(self, pieces: Iterable[bytes], limit: int) -> tuple[int, int]:
        """Append; return where that starts and its size in bytes. Raises OSError, and DamagedError beyond `limit`.

        What failed stays and counts too: thousands of archives that each fail at their end must not take for ever.
        """
        start = self.size
        for piece in pieces:
            self.size += len(piece)
            if self.size > limit:
                raise DamagedError(f"unpacks to more than {limit >> 20:,} MB")
            self.file.write(piece)
        self.file.flush()
        return start, self.size - start


class Listing:
    """The files of a split's source. `folder` is where its archives would be unpacked to, `names` what items call."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.names = list(names)
        self.files: list[tuple[str, Key]] = []
        self.archives: list[tuple[str, ...]] = []  # the files of each, read end to end
        self.notes: list[str] = []
        self.spool: Spool | None = None
        self.spooled = -1  # its number among the archives
        self.num_entries = 0
        self.num_inner = 0
        self.counts: Counter[str] = Counter()  # notes of each kind

    def add_folder(self, root: str) -> None:
        """List what is below `root`. Raises UserError when that cannot be opened."""
        self.add(root, list(self.walk(root)))

    def walk(self, root: str) -> Iterator[Found]:
        """Yield the files below `root`, in a fixed order: each real folder once, linked ones after the others."""
        seen = set()
        linked = deque([root])
        while linked:
            stack = [linked.popleft()]
            while stack:
                folder = stack.pop()
                try:
                    status = Path(folder).stat()
                    if (status.st_dev, status.st_ino) in seen:
                        continue
                    seen.add((status.st_dev, status.st_ino))
                    with os.scandir(folder) as entries:
                        files, folders, links = sort_entries(entries)
                except OSError as error:
                    yield self.lose_folder(root, folder, error)
                    continue
                stack += reversed(folders)
                linked += links
                below = folder.removeprefix(root).lstrip("/")
                for name, key in group(folder, files):
                    yield os.fsencode(f"{below}/{name}" if below else name), None, key

    def lose_folder(self, root: str, folder: str, error: OSError) -> Found:
        """What stands for a folder that cannot be opened. Raises UserError for the root."""
        line = f"{folder}: this folder cannot be opened ({(error.strerror or 'unknown').lower()}); make it readable"
        if folder == root:
            raise UserError(line) from error
        self.note("lost", line)
        detail = f"a folder that cannot be opened ({error.strerror})"
        return os.fsencode(folder.removeprefix(root).lstrip("/")), None, Lost(detail, line)

    def add_volumes(
        self, folder: Path, volumes: Volumes, prefix: str = "", is_loose: Callable[[str], bool] | None = None
    ) -> None:
        """List the files of an archive in `folder`. Raises ArchiveError."""
        paths, entries = open_volumes(folder, volumes)
        self.archives.append(paths)
        self.add_entries(paths[-1], "", len(self.archives) - 1, entries, prefix, 0, is_loose)

    def add_entries(
        self,
        where: str,
        inside: str,
        archive: int,
        entries: list[Entry],
        prefix: str,
        depth: int,
        is_loose: Callable[[str], bool] | None,
    ) -> None:
        """List an archive's entries; those that cannot be unpacked are lost, with one line for all of a cause."""
        self.num_entries += len(entries)
        if self.num_entries > MAX_ENTRIES:
            raise UserError(f"{where}: more than {MAX_ENTRIES:,} files; unpack it into the folder {self.folder}")
        lost = {entry.trouble: self.trouble(where, inside, entry.trouble) for entry in entries}
        keys = [
            Lost(entry.trouble, str(lost[entry.trouble])) if entry.trouble else Packed(archive, entry)
            for entry in entries
        ]
        found: list[Found] = [(entry.name, entry.text, key) for entry, key in zip(entries, keys, strict=True)]
        self.add(where, found, prefix, depth, is_loose)

    def add(
        self,
        where: str,
        found: list[Found],
        prefix: str = "",
        depth: int = 0,
        is_loose: Callable[[str], bool] | None = None,
    ) -> None:
        """List files found together, and those of the archives among them, below `prefix`.

        `is_loose` tells which of them lie unpacked beside the archive that they are in: those are listed from there.
        """
        texts = decode_names([(raw, text) for raw, text, _ in found], self.names)
        kept = [(text, key) for text, (*_, key) in zip(texts, found, strict=True) if not is_litter(text)]
        plain = {text for text, key in kept if not is_archive(text, key)}
        num_loose = 0
        for text, key in kept:
            if is_loose and is_loose(text):
                num_loose += 1
            elif isinstance(key, tuple) or (isinstance(key, Packed) and text not in plain):
                self.add_inner(where, text, key, prefix, depth, plain)
            else:
                self.files.append((prefix + text, key))
        if num_loose:
            self.note("loose", f"{where}: {num_loose:,} of its files lie unpacked beside it, those are read")

    def add_inner(self, where: str, text: str, key: Packed | Group, prefix: str, depth: int, plain: set[str]) -> None:
        """List the files of an archive that lies among others, or the archive as lost."""
        stem = text[: text.casefold().rindex(".")] if isinstance(key, Packed) else stem_of(text, key[1])
        bases = (f"{stem}/", text[: text.rfind("/") + 1])

        def is_loose(path: str) -> bool:
            return any(base + path in plain for base in bases)

        try:
            if isinstance(key, Packed):
                self.add_packed(where, text, key, f"{prefix}{stem}/", depth + 1, is_loose)
            else:
                self.add_volumes(*key, f"{prefix}{stem}/", is_loose)
        except ArchiveError as error:
            self.note("lost", str(error))
            self.files.append((prefix + text, Lost(error.detail, str(error))))

    def add_packed(
        self, where: str, inside: str, key: Packed, prefix: str, depth: int, is_loose: Callable[[str], bool]
    ) -> None:
        """List the files of an archive inside another. Raises ArchiveError."""
        self.num_inner += 1
        if self.num_inner > MAX_INNER:
            raise self.trouble(where, inside, f"one of more than {MAX_INNER:,} archives in archives")
        if depth > 1:
            raise self.trouble(where, inside, "an archive in an archive in an archive")
        if not inside.casefold().endswith(".zip"):
            raise self.trouble(where, inside, "an archive in an archive, and not a whole zip")
        try:
            archive, start, size = self.unpacked(where, inside, key)
            with Joined(self.archives[archive], start, size) as joined, io.BufferedReader(joined) as file:
                entries = [dataclasses.replace(entry, start=entry.start + start) for entry in read_table(file)]
        except DamagedError as error:
            raise self.trouble(where, inside, f"not a whole zip archive ({error})") from error
        self.note("inner", f"{where}: {inside} in it is an archive too, its {len(entries):,} files are read")
        self.add_entries(where, inside, archive, entries, prefix, depth, is_loose)

    def unpacked(self, where: str, inside: str, key: Packed) -> tuple[int, int, int]:
        """Where an inner archive lies, stored or unpacked to disk: archive, start, bytes. Raises DamagedError."""
        paths = self.archives[key.archive]
        with Joined(paths) as joined, io.BufferedReader(joined) as file:
            if key.entry.method == STORED:
                return key.archive, data_start(file, key.entry), key.entry.packed
            limit = max(MAX_SPOOL_BYTES, MAX_SPOOL_RATIO * sum(Path(path).stat().st_size for path in paths))
            if key.entry.size > limit:
                raise DamagedError(f"unpacks to more than {limit >> 20:,} MB")
            try:
                if self.spool is None:
                    self.spool, self.spooled = Spool(), len(self.archives)
                    self.archives.append((self.spool.path,))
                if key.entry.size > shutil.disk_usage(self.spool.path).free:
                    raise OSError
                return self.spooled, *self.spool.add(unpack(file, key.entry), limit)
            except OSError as error:
                room = f"no room in {tempfile.tempdir or 'any temporary folder'} for {key.entry.size >> 20:,} MB"
                advice = f"set TMPDIR to a folder with room, or {self.advice(inside, '')}"
                raise UserError(f"{where}: {room}, to which {inside} in it unpacks; {advice}") from error

    def trouble(self, where: str, inside: str, detail: str) -> ArchiveError:
        return ArchiveError(f"{where}: {inside} in it" if inside else where, detail, self.advice(inside, detail))

    def advice(self, inside: str, detail: str) -> str:
        """How the user gets at what is in an archive, or in the archive `inside` it."""
        password = " with its password" if detail == "encrypted" else ""
        what = f"unpack it and then {inside}{password}" if inside else f"unpack it{password}"
        return f"{what} into the folder {self.folder}, and move the zip away"

    def note(self, kind: str, line: str) -> None:
        """Keep a line for the user, unless there are enough of the kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_NOTES:
            self.notes.append(line)


def sort_entries(entries: Iterator[os.DirEntry[str]]) -> tuple[list[tuple[str, Key]], list[str], list[str]]:
    """A folder's files with their keys, its folders and its linked folders, each by name."""
    files: list[tuple[str, Key]] = []
    folders: list[str] = []
    links: list[str] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        try:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_file():
                files.append((entry.name, entry.path))
            else:  # a named pipe would block for ever
                cause = "a link that leads nowhere" if entry.is_symlink() else "a device or a pipe, not a file"
                files.append((entry.name, Lost(cause)))
        except OSError as error:  # a link in a circle
            files.append((entry.name, Lost(error.strerror or "cannot be opened")))
    return files, folders, links


def group(folder: str, files: list[tuple[str, Key]]) -> Iterator[tuple[str, Key | Group]]:
    """The files of one folder, those of an archive as one under the name of the last."""
    volumes = find_volumes(name for name, key in files if isinstance(key, str))
    taken = {name for one in volumes for name in one.names}
    yield from ((name, key) for name, key in files if name not in taken)
    yield from ((one.names[-1] or one.names[0], (Path(folder), one)) for one in volumes)


def is_archive(path: str, key: Key | Group) -> bool:
    """Whether a file is an archive, by its name alone."""
    if isinstance(key, Packed):
        name = path.replace("\\", "/").rpartition("/")[2]
        return name.casefold().endswith(".zip") or is_part(name) or OTHER.fullmatch(name) is not None
    return isinstance(key, tuple)


def stem_of(path: str, volumes: Volumes) -> str:
    """An archive's path less what tells its kind; the stem's own length in letters is that of its text."""
    tail = len(volumes.names[-1] or volumes.names[0]) - len(volumes.stem)
    return path[:-tail]
