"""Which files of a folder make up an archive: whole, cut into parts, or spread over disks as PKZIP did it."""

import io
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_scripts.archives.file_names import printable
from data_scripts.archives.joined import Joined
from data_scripts.archives.zips import DamagedError, Entry, read_end, read_table
from tongkuan.base.errors import UserError

AGAIN = "copy it here again, or run ./entrypoint.sh download again"
PART = re.compile(r"(.+\.zip)\.(?:part)?([a-z]{2}|\d{2,4})", re.IGNORECASE)
DISK = re.compile(r"(.+)\.z(\d{2,4})", re.IGNORECASE)
# Archives of other kinds, the first of their parts where they have parts.
OTHER = re.compile(
    r"(?P<whole>(?P<stem>.+?)(?:\.part0*1)?\.(?P<kind>tar|t(?:ar\.)?(?:gz|bz2?|xz|zst)|7z|rar))"
    r"(?P<part>\.(?:part)?(?:aa|0*[01]))?",
    re.IGNORECASE,
)
STARTS = {b"Rar!": "rar", b"7z\xbc\xaf": "7z", b"\x1f\x8b": "tar.gz", b"BZh": "tar.bz2", b"\xfd7zXZ": "tar.xz"}


class ArchiveError(UserError):
    """An archive that cannot be read. `detail` is what is wrong with it, for a ledger."""

    def __init__(self, path: str | Path, detail: str, advice: str) -> None:
        super().__init__(printable(f"{path}: {detail}; {advice}"))
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Volumes:
    """One archive's files in the order in which they are read. `kind` is zip, parts, disks or other."""

    stem: str  # the name less all that says what kind it is
    kind: str
    names: tuple[str, ...]


def find_volumes(names: Iterable[str]) -> list[Volumes]:
    """The archives among the names of one folder's files, by name."""
    disks: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    found = []
    for name in sorted(names):
        if match := DISK.fullmatch(name):
            disks.setdefault(match[1], []).append(name)
        elif match := PART.fullmatch(name):
            parts.setdefault(match[1][:-4], []).append(name)
        elif name.casefold().endswith(".zip") and len(name) > 4:
            disks.setdefault(name[:-4], []).append(name)
        elif match := OTHER.fullmatch(name):
            found.append(Volumes(match["stem"], "other", (name,)))
    for stem, group in disks.items():
        # Where `a.zip` and `a.ZIP` are there, no disk can be said to be the one's or the other's.
        zips = [name for name in group if not DISK.fullmatch(name)]
        others = sorted((name for name in group if DISK.fullmatch(name)), key=number_of)
        found += [Volumes(stem, "disks" if others else "zip", (*others, name)) for name in zips or [""]]
    found += [Volumes(stem, "parts", tuple(sorted(group, key=number_of))) for stem, group in parts.items()]
    return sorted(found, key=lambda volumes: (volumes.stem, volumes.names))


def is_part(name: str) -> bool:
    """Whether a file's name says that it is a part of a zip."""
    return (PART.fullmatch(name) or DISK.fullmatch(name)) is not None


def number_of(name: str) -> int:
    """A part's place among its own: `.partac` is 2, `.003` and `.z03` are 3."""
    mark = mark_of(name)[2].casefold()
    return int(mark) if mark.isdigit() else (ord(mark[0]) - 97) * 26 + ord(mark[1]) - 97


