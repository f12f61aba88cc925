"""A split's files, whole and in parts, and a server of them, for the tests of download."""

import io
import random
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_scripts import download, transfer

QUICK = transfer.Patience(attempts=2, timeout=10, pause=0.001, longest=0.02)
ZIP, JSONL = "item_valid_images.zip", "item_valid_info.jsonl"


def archive(size: int = 60_000) -> bytes:
    """A zip archive of two entries, too random to be compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("a.jpg", "b.jpg"):
            file.writestr(zipfile.ZipInfo(name), random.Random(name).randbytes(size // 2))
    return buffer.getvalue()


def in_parts(content: bytes) -> dict[str, bytes]:
    step = -(-len(content) // 4)
    return {f"{ZIP}.parta{letter}": content[n * step : (n + 1) * step] for n, letter in enumerate("abcd")}


CONTENT = {ZIP: archive(), JSONL: b'{"item_id": "1"}\n{"item_id": "2"}\n'}
PARTS = in_parts(CONTENT[ZIP])


def folder_of(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def take(raw: Path, folder: Path) -> str:
    """`download --from`, with little patience."""
    return download.download(raw, download.find_files(folder, download.Record(raw).whole()), QUICK)


def fetch(raw: Path, links: Path, patience: transfer.Patience = QUICK) -> str:
    """`download --urls`, with little patience."""
    return download.download(raw, download.read_list(links, download.Record(raw).whole()), patience)


def files(raw: Path) -> dict[str, bytes]:
    """What is in the folder but for the record."""
    return {path.name: path.read_bytes() for path in raw.iterdir() if path.name != ".download.json"}


class Handler(BaseHTTPRequestHandler):
    """Serves `files` as a good server does, unless `misbehave` has taken the request over."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers["Range"])
        self.server.conditions.append(self.headers["If-Range"])
        self.close_connection = True
        assert self.headers["Accept-Encoding"] == "identity", "a range of compressed bytes is of something else"
        with suppress(ConnectionError):
            self.server.misbehave(self, self.server.files[urlsplit(self.path).path.rpartition("/")[2]])

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        """An answer; the ETag stays the same unless given, a header given as "" is left out."""
        known = {"ETag": '"1"', "Connection": "close", "Content-Length": str(len(body) if length is None else length)}
        self.send_response(status)
        for name, value in (known | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply_from(self, data: bytes, count: int = 1 << 30, length: int | None = None, **headers: str) -> None:
        """A true answer to the range, of so many bytes at the most."""
        start = self.start()
        end = min(start + count, len(data))
        self.reply(206, data[start:end], length, **{"Content_Range": f"bytes {start}-{end - 1}/{len(data)}"} | headers)

    def start(self) -> int:
        """Where the asked range begins."""
        return int(re.findall(r"\d+", self.headers["Range"] or "0")[0])

    def log_message(self, *_: Any) -> None:
        """Not on the tests' output."""


Behaviour = Callable[[Handler, bytes], None]


def behave(h: Handler, data: bytes) -> None:
    if not h.start() or h.headers["If-Range"] not in (None, '"1"'):
        h.reply(200, data)
    elif h.start() >= len(data):
        h.reply(416, Content_Range=f"bytes */{len(data)}")
    else:
        h.reply_from(data)


class Server(ThreadingHTTPServer):
    """On a free port of the loopback; `ranges` and `conditions` are the Range and If-Range headers that came."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.misbehave, self.released = {**CONTENT, **PARTS}, behave, threading.Event()
        self.ranges: list[str | None] = []
        self.conditions: list[str | None] = []
        self.errors: list[BaseException | None] = []

    def links(self, path: Path, *names: str, **options: object) -> Path:
        """A list of links to the files."""
        more = "".join(f" {key}={value}" for key, value in options.items())
        top = f"http://127.0.0.1:{self.server_port}"
        path.write_text("".join(f"{top}/{name}?Signature=secret{more}\n" for name in names))
        return path

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what some tests are about, any other error is a test's own."""
        if not isinstance(sys.exception(), ConnectionError):
            self.errors.append(sys.exception())


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()
    assert not server.errors
