"""Run a stranger's similarity.py in a fork that the kernel and Python keep from everything but computing.

`guard.py` runs this file by path with `python -IB`: it imports the standard library alone, and nothing of ours.

The fork has limits of time and memory. Where the kernel has Landlock, it reads the folders and files of `rules` alone,
writes and starts nothing, and sends no signals; a filter of system calls keeps it from sockets, from other processes'
memory and from changing modes. No process outlives the guard: orphans come to it, whatever session they hide in, and it
ends when its parent does. Scores go into a file that was opened before; what the stranger prints goes nowhere.

An audit hook refuses the same in Python itself, also where the kernel has no Landlock, and notes what was tried. Hooks
can be evaded (by ctypes, by a system call of one's own): notes may lack such a deed; the kernel's rules hold even then.
"""

import contextlib
import ctypes
import errno
import importlib.util
import json
import mmap
import os
import platform
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_NOTES = 100
# Landlock's rights, of <linux/landlock.h>.
WRITE_FILE, READ_FILE, READ_DIR = 2, 4, 8
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same numbers on all processors
REFUSE = 0x00050000  # SECCOMP_RET_ERRNO, to be joined with the error's number

SYSTEM = ctypes.CDLL(None, use_errno=True)

# What a machine calls itself: the kernel's AUDIT_ARCH, the number of seccomp, the numbers of calls that are refused.
FILTERED: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        317,
        (
            # socket, connect, bind, listen, ptrace, process_vm_readv and writev, pidfd_getfd, kcmp
            *(41, 42, 49, 50, 101, 310, 311, 438, 312),
            # io_uring_setup, open_by_handle_at, bpf, perf_event_open, userfaultfd, fanotify_init
            *(425, 304, 321, 298, 323, 300),
            # mount, umount2, pivot_root, chroot, unshare, setns, open_tree, move_mount, fsopen, fsmount, mount_setattr
            *(165, 166, 155, 161, 272, 308, 428, 429, 430, 432, 442),
            # fchmod, fchmodat, fchmodat2, fchown, fchownat; chmod, chown, lchown
            *(91, 268, 452, 93, 260, 90, 92, 94),
            # utimensat, set-, lset-, fset-, remove-, lremove-, fremovexattr; utime, utimes, futimesat
            *(280, 188, 189, 190, 197, 198, 199, 132, 235, 261),
            # add_key, request_key, keyctl, shmget, shmat, msgget, semget
            *(248, 249, 250, 29, 30, 68, 64),
        ),
    ),
    "aarch64": (  # the same, less those that stand last in their line above, which it never had
        0xC00000B7,
        277,
        (
            *(198, 203, 200, 201, 117, 270, 271, 438, 272),
            *(425, 265, 280, 241, 282, 262),
            *(40, 39, 41, 51, 97, 268, 428, 429, 430, 432, 442),
            *(52, 53, 452, 55, 54),
            *(88, 5, 6, 7, 14, 15, 16),
            *(217, 218, 219, 194, 196, 186, 190),
        ),
    ),
}

