"""Downloading: whatever a server does, no half file gets a final name, and the same command completes it."""

import errno
import functools
import hashlib
import io
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from commands import environment, ok, run_verb
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts import download, transfer
from data_scripts.archives import sources
from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main

QUICK = transfer.Patience(attempts=2, timeout=10, pause=0.001, longest=0.02)
IMPATIENT = {
    "silent": transfer.Patience(attempts=2, timeout=0.1, pause=0.001),
    "silent midway": transfer.Patience(attempts=2, timeout=0.1, pause=0.001),
    "slow": transfer.Patience(attempts=1, timeout=0.3),
}
CERTIFICATES = httpx2.create_ssl_context()
ZIP, JSONL = "item_valid_images.zip", "item_valid_info.jsonl"


def archive(size: int = 60_000) -> bytes:
    """A zip archive of two entries, too random to be compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("a.jpg", "b.jpg"):
            file.writestr(zipfile.ZipInfo(name), random.Random(name).randbytes(size // 2))
    return buffer.getvalue()


CONTENT = {ZIP: archive(), JSONL: b'{"item_id": "1"}\n{"item_id": "2"}\n'}
PARTS = {f"{ZIP}.parta{letter}": CONTENT[ZIP][n * 20_000 : (n + 1) * 20_000] for n, letter in enumerate("abcd")}


class Handler(BaseHTTPRequestHandler):
    """Serves `files` as a good server does, unless `misbehave` has taken the request over."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers["Range"])
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

    def start(self) -> int:
        """Where the asked range begins."""
        return int(re.findall(r"\d+", self.headers["Range"] or "0")[0])

    def log_message(self, *_: Any) -> None:
        """Not on the tests' output."""


class Server(ThreadingHTTPServer):
    """On a free port of the loopback; `ranges` are the Range headers that came."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.misbehave, self.released = {**CONTENT, **PARTS}, behave, threading.Event()
        self.ranges: list[str | None] = []
        self.faults: list[BaseException | None] = []

    def links(self, path: Path, *names: str, **options: object) -> Path:
        """A list of links to the files."""
        more = "".join(f" {key}={value}" for key, value in options.items())
        path.write_text(
            "".join(f"http://127.0.0.1:{self.server_port}/{name}?Signature=secret{more}\n" for name in names)
        )
        return path

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what some tests are about, any other error is a test's own."""
        if not isinstance(sys.exception(), ConnectionError):
            self.faults.append(sys.exception())


Behaviour = Callable[[Handler, bytes], None]