def numbered(name: str, number: int) -> str:
    """What the part of that number is called, one of the others being `name`."""
    match = mark_of(name)
    digits = f"{number:0{len(match[2])}}" if match[2].isdigit() else chr(97 + number // 26) + chr(97 + number % 26)
    return name[: match.start(2)] + digits


def mark_of(name: str) -> re.Match[str]:
    match = PART.fullmatch(name) or DISK.fullmatch(name)
    assert match, name
    return match


def open_volumes(folder: Path, volumes: Volumes) -> tuple[tuple[str, ...], list[Entry]]:
    """An archive's files in order, and its entries, placed in all of them end to end. Raises ArchiveError."""
    if volumes.kind == "other":
        raise refusal(folder, volumes.names[0])
    if volumes.kind == "parts":
        check_numbers(folder, volumes.names)
        names = volumes.names
    else:
        names = all_disks(folder, volumes)
    paths = tuple(str(folder / name) for name in names)
    try:
        with Joined(paths) as joined, io.BufferedReader(joined) as file:
            starts = joined.starts[:-1] if volumes.kind == "disks" else [0]
            return paths, read_table(file, starts[: len(names)])
    except OSError as error:
        raise ArchiveError(paths[0], error.strerror or "cannot be opened", "see that it can be read") from error
    except DamagedError as error:
        raise damage(folder, volumes, str(error)) from error


def check_numbers(folder: Path, names: tuple[str, ...]) -> None:
    """See that no part is missing between others. Raises ArchiveError."""
    first, last = names[0], names[-1]
    styles = {re.sub(r"\d+|..$", "", name[mark_of(name).end(1) :]) + str(name[-1].isdigit()) for name in names}
    if len(styles) > 1:
        raise ArchiveError(folder / first, f"parts of two kinds, {last} is another", "move those of one kind away")
    start = 1 if first[-1].isdigit() and number_of(first) > 0 else 0
    for number, name in enumerate(names, start):
        if number_of(name) != number:
            raise ArchiveError(folder / numbered(first, number), "this part is missing", AGAIN)


def all_disks(folder: Path, volumes: Volumes) -> tuple[str, ...]:
    """The names of all disks that the last one says there are. Raises ArchiveError for one that is missing."""
    *names, last = volumes.names
    if not last:
        raise ArchiveError(folder / f"{volumes.stem}.zip", f"this last part is missing, {names[-1]} is there", AGAIN)
    try:
        with (folder / last).open("rb") as file:
            count = read_end(file).disk
    except OSError as error:
        raise ArchiveError(folder / last, error.strerror or "cannot be opened", "see that it can be read") from error
    except DamagedError as error:
        raise damage(folder, volumes, str(error)) from error
    by_number = {number_of(name): name for name in names}
    for number in range(1, count + 1):
        if number not in by_number:
            name = numbered(names[0], number) if names else f"{volumes.stem}.z{number:02}"
            raise ArchiveError(folder / name, "this part is missing", AGAIN)
    return (*(by_number[number] for number in range(1, count + 1)), last)


def damage(folder: Path, volumes: Volumes, what: str) -> ArchiveError:
    """The error for an archive whose table cannot be read: which part is damaged, as far as can be seen."""
    paths = [folder / name for name in volumes.names if name]
    with paths[0].open("rb") as file:
        start = file.read(8)
    if kind := next((kind for mark, kind in STARTS.items() if start.startswith(mark)), ""):
        advice = f"call it {volumes.stem}.{kind} and run the same command again"
        return ArchiveError(paths[0], f"not a zip archive but {kind}, by its first bytes", advice)
    if volumes.kind != "parts":
        return ArchiveError(paths[-1], f"not a whole zip archive (it {what})", AGAIN)
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths[:-1], sizes, strict=False):
        if size != sizes[0]:
            return ArchiveError(path, "this part is cut, or of another archive", AGAIN)
    if "no table" in what:
        name = numbered(volumes.names[-1], number_of(volumes.names[-1]) + 1)
        return ArchiveError(folder / name, f"this part is missing, or {volumes.names[-1]} is cut", AGAIN)
    if not start.startswith(b"PK"):
        name = numbered(volumes.names[0], max(0, number_of(volumes.names[0]) - 1))
        return ArchiveError(folder / name, f"this part is missing, or {volumes.names[0]} is of another archive", AGAIN)
    return ArchiveError(paths[0], f"not a whole zip archive with the {len(paths) - 1} parts after it ({what})", AGAIN)


def refusal(folder: Path, name: str) -> ArchiveError:
    """The error for an archive of a kind that is not read, with the command that unpacks it."""
    match = OTHER.fullmatch(name)
    assert match, name
    path, target = shlex.quote(str(folder / name)), shlex.quote(str(folder / match["stem"]))
    kind = match["kind"].casefold()
    if kind == "7z":
        command = f"7z x {path} -o{target}"
    elif kind == "rar":
        command = f"unrar x {path} {target}/"
    elif match["part"]:
        whole = shlex.quote(str(folder / match["whole"]))
        mark = re.sub(r"(aa|\d+)$", "", match["part"])
        return ArchiveError(folder / name, "a part of a tar archive", f"join the parts: cat {whole}{mark}* > {whole}")
    else:
        command = f"mkdir -p {target} && tar -xf {path} -C {target}"
    return ArchiveError(folder / name, f"{kind} archives are not read", f"unpack it: {command}")
