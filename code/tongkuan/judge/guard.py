"""Score a result by its similarity.py, a stranger's code, in processes that are kept from the answers.

`guard_process.py` says what the kernel and Python keep it from. Here stand what it may read, its bounds, and its end.
"""

import itertools
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from tongkuan.base.errors import UserError, clip, missing
from tongkuan.base.files import sha256_of
from tongkuan.base.metrics import Scores
from tongkuan.judge import guard_process

SECONDS_A_PAIR = 0.05
START_SECONDS = 60
STOP_SECONDS = 10  # that ending all of a stranger's processes may take
MEMORY = 4 << 30  # bytes a process of the stranger's
ERROR_BYTES = 4096  # bytes of the stranger's error that are looked at
NOTES = 1 << 16  # bytes of notes on what was tried
SHOWN_NOTES = 8
MAX_FILES = 1000  # of its folder that it may read
HEAD = 1 << 16  # bytes of a file in which a label shows

# Beside Python's own folders: shared libraries, time zones, languages, and devices that hold nothing.
SYSTEM = (
    *("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime"),
    *("/usr/share/zoneinfo", "/usr/share/locale", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)
PLOTS = (".html", ".svg", ".png", ".part")  # what `report` and `plot` make of labels, half-written too


def run_similarity(submit_dir: Path, count: int, answers: Path) -> tuple[Scores, list[str]]:
    """(scores float64 (count,), lines on what it tried and what this kernel cannot keep it from).

    It runs bounded in time and memory, and may read its own folder, but no answers in it, and Python. Raises UserError
    when it fails, is not done in time, or gives anything but `count` finite numbers.
    """
    similarity, result = submit_dir / "similarity.py", submit_dir / "result.jsonl"
    seconds, size = round(START_SECONDS + SECONDS_A_PAIR * count), (1 << 20) + 32 * count
    landlock, is_filtered = guard_process.landlock_version(), guard_process.can_filter()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        opened(result) as rows,
        tempfile.TemporaryFile() as out,  # no names: what a stranger puts in a file's place would be read here
        tempfile.TemporaryFile() as failure,
        tempfile.TemporaryFile() as tried,
        tempfile.TemporaryFile() as rules,
    ):
        # By descriptor, as the rows: a stranger must not learn where the answers lie from the command line.
        allowed = readable(submit_dir, answers, Path(folder))
        rules.write(json.dumps({**allowed, "landlock": landlock, "filter": is_filtered}).encode())
        rules.seek(0)
        files = [file.fileno() for file in (rows, out, failure, tried, rules)]
        command = [sys.executable, "-IB", guard_process.__file__, str(similarity.resolve())]
        code = run_bounded([*command, *map(str, (*files, seconds, MEMORY, size))], files, Path(folder), seconds)
        notes = describe(tried, landlock, is_filtered)
        if len(allowed["files"]) > MAX_FILES:
            notes.append(f"{submit_dir}: similarity.py could read {MAX_FILES:,} of the files here, not more")
        if code is None:
            raise UserError(f"{similarity}: not done after {seconds} s; make compute faster")
        if code:
            failure.seek(0)
            message = failure.read(ERROR_BYTES).decode(errors="replace")
            raise UserError(f"{similarity}: failed with exit code {code} ({clip(message, 120)}); mend it")
        out.seek(0)
        words = out.read(size + 1).split()
    try:
        scores = np.array([float(word) for word in words], dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{similarity}: wrote something else among its scores; mend it") from error
    if len(scores) != count or not np.isfinite(scores).all():
        raise UserError(f"{similarity}: gave {len(scores)} scores for {count} pairs or something not finite; mend it")
    return scores, notes


def opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise missing(path, "no such file; run ./entrypoint.sh predict") from error


# ---------------------------------------------------------------------------------------------------------------------
# What may be read


def readable(submit_dir: Path, answers: Path, folder: Path) -> dict[str, list[str]]:
    """The rules of guard_process.py: places that are read with all in them, files, and its folder, to be listed."""
    own, hidden = submit_dir.resolve(), answers.resolve()
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    places = [*SYSTEM, *(str(Path(prefix, name)) for prefix in sorted(prefixes) for name in ("lib", "lib64"))]
    for place in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        # Libraries may lie anywhere; a folder that is about more than libraries is not taken for one.
        if Path(place).is_absolute() and not any(path.is_relative_to(Path(place).resolve()) for path in (own, hidden)):
            places.append(place)
    found = [part for place in dict.fromkeys(places) for part in around(Path(place), hidden)]
    files = list(map(str, itertools.islice(own_files(own, hidden), MAX_FILES)))
    similarity = str((submit_dir / "similarity.py").resolve())
    return {"places": [*found, str(folder)], "files": [similarity, *files], "listable": [str(own)]}


def around(place: Path, hidden: Path) -> Iterator[str]:
    """A place, or all that is in it but the hidden file and the folders on the way there."""
    if not hidden.is_relative_to(place.resolve()):
        yield str(place)
    elif place.resolve() != hidden:
        for part in sorted(place.resolve().iterdir()):
            if not part.is_symlink():
                yield from around(part, hidden)


def own_files(own: Path, hidden: Path) -> Iterator[Path]:
    """Files in a similarity.py's folder and below, modules first, but no links and none that holds labels."""
    for place, folders, names in os.walk(own):
        folders.sort()
        for name in sorted(names, key=lambda name: (not name.endswith(".py"), name)):
            path = Path(place, name)
            with suppress(OSError):
                if stat.S_ISREG(path.lstat().st_mode) and not holds_labels(path, hidden):
                    yield path


def holds_labels(path: Path, hidden: Path) -> bool:
    """Whether a file is the answers, under this name or another, or was made of labels."""
    if path.suffix in PLOTS:
        return True
    if hidden.is_file():  # and no pipe, which has been read
        facts, others = path.stat(), hidden.stat()
        if os.path.samestat(facts, others):
            return True
        if facts.st_size == others.st_size and sha256_of(path) == sha256_of(hidden):
            return True
    with path.open("rb") as file:
        return path.suffix != ".py" and b"item_label" in file.read(HEAD)


# ---------------------------------------------------------------------------------------------------------------------
# What is said of it


def describe(tried: IO[bytes], landlock: int, is_filtered: bool) -> list[str]:
    """Lines for the user: deeds that were tried, and what this kernel does not keep a similarity.py from.

    The stranger could have written to this file, too: nothing in it is more than a text to show.
    """
    tried.seek(0)
    deeds = []
    for line in tried.read(NOTES).decode(errors="replace").splitlines():
        with suppress(ValueError):
            deed = json.loads(line)
            if isinstance(deed, str):
                deeds.append(clip(deed, 160)[1:-1])
    notes = []
    if deeds := list(dict.fromkeys(deeds)):
        more = f", and {len(deeds) - SHOWN_NOTES} more" if len(deeds) > SHOWN_NOTES else ""
        notes.append(f"similarity.py tried to {', to '.join(deeds[:SHOWN_NOTES])}{more}")
    if not landlock:
        notes.append(
            "this kernel cannot keep similarity.py from reading files, so it may have seen the answers: Landlock is "
            "missing (Linux before 5.13) or forbidden here"
        )
    lacking = [
        what
        for what, is_there in (
            ("sockets", is_filtered),
            ("signals to other processes", landlock >= 6),
        )
        if not is_there
    ]
    if landlock and lacking:
        notes.append(f"this kernel does not keep similarity.py from {' and '.join(lacking)}")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Its bounds and its end


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
