"""The judges' side: check a result file row by row, and score it by running its similarity.py as they do.

`./entrypoint.sh check --submit submit --pairs data/item_test_pair.jsonl`
`./entrypoint.sh score --submit submit --pairs data/item_valid_pair.jsonl`
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tongkuan.errors import UserError, clip, missing
from tongkuan.labels import contradiction_note
from tongkuan.metrics import Labels, Scores, quality_at
from tongkuan.records import Pair, Prediction, read_pairs, read_predictions

SECONDS_A_PAIR = 0.05
START_SECONDS = 60
STOP_SECONDS = 10  # that ending all of a stranger's processes may take
MEMORY = 4 << 30  # bytes a process of the stranger's
COMPLAINT = 4096  # bytes of the stranger's error that are looked at

# similarity.py is a stranger's code. A guard runs it in a fork with limits: no memory past MEMORY; nothing to write to,
# no TCP and no signals to others, where the kernel has Landlock; no process that outlives it: orphans come to it,
# whatever session they hide in, and it ends when we do. Scores go into a file that was opened before; what it prints
# goes nowhere.
RUNNER = """
import ctypes, importlib.util, json, os, resource, select, signal, struct, sys

similarity, result = sys.argv[1:3]
scores, complaint, seconds, memory, size = map(int, sys.argv[3:])
system = ctypes.CDLL(None)


def limit():
    bounds = {
        resource.RLIMIT_DATA: memory, resource.RLIMIT_FSIZE: size, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds * (os.cpu_count() or 1) + 1,  # ends what is left after a killed guard, too
    }
    for what, bound in bounds.items():
        hard = resource.getrlimit(what)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, bound))
    version = system.syscall(444, None, 0, 1)  # landlock_create_ruleset; -1 where the kernel has none
    if version > 0:
        writing = 0x1FF2 | (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0)
        rules = struct.pack("QQQ", writing, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
        ruleset = system.syscall(444, rules, len(rules), 0)
        system.prctl(38, 1, 0, 0, 0)  # no new privileges, which Landlock asks for
        system.syscall(446, ruleset, 0)  # landlock_restrict_self: nothing is exempt


def work():
    spec = importlib.util.spec_from_file_location("similarity", similarity)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(result, encoding="utf-8-sig", newline="\\n") as rows, open(scores, "w", encoding="utf-8") as out:
        for row in map(json.loads, filter(str.strip, rows)):
            score = module.compute(json.loads(row["src_item_emb"]), json.loads(row["tgt_item_emb"]))
            out.write(f"{float(score)!r}\\n")


def stop(*_):
    sys.exit(1)


system.prctl(36, 1, 0, 0, 0)  # orphans below this process come to it
for number in (signal.SIGTERM, signal.SIGALRM):
    signal.signal(number, stop)
signal.alarm(seconds + 1)  # for when nobody is left to send the other
child = os.fork()
if not child:
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    system.prctl(1, signal.SIGKILL, 0, 0, 0)  # ends with the guard
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        limit()
        work()
    except Exception as error:
        os.write(complaint, f"{type(error).__name__}: {error}"[:1000].encode(errors="replace"))
        sys.exit(1)
    sys.exit(0)
try:
    # Nothing is ever written to standard input: it can be read from when the process that started this one is gone.
    if select.select([os.pidfd_open(child), 0], [], [])[0] == [0]:
        stop()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
finally:
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            with open("/proc/thread-self/children") as file:
                left = [int(pid) for pid in file.read().split()]
        except OSError:  # a kernel built without
            break
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)
        if not left:
            break
