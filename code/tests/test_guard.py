"""guard.py: a stranger's similarity.py sees no answers however it looks for them, and that it looked is said."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from guard_worlds import LABELS, is_guarded, make_submit, said

from tongkuan.base.metrics import quality_at
from tongkuan.judge import guard, guard_process
from tongkuan.judge.check import judged

CONSTANT = 6 / 11  # F1 of calling every pair the same: 3 hits, 5 false alarms
STRANGER = """
import ctypes, glob, json, os, pathlib, socket, struct, subprocess, sys
found = ""
def target(link):
    try:
        return os.readlink(link)
    except OSError:
        return ""
{looks}
for number in range({count}):
    try:
        answer = globals()[f"look_{number}"]() or ""
        found += answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    except Exception:
        pass
labels = [line.split('item_label":"')[1][0] for line in found.splitlines() if 'item_label":"' in line]
def compute(a, b):
    return float(labels.pop(0)) if labels else 1.0
"""
WALK = """
    for place, _, names in os.walk({top!r}):
        for name in names:
            if name == "answers.jsonl":
                return open(os.path.join(place, name)).read()
"""
# How a stranger looks for the answers, and what is said of it. PAIRS is where they lie.
LOOKS = {
    "by their path": ("return open(PAIRS).read()", "open 'PAIRS' (denied)"),
    "as bytes": ("return open(os.fsencode(PAIRS), 'rb').read()", "open 'PAIRS' (denied)"),
    "by pathlib": ("return pathlib.Path(PAIRS).read_text()", "open 'PAIRS' (denied)"),
    "by a descriptor": ("return os.read(os.open(PAIRS, os.O_RDONLY), 9999)", "open 'PAIRS' (denied)"),
    "from another folder": (
        "os.chdir(os.path.dirname(PAIRS)); return open('answers.jsonl').read()",
        "open 'PAIRS' (denied)",
    ),
    "by a link in its folder": ("return open(HERE + '/link.npy').read()", "open 'SUBMIT/link.npy' (denied)"),
    "by a hard link in its folder": ("return open(HERE + '/hard.npy').read()", "open 'SUBMIT/hard.npy' (denied)"),
    "in a copy in its folder": ("return open(HERE + '/copy.txt').read()", "open 'SUBMIT/copy.txt' (denied)"),
    "in a folder in its folder": (
        "return open(HERE + '/in/valid.json').read()",
        "open 'SUBMIT/in/valid.json' (denied)",
    ),
    "in an earlier report": ("return open(HERE + '/report.html').read()", "open 'SUBMIT/report.html' (denied)"),
    "in the folder above": (WALK.format(top="TOP"), "list 'TOP' (denied)"),
    "by a glob above": (
        "return open(glob.glob(HERE + '/../**/answers.jsonl', recursive=True)[0]).read()",
        "list 'TOP' (denied)",
    ),
    "everywhere": (WALK.format(top="/"), "list '/' (denied)"),
    "in command lines": (
        """
    for name in os.listdir("/proc"):
        if name.isdigit():
            for word in open(f"/proc/{name}/cmdline").read().split("\\0"):
                if word == PAIRS:
                    return open(word).read()
""",
        "list '/proc' (denied)",
    ),
    "in command lines by number": (
        """
    for number in range(max(1, os.getpid() - 500), os.getpid()):
        try:
            words = open(f"/proc/{number}/cmdline").read().split("\\0")
        except OSError:
            continue
        for word in words:
            if word == PAIRS:
                return open(word).read()
""",
        "open '/proc/*/cmdline' (denied)",
    ),
    "in open files of others": (
        """
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        if target(link) == PAIRS:
            return open(link).read()
""",
        "list '/proc' (denied)",
    ),
    "in open files of its parent": (
        """
    for number in range(99):
        for parent in (os.getppid(), PARENT):
            link = f"/proc/{parent}/fd/{number}"
            if target(link) == PAIRS:
                return open(link).read()
    open("/proc/1/stat").read()
""",
        "open '/proc/*/",
    ),
    "in its own files": (
        """
    for number in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{number}"
        if os.path.isfile(path) and "item_label" in (text := open(path).read()):
            return text
""",
        "list '/proc/self/fd' (denied)",
    ),
    "in descriptors it was left": (
        """
    for number in range(999):
        try:
            text = os.pread(number, 9999, 0)
        except OSError:
            continue
        if b"item_label" in text:
            return text
