"""guard.py: a stranger's similarity.py sees no answers however it looks for them, and that it looked is said."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import orjson
import pytest
from report_worlds import make_world

from tongkuan.base.errors import UserError
from tongkuan.base.metrics import quality_at
from tongkuan.judge import guard, guard_process
from tongkuan.judge.check import judged, score
from tongkuan.report.report import report

LABELS = [1, 0, 0, 1, 0, 1, 0, 0]
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
is_guarded = guard_process.landlock_version() > 0 and guard_process.can_filter()


@pytest.fixture
def submit(tmp_path: Path) -> Path:
    """A folder to hand in, with answers hidden in it under several names, and answers.jsonl beside it."""
    folder = tmp_path / "submit"
    (folder / "in").mkdir(parents=True)
    ids = [{"src_item_id": "a", "tgt_item_id": f"b{number}"} for number in range(len(LABELS))]
    texts = {"src_item_emb": "[1.0, 1.0]", "tgt_item_emb": "[1.0, 2.0]", "threshold": 0.5}
    pairs = [each | {"item_label": str(label)} for each, label in zip(ids, LABELS, strict=True)]
    (folder / "result.jsonl").write_bytes(b"".join(orjson.dumps(each | texts) + b"\n" for each in ids))
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(b"".join(orjson.dumps(pair) + b"\n" for pair in pairs))
    (folder / "link.npy").symlink_to(answers)
    (folder / "hard.npy").hardlink_to(answers)
    for name in ("copy.txt", "report.html"):
        shutil.copy(answers, folder / name)
    (folder / "in" / "valid.json").write_bytes(answers.read_bytes() + b"\n")
    return folder


def write_stranger(submit: Path, looks: Sequence[str], port: int) -> None:
    """A similarity.py that looks in these ways, one after another."""
    answers = submit.parent / "answers.jsonl"
    functions = "\n".join(f"def look_{number}():\n    {look}" for number, look in enumerate(looks))
    code = STRANGER.replace("{looks}", functions).replace("{count}", str(len(looks)))
    for name, value in {"HERE": submit, "TOP": submit.parent, "PAIRS": answers}.items():
        code = code.replace(f"'{name}'", name).replace(name, repr(str(value)))
    code = code.replace("PORT", str(port)).replace("PARENT", str(os.getpid()))
    (submit / "similarity.py").write_text(code, encoding="utf-8")


def said(submit: Path, words: str) -> str:
    """The words with the test's own paths."""
    places = {"PAIRS": submit.parent / "answers.jsonl", "SUBMIT": submit, "TOP": submit.parent}
    for name, place in places.items():
        words = words.replace(name, str(place))
    return words


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
def test_whoever_looks_for_answers_scores_as_a_constant_and_it_is_said(
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
def test_whoever_looks_in_one_way_scores_as_a_constant_and_it_is_said(
    submit: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    look, words = LOOKS[how]
    with everywhere(submit, monkeypatch) as port:
        write_stranger(submit, [look], port)
        f1, notes = figures(submit)
    assert f1 == pytest.approx(CONSTANT) and said(submit, words) in notes


def test_below_python_the_kernel_holds_or_it_is_said_that_it_cannot(
    submit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with everywhere(submit, monkeypatch) as port:
        write_stranger(submit, [look for look, _ in BELOW_PYTHON.values()], port)
        f1, notes = figures(submit)
    assert not [words for _, words in BELOW_PYTHON.values() if words not in notes]
    assert f1 == pytest.approx(CONSTANT) if is_guarded else "this kernel" in notes


@pytest.mark.slow
@pytest.mark.parametrize("how", [*LOOKS, *BELOW_PYTHON])
def test_each_of_these_strangers_finds_answers_where_nobody_keeps_it(
    submit: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "everywhere":
        return  # the whole disk takes long
    look, _ = {**LOOKS, **BELOW_PYTHON}[how]
    with everywhere(submit, monkeypatch) as port:
        write_stranger(submit, [look], port)
        code = "import os, sys; sys.path.insert(0, sys.argv[1]); import similarity; print(*similarity.labels)"
        found = subprocess.check_output([sys.executable, "-c", code, submit], close_fds=False, text=True)
    assert found.split() == [str(label) for label in LABELS]


HONEST = """
import collections, ctypes, dataclasses, json, math, numpy as np, os, pathlib, random, re, zoneinfo
import helper
from parts.inner import twice
TABLE = json.loads((pathlib.Path(__file__).parent / "table.json").read_text())
WEIGHTS = np.load(os.path.join(os.path.dirname(__file__), "weights.npy"))
assert sorted(os.listdir(pathlib.Path(__file__).parent))
assert zoneinfo.ZoneInfo("Asia/Shanghai") and os.urandom(4) and open(os.devnull).read() == ""
def compute(a, b):
    return float(twice(np.dot(WEIGHTS, a)) + helper.add(TABLE["plus"], b[0]) + np.linalg.norm(b))
"""


def test_an_honest_similarity_has_its_libraries_its_helpers_and_its_files(submit: Path) -> None:
    (submit / "parts").mkdir()
    (submit / "parts" / "__init__.py").touch()
    (submit / "parts" / "inner.py").write_text("def twice(x): return 2 * x")
    (submit / "helper.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\ndef add(a, b): return a + b"
    )
    (submit / "table.json").write_text('{"plus": -9}')
    np.save(submit / "weights.npy", np.array([1.0, 1.0]))
    (submit / "similarity.py").write_text(HONEST, encoding="utf-8")
    before = sorted(submit.rglob("*"))
    found = judged(submit, submit.parent / "answers.jsonl")
    assert found.scores == pytest.approx(4 - 8 + 5**0.5)
    assert not [note for note in found.notes if "tried" in note]
    assert sorted(submit.rglob("*")) == before


@pytest.mark.slow
def test_a_similarity_may_use_scipy_and_scikit_learn(submit: Path) -> None:
    code = "import scipy.spatial.distance as d, sklearn.linear_model\ndef compute(a, b): return d.cityblock([0, 0], b)"
    (submit / "similarity.py").write_text(code, encoding="utf-8")
    assert judged(submit, submit.parent / "answers.jsonl").scores == pytest.approx(3.0)


def test_answers_in_the_folder_itself_are_kept_from_it_and_the_rest_is_not(submit: Path) -> None:
    """As with `--submit data`: the answers lie beside similarity.py, under the name that was given."""
    answers = shutil.move(submit.parent / "answers.jsonl", submit / "answers.jsonl")
    (submit / "plain.txt").write_text("1")
    code = (
        "import pathlib\nhere = pathlib.Path(__file__).parent\nx = float((here / 'plain.txt').read_text())\n"
        "try: (here / 'answers.jsonl').read_text(); x = -1\nexcept PermissionError: pass\ndef compute(a, b): return x"
    )
    (submit / "similarity.py").write_text(code, encoding="utf-8")
    found = judged(submit, answers)
    assert found.scores == pytest.approx(1.0)
    assert found.notes == [f"similarity.py tried to open {str(submit / 'answers.jsonl')!r} (denied)"] or not is_guarded


def test_answers_from_a_pipe_hide_nothing_else(submit: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, (submit.parent / "answers.jsonl").read_bytes())
    os.close(writing)
    (submit / "plain.txt").write_text("1")
    code = "x = float(open(__file__.replace('similarity.py', 'plain.txt')).read())\ndef compute(a, b): return x"
    (submit / "similarity.py").write_text(code, encoding="utf-8")
    try:
        assert judged(submit, Path(f"/dev/fd/{reading}")).scores == pytest.approx(1.0)
    finally:
        os.close(reading)


def test_of_a_crowded_folder_modules_come_first_and_it_is_said_where_it_ends(
    submit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_FILES", 3)
    for name in ("1.txt", "2.txt", "zz.py"):
        (submit / name).write_text("x = 1.0")
    (submit / "similarity.py").write_text("import zz\ndef compute(a, b): return zz.x", encoding="utf-8")
    found = judged(submit, submit.parent / "answers.jsonl")
    assert found.scores == pytest.approx(1.0) and "could read 3 of the files here, not more" in found.notes[-1]


def test_deeds_of_all_kinds_are_refused_and_said_and_what_is_caught_costs_nothing(submit: Path) -> None:
    deeds = {
        "open(HERE + '/made', 'w')": "write in 'SUBMIT' (denied)",
        "open(HERE + '/table.txt', 'a')": "write in 'SUBMIT' (denied)",
        "os.remove(HERE + '/result.jsonl')": "delete 'SUBMIT/result.jsonl' (denied)",
        "os.rename(HERE + '/result.jsonl', HERE + '/x')": "rename 'SUBMIT/result.jsonl' (denied)",
        "os.mkdir(HERE + '/x')": "make 'SUBMIT/x' (denied)",
        "os.chmod(HERE + '/result.jsonl', 0)": "change 'SUBMIT/result.jsonl' (denied)",
        "os.kill(os.getppid(), 9)": "send a signal to another process",
        "open('/no/such/file')": "open '/no/such/file' (not there)",
    }
    lines = [f"try: {deed}\nexcept OSError: failed += 1" for deed in deeds]
    code = f"import os\nHERE = {str(submit)!r}\nfailed = 0\n" + "\n".join(lines)
    (submit / "similarity.py").write_text(code + "\ndef compute(a, b): return failed", encoding="utf-8")
    if guard_process.landlock_version() < 6:
        del deeds["os.kill(os.getppid(), 9)"]  # it would end the guard
        (submit / "similarity.py").write_text(code.replace("os.kill(os.getppid(), 9)", "open('/no')"))
    before = {path: path.stat().st_mode for path in submit.iterdir()}
    found = judged(submit, submit.parent / "answers.jsonl")
    assert found.scores == pytest.approx(8.0)
    notes = "\n".join(found.notes)
    assert all(said(submit, words) in notes for words in deeds.values())
    assert {path: path.stat().st_mode for path in submit.iterdir()} == before


def test_notes_are_short_whatever_a_stranger_writes_there(submit: Path) -> None:
    code = """
import os, sys
for number in range(50):
    try: open('/proc/' + 'x' * 5000 + '\\n\\x1b[31m' + str(number))
    except OSError: pass
os.write(int(sys.argv[5]), b'\\x1b[31m no JSON\\n"' + b'y' * 9999 + b'"\\n[1]\\n')
def compute(a, b): return 1.0
"""
    (submit / "similarity.py").write_text(code, encoding="utf-8")
    note = judged(submit, submit.parent / "answers.jsonl").notes[0]
    assert len(note) < 2000 and note.isprintable() and note.startswith("similarity.py tried to ")


def test_a_start_takes_less_than_a_second(submit: Path) -> None:
    (submit / "similarity.py").write_text("def compute(a, b): return 1.0", encoding="utf-8")
    for number in range(300):
        (submit / f"{number}.txt").touch()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        guard.run_similarity(submit, len(LABELS), submit.parent / "answers.jsonl")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1


def test_what_it_tried_and_what_the_kernel_lacks_stands_in_the_output_and_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard_process, "landlock_version", lambda: 0)
    world = make_world(tmp_path)
    path, names = world.submit / "similarity.py", ("/proc/1/<script>", "/proc/1/stat")
    tried = "".join(f"try: open({name!r})\nexcept OSError: pass\n" for name in names)
    path.write_text(tried + path.read_text(encoding="utf-8"), encoding="utf-8")
    lacking = "this kernel cannot keep similarity.py from reading files, so it may have seen the answers"
    score(world.submit, world.pairs)
    out = capsys.readouterr().out
    assert "tried to open '/proc/*/<script>' (not there), to open '/proc/*/stat' (denied)\n" in out and lacking in out
    report(world.submit, world.pairs, world.data, tmp_path / "page.html")
    page, out = (tmp_path / "page.html").read_text(encoding="utf-8"), capsys.readouterr().out
    assert "tried to open &#39;/proc/*/&lt;script&gt;&#39; (not there)" in page and lacking in page
    assert "similarity.py tried to" in out and lacking in out


def test_a_denial_that_nobody_catches_is_one_line(submit: Path) -> None:
    (submit / "similarity.py").write_text("open('/proc/self/status')", encoding="utf-8")
    with pytest.raises(UserError, match=r"failed with exit code 1 .*PermissionError.*may not open") as caught:
        judged(submit, submit.parent / "answers.jsonl")
    assert "\n" not in str(caught.value)
