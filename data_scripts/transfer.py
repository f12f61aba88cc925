"""Bring one file's bytes into a partial file, by HTTP ranges or from a folder, and check them; for `download.py`."""

import io
import re
import sys
import time
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import orjson
from tqdm import tqdm

from data_scripts.archives.joined import Joined
from tongkuan.base.errors import UserError
from tongkuan.base.files import READ_BLOCK, part_of

AGAIN = "run the same command again: it goes on"
ENOUGH = 1 << 20  # bytes: an attempt that brought as many is not held against the server
SLOWEST = 1000  # bytes/s


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to bring. `where` is what the user would mend; `changed` is the time stamp of a file to copy."""

    name: str
    source: httpx2.URL | Path
    where: str
    size: int | None = None
    sha256: str = ""
    changed: int = 0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to bear with a server, in seconds."""

    attempts: int = 8  # in a row that bring nothing to speak of
    timeout: float = 30  # without a byte
    pause: float = 1  # before the second attempt, doubled before each further one
    longest: float = 120  # pause, also when the server asks for one


class TransferError(Exception):
    """The server or the way to it failed. Another attempt may do better, after `pause` seconds at the soonest."""

    def __init__(self, what: str, pause: float = 0) -> None:
        super().__init__(what)
        self.pause = pause


class Partial:
    """The bytes of a file that is not whole yet and, in a note beside them, what to resume by: validator and total."""

    def __init__(self, raw_dir: Path, name: str) -> None:
        self.path = part_of(raw_dir / name)
        self.note = self.path.with_name(f"{self.path.name}.json")
        self.validator, self.total = "", None
        if self.path.is_symlink() or self.note.is_symlink():  # not ours: we would write elsewhere
            self.discard()
        with suppress(OSError, ValueError, TypeError):  # cut while it was written: start from nothing
            self.validator, self.total = orjson.loads(self.note.read_bytes())

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self, validator: str, total: int | None) -> None:
        """Start from nothing. Emptied first: a note must never stand beside bytes that it does not describe."""
        self.path.write_bytes(b"")
        self.validator, self.total = validator, total
        self.note.write_bytes(orjson.dumps([validator, total]))

    def discard(self) -> None:
        """Delete bytes and note; the note first, for bytes without one are never resumed."""
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.validator, self.total = "", None


def progress(name: str, total: int | None, start: int = 0) -> "tqdm[NoReturn]":
    """Bytes, rate and time left; quiet when not on a terminal."""
    sizes: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    return tqdm(desc=name, total=total, initial=start, leave=False, disable=None, **sizes)


def copy(path: Path, wanted: Wanted, partial: Partial) -> None:
    """Copy a local file. Raises UserError when it cannot be read."""
    partial.discard()
    try:
        source = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from error
    with source, partial.path.open("wb") as target, progress(wanted.name, wanted.size) as bar:
        while block := source.read(READ_BLOCK):
            bar.update(target.write(block))


def fetch(url: httpx2.URL, wanted: Wanted, partial: Partial, patience: Patience) -> None:
    """Bring `partial` to its full length, in as many attempts as that takes.

    Raises UserError when the server refuses, or fails `patience.attempts` times in a row.
    """
    if differ(partial.total, wanted.size) or (partial.total is not None and partial.size() > partial.total):
        partial.discard()
    failures, furthest = 0, partial.size()
    # Bytes as they are stored: ranges of a compressed answer would be of something else.
    headers = {"Accept-Encoding": "identity", "User-Agent": "tongkuan"}
    with httpx2.Client(follow_redirects=True, timeout=patience.timeout, headers=headers) as client:
        while partial.total is None or partial.size() < partial.total:
            try:
                if receive(client, url, wanted, partial, patience):
                    return
            except (TransferError, httpx2.RequestError) as error:
                if partial.size() >= furthest + ENOUGH:
                    failures, furthest = 0, partial.size()
                failures += 1
                asked = error.pause if isinstance(error, TransferError) else 0
                if failures == patience.attempts or asked > patience.longest or is_lasting(error):
                    raise UserError(f"{wanted.where}: {wanted.name}: {give_up(error, failures, asked)}") from error
                pause = max(asked, min(patience.pause * 2 ** (failures - 1), patience.longest))
                if sys.stderr.isatty():
                    tqdm.write(f"{wanted.name}: {explain(error)}; again in {pause:.0f} s", file=sys.stderr)
                time.sleep(pause)


def differ(left: int | None, right: int | None) -> bool:
    """Whether two sizes are known and not the same."""
    return None not in (left, right) and left != right


def is_lasting(error: Exception) -> bool:
    """Whether another attempt would end the same way."""
    return isinstance(error, httpx2.UnsupportedProtocol | httpx2.TooManyRedirects) or is_untrusted(error)


def is_untrusted(error: Exception) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def explain(error: Exception) -> str:
    return str(error) or type(error).__name__


def give_up(error: Exception, failures: int, asked: float) -> str:
    """Why there is no further attempt, and what to do."""
    if is_untrusted(error):
        return "the server's certificate is not trusted; behind a company proxy, set SSL_CERT_FILE to its certificates"
    if is_lasting(error):
        return f"{explain(error)}; get a new link"
    when = f"in {asked:.0f} s, as the server asks, " if asked else ""
    return f"{explain(error)}; gave up after {failures} attempts; {when}{AGAIN}"