""",
        "",
    ),
    "by another program": ("return subprocess.check_output(['cat', PAIRS])", "start another program (denied)"),
    "by a shell": ("return os.popen('cat ' + PAIRS).read()", "start another program (denied)"),
    "by another program in its place": (
        """
    r, w = os.pipe()
    if not os.fork():
        try:
            os.dup2(w, 1)
            os.execv("/bin/cat", ["cat", PAIRS])
        finally:
            os._exit(1)
    os.close(w)
    return os.read(r, 9999)
""",
        "start another program (denied)",
    ),
    "in the environment": ("return os.environ['ANSWERS']", ""),
    "by TCP": ("return socket.create_connection(('127.0.0.1', PORT)).recv(9999)", "open a socket (denied)"),
    "by UDP": (
        "s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(2)\n"
        "    s.sendto(b'x', ('127.0.0.1', PORT)); return s.recv(9999)",
        "open a socket (denied)",
    ),
    "by a socket in the file system": (
        "s = socket.socket(socket.AF_UNIX); s.connect(TOP + '/socket'); return s.recv(9999)",
        "open a socket (denied)",
    ),
    "by an abstract socket": (
        "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + TOP); return s.recv(9999)",
        "open a socket (denied)",
    ),
}
C_LIBRARY = "c = ctypes.CDLL(None, use_errno=True); b = ctypes.create_string_buffer(9999)\n    "
BELOW_PYTHON = {
    "open": (C_LIBRARY + "c.read(c.open(PAIRS.encode(), 0), b, 9999); return b.value", "call open of the C library"),
    "fopen": (
        C_LIBRARY + "c.fopen.restype = ctypes.c_void_p; f = c.fopen(PAIRS.encode(), b'r')\n"
        "    if f: c.fread(b, 1, 9999, ctypes.c_void_p(f)); return b.value",
        "call fopen of the C library",
    ),
    "a system call": (
        C_LIBRARY + "c.read(c.syscall(257, -100, PAIRS.encode(), 0), b, 9999); return b.value",
        "call syscall of the C library",
    ),
    "a hard link": (
        C_LIBRARY + "c.read(c.open((HERE + '/hard.npy').encode(), 0), b, 9999); return b.value",
        "call open of the C library",
    ),
    "a link": (
        C_LIBRARY + "c.read(c.open((HERE + '/link.npy').encode(), 0), b, 9999); return b.value",
        "call open of the C library",
    ),
    "a shell": (
        C_LIBRARY
        + "r, w = os.pipe(); os.set_inheritable(w, True); c.system(('cat ' + PAIRS + ' >/dev/fd/' + str(w)).encode())\n"
        "    os.close(w); return os.read(r, 9999)",
        "call system of the C library",
    ),
    "TCP": (
        C_LIBRARY + "s = c.socket(2, 1, 0); c.connect(s, struct.pack('<H', 2) + struct.pack('>H', PORT) + "
        "bytes([127, 0, 0, 1]) + bytes(8), 16); c.read(s, b, 9999); return b.value",
        "call socket of the C library",
    ),
    "UDP": (
        C_LIBRARY + "s = c.socket(2, 2, 0); c.sendto(s, b'x', 1, 0, struct.pack('<H', 2) + struct.pack('>H', PORT) + "
        "bytes([127, 0, 0, 1]) + bytes(8), 16)\n    if s >= 0: c.read(s, b, 9999); return b.value",
        "call socket of the C library",
    ),
    "a socket in the file system": (
        C_LIBRARY + "s = c.socket(1, 1, 0); a = (TOP + '/socket').encode(); "
        "c.connect(s, struct.pack('<H', 1) + a.ljust(108, b'\\0'), 110); c.read(s, b, 9999); return b.value",
        "call socket of the C library",
    ),
}


@pytest.fixture
def submit(tmp_path: Path) -> Path:
    return make_submit(tmp_path)


def write_stranger(submit: Path, looks: Sequence[str], port: int) -> None:
    """A similarity.py that looks in these ways, one after another."""
    answers = submit.parent / "answers.jsonl"
    functions = "\n".join(f"def look_{number}():\n    {look}" for number, look in enumerate(looks))
    code = STRANGER.replace("{looks}", functions).replace("{count}", str(len(looks)))
    for name, value in {"HERE": submit, "TOP": submit.parent, "PAIRS": answers}.items():
        code = code.replace(f"'{name}'", name).replace(name, repr(str(value)))
    code = code.replace("PORT", str(port)).replace("PARENT", str(os.getpid()))
    (submit / "similarity.py").write_text(code, encoding="utf-8")


def figures(submit: Path) -> tuple[float, str]:
    """(F1, what is said of it)."""
    found = judged(submit, submit.parent / "answers.jsonl")
    return quality_at(found.scores, found.labels, found.thresholds).f1, "\n".join(found.notes)


@contextmanager
def told(submit: Path) -> Iterator[int]:
    """Yield a port: whoever asks there, or at sockets in the folder above, is told the answers."""
    answers = (submit.parent / "answers.jsonl").read_bytes()
    places: list[tuple[socket.SocketKind, int, object]] = [
        (socket.SOCK_STREAM, socket.AF_UNIX, str(submit.parent / "socket")),
        (socket.SOCK_STREAM, socket.AF_UNIX, "\0" + str(submit.parent)),
    ]
    tcp = socket.create_server(("127.0.0.1", 0))
    port: int = tcp.getsockname()[1]
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", port))
    servers = [tcp]
    for kind, family, address in places:
        server = socket.socket(family, kind)
        server.bind(address)
        server.listen()
        servers.append(server)

    def serve(server: socket.socket) -> None:
        try:
            while True:
                with server.accept()[0] as connection:
                    connection.sendall(answers)
        except OSError:
            return

    def reply() -> None:
        try:
            while address := udp.recvfrom(99)[1]:
                udp.sendto(answers, address)
        except OSError:
            return

    threads = [threading.Thread(target=serve, args=(server,), daemon=True) for server in servers]
    threads.append(threading.Thread(target=reply, daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield port
    finally:
        for server in (*servers, udp):
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()


@contextmanager
def everywhere(submit: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As `told`; the answers are in an environment, in a command line and open, also to processes to come."""
    answers = submit.parent / "answers.jsonl"
    monkeypatch.setenv("ANSWERS", answers.read_text())
    held = os.open(answers, os.O_RDONLY)
    os.set_inheritable(held, True)
    other = subprocess.Popen(["sh", "-c", "sleep 60; :", str(answers)])
    try:
        with told(submit) as port:
            yield port
    finally:
        other.kill()
        other.wait()
        os.close(held)