def behave(h: Handler, data: bytes) -> None:
    start = h.start()
    if not start or h.headers["If-Range"] not in (None, '"1"'):
        h.reply(200, data)
    elif start >= len(data):
        h.reply(416, Content_Range=f"bytes */{len(data)}")
    else:
        h.reply(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")


def cut(h: Handler, data: bytes) -> None:
    h.reply(200, data[: len(data) // 2], len(data))


def silent(h: Handler, data: bytes) -> None:
    h.server.released.wait(5)


def silent_midway(h: Handler, data: bytes) -> None:
    cut(h, data)
    h.wfile.flush()
    h.server.released.wait(5)


def trickle(h: Handler, data: bytes) -> None:
    h.reply(200, b"", len(data))
    for number in range(100):
        h.wfile.write(data[number : number + 1])
        if h.server.released.wait(0.03):
            return


def chunks_cut(h: Handler, data: bytes) -> None:
    h.reply(200, b"7530\r\n" + data[:30_000], Content_Length="", Transfer_Encoding="chunked")


def ranged(change: Callable[[int, int], str], etag: str = '"1"') -> Behaviour:
    """Answers a range, but with this Content-Range, from start and total."""
    return lambda h, data: (
        h.reply(206, data[h.start() :], Content_Range=change(h.start(), len(data)), ETag=etag)
        if h.start()
        else cut(h, data)
    )


def status(code: int, **headers: str) -> Behaviour:
    return lambda h, _: h.reply(code, b"<Error/>", **headers)


# Of these the half that was there before must survive.
HARMLESS = {
    "cut midway",
    "no answer",
    "compressed",
    "silent",
    "silent midway",
    "500",
    "429, come next day",
    "403",
    "404",
}
# What the first call then says; "" where it brings the file all the same. The second number: from half a file.
MISBEHAVIOUR: dict[str, tuple[Behaviour, str, str]] = {
    "cut midway": (cut, "gave up after 2 attempts", "gave up"),
    "chunks cut midway": (chunks_cut, "gave up", "gave up"),
    "no answer": (lambda h, _: None, "gave up", "gave up"),
    "not HTTP": (lambda h, _: h.wfile.write(b"SSH-2.0-x\r\n") and None, "gave up", "gave up"),
    "ignores ranges": (lambda h, data: h.reply(200, data), "", ""),
    "a range from elsewhere": (ranged(lambda s, n: f"bytes {s - 1}-{n - 1}/{n}"), "gave up", "gave up"),
    "a range of another length": (ranged(lambda s, n: f"bytes {s}-{n}/{n + 1}"), "gave up", "gave up"),
    "a range without its place": (ranged(lambda s, n: ""), "gave up", "gave up"),
    "a range of another file": (ranged(lambda s, n: f"bytes {s}-{n - 1}/{n}", '"2"'), "gave up", "gave up"),
    "a range unasked": (lambda h, data: h.reply(206, data[9:], Content_Range=f"bytes 9-{len(data)}/*"), "gave", "gave"),
    "416": (status(416, Content_Range="bytes */5"), "answers 416", "answers 416"),
    "a length too long": (lambda h, data: h.reply(200, data, len(data) + 9), "gave up", "gave up"),
    "a length too short": (lambda h, data: h.reply(200, data, len(data) - 9), "not a whole zip.*deleted", "not a"),
    "compressed": (lambda h, data: h.reply(200, data, Content_Encoding="gzip"), "compresses", "compresses"),
    "silent": (silent, "timed out; gave up", "timed out"),
    "silent midway": (silent_midway, "timed out; gave up", "timed out"),
    "slow": (trickle, "too slow", "too slow"),
    "500": (status(500), "answers 500; gave up after 2", "answers 500; gave up after 2"),
    "503, come again": (status(503, Retry_After="0"), "gave up after 2", "gave up after 2"),
    "429, come next day": (status(429, Retry_After="86400"), "after 1 attempts; in 86400 s", "in 86400 s"),
    "429, come on a date": (status(429, Retry_After=formatdate(time.time() + 1e7, usegmt=True)), "in 9999", "in 9999"),
    "403": (status(403), "link expired.*new links.*same command", "link expired"),
    "404": (status(404), "answers 404; mend the link", "answers 404"),
    "a web page": (lambda h, _: h.reply(200, b"<html>", Content_Type="text/html; charset=x"), "web page", "web page"),
    "a loop of redirects": (status(302, Location="/x/" + ZIP), "redirects.*new link", "redirects"),
    "a redirect to nowhere": (status(302, Location="ftp://x/y"), "get a new link", "get a new link"),
    "other bytes": (lambda h, data: h.reply(200, b"?" * len(data), ETag='"2"'), "deleted.*same command", "deleted"),
}


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy; certificates are read once, not for each client; processes are killed here, but no machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(httpx2, "Client", functools.partial(httpx2.Client, verify=CERTIFICATES))
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()
    assert not server.faults


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


def run(raw: Path, links: Path, patience: Any = QUICK) -> str:
    """The verb, with little patience."""
    return str(download.download(raw, download.read_list(links, download.Record(raw).whole()), patience))


def take(raw: Path, folder: Path) -> str:
    return str(download.download(raw, download.find_files(folder, download.Record(raw).whole()), QUICK))


def files(raw: Path) -> dict[str, bytes]:
    """What is in the folder but for the record."""
    return {path.name: path.read_bytes() for path in raw.iterdir() if path.name != ".download.json"}


def half(raw: Path, links: Path, server: Server) -> None:
    """The first half of a file, left by a call that was cut."""
    server.misbehave = cut
    with pytest.raises(UserError):
        run(raw, links, transfer.Patience(attempts=1, timeout=1))
    assert (raw / f".{ZIP}.part").read_bytes() == CONTENT[ZIP][: len(CONTENT[ZIP]) // 2]


@pytest.mark.parametrize("begun", [False, True], ids=["from nothing", "from half a file"])
@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_after_any_misbehaviour_the_same_command_completes(
    server: Server, raw: Path, tmp_path: Path, how: str, begun: bool
) -> None:
    links = server.links(tmp_path / "links.txt", ZIP)
    if begun:
        half(raw, links, server)
    misbehave, *expected = MISBEHAVIOUR[how]
    server.misbehave = misbehave
    if expected[begun]:
        with pytest.raises(UserError, match=expected[begun]) as caught:
            run(raw, links, IMPATIENT.get(how, QUICK))
        assert str(caught.value).startswith(f"{links}:1: {ZIP}")
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
        assert not (raw / ZIP).exists()
    else:
        run(raw, links)
    server.released.set()
    server.misbehave = behave
    run(raw, links)
    assert files(raw) == {ZIP: CONTENT[ZIP]}
    if begun and how in HARMLESS:
        assert server.ranges[-1] == f"bytes={len(CONTENT[ZIP]) // 2}-"


def test_bytes_are_on_the_disk_before_they_have_a_name(
    server: Server, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: steps.append(Path(f"/proc/self/fd/{number}").readlink().name))
    monkeypatch.setattr(Path, "replace", lambda path, target: (steps.append("rename"), replace(path, target)))
    run(raw, server.links(tmp_path / "links.txt", ZIP))
    assert steps == ["..download.json.part", "rename", "raw", f".{ZIP}.part", "rename", "raw"]


def test_a_call_goes_on_where_the_last_one_was_cut(server: Server, raw: Path, tmp_path: Path) -> None:
    links = server.links(tmp_path / "links.txt", ZIP)
    half(raw, links, server)
    server.misbehave = behave
    out = run(raw, links)
    assert server.ranges == [None, f"bytes={len(CONTENT[ZIP]) // 2}-"]
    assert f"brought {ZIP} (" in out and f"next: ./entrypoint.sh resize --raw {raw}" in out
    for leftover in (f".{ZIP}.part", f".{ZIP}.part.json"):
        (raw / leftover).write_bytes(b"of a call killed just after the renaming")
    assert "1 there already" in run(raw, links)
    assert len(server.ranges) == 2
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_all_bytes_may_be_there_although_more_were_announced(server: Server, raw: Path, tmp_path: Path) -> None:
    def lie_once(h: Handler, data: bytes) -> None:
        behave(h, data) if h.start() else h.reply(200, data, len(data) + 9)

    server.misbehave = lie_once
    run(raw, server.links(tmp_path / "links.txt", ZIP))
    assert server.ranges == [None, f"bytes={len(CONTENT[ZIP])}-"]
    assert files(raw) == {ZIP: CONTENT[ZIP]}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, '"1"'),
        ({"ETag": 'W/"1"'}, None),
        ({"ETag": ""}, None),
        ({"ETag": "", "Last_Modified": formatdate(1e9, usegmt=True)}, formatdate(1e9, usegmt=True)),
        ({"ETag": "", "Last_Modified": formatdate(9e9, usegmt=True)}, None),
    ],
)
def test_a_range_is_tied_to_what_surely_names_the_version(
    server: Server, raw: Path, tmp_path: Path, headers: dict[str, str], expected: str | None
) -> None:
    links, conditions = server.links(tmp_path / "links.txt", ZIP), []

    def first_cut(h: Handler, data: bytes) -> None:
        conditions.append(h.headers["If-Range"])
        if start := h.start():
            h.reply(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **headers)
        else:
            h.reply(200, data[:9000], len(data), **headers)

    server.misbehave = first_cut
    run(raw, links)
    assert conditions == [None, expected]
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_without_a_length_or_a_version_the_rest_is_of_no_use(server: Server, raw: Path, tmp_path: Path) -> None:
    links = server.links(tmp_path / "links.txt", ZIP)
    server.misbehave = lambda h, _: h.reply(200, b"9\r\n", ETag="", Content_Length="", Transfer_Encoding="chunked")
    with pytest.raises(UserError):
        run(raw, links)
    server.misbehave = lambda h, data: h.reply(200, data, ETag="", Content_Length="")
    run(raw, links)
    assert set(server.ranges) == {None}
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_a_file_that_has_changed_is_fetched_from_its_start(server: Server, raw: Path, tmp_path: Path) -> None:
    links = server.links(tmp_path / "links.txt", ZIP)
    half(raw, links, server)
    server.files[ZIP] = archive(50_000)
    server.misbehave = lambda h, data: h.reply(200, data, ETag='"2"') if h.headers["If-Range"] else None
    run(raw, links)
    assert files(raw) == {ZIP: archive(50_000)}


def test_a_server_may_give_less_than_was_asked_for(server: Server, raw: Path, tmp_path: Path) -> None:
    links = server.links(tmp_path / "links.txt", ZIP)
    half(raw, links, server)

    def stingy(h: Handler, data: bytes) -> None:
        start, end = h.start(), min(h.start() + 3000, len(data))
        h.reply(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}")

    server.misbehave = stingy
    run(raw, links, transfer.Patience(attempts=1))
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_an_attempt_that_brings_enough_is_no_failure(
    server: Server, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_often(h: Handler, data: bytes) -> None:
        start, total = h.start(), len(data)
        place = {"Content_Range": f"bytes {start}-{total - 1}/{total}"} if start else {}
        h.reply(206 if start else 200, data[start : start + 9000], total - start, **place)

    server.misbehave = cut_often
    links = server.links(tmp_path / "links.txt", ZIP)
    with pytest.raises(UserError, match="gave up after 2"):
        run(raw, links, transfer.Patience(attempts=2, pause=0))
    monkeypatch.setattr(transfer, "ENOUGH", 5000)
    run(raw, links, transfer.Patience(attempts=2, pause=0))
    assert files(raw) == {ZIP: CONTENT[ZIP]}


@pytest.mark.parametrize(("asked", "pauses"), [("", [1, 2, 4, 5]), ("3", [3, 3, 4, 5]), ("soon", [1, 2, 4, 5])])
def test_pauses_double_and_are_as_long_as_the_server_asks(
    server: Server, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, pauses: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.misbehave = lambda h, data: behave(h, data) if len(slept) == 4 else h.reply(503, Retry_After=asked)
    run(raw, server.links(tmp_path / "links.txt", ZIP), transfer.Patience(attempts=5, pause=1, longest=5))
    assert slept == pauses
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_redirects_are_followed_with_the_range(server: Server, raw: Path, tmp_path: Path) -> None:
    links = server.links(tmp_path / "links.txt", ZIP)
    half(raw, links, server)
    server.misbehave = lambda h, data: behave(h, data) if "/x/" in h.path else h.reply(307, Location="/x/" + ZIP)
    run(raw, links)
    assert server.ranges[-1]
    assert files(raw) == {ZIP: CONTENT[ZIP]}


@pytest.mark.parametrize("wrong", [{"size": 5}, {"sha256": "0" * 64}])
def test_what_is_not_as_the_list_says_is_deleted(
    server: Server, raw: Path, tmp_path: Path, wrong: dict[str, object]
) -> None:
    links = server.links(tmp_path / "links.txt", JSONL, **wrong)
    server.misbehave = lambda h, data: h.reply(200, data, Content_Length="")
    with pytest.raises(UserError, match=rf"{links}:1: {JSONL}.* instead of .*deleted"):
        run(raw, links)
    assert files(raw) == {}
    known = {"size": len(CONTENT[JSONL]), "sha256": hashlib.sha256(CONTENT[JSONL]).hexdigest().upper()}
    run(raw, server.links(tmp_path / "links.txt", JSONL, **known))
    assert files(raw) == {JSONL: CONTENT[JSONL]}


def test_a_file_is_known_to_be_whole_by_the_list_or_by_the_record(server: Server, raw: Path, tmp_path: Path) -> None:
    raw.mkdir()
    (raw / JSONL).write_bytes(CONTENT[JSONL])
    run(raw, server.links(tmp_path / "links.txt", JSONL, size=len(CONTENT[JSONL])))
    run(raw, server.links(tmp_path / "links.txt", JSONL))
    assert server.ranges == []
    (raw / JSONL).write_bytes(CONTENT[JSONL][:9])
    run(raw, server.links(tmp_path / "links.txt", JSONL))
    assert files(raw) == {JSONL: CONTENT[JSONL]}
    with pytest.raises(UserError, match="came with sha256"):
        run(raw, server.links(tmp_path / "links.txt", JSONL, sha256="0" * 64))
    assert files(raw) == {JSONL: CONTENT[JSONL]}
    (raw / ".download.json").write_text("[1")
    run(raw, server.links(tmp_path / "links.txt", JSONL))
    assert len(server.ranges) == 3


def test_sigkill_leaves_no_half_file_and_the_same_command_goes_on(server: Server, raw: Path, tmp_path: Path) -> None:
    server.misbehave = silent_midway
    words = (
        "download",
        "--raw",
        str(raw),
        "--urls",
        str(server.links(tmp_path / "links.txt", ZIP, size=len(CONTENT[ZIP]))),
    )
    process = subprocess.Popen([sys.executable, "-m", "tongkuan", *words], env=environment())
    partial, size = raw / f".{ZIP}.part", len(CONTENT[ZIP]) // 2
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < partial.stat().st_size <= size and not (raw / ZIP).exists()
    server.misbehave = behave
    done = run_verb(*words)
    assert "next: ./entrypoint.sh resize" in ok(done) and done.stderr == ""
    assert server.ranges[-1]
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_parts_are_joined_into_what_resize_reads(server: Server, raw: Path, tmp_path: Path) -> None:
    links = server.links(tmp_path / "links.txt", *PARTS)
    assert f"{ZIP} is joined" in run(raw, links)
    assert files(raw) == {ZIP: CONTENT[ZIP]}
    assert [name for name, _ in sources.find_source(raw, "valid").entries()] == ["a.jpg", "b.jpg"]
    assert "4 there already" in run(raw, links)
    assert len(server.ranges) == 4


def test_parts_may_come_from_several_lists(server: Server, raw: Path, tmp_path: Path) -> None:
    first, second = server.links(tmp_path / "1", *list(PARTS)[:2]), server.links(tmp_path / "2", *list(PARTS)[2:])
    with pytest.raises(UserError, match=rf"2:2: {ZIP}\.partaa is missing before {ZIP}\.partac; add it"):
        run(raw, second)
    with pytest.raises(UserError, match=r"partaa to .*partab, make no whole zip archive; add the parts that follow"):
        run(raw, first)
    run(raw, second)
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_a_part_too_short_is_noticed(server: Server, raw: Path, tmp_path: Path) -> None:
    server.files[f"{ZIP}.partab"] = PARTS[f"{ZIP}.partab"][:-1]
    with pytest.raises(UserError, match="make no whole zip archive"):
        run(raw, server.links(tmp_path / "links.txt", *PARTS))
    assert not (raw / ZIP).exists()


def test_another_version_of_a_part_replaces_the_joined_archive(server: Server, raw: Path, tmp_path: Path) -> None:
    run(raw, server.links(tmp_path / "links.txt", *PARTS))
    other = archive(70_000)
    new = {name: other[n * 18_000 : (n + 1) * 18_000] for n, name in enumerate(PARTS)}
    server.files |= new
    links = tmp_path / "links.txt"
    lines = server.links(links, *PARTS).read_text().split("\n")
    links.write_text("\n".join([f"{lines[0]} size=18000", *lines[1:]]))
    run(raw, links)
    assert files(raw) == {ZIP: other}


def test_without_room_parts_stay_parts(
    server: Server, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 9}))
    raw.mkdir()
    (raw / f".{ZIP}.part").write_bytes(b"of a call killed while it joined")
    assert "for want of room" in run(raw, server.links(tmp_path / "links.txt", *PARTS))
    assert files(raw) == PARTS


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_at_any_step_the_same_command_ends_with_the_same_files(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "from"
    folder.mkdir()
    for name, content in {JSONL: CONTENT[JSONL], **PARTS}.items():
        (folder / name).write_bytes(content)
    left = 0

    def count_down(method: str) -> None:
        original = getattr(Path, method)

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return original(*arguments, **options)

        monkeypatch.setattr(Path, method, step)

    for method in ("replace", "unlink", "write_bytes", "open"):
        count_down(method)
    for steps in itertools.count(1):
        target, left, was_killed = raw / str(steps), steps, False
        try:
            take(target, folder)
        except Killed:
            was_killed = True
            for name in (JSONL, ZIP, *PARTS):
                whole = CONTENT.get(name) or PARTS[name]
                assert not (target / name).exists() or (target / name).read_bytes() == whole
        left = 0
        take(target, folder)
        assert files(target) == CONTENT
        if not was_killed:
            break
    assert steps > 40


def test_a_folders_files_are_copied_and_left_alone(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "from"
    folder.mkdir()
    for name in (ZIP, JSONL, "notes.txt", ".item_test_info.jsonl.part"):
        (folder / name).write_bytes(CONTENT.get(name, b"mine"))
    before = files(folder)
    out = ok(run_verb("download", "--raw", raw, "--from", folder))
    assert "not there yet: item_train_info.jsonl" in out and ZIP not in out.partition("not there yet")[2]
    assert files(raw) == CONTENT
    assert files(folder) == before
    assert "2 there already" in take(raw, folder)
    (folder / JSONL).write_bytes(CONTENT[JSONL].replace(b"2", b"3"))
    os.utime(folder / JSONL, ns=(1, 1))
    assert f"brought {JSONL} (" in take(raw, folder)
    assert (raw / JSONL).read_bytes() == (folder / JSONL).read_bytes()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["item_valid_info (1).jsonl"], r"info \(1\)\.jsonl: unknown name; rename it to item_valid_info\.jsonl"),
        (["item_test_answers.jsonl"], "no file here is named item_train_info"),
        ([f"{ZIP}.partaa", f"{ZIP}.partac"], "partab is missing before"),
        ([f"{ZIP}.partaa", ZIP], "whole and in parts"),
        ([JSONL], "is not whole lines of JSON objects"),
    ],
)
def test_what_a_folder_lacks_is_said_and_nothing_is_copied(
    raw: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    folder = tmp_path / "from"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b'{"item_id": "1"}\n{"item')
    with pytest.raises(UserError, match=message):
        take(raw, folder)
    assert not raw.exists() or files(raw) == {}


