"""Errors that end as one line, and the words that such a line is made of."""

import difflib
import errno
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

IMAGE = "TONGKUAN_IMAGE"  # environment: set by the Dockerfile, where folders are there by being mounted
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = re.compile("can't allocate memory|out of memory|ALLOC_FAILED")  # as torch, CUDA and its libraries say it


class ReportedError(Exception):
    """An error whose text is all that the user needs: a line an argument, whatever file names stand in it."""

    def __str__(self) -> str:
        return "\n".join(one_line(str(line)) for line in self.args)


class UserError(ReportedError):
    """Something the user can mend. Its text is one line: file, line, what is wrong, what to do next. Exit code 2."""


class FailureError(ReportedError):
    """Something that went wrong on the way, whoever caused it. Its text is one line, as UserError's. Exit code 1."""


class LostError(FailureError):
    """Another rank has ended and this one cannot go on: what ended that one is the cause."""


def no_room(error: BaseException) -> int:
    """The number of a full disk's error, else 0. Writers in C++ and Rust hide it in their text or behind it."""
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else 0
    named = re.search(r"\(os error (\d+)\)", str(error))
    if named and int(named[1]) in NO_ROOM:
        return int(named[1])
    return no_room(error.__context__) if error.__context__ else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the processor or of a GPU."""
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def unwritable(folder: Path, error: OSError) -> Exception:
    """The error to raise for a folder that refuses files: the user's to mend, unless the disk itself failed."""
    if error.errno not in REFUSALS:
        return error
    reason = os.strerror(error.errno or 0).lower()
    advice = ""
    if IMAGE in os.environ:
        user = os.geteuid()
        advice = (
            f": docker run -v {quote(volume(folder, False))}, DIR writable for UID {user}, or --user with its owner"
        )
    return UserError(f"{folder}: cannot write here ({reason}); mount it writable or name another folder{advice}")


def missing(path: Path, message: str) -> UserError:
    """The error to raise for an input that is not there; in the image it ends in what to mount."""
    advice = f"; mount it: docker run -v {quote(volume(path, bool(path.suffix)))}" if IMAGE in os.environ else ""
    return UserError(f"{path}: {message}{advice}")


def volume(path: Path, is_file: bool) -> str:
    """What `docker run -v` takes so that `path` is there: data, weights, runs and so on below the top, or elsewhere.

    Never the top or a folder above it: docker refuses /, and a mount there would hide the program.
    """
    path, top = Path(os.path.normpath(path.absolute())), Path.cwd()
    folder = path.parent if is_file else path
    if folder != top and folder.is_relative_to(top):
        folder = top / folder.relative_to(top).parts[0]
    if not top.is_relative_to(folder):
        return f"DIR:{folder}"
    return f"FILE:{path}" if is_file else f"DIR:{top / 'NAME'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when something known is close, else nothing. Takes half a second at most."""
    # Comparing two names of n letters takes up to n^3 steps: thousands of long ones are too many to look at.
    count = 200_000_000 // max(len(word), 20) ** 3 if len(word) <= 100 else 0
    candidates = [name for _, name in zip(range(count), known, strict=False)]
    matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def clip(value: object, limit: int = 60) -> str:
    """A user's value for an error line: quoted, on one line, not longer than `limit`, however large or deep it is."""
    if isinstance(value, str | bytes):
        text = repr(value[: limit + 1])
    else:
        short = reprlib.Repr()
        short.maxstring = short.maxother = short.maxlong = limit
        text = short.repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str) -> str:
    """A text without line ends and what else a terminal would obey or not show: those as Python writes them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def entrypoint(*words: object) -> str:
    """A command to type as it stands: `./entrypoint.sh WORDS`, each quoted where the shell would read it otherwise."""
    return " ".join(["./entrypoint.sh", *map(quote, words)])


def pip_install(*words: object) -> str:
    """The command that installs packages into the Python that runs, as `entrypoint` writes one."""
    return " ".join(map(quote, (Path(sys.executable), "-m", "pip", "install", *words)))


def quote(word: object) -> str:
    """A word as the shell takes it. What the terminal cannot show goes by its bytes, as bash's `$'...'` has them."""
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):  # no option
        text = f"./{text}"
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        pass
    else:
        if text.isprintable():
            return shlex.quote(text)
    plain = (chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\{b:03o}" for b in os.fsencode(text))
    return f"$'{''.join(plain)}'"