def receive(client: httpx2.Client, url: httpx2.URL, wanted: Wanted, partial: Partial, patience: Patience) -> bool:
    """One attempt: whether the file is now as long as it will get. Raises TransferError, RequestError, UserError."""
    # Without anything to tell by whether the file is still the same, its rest is of no use.
    start = partial.size() if partial.validator or partial.total is not None else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and partial.validator:
        headers["If-Range"] = partial.validator
    with client.stream("GET", url, headers=headers) as response:
        if not accept(response, wanted, partial, start):
            return True
        received, since = 0, time.monotonic()
        with partial.path.open("ab") as file, progress(wanted.name, partial.total, partial.size()) as bar:
            for block in response.iter_raw():
                received += file.write(block)
                bar.update(len(block))
                # A server that trickles never runs into the time-out.
                if (passed := time.monotonic() - since) > patience.timeout:
                    if received < SLOWEST * passed:
                        raise TransferError("the server is too slow")
                    received, since = 0, time.monotonic()
    size, total = partial.size(), partial.total
    if total is not None and size > total:
        partial.discard()
        raise TransferError(f"the server sent {size} bytes instead of {total}; they were deleted")
    if total is not None and size < total and (response.status_code == 200 or size == start):
        raise TransferError("the server sent less than it announced")
    return total is None or size == total  # a server may give less of a range than was asked for


def accept(response: httpx2.Response, wanted: Wanted, partial: Partial, start: int) -> bool:
    """Hold an answer's head against what was asked and make `partial` ready for its body; False if none is needed."""
    status, headers = response.status_code, response.headers
    content_range = headers.get("content-range", "")
    if status == 416 and start:
        if partial.validator and content_range == f"bytes */{start}" and wanted.size in (None, start):
            return False  # the length announced at first was a lie, and all bytes are here
        partial.discard()
    if status in (408, 416, 425, 429) or status >= 500:
        raise TransferError(f"the server answers {status}", asked_pause(headers))
    if status not in (200, 206):
        raise UserError(f"{wanted.where}: {wanted.name}: {refusal(status)}")
    if headers.get("content-type", "").startswith("text/html"):
        raise UserError(f"{wanted.where}: {wanted.name}: the link leads to a web page; get the file's own and {AGAIN}")
    if headers.get("content-encoding", "identity") != "identity":
        raise TransferError("the server compresses although asked not to")
    length = headers.get("content-length", "")
    total = int(length) if length.isdecimal() else None
    if status == 206:
        match = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", content_range)
        total = int(match[2]) if match and match[2] != "*" else None
        is_same = validator_of(headers) in ("", partial.validator) if partial.validator else total is not None
        if not start or not match or int(match[1]) != start or not is_same or differ(total, partial.total):
            partial.discard()
            raise TransferError("the server answers with another range than the one asked for")
    if differ(total, wanted.size):
        raise TransferError(f"the server announces {total} bytes instead of {wanted.size}")
    if status == 200:
        partial.begin(validator_of(headers), wanted.size if total is None else total)
    return True


def refusal(status: int) -> str:
    """What an answer that no repetition will change means for the user."""
    if status in (401, 403):
        return f"link expired (the server answers {status}); get new links, put them into the list and {AGAIN}"
    return f"the server answers {status}; mend the link and {AGAIN}"


def validator_of(headers: httpx2.Headers) -> str:
    """What tells one version of a file from another for certain, else ""; a weak ETag or a date just gone does not."""
    etag = headers.get("etag", "")
    if etag.startswith('"') and etag.isascii():
        return etag
    with suppress(KeyError, ValueError):
        modified, sent = (parsedate_to_datetime(headers[key]).timestamp() for key in ("last-modified", "date"))
        if sent - modified >= 1:
            return headers["last-modified"]
    return ""


def asked_pause(headers: httpx2.Headers) -> float:
    """Seconds that the server asks to wait, 0 if it does not."""
    value = headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0


def find_damage(path: Path, sha256: str, wanted: Wanted) -> str:
    """What is wrong with the bytes that came for a file, else ""."""
    size = path.stat().st_size
    if wanted.size not in (None, size):
        return f"came with {size} bytes instead of {wanted.size}"
    if wanted.sha256 not in ("", sha256):
        return f"came with sha256 {sha256} instead of {wanted.sha256}"
    with path.open("rb") as file:
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(-min(size, 1024), io.SEEK_END)
        tail = file.read().rstrip()
    if wanted.name.endswith(".jsonl") and not (head.startswith(b"{") and tail.endswith(b"}")):
        return "is not whole lines of JSON objects"
    if wanted.name.endswith((".zip", ".partaa")) and not head.startswith(b"PK"):
        return "does not begin as a zip archive"
    return "is not a whole zip archive" if wanted.name.endswith(".zip") and not is_archive([path]) else ""


def is_archive(paths: Iterable[Path]) -> bool:
    """Whether files, one after the other, are a zip archive that nothing is missing from."""
    try:
        with Joined(map(str, paths)) as joined, zipfile.ZipFile(io.BufferedReader(joined)) as archive:
            # The entries are listed at the end; bytes missing before it shift the first ones to before the start.
            return all(info.header_offset >= 0 for info in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return False