def test_bad_usage_is_one_line(raw: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--from", str(tmp_path / "none")), "no file here"),
        (("--urls", str(tmp_path / "none")), "no readable text file"),
        (("--from", str(raw)), "both --from and --raw"),
    ):
        with pytest.raises(UserError, match=message):
            main(["download", "--raw", str(raw), *words])
    assert not raw.exists()


def test_a_second_download_waits_outside(server: Server, raw: Path, tmp_path: Path) -> None:
    raw.mkdir()
    with download.alone(raw), pytest.raises(UserError, match="another process fills this folder; wait for its end"):
        run(raw, server.links(tmp_path / "links.txt", ZIP))
    run(raw, server.links(tmp_path / "links.txt", ZIP))


def test_a_full_disk_is_the_users_to_mend(
    server: Server, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = server.links(tmp_path / "links.txt", ZIP)
    half(raw, links, server)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: '{raw}'"):
        patch.setattr(transfer, "accept", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        run(raw, links)
    server.misbehave = behave
    run(raw, links)
    assert server.ranges[-1]
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_every_problem_of_a_list_is_shown_with_its_line(tmp_path: Path) -> None:
    lines = {
        "# a comment": "",
        "https://h/p/item_train_info.jsonl?Expires=1&Signature=a%2Fb size=12 # so far": "",
        "item_train_pair.jsonl https://h/f/8a7b SHA256=12": "cannot use 'SHA256=12'",
        "item_train_pairs.jsonl https://h/x": "did you mean item_train_pair.jsonl?",
        "../item_test_info.jsonl https://h/x": "a path is no name: '../item_test_info.jsonl'",
        "item_test_info.jsonl ftp://h/x": "give an http or https link",
        "item_test_info.jsonl https:///x": "give an http or https link",
        "item_test_info.jsonl http://[::1": "Invalid",
        "item_test_info.jsonl": "no URL; write NAME URL",
        "item_train_info.jsonl https://h/y": "is on {}:2 already; keep one of the two",
        "item_test_pair.jsonl https://h/y size=1 size=1": "cannot use 'size=1'",
        "https://h/": "the names are item_train_info.jsonl,",
        "  ": "",
        "item_test_images.zip https://h/y": "item_test_images.zip comes whole and in parts",
        "https://h/item_test_images.zip.partab": "item_test_images.zip.partaa is missing before",
    }
    path = tmp_path / "links.txt"
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    with pytest.raises(UserError) as caught:
        download.read_list(path)
    told = str(caught.value).split("\n")
    expected = [(n, text.format(path)) for n, text in enumerate(lines.values(), 1) if text]
    assert len(told) == len(expected)
    for line, (number, text) in zip(told, expected, strict=True):
        assert line.startswith(f"{path}:{number}: ") and text in line, line
    assert "Signature" not in str(caught.value)


def test_a_list_says_names_sizes_and_sums(tmp_path: Path) -> None:
    path = tmp_path / "links.txt"
    path.write_text(f"{JSONL} https://h/8a7b?x=y#z sha256={'AB' * 32} size=7 # here\n\nhttp://h/p/{ZIP}?q=/a\n")
    first, second = download.read_list(path)
    assert (first.name, str(first.source), first.size, first.sha256) == (JSONL, "https://h/8a7b?x=y#z", 7, "ab" * 32)
    assert (second.name, second.size, second.sha256, second.where) == (ZIP, None, "", f"{path}:3")


PIECES = st.sampled_from(
    [JSONL, ZIP, f"{ZIP}.partaa", f"{ZIP}.partac", "https://", "http://h/", "size=", "9", "#", "\\", "..", "/"]
)
WILD = st.lists(st.lists(st.one_of(PIECES, st.text(max_size=8), st.just(" ")), max_size=6).map("".join), max_size=6)


@settings(deadline=None, max_examples=100)
@given(WILD)
def test_wild_lines_are_files_of_known_names_or_problems_with_their_lines(lines: list[str]) -> None:
    text = "\n".join(lines).encode("utf-8", "replace").decode()
    path = StubPath(text)
    try:
        wanted = download.read_list(path)
    except UserError as error:
        assert all(re.match(r"list:\d+: .+|list: no links", line) for line in str(error).split("\n")), str(error)
        return
    names = [entry.name for entry in wanted]
    assert names and len(set(names)) == len(names)
    assert all(re.fullmatch(r"item_\w+\.(jsonl|zip(\.part[a-z]{2})?)", name) for name in names)
    assert all(entry.source.scheme in ("http", "https") and entry.source.host for entry in wanted)


class StubPath:
    """A list in memory: hypothesis would otherwise write hundreds of files."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return "list"

    def read_text(self, encoding: str) -> str:
        return io.TextIOWrapper(io.BytesIO(self.text.encode()), encoding).read()
