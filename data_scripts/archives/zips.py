"""Zip archives: their tables, and their entries unpacked piece by piece. Nothing in a table is trusted.

Python's zipfile gives up on a whole archive for one name that is not the UTF-8 it says, refuses an entry whose two
names differ, cannot read what is spread over `.z01`, `.z02`, and unpacks bzip2 and lzma without a bound.
"""

import bz2
import io
import lzma
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

TURN = 1 << 32
PIECE = 1 << 20  # bytes unpacked at a time, at most
MAX_ENTRIES = 2_000_000
MAX_LZMA = 256 << 20  # bytes of memory for one entry's dictionary
STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14
OTHER_METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL_SIZE = 30


class DamagedError(Exception):
    """An archive or an entry that is not what its table says; the text is a clause."""


@dataclass(frozen=True, slots=True)
class End:
    """What stands at an archive's end: where its table is, and on which of how many disks (parts)."""

    place: int  # of this record, in bytes
    disk: int  # the last one; 0 where there is only one
    table_disk: int
    table_size: int
    table_start: int  # from the start of its disk


class Entry(NamedTuple):
    """One file of an archive. `text` is its name where the archive itself says which letters `name` stands for."""

    name: bytes
    text: str | None
    start: int  # of its local header, in the joined file
    packed: int  # bytes
    size: int  # bytes, unpacked
    crc: int
    method: int
    flags: int

    @property
    def trouble(self) -> str:
        """Why it cannot be unpacked, as far as the table says, else nothing."""
        if self.flags & 1:
            return "encrypted"
        if self.method in (STORED, DEFLATED, BZIP2, LZMA):
            return ""
        return f"compressed by {OTHER_METHODS.get(self.method, f'method {self.method}')}, which is not read here"


def read_end(file: BinaryIO) -> End:
    """The end record of the archive in `file`. Raises DamagedError when there is none."""
    size = file.seek(0, io.SEEK_END)
    base = max(0, size - END.size - 0xFFFF)
    file.seek(base)
    tail = file.read()
    places = [match.start() for match in re.finditer(b"PK\5\6", tail) if match.start() + END.size <= len(tail)]
    if not places:
        raise DamagedError("has no table of contents at its end")
    # A comment follows, which may hold such a mark too; bytes behind it are no one's.
    ends = [place + END.size + struct.unpack_from("<H", tail, place + END.size - 2)[0] for place in places]
    found = next((place for place, end in zip(places, ends, strict=True) if end == len(tail)), places[-1])
    place = base + found
    _, disk, table_disk, _, _, table_size, table_start, _ = END.unpack_from(tail, found)
    if found >= LOCATOR.size and tail[found - LOCATOR.size :].startswith(b"PK\6\7"):
        place -= LOCATOR.size + END64.size
        file.seek(max(0, place))
        record = file.read(END64.size)
        if place < 0 or not record.startswith(b"PK\6\6"):
            raise DamagedError("has no 64-bit end record where it should be")
        _, _, _, _, disk, table_disk, _, _, table_size, table_start = END64.unpack(record)
    return End(place, disk, table_disk, table_size, table_start)


def read_table(file: BinaryIO, disks: Sequence[int] = (0,)) -> list[Entry]:
    """All files of the archive in `file`, without folders, in the table's order. Raises DamagedError.

    `disks` says where each disk of a spanned archive starts in `file`.
    """
    end = read_end(file)
    if end.disk != len(disks) - 1:
        raise DamagedError(f"is one of {end.disk + 1} parts")
    shift = 0
    start = disks[min(end.table_disk, end.disk)] + end.table_start
    if len(disks) == 1:
        start = end.place - end.table_size
        shift = start - end.table_start
    # What stands before an archive moves all its places, a program that unpacks it for one. But macOS writes archives
    # of any size without 64-bit fields: then places are less whole turns of 32 bits.
    wraps = shift > 0 and shift % TURN == 0
    if start < 0 or shift < 0 or start + end.table_size > end.place:
        raise DamagedError("is shorter than its table of contents says")
    file.seek(start)
    table = file.read(end.table_size)
    if not wraps:
        return list(parse_table(table, [disk + shift for disk in disks]))
    entries = []
    turns = last = 0
    for entry in parse_table(table, disks):
        turns += entry.start < last
        last = entry.start
        entries.append(entry._replace(start=entry.start + turns * TURN))
    return entries


