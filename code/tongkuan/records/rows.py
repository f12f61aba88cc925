"""JSON objects of a user's file, one by one, each with its line number."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from io import BytesIO
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from tongkuan.base.errors import UserError, clip
from tongkuan.records.json_values import BrokenError, TooLongError, load, objects, records_within
from tongkuan.records.streams import (
    GB18030,
    Stream,
    gather_evidence,
    is_gb18030,
    is_utf8,
    open_file,
    open_stream,
    peek,
    reading,
)
from tongkuan.records.unfit import in_place, not_json

Rows = Iterator[tuple[int, dict[str, Any]]]

MAX_LINE = 64 << 20  # bytes; a line is held in memory whole, as is an object that stands over several
BOM = b"\xef\xbb\xbf"
EXACT = 2.0**53  # from here on two whole numbers can be one float
HEAD = 1 << 16  # bytes by which a file's form is recognised
NUM_LISTS = 8  # in a wrapping object, that are looked through for the lines of its records
LIST, SPREAD, WRAPPED = "a JSON list", "objects over several lines", "a list within an object"
SEVERAL, COMMAS, NULLS = "several objects a line", "commas between objects", "NaN"
noted: set[str] = set()  # notes of this process: a file that several readers read is spoken of once


def given(path: Path) -> Path:
    """Where the records that `path` names lie: there, or packed beside it as `path`.gz."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if os.path.isfile(packed) and not os.path.lexists(path) else path  # noqa: PTH113 - of any name


def is_given(path: Path) -> bool:
    """Whether the records that `path` names are there, packed or not."""
    return given(path).is_file()


def read_rows(path: Path, advice: str) -> Rows:
    """Yield (line number from 1, JSON object) of a file of records; blank lines and a BOM are passed over.

    One object a line is what is expected; lists, objects over several lines, NaN, other encodings and gzip are read
    too, with a note on stderr. Raises UserError for a missing file (ending in `advice`), a line that is too long, not
    JSON, or not an object.
    """
    place, beside = given(path), path.with_name(f"{path.name}.gz")
    with open_stream(place, advice) as stream, reading(place):
        yield from any_rows(stream, place)
    if place == path and os.path.isfile(beside):  # noqa: PTH113 - of any name
        note(f"{path}: read, and not {beside.name} beside it")
    forms = [kind for kind in dict.fromkeys(stream.kinds) if kind != NULLS]
    if stream.kinds:
        taken = [f"read as {', '.join(forms)}"] * bool(forms) + ["NaN taken for null"] * (NULLS in stream.kinds)
        note(f"{place}: {'; '.join(taken)}")


def read_plain_rows(path: Path, advice: str) -> Rows:
    """As `read_rows`, for a file that other programs read too: UTF-8, one object a line, nothing else."""
    with open_file(path, advice) as file:
        for number, text in lines_of(file, path):
            try:
                row = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise no_json(path, number, error) from error
            yield number, check_object(row, path, number)


def note(text: str) -> None:
    """Say something of a file once, on the first rank."""
    if text not in noted and os.environ.get("LOCAL_RANK", "0") == "0":
        noted.add(text)
        print(f"note: {text}", file=sys.stderr)


