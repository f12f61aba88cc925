"""Archives as people make them, in folders of a test, and what is read from them."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_scripts.archives import sources
from tongkuan.base.errors import UserError
from tongkuan.records.pictures import UnreadableError

STEM = "item_train_images"


def raw_name(number: int, length: int) -> str:
    """A name of ASCII letters that stands for bytes to be put in its place."""
    return f"@{number:04d}".ljust(length, "#")


def zipped(files: Iterable[tuple[bytes, bytes]], method: int = zipfile.ZIP_STORED, flags: int = 0) -> bytes:
    """A zip whose names are the given bytes."""
    files = list(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for number, (name, content) in enumerate(files):
            # ZipInfo has a date of its own: packed archives in archives must not change their size with the clock.
            archive.writestr(zipfile.ZipInfo(raw_name(number, len(name))), content, method)
    content = buffer.getvalue()
    for number, (name, _) in enumerate(files):
        content = content.replace(raw_name(number, len(name)).encode(), name)
    return flagged(content, flags) if flags else content


def flagged(content: bytes, flags: int) -> bytes:
    """The zip with bits set in the flags of all its entries, in both places."""
    data = bytearray(content)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = data.find(mark)
        while start >= 0:
            old = struct.unpack_from("<H", data, start + place)[0]
            struct.pack_into("<H", data, start + place, old | flags)
            start = data.find(mark, start + 4)
    return bytes(data)


def plain(*names: str) -> bytes:
    """A zip of files that hold their own names."""
    return zipped((name.encode(), name.encode()) for name in names)


def in_zip(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    return zipped(((name.encode(), content) for name, content in files.items()), method)


def read_all(folder: Path, names: Iterable[str] = ()) -> dict[str, str]:
    """What each file of the split says, or why it cannot be read."""
    source = sources.find_source(folder, "train", names)
    told = {}
    for path, key in source.entries():
        try:
            told[path] = source.read(key).decode("latin-1")
        except UnreadableError as error:
            told[path] = f"! {error}"
    return told


def notes(folder: Path) -> list[str]:
    return list(sources.find_source(folder, "train").notes)


def refused(folder: Path) -> str:
    """The line by which the split is refused."""
    with pytest.raises(UserError) as caught:
        sources.find_source(folder, "train")
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


def put(folder: Path, content: bytes, name: str = f"{STEM}.zip") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


FILES = {f"p/{n}.jpg": bytes([65 + n]) * 500 for n in range(9)}
TOLD = {name: content.decode() for name, content in FILES.items()}


def byte_parts(folder: Path, suffixes: Iterable[str], content: bytes | None = None) -> list[Path]:
    """A zip cut into parts of one size, the last a little smaller."""
    suffixes, content = list(suffixes), content or in_zip(FILES)
    step = -(-len(content) // len(suffixes))
    return [
        put(folder, content[number * step : (number + 1) * step], f"{STEM}.zip{suffix}")
        for number, suffix in enumerate(suffixes)
    ]


def disk_parts(folder: Path, size: int = 1100, last: str = f"{STEM}.zip") -> list[Path]:
    """A zip as PKZIP spreads it over disks: places count from the start of a disk, the table tells the disk."""
    stream, places = bytearray(b"PK\7\x08"), []
    for name, content in FILES.items():
        head = bytes(8) + struct.pack("<3L2H", zlib.crc32(content), len(content), len(content), len(name), 0)
        head = struct.pack("<H", 20) + head
        if len(stream) % size + 30 + len(name) > size:  # a header lies on one disk
            stream += bytes(size - len(stream) % size)
        places.append((name, head, len(stream)))
        stream += b"PK\3\4" + head + name.encode() + content
    table = b"".join(
        b"PK\1\2" + bytes(2) + head + struct.pack("<3H2L", 0, place // size, 0, 0, place % size) + name.encode()
        for name, head, place in places
    )
    disk = len(stream) // size
    end = struct.pack("<4s4H2LH", b"PK\5\6", disk, disk, 9, 9, len(table), len(stream) % size, 0)
    stream += table + end
    disks = [stream[n * size : (n + 1) * size if n < disk else None] for n in range(disk + 1)]
    names = [last[:-3] + (f"z{n + 1:02}" if last.islower() else f"Z{n + 1:02}") for n in range(disk)]
    return [put(folder, bytes(part), name) for part, name in zip(disks, [*names, last], strict=True)]


def encrypt(content: bytes, password: bytes) -> bytes:
    """PKZIP's cipher, with its twelve bytes before."""
    table = [zlib.crc32(bytes([n]), 0xFFFFFFFF) ^ 0xFFFFFFFF for n in range(256)]
    keys = [0x12345678, 0x23456789, 0x34567890]

    def update(byte: int) -> None:
        keys[0] = table[(keys[0] ^ byte) & 255] ^ keys[0] >> 8
        keys[1] = ((keys[1] + (keys[0] & 255)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = table[(keys[2] ^ keys[1] >> 24) & 255] ^ keys[2] >> 8

    for byte in password:
        update(byte)
    out = bytearray()
    for byte in bytes(11) + bytes([zlib.crc32(content) >> 24]) + content:
        seed = (keys[2] | 2) & 0xFFFF
        out.append(byte ^ (seed * (seed ^ 1) >> 8 & 255))
        update(byte)
    return bytes(out)


def locked(files: dict[str, bytes], open_ones: Iterable[str] = ()) -> bytes:
    """A zip whose files, but for `open_ones`, are encrypted with the password `pw`."""
    out, table = bytearray(), bytearray()
    for name, content in files.items():
        flags = 0 if name in open_ones else 1
        packed = encrypt(content, b"pw") if flags else content
        sizes = struct.pack("<3L2H", zlib.crc32(content), len(packed), len(content), len(name), 0)
        head = struct.pack("<2H", 20, flags) + bytes(6) + sizes
        table += b"PK\1\2" + struct.pack("<H", 20) + head + bytes(10) + struct.pack("<L", len(out)) + name.encode()
        out += b"PK\3\4" + head + name.encode() + packed
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(files), len(files), len(table), len(out), 0)
    return bytes(out + table + end)