sys.exit(code if code >= 0 else 128 - code)
"""


def read_result(submit_dir: Path, pairs: Sequence[Pair], pairs_path: Path) -> list[Prediction]:
    """The result's rows, checked: every pair once and no other, one embedding an item, one size.

    Embeddings are dropped as soon as they are compared, so that memory grows with items, not with pairs.
    """
    path = submit_dir / "result.jsonl"
    if not (submit_dir / "similarity.py").is_file():
        raise missing(submit_dir / "similarity.py", "no such file; run ./entrypoint.sh predict")
    wanted = Counter((pair.left, pair.right) for pair in pairs)
    embeddings: dict[str, bytes] = {}
    rows = []
    size = 0
    for where, row in read_predictions(path):
        key = (row.left, row.right)
        if key not in wanted:
            raise UserError(f"{where}: {clip(key)} is not a pair of {pairs_path}; predict these pairs")
        if not wanted[key]:
            raise UserError(f"{where}: pair {clip(key)} stands here too often; predict again")
        wanted[key] -= 1
        for item_id, embedding in ((row.left, row.left_embedding), (row.right, row.right_embedding)):
            size = size or len(embedding)
            if len(embedding) != size:
                raise UserError(
                    f"{where}: an embedding of {len(embedding)} numbers among some of {size}; predict again"
                )
            if embeddings.setdefault(item_id, embedding.tobytes()) != embedding.tobytes():
                raise UserError(f"{where}: item {clip(item_id)} has another embedding than before; predict again")
        empty = np.empty(0)
        rows.append(Prediction(row.left, empty, row.right, empty, row.threshold))
    if absent := [key for key, count in wanted.items() if count]:
        raise UserError(f"{path}: {len(absent)} pairs are missing, first {clip(min(absent))}; predict again")
    return rows


def check(submit_dir: Path, pairs_path: Path) -> None:
    """Print that the result keeps the judges' contract, or raise UserError with the first line that does not."""
    pairs = read_pairs(pairs_path, labels="optional")
    rows = read_result(submit_dir, pairs, pairs_path)
    print(f"{submit_dir / 'result.jsonl'}: {len(rows)} rows keep the contract")
    print(f"next: ./entrypoint.sh score --submit {submit_dir} --pairs FILE_WITH_LABELS")


def score(submit_dir: Path, pairs_path: Path) -> float:
    """Print and return the F1 that the judges compute."""
    scores, labels, thresholds = judged(submit_dir, pairs_path)
    quality = quality_at(scores, labels, thresholds)
    print(f"{quality} on {len(scores)} pairs")
    if note := contradiction_note(pairs_path, read_pairs(pairs_path), "delete such lines and predict again"):
        print(note)
    print(f"next: ./entrypoint.sh report --submit {submit_dir} --pairs {pairs_path}")
    return quality.f1


def judged(submit_dir: Path, pairs_path: Path) -> tuple[Scores, Labels, Scores]:
    """(scores, labels, thresholds), (N,) each in the result's order, of a checked result with known answers."""
    pairs = read_pairs(pairs_path)
    rows = read_result(submit_dir, pairs, pairs_path)
    scores = run_similarity(submit_dir, len(rows))
    thresholds = np.array([row.threshold for row in rows], dtype=np.float64)
    labels_by_pair = {(pair.left, pair.right): pair.label for pair in pairs}
    labels = np.array([labels_by_pair[row.left, row.right] for row in rows], dtype=np.int64)
    return scores, labels, thresholds


def run_similarity(submit_dir: Path, count: int) -> Scores:
    """Scores, float64 (count,), by similarity.py in processes of its own, bounded in time and memory.

    Raises UserError when it fails, is not done in time, or gives anything but `count` finite numbers.
    """
    similarity = submit_dir / "similarity.py"
    seconds, size = round(START_SECONDS + SECONDS_A_PAIR * count), (1 << 20) + 32 * count
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,  # no names: what a stranger puts in a file's place would be read here
        tempfile.TemporaryFile() as complaint,
    ):
        files = (out.fileno(), complaint.fileno())
        paths = (similarity.resolve(), (submit_dir / "result.jsonl").resolve())
        command = [sys.executable, "-IB", "-c", RUNNER, *map(str, (*paths, *files, seconds, MEMORY, size))]
        code = run_bounded(command, files, Path(folder), seconds)
        if code is None:
            raise UserError(f"{similarity}: not done after {seconds} s; make compute faster")
        if code:
            complaint.seek(0)
            told = complaint.read(COMPLAINT).decode(errors="replace")
            raise UserError(f"{similarity}: failed with exit code {code} ({clip(told, 120)}); mend it")
        out.seek(0)
        words = out.read(size + 1).split()
    try:
        scores = np.array([float(word) for word in words], dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{similarity}: wrote something else among its scores; mend it") from error
    if len(scores) != count or not np.isfinite(scores).all():
        raise UserError(f"{similarity}: gave {len(scores)} scores for {count} pairs or something not finite; mend it")
    return scores


def run_bounded(command: Sequence[str], files: Sequence[int], folder: Path, seconds: int) -> int | None:
    """The exit code of a guard, None when it is not done in `seconds`. It and what it started have ended then.

    `files` are the descriptors that it may use. Of our environment it sees only what a program needs to start:
    there may be secrets in the rest.
    """
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    nowhere = subprocess.DEVNULL
    reading, held = os.pipe()
    # In a session of its own: what kills ours as a whole must leave the guard to end the stranger's processes.
    guard = subprocess.Popen(
        command,
        stdin=reading,
        stdout=nowhere,
        stderr=nowhere,
        pass_fds=files,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    os.close(reading)
    try:
        return guard.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        guard.terminate()
        try:
            guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        os.close(held)