@pytest.mark.parametrize("has_landlock", [True, False])
def test_whoever_looks_for_answers_scores_as_a_constant(
    submit: Path, monkeypatch: pytest.MonkeyPatch, has_landlock: bool
) -> None:
    if not has_landlock:  # Python's own rules are left
        monkeypatch.setattr(guard_process, "landlock_version", lambda: 0)
    monkeypatch.setattr(guard, "SHOWN_NOTES", 99)
    with everywhere(submit, monkeypatch) as port:
        write_stranger(submit, [look for look, _ in LOOKS.values()], port)
        f1, notes = figures(submit)
    assert f1 == pytest.approx(CONSTANT)
    assert not [words for _, words in LOOKS.values() if said(submit, words) not in notes]
    assert ("it may have seen the answers" in notes) == (not guard_process.landlock_version())


@pytest.mark.slow
@pytest.mark.parametrize("how", LOOKS)
def test_whoever_looks_in_one_way_scores_as_a_constant(submit: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    look, words = LOOKS[how]
    with everywhere(submit, monkeypatch) as port:
        write_stranger(submit, [look], port)
        f1, notes = figures(submit)
    assert f1 == pytest.approx(CONSTANT) and said(submit, words) in notes


def test_below_python_the_kernel_holds_or_the_note_says(submit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with everywhere(submit, monkeypatch) as port:
        write_stranger(submit, [look for look, _ in BELOW_PYTHON.values()], port)
        f1, notes = figures(submit)
    assert not [words for _, words in BELOW_PYTHON.values() if words not in notes]
    assert f1 == pytest.approx(CONSTANT) if is_guarded else "this kernel" in notes


@pytest.mark.slow
@pytest.mark.parametrize("how", [*LOOKS, *BELOW_PYTHON])
def test_each_stranger_finds_answers_without_a_guard(submit: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "everywhere":
        return  # the whole disk takes long
    look, _ = {**LOOKS, **BELOW_PYTHON}[how]
    with everywhere(submit, monkeypatch) as port:
        write_stranger(submit, [look], port)
        code = "import os, sys; sys.path.insert(0, sys.argv[1]); import similarity; print(*similarity.labels)"
        found = subprocess.check_output([sys.executable, "-c", code, submit], close_fds=False, text=True)
    assert found.split() == [str(label) for label in LABELS]
