"""Every file of a folder or an archive, and of the archives inside: what it is called and how it is read."""

import io
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from data_scripts.archives.file_names import decode_names, is_litter, marks_of_all, printable
from data_scripts.archives.joined import Joined
from data_scripts.archives.volumes import OTHER, ArchiveError, Volumes, find_volumes, is_part, open_volumes
from data_scripts.archives.zips import MAX_ENTRIES, STORED, DamagedError, Entry, data_start, read_table, unpack
from tongkuan.base.errors import UserError, clip

MAX_INNER = 10_000  # archives inside archives
# What those may unpack to, all together; pictures are packed already, so honest ones grow little.
MAX_SPOOL_RATIO = 50  # times the size of the files that they lie in,
MAX_SPOOL_BYTES = 1 << 30  # or this if it is more
USUAL = (".jpg", ".jpeg", ".png", ".webp")  # known from archives at a glance
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


Test: TypeAlias = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Place:
    """Where files are found together: in the archive `where`, or in the archive `inside` that.

    `is_loose` tells which of them lie unpacked beside their archive: those are listed from there.
    """

    where: str
    inside: str = ""
    prefix: str = ""  # of their paths
    depth: int = 0
    is_loose: Test | None = None

    @property
    def name(self) -> str:
        return f"{self.where}: {clip(self.inside)} in it" if self.inside else self.where


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
    """The files of a split's source. Archives would be unpacked to `folder`; items name the pictures `names`."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.marks = marks_of_all(names)
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
        self.add(Place(root), list(self.walk(root)))

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
        cause = (error.strerror or "unknown").lower()
        line = printable(f"{folder}: this folder cannot be opened ({cause}); make it readable")
        if folder == root:
            raise UserError(line) from error
        self.note("lost", line)
        detail = f"a folder that cannot be opened ({error.strerror})"
        return os.fsencode(folder.removeprefix(root).lstrip("/")), None, Lost(detail, line)

    def add_volumes(self, folder: Path, volumes: Volumes, prefix: str = "", is_loose: Test | None = None) -> None:
        """List the files of an archive in `folder`. Raises ArchiveError."""
        paths, entries = open_volumes(folder, volumes)
        self.archives.append(paths)
        self.add_entries(Place(paths[-1], "", prefix, 0, is_loose), len(self.archives) - 1, entries)

    def add_entries(self, place: Place, archive: int, entries: list[Entry]) -> None:
        """List an archive's entries; those that cannot be unpacked are lost, with one line for all of a cause."""
        self.num_entries += len(entries)
        if self.num_entries > MAX_ENTRIES:
            raise UserError(f"{place.where}: more than {MAX_ENTRIES:,} files; hand over fewer")
        lost = {trouble: self.lost(place, trouble) for trouble in {entry.trouble: 0 for entry in entries}}
        keys = [lost[entry.trouble] if entry.trouble else Packed(archive, entry) for entry in entries]
        self.add(place, [(entry.name, entry.text, key) for entry, key in zip(entries, keys, strict=True)])

    def add(self, place: Place, found: list[Found]) -> None:
        """List files found together, and those of the archives among them."""
        texts = decode_names([(raw, text) for raw, text, _ in found], self.marks)
        kept = [(text, key) for text, (*_, key) in zip(texts, found, strict=True) if not is_litter(text)]
        plain = {text for text, key in kept if not is_archive(text, key)}
        num_loose = num_read = 0
        for text, key in kept:
            if place.is_loose and place.is_loose(text):
                num_loose += 1
            elif isinstance(key, tuple) or (isinstance(key, Packed) and is_archive(text, key)):
                self.add_inner(place, text, key, plain)
            else:
                self.files.append((place.prefix + text, key))
                num_read += not isinstance(key, Lost)
        if place.prefix:
            loose = f", {num_loose:,} more lie unpacked beside it and are read from there" if num_loose else ""
            self.note("inner", f"{place.name}: an archive among the pictures, {num_read:,} files in it are read{loose}")

    def add_inner(self, place: Place, text: str, key: Packed | Group, plain: set[str]) -> None:
        """List the files of an archive that lies among others, or the archive as lost."""
        stem = text[: text.rindex(".")] if isinstance(key, Packed) else stem_of(text, key[1])
        bases = (f"{stem}/", text[: text.rfind("/") + 1])

        def is_loose(path: str) -> bool:
            return any(base + path in plain for base in bases)

        prefix = f"{place.prefix}{stem}/"
        try:
            if isinstance(key, Packed):
                self.add_packed(Place(place.where, text, prefix, place.depth + 1, is_loose), key)
            else:
                self.add_volumes(*key, prefix, is_loose)
        except ArchiveError as error:
            self.note("lost", str(error))
            self.files.append((place.prefix + text, Lost(error.detail, str(error))))

    def add_packed(self, place: Place, key: Packed) -> None:
        """List the files of an archive inside another. Raises ArchiveError."""
        self.num_inner += 1
        if self.num_inner > MAX_INNER:
            raise self.trouble(place, f"one of more than {MAX_INNER:,} archives in archives")
        if place.depth > 1:
            raise self.trouble(place, "an archive in an archive in an archive")
        if not place.inside.casefold().endswith(".zip"):
            raise self.trouble(place, "an archive in an archive, and not a whole zip")
        try:
            archive, start, size = self.unpacked(place, key)
            with Joined(self.archives[archive], start, size) as joined, io.BufferedReader(joined) as file:
                entries = [entry._replace(start=entry.start + start) for entry in read_table(file)]
        except DamagedError as error:
            raise self.trouble(place, f"not a whole zip archive ({error})") from error
        self.add_entries(place, archive, entries)

    def unpacked(self, place: Place, key: Packed) -> tuple[int, int, int]:
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
                room = f"no room in {tempfile.tempdir or 'any temporary folder'} for {key.entry.size >> 20:,} MB of it"
                advice = f"set TMPDIR to a folder with room, or {self.advice(place, '')}"
                raise UserError(printable(f"{place.name}: {room}; {advice}")) from error

    def trouble(self, place: Place, detail: str) -> ArchiveError:
        return ArchiveError(place.name, detail, self.advice(place, detail))

    def lost(self, place: Place, detail: str) -> Lost:
        return Lost(detail, str(self.trouble(place, detail)))

    def advice(self, place: Place, detail: str) -> str:
        """How the user gets at what is in an archive, or in the archive inside it."""
        password = " with its password" if detail == "encrypted" else ""
        what = f"unpack it and then {clip(place.inside)}{password}" if place.inside else f"unpack it{password}"
        return f"{what} into the folder {self.folder}, and move the zip away"

    def note(self, kind: str, line: str) -> None:
        """Keep a line for the user, unless there are enough of the kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_NOTES:
            self.notes.append(printable(line))


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
    if isinstance(key, Packed) and not path.endswith(USUAL):
        name = path.replace("\\", "/").rpartition("/")[2]
        return name.casefold().endswith(".zip") or is_part(name) or OTHER.fullmatch(name) is not None
    return isinstance(key, tuple)


def stem_of(path: str, volumes: Volumes) -> str:
    """An archive's path less what tells its kind; the stem's own length in letters is that of its text."""
    tail = len(volumes.names[-1] or volumes.names[0]) - len(volumes.stem)
    return path[:-tail]
