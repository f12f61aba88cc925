"""Standard input, output and error as shells hand them over: closed, not in UTF-8, or with a reader that goes."""

import io
import os
import select
import sys
from contextlib import suppress

CLOSED_PIPE = 141  # exit code, as shells have it for a program that SIGPIPE ended
OUTPUT, ERROR = 1, 2  # descriptors


def open_streams() -> None:
    """Let a process print whatever it is started with.

    What is closed leads nowhere: the first file that is opened would take its number, and be printed into. What the
    terminal's encoding lacks is printed with backslashes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free: this one
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams(code: int) -> int:
    """Print what is still held; the exit code of a process that would end with `code`.

    Python does so at its end, too, and then complains of a reader that has gone.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or CLOSED_PIPE
        except OSError as error:  # a full disk
            say(f"tongkuan: what was printed is not whole: {error.strerror}; print it elsewhere")
            code = code or 1
        else:
            continue
        redirect_to_nowhere(OUTPUT if stream is sys.stdout else ERROR)
    return code


def say(line: str) -> None:
    """A line on standard error, if anybody reads it."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def readers_gone() -> list[int]:
    """Which of standard output and error nobody reads any more."""
    poll = select.poll()
    for number in (OUTPUT, ERROR):
        poll.register(number, 0)  # hang-ups are reported unasked
    return [number for number, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]


def redirect_to_nowhere(*numbers: int) -> None:
    """What goes to these descriptors from now on is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)
