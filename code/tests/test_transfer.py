"""Transfers: whatever a server does, no half file gets a final name, and the same command completes it."""

import errno
import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import httpx2
import pytest
from commands import environment, ok, run_verb, wait_for
from download_worlds import (
    CONTENT,
    JSONL,
    PARTS,
    QUICK,
    ZIP,
    Behaviour,
    Handler,
    Server,
    archive,
    behave,
    fetch,
    files,
    in_parts,
    serving,
)  # fmt: skip

from data_scripts import transfer
from tongkuan.base.errors import UserError

ONCE = transfer.Patience(attempts=1, timeout=1)
IMPATIENT = transfer.Patience(attempts=2, timeout=0.1, pause=0.001)
CERTIFICATES = httpx2.create_ssl_context()
WHOLE = len(CONTENT[ZIP])


def cut(h: Handler, data: bytes) -> None:
    h.reply(200, data[: len(data) // 2], len(data))


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


def cut_first(count: int, **headers: str) -> Behaviour:
    """The first answer ends after so many bytes, an answer to a range is whole."""

    def answer(h: Handler, data: bytes) -> None:
        if h.start() >= len(data):
            behave(h, data)
        elif h.start():
            h.reply_from(data, **headers)
        else:
            h.reply(200, data[:count], len(data), **headers)

    return answer


def ranged(change: Callable[[int, int], str], etag: str = '"1"') -> Behaviour:
    """Answers a range, but with this Content-Range, from start and total."""
    return lambda h, data: (
        h.reply_from(data, Content_Range=change(h.start(), len(data)), ETag=etag) if h.start() else cut(h, data)
    )


def status(code: int, **headers: str) -> Behaviour:
    return lambda h, _: h.reply(code, b"<Error/>", **headers)


# Of these the half that was there before must survive.
HARMLESS = ["cut midway", "no answer", "compressed", "silent", "silent midway", "500", "429, come next day"]
HARMLESS += ["403", "404"]
# What the first call then says; "" where it brings the file all the same. The second text: from half a file.
MISBEHAVIOUR: dict[str, tuple[Behaviour, str, str]] = {
    "cut midway": (cut, "gave up after 2 attempts", "gave up"),
    "chunks cut midway": (
        lambda h, data: h.reply(200, b"7530\r\n" + data[:30_000], Content_Length="", Transfer_Encoding="chunked"),
        *("gave up", "gave up"),
    ),
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
    "silent": (lambda h, _: h.server.released.wait(5) and None, "timed out; gave up", "timed out"),
    "silent midway": (silent_midway, "timed out; gave up", "timed out"),
    "slow": (trickle, "too slow", "too slow"),
    "500": (status(500), "answers 500; gave up after 2", "answers 500; gave up after 2"),
    "503, come again": (status(503, Retry_After="0"), "gave up after 2", "gave up after 2"),
    "429, come next day": (status(429, Retry_After="86400"), "after 1 attempts; in 86400 s", "in 86400 s"),
    "429, come on a date": (
        status(429, Retry_After=formatdate(time.time() + 1e7, usegmt=True)),
        "in 99[0-9]{5} s",
        "in 99[0-9]{5} s",
    ),
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
    with serving() as server:
        yield server


@pytest.fixture
def links(server: Server, tmp_path: Path) -> Path:
    """A list of the one archive."""
    return server.links(tmp_path / "links.txt", ZIP)


@pytest.fixture
def half(server: Server, raw: Path, links: Path) -> None:
    """The first half of the archive, left by a call that was cut."""
    server.misbehave = cut
    with pytest.raises(UserError):
        fetch(raw, links, ONCE)
    assert (raw / f".{ZIP}.part").read_bytes() == CONTENT[ZIP][: WHOLE // 2]
    server.misbehave = behave


@pytest.mark.parametrize("begun", [False, True], ids=["from nothing", "from half a file"])
@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_after_any_misbehaviour_the_same_command_completes(
    server: Server, raw: Path, links: Path, how: str, begun: bool, request: pytest.FixtureRequest
) -> None:
    if begun:
        request.getfixturevalue("half")
    server.misbehave, *expected = MISBEHAVIOUR[how]
    if expected[begun]:
        with pytest.raises(UserError, match=expected[begun]) as caught:
            fetch(raw, links, IMPATIENT if how.startswith(("silent", "slow")) else QUICK)
        assert str(caught.value).startswith(f"{links}:1: {ZIP}")
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
        assert not (raw / ZIP).exists()
    else:
        fetch(raw, links)
    server.released.set()
    server.misbehave = behave
    fetch(raw, links)
    assert files(raw) == {ZIP: CONTENT[ZIP]}
    if begun and how in HARMLESS:
        assert server.ranges[-1] == f"bytes={WHOLE // 2}-"


FAIR: dict[str, tuple[Behaviour, list[str]]] = {  # and what is asked of it, with half a file there
    "goes on": (behave, [f"bytes={WHOLE // 2}-"]),
    "less than was asked for": (
        lambda h, data: h.reply_from(data, 10_000),
        [f"bytes={start}-" for start in range(WHOLE // 2, WHOLE, 10_000)],
    ),
    "redirects": (
        lambda h, data: behave(h, data) if "/x/" in h.path else h.reply(307, Location="/x/" + ZIP),
        [f"bytes={WHOLE // 2}-"] * 2,
    ),
    "another version since": (
        lambda h, _: h.reply(200, archive(50_000), ETag='"2"') if h.headers["If-Range"] else None,
        [f"bytes={WHOLE // 2}-"],
    ),
}


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("how", FAIR)
def test_what_is_odd_and_fair_is_taken_at_once(server: Server, raw: Path, links: Path, how: str) -> None:
    server.misbehave, asked = FAIR[how]
    out = fetch(raw, links, ONCE)
    assert f"brought {ZIP} (" in out and f"next: ./entrypoint.sh resize --raw {raw}" in out
    assert server.ranges == [None, *asked]
    for leftover in (f".{ZIP}.part", f".{ZIP}.part.json"):
        (raw / leftover).write_bytes(b"of a call killed just after the renaming")
    assert "1 there already" in fetch(raw, links)
    assert len(server.ranges) == 1 + len(asked)
    assert files(raw) == {ZIP: archive(50_000) if "version" in how else CONTENT[ZIP]}


DATED = {"ETag": "", "Last_Modified": formatdate(1e9, usegmt=True)}


@pytest.mark.parametrize(
    ("headers", "count", "asked", "condition"),
    [
        ({}, 9000, "bytes=9000-", '"1"'),
        ({"ETag": 'W/"1"'}, 9000, "bytes=9000-", None),
        ({"ETag": ""}, 9000, "bytes=9000-", None),
        (DATED, 9000, "bytes=9000-", DATED["Last_Modified"]),
        ({"ETag": "", "Last_Modified": formatdate(9e9, usegmt=True)}, 9000, "bytes=9000-", None),
        ({"Content_Length": str(WHOLE + 9)}, WHOLE, f"bytes={WHOLE}-", '"1"'),  # more announced than there is
    ],
)
def test_a_range_is_tied_to_what_surely_names_the_version(
    server: Server, raw: Path, links: Path, headers: dict[str, str], count: int, asked: str, condition: str | None
) -> None:
    server.misbehave = cut_first(count, **headers)
    fetch(raw, links)
    assert (server.ranges, server.conditions) == ([None, asked], [None, condition])
    assert files(raw) == {ZIP: CONTENT[ZIP]}


def test_without_a_length_or_a_version_the_rest_is_of_no_use(server: Server, raw: Path, links: Path) -> None:
    chunked = {"ETag": "", "Content_Length": "", "Transfer_Encoding": "chunked"}
    server.misbehave = lambda h, data: h.reply(200, b"2328\r\n" + data[:9000], **chunked)
    with pytest.raises(UserError):
        fetch(raw, links)
    server.misbehave = lambda h, data: h.reply(200, data, ETag="", Content_Length="")
    fetch(raw, links)
    assert set(server.ranges) == {None} and files(raw) == {ZIP: CONTENT[ZIP]}


def test_an_attempt_may_bring_enough(server: Server, raw: Path, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.misbehave = lambda h, data: (
        h.reply_from(data, 9000, len(data)) if h.start() else h.reply(200, data[:9000], len(data))
    )
    with pytest.raises(UserError, match="gave up after 2"):
        fetch(raw, links)
    monkeypatch.setattr(transfer, "ENOUGH", 5000)
    fetch(raw, links)
    assert files(raw) == {ZIP: CONTENT[ZIP]}


@pytest.mark.parametrize(("asked", "pauses"), [("", [1, 2, 4, 5]), ("3", [3, 3, 4, 5]), ("soon", [1, 2, 4, 5])])
def test_pauses_double_and_are_as_long_as_the_server_asks(
    server: Server, raw: Path, links: Path, monkeypatch: pytest.MonkeyPatch, asked: str, pauses: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.misbehave = lambda h, data: behave(h, data) if len(slept) == 4 else h.reply(503, Retry_After=asked)
    fetch(raw, links, transfer.Patience(attempts=5, pause=1, longest=5))
    assert slept == pauses and files(raw) == {ZIP: CONTENT[ZIP]}


def test_bytes_are_on_the_disk_before_they_have_a_name(raw: Path, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: steps.append(Path(f"/proc/self/fd/{number}").readlink().name))
    monkeypatch.setattr(Path, "replace", lambda path, target: (steps.append("rename"), replace(path, target)))
    fetch(raw, links)
    assert steps == ["..download.json.part", "rename", "raw", f".{ZIP}.part", "rename", "raw"]


def test_a_file_is_known_to_be_whole_by_the_list_or_by_the_record(server: Server, raw: Path, tmp_path: Path) -> None:
    def listed(**options: object) -> Path:
        return server.links(tmp_path / "links.txt", JSONL, **options)

    whole = CONTENT[JSONL]
    sums = {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest().upper()}
    server.misbehave = lambda h, data: h.reply(200, data, Content_Length="")
    for wrong in ({"size": 5}, {"sha256": "0" * 64}):
        with pytest.raises(UserError, match=rf"links\.txt:1: {JSONL}.* instead of .*deleted"):
            fetch(raw, listed(**wrong))
        assert files(raw) == {}
    (raw / JSONL).write_bytes(whole)
    asked = len(server.ranges)
    fetch(raw, listed(size=len(whole)))
    fetch(raw, listed())
    assert len(server.ranges) == asked
    (raw / JSONL).write_bytes(whole[:9])
    fetch(raw, listed(**sums))
    assert files(raw) == {JSONL: whole}
    with pytest.raises(UserError, match="came with sha256"):
        fetch(raw, listed(sha256="0" * 64))
    assert files(raw) == {JSONL: whole}
    (raw / ".download.json").write_text("[1")
    fetch(raw, listed())
    assert len(server.ranges) == asked + 3


def test_sigkill_leaves_no_half_file_and_the_same_command_goes_on(server: Server, raw: Path, links: Path) -> None:
    server.misbehave = silent_midway
    words = ("download", "--raw", str(raw), "--urls", str(links))
    process = subprocess.Popen([sys.executable, "-m", "tongkuan", *words], env=environment())
    partial = raw / f".{ZIP}.part"
    wait_for(lambda: partial.exists() and partial.stat().st_size)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < partial.stat().st_size <= WHOLE // 2 and not (raw / ZIP).exists()
    server.misbehave = behave
    done = run_verb(*words)
    assert "next: ./entrypoint.sh resize" in ok(done) and done.stderr == ""
    assert server.ranges[-1] and files(raw) == {ZIP: CONTENT[ZIP]}


def test_parts_may_come_from_several_lists(server: Server, raw: Path, tmp_path: Path) -> None:
    first, second = server.links(tmp_path / "1", *list(PARTS)[:2]), server.links(tmp_path / "2", *list(PARTS)[2:])
    with pytest.raises(UserError, match=rf"2:2: {ZIP}\.partaa is missing before {ZIP}\.partac; add it"):
        fetch(raw, second)
    with pytest.raises(UserError, match=r"partaa to .*partab, make no whole zip archive; add the parts that follow"):
        fetch(raw, first)
    assert f"{ZIP} is joined" in fetch(raw, second)
    assert files(raw) == {ZIP: CONTENT[ZIP]}
    assert "2 there already" in fetch(raw, first) and len(server.ranges) == 4


def test_another_version_of_a_part_replaces_the_joined_archive(server: Server, raw: Path, tmp_path: Path) -> None:
    links = server.links(tmp_path / "links.txt", *PARTS)
    fetch(raw, links)
    server.files |= (new := in_parts(archive(70_000)))
    links.write_text(links.read_text().replace("\n", f" size={len(new[f'{ZIP}.partaa'])}\n", 1))
    fetch(raw, links)
    assert files(raw) == {ZIP: archive(70_000)}


@pytest.mark.usefixtures("half")
def test_a_full_disk_is_one_line(server: Server, raw: Path, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: '{raw}'"):
        patch.setattr(transfer, "accept", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        fetch(raw, links)
    fetch(raw, links)
    assert server.ranges[-1] and files(raw) == {ZIP: CONTENT[ZIP]}
