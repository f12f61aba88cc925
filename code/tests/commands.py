"""Run verbs as a user does: a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CODE = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{CODE}:{CODE.parent}", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def run_verb(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`./entrypoint.sh WORDS` without the shell script; exit code and what it printed."""
    command = [sys.executable, "-m", "tongkuan", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=timeout, stdin=subprocess.DEVNULL
    )


def ok(done: subprocess.CompletedProcess[str]) -> str:
    """Its output, after it has exited with 0."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@contextmanager
def without_root() -> Iterator[None]:
    """Root may write anywhere; a test of permissions must not be root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield
