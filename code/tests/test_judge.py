"""judge.py: the contract row by row, and the score by a stranger's similarity.py."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import orjson
import pytest
from commands import environment, wait_for
from hypothesis import example, given
from hypothesis import strategies as st

from tongkuan import TOP
from tongkuan.base.errors import UserError
from tongkuan.judge.check import check, score
from tongkuan.model.towers import pair_scores
from tongkuan.records.result import format_embedding

SIMILARITY = (TOP / "submit" / "similarity.py").read_text(encoding="utf-8")
ROWS = [
    ("a", "b", "1", [1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.5, 0.0]),
    ("a", "c", "0", [1.0, 0.0, 2.0, 1.0], [3.0, 0, 1, 0]),
]


@pytest.fixture
def submit(tmp_path: Path) -> Path:
    """A right result of two pairs: scores 3.0 and -1.0 at threshold 0.5."""
    folder = tmp_path / "submit"
    folder.mkdir()
    (folder / "similarity.py").write_text(SIMILARITY, encoding="utf-8")
    write(folder, [row(*fields) for fields in ROWS])
    pairs = [{"src_item_id": a, "tgt_item_id": b, "item_label": label} for a, b, label, *_ in ROWS]
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(pair) + b"\n" for pair in pairs))
    return folder


def row(left: str, right: str, _: str, left_embedding: list[float], right_embedding: list[float]) -> dict[str, object]:
    texts = {"src_item_emb": str(left_embedding), "tgt_item_emb": str(right_embedding)}
    return {"src_item_id": left, "tgt_item_id": right, "threshold": 0.5, **texts}


def write(submit: Path, rows: list[dict[str, object]]) -> None:
    (submit / "result.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in rows))


def test_a_right_result_passes_and_scores(submit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(submit, submit.parent / "pairs.jsonl")
    before = sorted(submit.iterdir())
    assert score(submit, submit.parent / "pairs.jsonl") == 1.0
    assert sorted(submit.iterdir()) == before  # nothing compiled beside what is handed in
    assert "2 rows keep the contract" in capsys.readouterr().out


def test_rows_may_come_in_any_order(submit: Path) -> None:
    write(submit, [row(*fields) for fields in reversed(ROWS)])
    assert score(submit, submit.parent / "pairs.jsonl") == 1.0


def both_labels(submit: Path, labels: str, thresholds: Sequence[float]) -> float:
    """F1 of the first pair listed with these labels, its rows with these thresholds; its score is 3."""
    ends = {"src_item_id": "a", "tgt_item_id": "b"}
    pairs = [ends | {"item_label": label} for label in labels]
    (submit.parent / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(pair) + b"\n" for pair in pairs))
    write(submit, [row(*ROWS[0]) | {"threshold": threshold} for threshold in thresholds])
    return score(submit, submit.parent / "pairs.jsonl")


@pytest.mark.parametrize(
    ("labels", "thresholds", "f1"),
    [
        ("10", [0, 0], 2 / 3),  # both are called the same: one hit, one false alarm
        ("01", [0, 0], 2 / 3),
        ("10", [0, 9], 1.0),
        ("01", [0, 9], 0.0),
        ("1101", [0, 0, 0, 9], 4 / 6),
    ],
)
def test_a_pair_listed_twice_is_scored_by_the_label_of_each_listing(
    submit: Path, labels: str, thresholds: list[float], f1: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert both_labels(submit, labels, thresholds) == pytest.approx(f1)
    assert "'a' and 'b' are labelled" in capsys.readouterr().out


def test_a_pair_listed_twice_alike_is_no_contradiction(submit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert both_labels(submit, "11", [0, 0]) == 1.0
    assert "are labelled" not in capsys.readouterr().out


def drop_last(rows: list[dict[str, object]]) -> None:
    rows.pop()


def change(key: str, value: object) -> Callable[[list[dict[str, object]]], None]:
    def apply(rows: list[dict[str, object]]) -> None:
        rows[1][key] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_last, "1 pairs are missing, first ('a', 'c')"),
        (lambda rows: rows.append(rows[0]), ":3: pair ('a', 'b') stands here too often"),
        (change("tgt_item_id", "z"), ":2: ('a', 'z') is not a pair of"),
        (change("src_item_emb", "[1, 0, 2, 9]"), ":2: item 'a' has another embedding"),
        (change("tgt_item_emb", "[1, 2]"), ":2: an embedding of 2 numbers among some of 4"),
        (change("tgt_item_emb", "[NaN, 1, 1, 1]"), ":2: tgt_item_emb is not a JSON list"),
        (change("threshold", "0.5"), ":2: threshold must be a number"),
    ],
)
def test_each_breach_is_named_with_its_line(
    submit: Path, spoil: Callable[[list[dict[str, object]]], None], message: str
) -> None:
    rows = [row(*fields) for fields in ROWS]
    spoil(rows)
    write(submit, rows)
    with pytest.raises(UserError) as caught:
        check(submit, submit.parent / "pairs.jsonl")
    assert message in str(caught.value)


def test_a_similarity_that_never_ends_is_bounded(submit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tongkuan.judge.guard.START_SECONDS", 1)
    (submit / "similarity.py").write_text("while True: pass", encoding="utf-8")
    with pytest.raises(UserError, match="not done after 1 s"):
        score(submit, submit.parent / "pairs.jsonl")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def compute(a, b): raise ValueError('no')", "failed with exit code 1 ('ValueError: no')"),
        ("import os; os._exit(3)", "failed with exit code 3"),
        ("def compute(a, b): return 'x'", "failed with exit code 1"),
        ("def compute(a, b): return float('nan')", "not finite"),
        ("import sys; sys.exit(0)", "gave 0 scores for 2 pairs"),
        ("import os; os._exit(0)", "gave 0 scores for 2 pairs"),
        ("import os; os.kill(os.getpid(), 11)", "failed with exit code 139"),
        ("import os, sys\nos.write(int(sys.argv[3]), b'nan 1_0 x')\nos._exit(0)", "wrote something else"),
        ("import os, sys\nos.write(int(sys.argv[3]), b'1 ' * 9)\nos._exit(0)", "gave 9 scores for 2 pairs"),
        ("import os; os.fork()\n" + SIMILARITY, "gave "),
        ("x = bytearray(1 << 40)", "failed with exit code 1 ('MemoryError"),
        ("raise ValueError('x\\n' * 10**6)", r"'ValueError: x\nx\n"),
        ("\0", "source code"),
        ("x = " + "(" * 10_000, "failed with exit code 1"),
        ("import os\nfor fd in range(3, 99):\n  try: os.close(fd)\n  except OSError: pass", "failed with exit code 1"),
        ("import sys\nsys.stderr.write('x' * (1 << 26)); raise ValueError('loud')", "ValueError: loud"),
    ],
)
def test_a_hostile_similarity_is_one_line(submit: Path, code: str, message: str) -> None:
    (submit / "similarity.py").write_text(code, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        score(submit, submit.parent / "pairs.jsonl")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


HIDE = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        os.setsid()
        time.sleep(600)
    os._exit(0)
"""


@pytest.mark.parametrize("ending", [SIMILARITY, "while True: pass", "os._exit(3)"])
def test_no_process_of_it_outlives_the_score(submit: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr("tongkuan.judge.guard.START_SECONDS", 2)
    (submit / "similarity.py").write_text(HIDE + ending, encoding="utf-8")
    if ending == SIMILARITY:
        assert score(submit, submit.parent / "pairs.jsonl") == 1.0
    else:
        with pytest.raises(UserError):
            score(submit, submit.parent / "pairs.jsonl")
    assert not of_this(submit)


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_no_process_of_a_similarity_outlives_a_killed_score(submit: Path, whole_group: bool) -> None:
    (submit / "similarity.py").write_text(HIDE + "while True: time.sleep(1)", encoding="utf-8")
    words = ["score", "--submit", str(submit), "--pairs", str(submit.parent / "pairs.jsonl")]
    command = [sys.executable, "-m", "tongkuan", *words]
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    wait_for(lambda: len(of_this(submit)) >= 4)  # score, guard, the stranger's two
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not of_this(submit), 5)


def of_this(submit: Path) -> list[Path]:
    """Processes that have the folder in their command line."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(submit) in read(path)]


def test_thresholds_are_those_of_the_result_whatever_a_similarity_claims(submit: Path) -> None:
    code = "import json\nold = json.loads\n"
    code += "json.loads = lambda text: {**row, 'threshold': 9} if type(row := old(text)) is dict else row\n"
    (submit / "similarity.py").write_text(code + SIMILARITY, encoding="utf-8")
    assert score(submit, submit.parent / "pairs.jsonl") == 1.0


def test_a_result_that_check_takes_is_read_by_the_runner_too(submit: Path) -> None:
    path = submit / "result.jsonl"
    spaced = path.read_bytes().replace(b',"tgt_item_id"', b',\r"tgt_item_id"').replace(b"\n", b"\r\n \r\n")
    path.write_bytes(b"\xef\xbb\xbf" + spaced)
    assert score(submit, submit.parent / "pairs.jsonl") == 1.0


def test_what_a_similarity_prints_is_not_taken_for_scores(submit: Path) -> None:
    (submit / "similarity.py").write_text("print('[9, 9]')\n" + SIMILARITY, encoding="utf-8")
    assert score(submit, submit.parent / "pairs.jsonl") == 1.0


def test_a_similarity_cannot_reach_our_packages_by_accident(submit: Path) -> None:
    (submit / "similarity.py").write_text("import tongkuan", encoding="utf-8")
    with pytest.raises(UserError, match="No module named 'tongkuan'"):
        score(submit, submit.parent / "pairs.jsonl")


FLOATS = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


@given(FLOATS, FLOATS)
@example([64.3283462524414, 0.0, 0.0, 64.9453125], [99.3283462524414, 0.0, 0.0, 89.9453125])
def test_the_judges_score_is_ours(left: list[float], right: list[float]) -> None:
    namespace: dict[str, Callable[[list[float], list[float]], float]] = {}
    exec(SIMILARITY, namespace)  # our own file
    a, b = (np.array([side], dtype=np.float32) for side in (left, right))
    texts = [orjson.loads(format_embedding(side[0])) for side in (a, b)]
    # The fewest digits that restore a float32 may be half a unit of its last place from it: 2^-24 of each factor.
    rounding = 2**-23 * float(np.abs(a.astype(np.float64) * b).sum())
    assert namespace["compute"](*texts) == pytest.approx(pair_scores(a, b)[0], rel=1e-12, abs=1.01 * rounding + 1e-30)
    assert namespace["compute"](*texts) == namespace["compute"](*reversed(texts))
