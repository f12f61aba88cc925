"""Where a split's picture files come from: folders and archives, hostile ones included."""

import bisect
import io
import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from tongkuan.errors import UserError
from tongkuan.pictures import UnreadableError, reason

MAX_BYTES = 64 << 20  # of one picture file, unpacked


class Folder:
    """Picture files below a folder; a key is the path of one."""

    def __init__(self, root: str) -> None:
        self.root = root

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield (path below the root with `/`, key)."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                if path.is_file():  # a named pipe would block for ever
                    yield decode_name(os.fsencode(path.relative_to(self.root).as_posix())), str(path)

    def read(self, key: Any) -> bytes:
        """A file's bytes, at most MAX_BYTES. Raises UnreadableError."""
        try:
            with open(key, "rb") as file:
                return checked_size(file.read(MAX_BYTES + 1))
        except OSError as error:
            raise UnreadableError(error.strerror or "cannot be opened") from error


class Archive:
    """Picture files of a zip in one or more parts; a key is the number of an entry. Each process opens its own."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self.parts = parts
        try:
            self.zip = zipfile.ZipFile(io.BufferedReader(Joined(parts)))
        except Exception as error:  # a damaged table of contents raises all sorts
            name = parts[0] if len(parts) == 1 else f"{parts[0]} and the {len(parts) - 1} parts after it"
            raise UserError(f"{name}: not a whole zip archive; run ./entrypoint.sh download again") from error
        self.infos = self.zip.infolist()

    def __reduce__(self) -> tuple[type["Archive"], tuple[tuple[str, ...]]]:
        return Archive, (self.parts,)  # an open file cannot travel to a worker, its name can

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield (path in the archive, key). A Mac's resource forks are no pictures and are passed over."""
        for number, info in enumerate(self.infos):
            if not info.is_dir() and not info.filename.startswith("__MACOSX/"):
                is_utf8 = info.flag_bits & 0x800
                yield info.filename if is_utf8 else decode_name(info.filename.encode("cp437", "replace")), number

    def read(self, key: Any) -> bytes:
        """An entry's bytes, at most MAX_BYTES. Raises UnreadableError."""
        info = self.infos[key]
        if info.flag_bits & 0x1:
            raise UnreadableError("encrypted")
        try:
            with self.zip.open(info) as file:
                return checked_size(file.read(MAX_BYTES + 1))
        except UnreadableError:
            raise
        except Exception as error:  # zlib, lzma, bad checksums, unknown methods: all of them this entry's fault
            raise UnreadableError(f"cannot be unpacked ({reason(error)})") from error


Source: TypeAlias = Folder | Archive


class Joined(io.RawIOBase):
    """Files read as if they were one, seekable, without writing the joined file."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.files = [open(path, "rb") for path in paths]  # noqa: SIM115 - they live as long as this object
        sizes = [file.seek(0, io.SEEK_END) for file in self.files]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.starts[-1]}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill what the part under the position can give; 0 at the end."""
        if self.position >= self.starts[-1]:
            return 0
        part = bisect.bisect_right(self.starts, self.position) - 1
        self.files[part].seek(self.position - self.starts[part])
        count = self.files[part].readinto(buffer)
        self.position += count
        return count

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()


def checked_size(data: bytes) -> bytes:
    """`data`, unless it is more than one picture may have."""
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"larger than {MAX_BYTES >> 20} MB")
    return data


def decode_name(raw: bytes) -> str:
    """A file name's text: UTF-8, else GBK as Chinese Windows writes it, else with marks for what is neither."""
    for encoding in ("utf-8", "gbk"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("utf-8", "replace")


def find_source(raw_dir: Path, split: str, names: Iterable[str] = ()) -> Source | None:
    """A split's pictures: the zip, else its parts, else the folder, else None. Raises UserError for a missing part."""
    archive = raw_dir / f"item_{split}_images.zip"
    if archive.is_file():
        return Archive((str(archive),))
    parts = sorted(raw_dir.glob(f"{archive.name}.part[a-z][a-z]"))
    if parts:
        letters = ("".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2))
        for part, suffix in zip(parts, letters, strict=False):
            if not part.name.endswith(suffix):
                raise UserError(f"{archive}.part{suffix}: this part is missing; run ./entrypoint.sh download again")
        return Archive(tuple(str(part) for part in parts))
    folder = raw_dir / f"item_{split}_images"
    return Folder(str(folder)) if folder.is_dir() else None