# Audit events: what they are called in a note, and where among their arguments a path stands.
READS = {"os.listdir": "list", "os.scandir": "list"}
CHANGES = {
    **{f"os.{name}": "delete" for name in ("remove", "rmdir")},
    **{f"os.{name}": "change" for name in ("chmod", "chown", "utime", "truncate", "setxattr", "removexattr")},
    **{f"os.{name}": "make" for name in ("mkdir", "link", "symlink")},
    "os.rename": "rename",
}
NETWORK = ("socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
CALLS = {"open", "openat", "fopen", "opendir", "socket", "connect", "syscall", "system", "popen", "execve"}
CALLS |= {"kill", "ptrace", "process_vm_readv", "process_vm_writev", "open64", "fopen64", "openat64"}


# ---------------------------------------------------------------------------------------------------------------------
# The kernel's rules


def landlock_version() -> int:
    """The kernel's version of Landlock, 0 where it has none or may not be asked."""
    return max(0, int(SYSTEM.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def can_filter() -> bool:
    """Whether system calls can be filtered here: a known processor, and a kernel that can refuse with an error."""
    if platform.machine() not in FILTERED or struct.calcsize("P") != 8:
        return False
    refusal = ctypes.c_uint32(REFUSE)
    return bool(SYSTEM.syscall(FILTERED[platform.machine()][1], 2, 0, ctypes.byref(refusal)) == 0)


def check(code: int, what: str) -> int:
    if code < 0:
        raise OSError(ctypes.get_errno(), f"the guard cannot {what}")
    return code


def prctl(option: int, value: int, address: int = 0) -> int:
    return int(SYSTEM.prctl(option, *map(ctypes.c_ulong, (value, address, 0, 0))))


def restrict(version: int, readable: Sequence[str], listable: Sequence[str]) -> None:
    """Landlock: `readable` files and folders may be read, `listable` folders listed, and nothing else be touched."""
    files = 0x1FFF | (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0) | (0x8000 if version >= 5 else 0)
    rules = struct.pack("QQQ", files, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = check(SYSTEM.syscall(CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0), "make rules")
    rights = [*((path, READ_FILE | READ_DIR) for path in readable), *((path, READ_DIR) for path in listable)]
    for path, right in [*rights, (os.devnull, READ_FILE | WRITE_FILE)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not there any more
            continue
        rule = struct.pack("=Qi", right if Path(path).is_dir() else right & ~READ_DIR, place)
        check(SYSTEM.syscall(ADD_RULE, ruleset, 1, rule, 0), f"add a rule for {path}")
        os.close(place)
    check(prctl(38, 1), "give up privileges")  # PR_SET_NO_NEW_PRIVS
    check(SYSTEM.syscall(RESTRICT_SELF, ruleset, 0), "restrict itself")
    os.close(ruleset)


def filter_calls() -> None:
    """Seccomp: what FILTERED names fails with EPERM, as do the calls of other architectures (i386, x32)."""
    architecture, _, numbers = FILTERED[platform.machine()]
    refuse = (0x06, 0, 0, REFUSE | errno.EPERM)
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), refuse, (0x20, 0, 0, 0)]  # load arch; as it; load number
    steps += [(0x35, 0, 1, 0x40000000), refuse]  # x32, whose numbers have this bit
    for number in numbers:
        steps += [(0x15, 0, 1, number), refuse]
    steps.append((0x06, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    check(prctl(38, 1), "give up privileges")
    check(prctl(22, 2, ctypes.addressof(header)), "filter system calls")  # PR_SET_SECCOMP


# ---------------------------------------------------------------------------------------------------------------------
# Python's own rules, and what was tried


def is_below(name: str, places: Sequence[str]) -> bool:
    return any(name == place or name.startswith(place + os.sep) for place in places)


class Watch:
    """An audit hook: refuses with PermissionError what the kernel's rules refuse, and writes a note of each kind."""

    def __init__(self, notes: int, readable: Sequence[str], listable: Sequence[str]) -> None:
        self.notes, self.noted = notes, set[str]()
        self.readable = [os.path.realpath(path) for path in readable]
        self.listable = [os.path.realpath(path) for path in listable]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            self.open(path, int(flags or 0))
        elif event in READS:
            self.path(READS[event], arguments[0] if arguments[0] is not None else ".", self.may_list)
        elif event in CHANGES:
            self.path(CHANGES[event], arguments[0], lambda _: False)
        elif event in NETWORK:
            self.refuse("open a socket")
        elif event in PROGRAMS:
            self.refuse("start another program")
        elif event == "ctypes.dlsym" and arguments[1] in CALLS:
            self.note(f"call {arguments[1]} of the C library")
        elif event in ("os.kill", "os.killpg") and arguments[0] != os.getpid():
            self.note("send a signal to another process")

    def open(self, path: object, flags: int) -> None:
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if changes:
            self.path("write", path, lambda name: name == os.devnull)
        else:
            self.path("open", path, lambda name: self.may_read(name) or self.may_list(name))

    def may_read(self, name: str) -> bool:
        return is_below(name, self.readable)

    def may_list(self, name: str) -> bool:
        return self.may_read(name) or (is_below(name, self.listable) and Path(name).is_dir())

    def path(self, verb: str, path: object, is_allowed: Callable[[str], bool]) -> None:
        """Refuse a deed on a path, unless it is allowed or reads what is not there."""
        if not isinstance(path, str | bytes | os.PathLike):  # a descriptor: what it is open on was asked before
            return
        shown = Path(os.path.normpath(Path(os.fsdecode(path)).absolute()))
        name = str(shown)
        with contextlib.suppress(OSError):  # a link of another's that may not be read
            name = os.path.realpath(os.fsdecode(path))
        if is_allowed(name):
            return
        if verb == "write":  # names of temporary files are never the same
            verb, shown = "write in", shown.parent
        if shown.parts[:2] == ("/", "proc"):  # nor are numbers of processes
            shown = Path(*("*" if step.isdigit() else step for step in shown.parts))
        deed = f"{verb} {str(shown)!r:.120}"
        if verb not in ("open", "list") or os.path.lexists(name):
            self.refuse(deed)
        elif not is_below(name, self.listable):  # modules are looked for in their own folder all the time
            self.note(f"{deed} (not there)")

    def refuse(self, deed: str) -> None:
        self.note(f"{deed} (denied)")
        raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)}: a similarity.py may not {deed}")

    def note(self, deed: str) -> None:
        if deed in self.noted or len(self.noted) >= MAX_NOTES:
            return
        self.noted.add(deed)
        with contextlib.suppress(OSError):
            os.write(self.notes, f"{json.dumps(deed)}\n".encode())


# ---------------------------------------------------------------------------------------------------------------------
# The fork


def limit(seconds: int, memory: int, size: int) -> None:
    bounds = {
        resource.RLIMIT_DATA: memory,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds * (os.cpu_count() or 1) + 1,  # ends what is left after a killed guard, too
    }
    for what, bound in bounds.items():
        hard = resource.getrlimit(what)[1]
        soft = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (soft, soft))


def work(similarity: str, rows: int, scores: int) -> None:
    """Write a score a row, by the stranger's `compute`."""
    spec = importlib.util.spec_from_file_location("similarity", similarity)
    if spec is None or spec.loader is None:
        raise ImportError(similarity)
    module = sys.modules["similarity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Not read by the descriptor, whose place in the file processes share: each has all rows; too many scores show it.
    with mmap.mmap(rows, 0, access=mmap.ACCESS_READ) as content, open(scores, "w", encoding="utf-8") as out:
        lines = (line.decode("utf-8-sig") for line in iter(content.readline, b""))
        for row in map(json.loads, filter(str.strip, lines)):
            score = module.compute(json.loads(row["src_item_emb"]), json.loads(row["tgt_item_emb"]))
            out.write(f"{float(score)!r}\n")


def stop(*_: object) -> None:
    sys.exit(1)


def end_all() -> None:
    """Kill every process below this one, and those that come to it meanwhile."""
    while True:
        try:
            left = [int(pid) for pid in Path("/proc/thread-self/children").read_text(encoding="ascii").split()]
        except OSError:  # a kernel built without
            return
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)
        if not left:
            return


def main(similarity: str, numbers: Sequence[int]) -> int:
    """The stranger's exit code. Numbers: descriptors of five files; seconds; bytes of memory and of a file."""
    rows, scores, failure, notes, rules_file, seconds, memory, size = numbers
    with open(rules_file, encoding="utf-8") as file:
        rules = json.load(file)
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans below this process come to it
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    signal.alarm(seconds + 1)  # for when nobody is left to send the other
    child = os.fork()
    if not child:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the guard
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            limit(seconds, memory, size)
            readable, listable = [*rules["places"], *rules["files"]], rules["listable"]
            watch = Watch(notes, readable, listable)
            # Its own folder first, as a program's is, and no folder that an installation elsewhere has added.
            sys.path[:] = [*listable, *(path for path in sys.path if watch.may_read(os.path.realpath(path)))]
            if rules["landlock"]:
                restrict(rules["landlock"], readable, listable)
            if rules["filter"]:
                filter_calls()
            sys.addaudithook(watch)
            work(similarity, rows, scores)
        except Exception as error:
            os.write(failure, f"{type(error).__name__}: {error}"[:1000].encode(errors="replace"))
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
        end_all()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [int(word) for word in sys.argv[2:]]))
