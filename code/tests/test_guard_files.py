"""guard.py: what similarity.py may read and do, and what is said of what it tried."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from guard_worlds import LABELS, is_guarded, make_submit, said
from report_worlds import make_world

from tongkuan.base.errors import UserError
from tongkuan.judge import guard, guard_process
from tongkuan.judge.check import judged, score
from tongkuan.report.report import report


@pytest.fixture
def submit(tmp_path: Path) -> Path:
    return make_submit(tmp_path)


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


def test_of_a_crowded_folder_modules_come_first_and_it_is_said(submit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
