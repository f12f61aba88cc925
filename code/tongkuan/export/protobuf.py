"""As much of protobuf's wire format as it takes to put weights and a card into an ONNX file.

torch writes the graph; the numbers are those of https://protobuf.dev/programming-guides/encoding/ and onnx.proto. The
package onnx, which torch's exporter imports, would hold all weights in memory once more.
"""

from collections.abc import Iterable, Iterator

Value = int | bytes
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WIDTHS = {FIXED64: 8, FIXED32: 4}


def varint(number: int) -> bytes:
    """A number from 0 on, 7 bits a byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def field(tag: int, value: Value) -> bytes:
    """One field: a number from 0 on, or bytes."""
    if isinstance(value, int):
        return varint(tag << 3 | VARINT) + varint(value)
    return head(tag, len(value)) + value


def head(tag: int, size: int) -> bytes:
    """What stands before the bytes of a field, which are `size`."""
    return varint(tag << 3 | BYTES) + varint(size)


def message(fields: Iterable[tuple[int, Value]]) -> bytes:
    """Fields one after another, each with its tag."""
    return b"".join(field(tag, value) for tag, value in fields)


def split(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(tag, the whole field, its content) of each field of a message; no content of one that is a number."""
    at = 0
    while at < len(data):
        start = at
        key, at = read_varint(data, at)
        kind = key & 7
        if kind == VARINT:
            inside, (_, at) = at, read_varint(data, at)
        elif kind == BYTES:
            size, inside = read_varint(data, at)
            at = inside + size
        else:
            inside, at = at, at + WIDTHS[kind]
        yield key >> 3, data[start:at], data[inside:at] if kind == BYTES else b""


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number that begins at a place, the place behind it)."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