def parse_table(table: bytes, disks: Sequence[int]) -> Iterator[Entry]:
    """The entries of a table of contents. Raises DamagedError."""
    place = count = 0
    while place < len(table):
        if len(table) - place < CENTRAL.size or not table.startswith(b"PK\1\2", place):
            raise DamagedError("has a damaged table of contents")
        if (count := count + 1) > MAX_ENTRIES:
            raise DamagedError(f"has more than {MAX_ENTRIES:,} entries")
        numbers = CENTRAL.unpack_from(table, place)
        flags, method, crc, packed, size = *numbers[3:5], *numbers[7:10]
        disk, start = numbers[13], numbers[16]
        name_end = place + CENTRAL.size + numbers[10]
        extra_end = name_end + numbers[11]
        name, fields = table[place + CENTRAL.size : name_end], parse_extra(table[name_end:extra_end])
        place = extra_end + numbers[12]
        if 0x0001 in fields:
            size, packed, start, disk = widen(fields[0x0001], size, packed, start, disk)
        name = name.split(b"\0")[0]
        if not name.endswith(b"/") and (size or not name.endswith(b"\\")):  # letters of Big5 and GBK end in one too
            where = disks[disk if disk < len(disks) else 0] + start
            yield Entry(name, text_of(name, flags, fields), where, packed, size, crc, method, flags)


def parse_extra(extra: bytes) -> dict[int, bytes]:
    """An entry's extra fields by number; what is cut is left out."""
    fields: dict[int, bytes] = {}
    place = 0
    while place + 4 <= len(extra):
        number, length = struct.unpack_from("<2H", extra, place)
        fields.setdefault(number, extra[place + 4 : place + 4 + length])
        place += 4 + length
    return fields


def widen(field: bytes, size: int, packed: int, start: int, disk: int) -> list[int]:
    """The four numbers with those that did not fit their places taken from the 64-bit field."""
    numbers = []
    for number, limit, kind in zip((size, packed, start, disk), (*[0xFFFFFFFF] * 3, 0xFFFF), "QQQL", strict=True):
        wide = struct.calcsize(f"<{kind}")
        if number == limit and len(field) >= wide:
            number, field = struct.unpack_from(f"<{kind}", field)[0], field[wide:]
        numbers.append(number)
    return numbers


def text_of(name: bytes, flags: int, fields: dict[int, bytes]) -> str | None:
    """The name's letters where the archive says which they are, and says so rightly."""
    utf8 = fields.get(0x7075, b"")
    if flags & 0x800:
        utf8 = name
    elif len(utf8) > 5 and utf8[0] == 1 and struct.unpack_from("<L", utf8, 1)[0] == zlib.crc32(name):
        utf8 = utf8[5:]
    else:
        return None
    try:
        return utf8.decode()
    except UnicodeDecodeError:
        return None


def data_start(file: BinaryIO, entry: Entry) -> int:
    """Where the entry's packed bytes start. Raises DamagedError."""
    file.seek(entry.start)
    header = file.read(LOCAL_SIZE)
    if len(header) < LOCAL_SIZE or not header.startswith(b"PK\3\4"):
        raise DamagedError("it is not where the table says")
    name, extra = struct.unpack_from("<2H", header, LOCAL_SIZE - 4)
    return entry.start + LOCAL_SIZE + int(name) + int(extra)


def unpack(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """The entry's bytes, PIECE at a time at most. Raises DamagedError, also at the end if the checksum is another."""
    if entry.trouble:
        raise DamagedError(entry.trouble)
    file.seek(data_start(file, entry))
    crc = size = 0
    try:
        for piece in pieces(file, entry) if entry.size else ():
            piece = piece[: entry.size - size]
            size += len(piece)
            crc = zlib.crc32(piece, crc)
            yield piece
            if size == entry.size:
                break
    except (zlib.error, lzma.LZMAError, OSError, EOFError, struct.error) as error:
        raise DamagedError(" ".join(str(error).split())) from error
    if crc != entry.crc:
        raise DamagedError("its checksum is another")


def pieces(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """The entry's bytes, from where its data starts; errors as the decoders raise them."""
    if entry.method == STORED:
        yield from blocks(file, entry.packed)
    elif entry.method == DEFLATED:
        inflater = zlib.decompressobj(-15)
        for block in blocks(file, entry.packed):
            while block and not inflater.eof:
                yield inflater.decompress(block, PIECE)
                block = inflater.unconsumed_tail
        yield inflater.flush()
    elif entry.method == BZIP2:
        yield from decode(bz2.BZ2Decompressor(), blocks(file, entry.packed))
    else:
        _, length = struct.unpack("<2H", file.read(4))
        size = -1 if entry.flags & 2 else entry.size  # -1: a mark stands at the end
        decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, MAX_LZMA)
        start = file.read(length) + struct.pack("<q", size)
        yield from decode(decoder, iter([start, *blocks(file, entry.packed - 4 - length)]))


def decode(decoder: bz2.BZ2Decompressor | lzma.LZMADecompressor, packed: Iterator[bytes]) -> Iterator[bytes]:
    for block in packed:
        while not decoder.eof and (block or not decoder.needs_input):
            yield decoder.decompress(block, PIECE)
            block = b""


def blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes, less where the file ends."""
    while size > 0 and (block := file.read(min(size, PIECE))):
        size -= len(block)
        yield block
