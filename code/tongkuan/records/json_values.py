"""JSON objects out of a stream in which they stand otherwise than one a line: in lists, over lines, with commas."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import orjson

BLOCK = 1 << 20  # bytes
OUTSIDE = re.compile(rb'["{}\[\]\n]')
WITHIN_TEXT = re.compile(rb'["\\\n]')
BETWEEN = re.compile(rb"[^\s,\[\]]")  # what may not stand between objects
MAX_LEVELS = 3  # of objects around a list of records


class BrokenError(Exception):
    """What is wrong with a stream of objects, and at which of its lines."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line, self.what = line, what


class TooLongError(BrokenError):
    """An object that is too long to be held in memory."""


class Readable(Protocol):
    """What objects are read from."""

    def read(self, size: int, /) -> bytes: ...


def objects(file: Readable, limit: int, first_line: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield (line that it begins on, its text) of each object of a stream, of those in lists one after another.

    Blanks and commas may stand between objects. Holds one object, of `limit` bytes at most. Raises BrokenError.
    """
    text, at, start = bytearray(), 0, -1  # start: of the object in `text`, -1 between objects
    line = started = opened = first_line
    depth, lists, is_text = 0, 0, False  # depth counts from the object's own brace
    while True:
        found = (WITHIN_TEXT if is_text else OUTSIDE).search(text, at)
        if found is None or (found[0] == b"\\" and found.end() == len(text)):
            at = found.start() if found else len(text)
            if start < 0:
                check_between(text, at, line)
            done = at if start < 0 else start
            del text[:done]
            at, start = at - done, min(start, 0)
            if len(text) > limit:
                raise TooLongError(started, f"an object longer than {limit >> 20} MB")
            if not (block := file.read(BLOCK)):
                break
            text += block
            continue
        mark, at = found[0], found.end()
        if mark == b"\n":
            line += 1
        elif is_text:
            at += mark == b"\\"
            is_text = mark != b'"'
        elif start >= 0:
            is_text = mark == b'"'
            depth += (mark in b"{[") - (mark in b"}]")
            if depth == 0:
                yield started, bytes(text[start:at])
                del text[:at]
                at, start = 0, -1
        else:
            check_between(text, found.start(), line)
            if mark == b"{":
                start, started, depth = found.start(), line, 1
                continue
            if mark == b"[":
                opened = line
            lists += {b"[": 1, b"]": -1}.get(mark, 2)
            if lists not in (0, 1):
                raise BrokenError(line, "something else than objects and one list of them")
            del text[:at]
            at = 0
    if start >= 0:
        raise BrokenError(started, "an object that does not end")
    if lists:
        raise BrokenError(opened, "a list that does not end")


def check_between(text: bytearray, stop: int, line: int) -> None:
    """Raise BrokenError when something but blanks and commas stands before `stop`, where no object is."""
    if BETWEEN.search(text, 0, stop):
        raise BrokenError(line, "something else between objects")


def load(text: bytes) -> tuple[Any, bool]:
    """A JSON value, and whether it had NaN or Infinity, which are taken for null. Raises orjson.JSONDecodeError."""
    try:
        return orjson.loads(text), False
    except orjson.JSONDecodeError as error:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
        try:
            value = json.loads(text, parse_constant=lambda _: None)
            json.dumps(value, ensure_ascii=False).encode()  # Python's reader lets lone surrogates pass
        except (ValueError, TypeError, RecursionError):
            raise error from None
        return value, True


def records_within(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The one list of objects that a wrapping object holds, at most MAX_LEVELS deep; None for none or several.

    An object with an id is a record, whatever lists it has.
    """
    found = lists_within(value, MAX_LEVELS)
    return found[0] if len(found) == 1 else None


def lists_within(value: Mapping[str, Any], levels: int) -> list[list[dict[str, Any]]]:
    if any(key.endswith("item_id") for key in value):
        return []
    found = []
    for inner in value.values():
        if isinstance(inner, list) and inner and all(isinstance(each, dict) for each in inner):
            found.append(inner)
        elif isinstance(inner, dict) and levels > 1:
            found += lists_within(inner, levels - 1)
    return found