def lines_of(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of the lines that are not blank, without a BOM. UserError for one that is too long."""
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), start=1):
        if len(line) > MAX_LINE:
            raise UserError(f"{path}:{number}: longer than {MAX_LINE >> 20} MB; end each record with a line end")
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, text


def no_json(path: Path, number: int, error: orjson.JSONDecodeError) -> UserError:
    detail = str(error).split(": line")[0]
    return UserError(f"{path}:{number}: not a JSON line ({detail}); mend or delete the line")


def check_object(row: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected a JSON object, found {clip(row)}; mend or delete the line")
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Forms other than one object a line


def any_rows(stream: Stream, path: Path) -> Rows:
    """Rows of a file in whatever form it has; `stream.kinds` gets what it was taken for."""
    if peek(stream.file, len(BOM)) == BOM:
        stream.file.read(len(BOM))
    head = peek(stream.file, HEAD).lstrip()
    if head[:1] == b"[" and head[1:].lstrip()[:1] in (b"{", b""):
        stream.kinds.append(LIST)
        yield from spread_rows(objects(stream.file, MAX_LINE), stream, path)
        return
    lines = lines_of(stream.file, path)
    if (first := next(lines, None)) is None:
        return
    number, text = first
    try:
        values, _ = rows_on_line(text)
    except orjson.JSONDecodeError as error:
        if is_utf8(text):
            if unfit := not_json(path, head.decode("utf-8", "ignore"), stream.codec):
                raise UserError(f"{path}: {unfit}") from error
            try:
                spread = objects_from(number, text, stream.file)
            except TooLongError as long:
                raise too_long(path, long) from error
            if spread is not None:
                stream.kinds.append(SPREAD)
                yield from spread_rows(spread, stream, path)
                return
    else:
        if len(values) == 1 and isinstance(values[0], dict) and (records := records_within(values[0])) is not None:
            following = next(lines, None)
            if following is None:
                stream.kinds.append(WRAPPED)
                yield from zip(lines_within(text, records, number), records, strict=True)
                return
            lines = chain([following], lines)
    yield from line_rows(chain([first], lines), stream, path)


def line_rows(lines: Iterable[tuple[int, bytes]], stream: Stream, path: Path) -> Rows:
    """A row a line; what a line holds otherwise is taken as far as it is clear. `lines`: (number, text)."""
    for number, text in lines:
        try:
            row = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            if not is_utf8(text):
                yield from recoded_rows(number, error, stream, path)
                return
            try:
                values, kinds = rows_on_line(text)
            except orjson.JSONDecodeError:
                raise no_json(path, number, error) from error
            stream.kinds += kinds
            yield from ((number, check_object(value, path, number)) for value in values)
        else:
            yield number, exact(check_object(row, path, number), text)


def recoded_rows(number: int, error: orjson.JSONDecodeError, stream: Stream, path: Path) -> Rows:
    """Rows from the first line on that is not UTF-8. UserError when the file is not GB18030 either."""
    if not path.is_file():
        raise no_json(path, number, error) from error
    found = gather_evidence(path)
    if not is_gb18030(path, found):
        raise no_json(path, number, error) from error
    if found.first < number:  # what has been read may have been another text
        command = in_place(path, "iconv -f GB18030 -t UTF-8")
        raise UserError(f"{path}:{number}: not a JSON line: the file is GB18030; make it UTF-8: {command}")
    with open_stream(path, "", GB18030) as again, reading(path):
        stream.kinds += again.kinds
        rest = dropwhile(lambda line: line[0] < number, lines_of(again.file, path))
        yield from line_rows(rest, stream, path)


def rows_on_line(text: bytes) -> tuple[list[Any], list[str]]:
    """The values of a line that is not plainly one object, and what that is called. Raises orjson.JSONDecodeError."""
    try:
        return [orjson.loads(text)], []
    except orjson.JSONDecodeError as error:
        try:
            values = [load(each) for _, each in objects(BytesIO(text), MAX_LINE)]
        except (BrokenError, orjson.JSONDecodeError):
            raise error from None
        if not values:
            raise
        kinds = [SEVERAL] if len(values) > 1 else [COMMAS] if b"," in (text.strip()[:1], text.strip()[-1:]) else []
        return [value for value, _ in values], kinds + [NULLS] * any(has_nulls for _, has_nulls in values)


def exact(row: dict[str, Any], text: bytes) -> dict[str, Any]:
    """The row with whole numbers of any size as they stand; orjson rounds those that take more than 64 bits."""
    if any(type(value) is float and not -EXACT < value < EXACT for value in row.values()):
        found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        return found
    return row


def objects_from(number: int, text: bytes, file: BinaryIO) -> Iterator[tuple[int, bytes]] | None:
    """Objects over several lines, when the file from line `number` on begins with one; else None."""
    found = objects(Joined(text, file), MAX_LINE, number)
    try:
        first = next(found)
        load(first[1])
    except TooLongError:
        raise
    except (BrokenError, StopIteration, orjson.JSONDecodeError):
        return None
    return chain([first], found)


class Joined:
    """Bytes that have been read already, and then a file."""

    def __init__(self, text: bytes, file: BinaryIO) -> None:
        self._text, self._file = text, file

    def read(self, size: int) -> bytes:
        text, self._text = self._text, b""
        return text or self._file.read(size)


def spread_rows(found: Iterator[tuple[int, bytes]], stream: Stream, path: Path) -> Rows:
    """Rows of (line, text of an object). UserError that names the line when one is not whole."""
    try:
        number = num_rows = 0
        while (each := next(found, None)) is not None:
            number, text = each
            row, has_nulls = load(text)
            stream.kinds += [NULLS] * has_nulls
            if not num_rows and (records := records_within(row)) is not None:
                following = next(found, None)
                if following is None:
                    stream.kinds.append(WRAPPED)
                    yield from zip(lines_within(text, records, number), records, strict=True)
                    return
                found = chain([following], found)
            num_rows += 1
            yield number, exact(row, text)
    except TooLongError as error:
        raise too_long(path, error) from error
    except BrokenError as error:
        raise UserError(f"{path}:{error.line}: {error.what}; mend it there, or copy the file again") from error
    except orjson.JSONDecodeError as error:
        detail = str(error).split(": line")[0]
        raise UserError(f"{path}:{number}: the object here is not JSON ({detail}); mend or delete it") from error


def too_long(path: Path, error: TooLongError) -> UserError:
    return UserError(f"{path}:{error.line}: {error.what}; write one record a line")


def lines_within(text: bytes, records: list[dict[str, Any]], first_line: int) -> list[int]:
    """The lines on which the records of a wrapping object begin; its own line when those are not known."""
    for match in islice(re.finditer(rb"\[\s*\{", text), NUM_LISTS):
        line = first_line + text.count(b"\n", 0, match.start())
        try:
            found = list(islice(objects(BytesIO(text[match.start() :]), len(text) + 1, line), len(records)))
            if [load(each)[0] for _, each in found] == records:
                return [number for number, _ in found]
        except (BrokenError, orjson.JSONDecodeError):
            continue
    return [first_line] * len(records)
