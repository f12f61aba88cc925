"""Where a split's picture files come from: folders and archives, hostile ones included."""

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_scripts.archives.joined import Joined
from data_scripts.archives.listing import Listing, Lost
from data_scripts.archives.volumes import Volumes, find_volumes
from data_scripts.archives.zips import DamagedError, unpack
from tongkuan.base.errors import UserError
from tongkuan.records.pictures import MAX_BYTES, UnreadableError

NO_PICTURES = set("csv doc docx htm html ini json jsonl log md nfo pdf tsv txt url xls xlsx xml".split())  # noqa: SIM905


class Source:
    """Picture files of a split. `notes` are lines for the user: what was decided, and which archives are lost."""

    def __init__(self, listing: Listing | None = None, archives: Iterable[tuple[str, ...]] = ()) -> None:
        self.listing = listing
        self.archives = listing.archives if listing else list(archives)
        self.notes = listing.notes if listing else []

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (None, self.archives)  # a worker reads by key and lists nothing

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield (path with `/`, key)."""
        return iter(self.listing.files if self.listing else ())

    def read(self, key: Any) -> bytes:
        """A file's bytes, at most MAX_BYTES. Raises UnreadableError."""
        if isinstance(key, Lost):
            raise UnreadableError(key.detail)
        try:
            if isinstance(key, str):
                with open(key, "rb") as file:
                    return checked_size(file.read(MAX_BYTES + 1))
            # Opened for each picture: no archive stays open, and every process may read any.
            with Joined(self.archives[key.archive]) as joined, io.BufferedReader(joined) as packed:
                data = bytearray()
                for piece in unpack(packed, key.entry):
                    data += piece
                    if len(data) > MAX_BYTES:
                        break
                return checked_size(bytes(data))
        except OSError as error:
            raise UnreadableError(error.strerror or "cannot be opened") from error
        except DamagedError as error:
            raise UnreadableError(f"cannot be unpacked ({error})") from error

    def check(self) -> None:
        """Raise UserError when all that may be pictures is lost for a cause that the user can mend."""
        lines = Counter(key.line for _, key in self.entries() if isinstance(key, Lost))
        readable = (path for path, key in self.entries() if not isinstance(key, Lost))
        if lines and "" not in lines and all(path.rpartition(".")[2].casefold() in NO_PICTURES for path in readable):
            raise UserError(lines.most_common(1)[0][0])


def checked_size(data: bytes) -> bytes:
    """`data`, unless it is more than one picture may have."""
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"larger than {MAX_BYTES >> 20} MB")
    return data


def find_source(raw_dir: Path, split: str, names: Iterable[str] = ()) -> Source | None:
    """A split's pictures: its zip, else the zip's parts, else its folder, else another archive, else None.

    `names` are the pictures that the split's items name: they show which encoding an archive's names are in. What lies
    beside the one that is read is named in its notes. Raises UserError for an archive that is encrypted or not whole.
    """
    wanted = f"item_{split}_images"
    try:
        with os.scandir(raw_dir) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    folders = [entry.name for entry in entries if entry.name.casefold() == wanted and entry.is_dir()]
    volumes = find_volumes(
        entry.name for entry in entries if entry.name.casefold().startswith(wanted) and entry.is_file()
    )
    choices: list[Volumes | str] = [*folders, *(one for one in volumes if one.stem.casefold() == wanted)]
    choices.sort(key=lambda choice: (rank(choice), name_of(choice) != name_of(choice).casefold(), name_of(choice)))
    if len(choices) > 1:
        choices = [choice for choice in choices if not isinstance(choice, str) or any((raw_dir / choice).iterdir())]
    if not choices:
        return None
    choice, *others = choices
    try:
        listing = Listing(raw_dir / (choice if isinstance(choice, str) else wanted), names)
        if isinstance(choice, str):
            listing.add_folder(str(raw_dir / choice))
        else:
            listing.add_volumes(raw_dir, choice)
        source = Source(listing)
        source.check()
    except UserError as error:
        beside = next((other for other in others if isinstance(other, str)), None)
        if beside and not isinstance(choice, str):
            raise UserError(f"{error}; or move it away, then the folder {raw_dir / beside} is read") from error
        raise
    if others:
        passed = ", ".join(map(name_of, others))
        source.notes.insert(
            0, f"{raw_dir / name_of(choice)}: read, and not {passed} beside it; move away what is not meant"
        )
    return source


def rank(choice: Volumes | str) -> int:
    """Which of several sources is read. What was read before other kinds were goes before them."""
    if isinstance(choice, str):
        return 2
    if choice.kind in ("zip", "disks"):
        return 0
    return 4 if choice.kind == "other" else 3 if choice.names[0][-1].isdigit() else 1


def name_of(choice: Volumes | str) -> str:
    return choice if isinstance(choice, str) else choice.names[-1] or choice.names[0]
