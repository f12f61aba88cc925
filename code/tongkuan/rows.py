"""JSON objects of a user's file, one by one, each with its line number."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from tongkuan.errors import UserError, clip, missing

MAX_LINE = 64 << 20  # bytes; a line is held in memory whole


def read_rows(path: Path, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) of a jsonl file; blank lines and a BOM are passed over.

    Raises UserError for a missing file (ending in `advice`), a line that is too long, not JSON, or not an object.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise missing(path, f"no such file; {advice}") from error
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror}); check its name and permissions") from error
    with file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise UserError(f"{path}:{number}: longer than {MAX_LINE >> 20} MB; end each record with a line end")
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                row = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                detail = str(error).split(": line")[0]
                raise UserError(f"{path}:{number}: not a JSON line ({detail}); mend or delete the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {clip(row)}; mend or delete the line")
            yield number, row
