"""How a process exits: errors as one line and an exit code, signals. No torch: a wrong option is answered at once."""

import os
import signal
import sys
import traceback
from contextlib import suppress

from tongkuan.base.errors import NO_ROOM, FailureError, LostError, UserError, clip, is_out_of_memory, one_line
from tongkuan.base.terminal import CLOSED_PIPE, close_streams, open_streams, readers_gone, redirect_to_nowhere, say
from tongkuan.cli.verbs import main
from tongkuan.ranks.place import LOST, REPORTS, is_own_rank

SHORTAGE = {
    "train": "lower train.pairs or model.image.size, raise train.accumulate, or set train.checkpoint_activations=true "
    "or train.precision=bf16",
    "predict": "lower --encode-batch, or start fewer ranks with --nproc",
}
SAME_ADVICE = {"demo": "train", "evaluate": "predict", "verify": "predict", "match": "predict"}


def run() -> int:
    """main, with exceptions turned into exit codes: 2 for the user's errors, 1 for all others, 130 and 143 on signals.

    141 when who read the output has gone.
    """
    open_streams()
    signal.signal(signal.SIGTERM, stop)
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error, sys.argv[1] if len(sys.argv) > 1 else "")
    return close_streams(code)


def stop(number: int, _frame: object) -> None:
    """A request to stop (as `docker stop` makes) acts like Ctrl-C: temporary files go, then exit 143."""
    sys.exit(128 + number)


def report_error(error: BaseException, verb: str) -> int:
    """Say what ended a verb, in one line unless it is an internal error; its exit code."""
    if isinstance(error, KeyboardInterrupt):
        if not is_own_rank() or os.environ.get("RANK") == "0":
            say("tongkuan: interrupted; the same command goes on from the last checkpoint")
        return 130
    if isinstance(error, BrokenPipeError) and (gone := readers_gone()):  # as `| head` does when it has seen enough
        redirect_to_nowhere(*gone)
        if is_own_rank():
            os._exit(CLOSED_PIPE)  # exiting in order would wait for the other ranks
        return CLOSED_PIPE
    if isinstance(error, PermissionError):  # of a folder on the way to a file, where nobody looks for it
        reason = f"not to be reached as UID {os.geteuid()} ({str(error.strerror).lower()})"
        error = UserError(f"{error.filename}: {reason}; let this user in, or be another (docker: --user)")
    code = 2 if isinstance(error, UserError) else 1
    line = describe(error, verb)
    if not line:
        with suppress(OSError, ValueError):
            traceback.print_exception(error)
        if not is_own_rank():
            return code
        line = f"{type(error).__name__} {clip(str(error), 200)}; its traceback stands above"
    if is_own_rank():
        report_to_launcher(line, LOST if isinstance(error, LostError) else code)
    say(f"tongkuan: {line}")
    return code


def describe(error: BaseException, verb: str) -> str:
    """An error as a line that says what to do; empty for an internal error."""
    if isinstance(error, UserError | FailureError):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        advice = "files that were there before are whole; make room and run the same command again"
        return one_line(f"{error.filename or 'no more room'}: {error.strerror}; {advice}")
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        advice = "set LC_ALL=C.UTF-8 and run the same command again"
        return f"{clip(error.object)}: no file can have this name where names are written in {error.encoding}; {advice}"
    if is_out_of_memory(error):
        advice = SHORTAGE.get(SAME_ADVICE.get(verb, verb), "give it more, or less to do")
        return one_line(f"out of memory ({clip(str(error), 160)}); {advice}")
    return ""


def report_to_launcher(line: str, code: int) -> None:
    """As one of several ranks, report to the launcher, which prints the first report, and exit."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(int(os.environ[REPORTS]), f"{code} {line}\n".encode(errors="backslashreplace"))
    os._exit(code)  # exiting in order would wait for the other ranks
