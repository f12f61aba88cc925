"""The launcher: one process a rank on this machine, started, watched, stopped and reported as one.

torchrun takes a stop for a failure, and says a page for a line; `docs/cluster.md` compares the two.
"""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from tongkuan.base.errors import UserError
from tongkuan.base.machine import available_cores
from tongkuan.base.terminal import CLOSED_PIPE, say
from tongkuan.ranks.network import is_here, is_taken
from tongkuan.ranks.place import GO_ON, LAUNCHER, LOST, REPORTS, STOPPING, Nodes, seconds_of

LEAVE_SECONDS = 2  # beyond TONGKUAN_STOP_SECONDS, after which ranks that were asked to stop are ended
# By exit code, which is negative where no handler of Python's was there yet.
STOPPED = {code: number for number in STOPPING for code in (128 + number, -number)}


def launch(count: int, arguments: Sequence[str], nodes: Nodes | None = None) -> int:
    """Run `python -m tongkuan ARGUMENTS` on `count` ranks of this machine; the exit code of the whole.

    With `nodes`, they meet those of other hosts. When a rank fails, the others of this machine are ended and stderr
    says why in a line. SIGTERM and SIGINT are passed on to all. UserError when the hosts cannot meet as asked.
    """
    store = serve(nodes)
    shared = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // count)),
        # A container without network cannot look up its own name.
        **({} if nodes else {"GLOO_SOCKET_IFNAME": "lo"}),
        **os.environ,
        "MASTER_ADDR": nodes.address if nodes else "127.0.0.1",
        "MASTER_PORT": str(store.port if store else nodes and nodes.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for: a launcher serves it
        LAUNCHER: str(os.getpid()),
        "WORLD_SIZE": str(count * nodes.count if nodes else count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    with Fleet(first=nodes.rank * count if nodes else 0) as fleet:
        for number in range(count):
            fleet.start(number, [sys.executable, "-m", "tongkuan", *arguments], shared)
        return fleet.watch()


def serve(nodes: Nodes | None) -> TCPStore | None:
    """The store where ranks meet, on the host of the first one; None on the others."""
    if nodes is None:
        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if nodes.rank:
        return None
    where = f"--master {nodes.address}:{nodes.port}"
    if not is_here(nodes.address):
        raise UserError(f"{where}: no address of this host, which is --node-rank 0; name one that the others can reach")
    try:
        return TCPStore("127.0.0.1", nodes.port, is_master=True, wait_for_workers=False)  # listens on all addresses
    except RuntimeError as error:
        if is_taken(error):
            raise UserError(f"{where}: another program listens there; take another port on all hosts") from error
        raise


class Fleet:
    """The ranks as their launcher sees them: processes, and pipes on which they report what ended them."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        """Rank of the first process; they are numbered from 0 here."""
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked = 0
        self._pipes = selectors.DefaultSelector()
        self._leave: float | None = None  # when those that are left are ended
        self._stack = ExitStack()

    def __enter__(self) -> "Fleet":
        for number in STOPPING:
            self._stack.callback(signal.signal, number, signal.signal(number, self._pass_on))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._stack.close()

    def start(self, number: int, command: Sequence[str], shared: dict[str, str]) -> None:
        """Start a rank, in a session of its own: a terminal's Ctrl-C would come twice, from it and from here."""
        reading, writing = os.pipe()
        own = {"RANK": str(self.first + number), "LOCAL_RANK": str(number), REPORTS: str(writing)}
        self._stack.callback(os.close, reading)
        self._pipes.register(reading, selectors.EVENT_READ, number)
        try:
            self.processes.append(
                subprocess.Popen(
                    command, env=shared | own, pass_fds=[writing], stdin=subprocess.DEVNULL, start_new_session=True
                )
            )
        finally:
            os.close(writing)
        if self.asked:
            self.processes[-1].send_signal(self.asked)

    def watch(self) -> int:
        """Wait for all; the exit code of the whole. Says on stderr what ended the first rank that failed.

        That is said of ranks that were asked to stop, too: their last state may not be saved. A rank that only lost
        another one is heard when none has a better word.
        """
        stopped, lost = 0, ""
        while self._pipes.get_map():
            left = None if self._leave is None else max(0.0, self._leave - time.monotonic())
            ready = self._pipes.select(min(1.0, 1.0 if left is None else left))
            for key, _ in ready:
                rank, (code, message) = self.first + key.data, self._end_of(key)
                if code == LOST:
                    lost = lost or message
                    self._let_go()
                elif code in STOPPED:  # as it was asked to, from here or by somebody else
                    stopped = stopped or 128 + (self.asked or STOPPED[code])
                    self._let_go()
                elif code == CLOSED_PIPE:
                    return code
                elif code:
                    say(f"tongkuan: {describe_end(rank, code, message)}")
                    return 2 if code == 2 else 1
            if not ready and left == 0:
                break
        if lost and not stopped:
            say(f"tongkuan: {lost}")
        return stopped or (1 if lost or self._pipes.get_map() else 0)

    def _end_of(self, key: selectors.SelectorKey) -> tuple[int, str]:
        """(exit code, negative for a signal; its message) of a rank that has reported an error or closed its pipe."""
        message = os.read(key.fd, 1 << 16).decode(errors="replace").strip()
        self._pipes.unregister(key.fd)
        if message:  # before it ends, and before others stumble over its end
            code, _, line = message.partition(" ")
            return int(code), line
        return self.processes[key.data].wait(), ""

    def _pass_on(self, number: int, _frame: object) -> None:
        self.asked = number
        for process in self.processes:
            process.send_signal(number)  # does nothing to one that has ended
        self._let_go()

    def _let_go(self) -> None:
        self._leave = self._leave or time.monotonic() + seconds_of("TONGKUAN_STOP_SECONDS") + LEAVE_SECONDS


def describe_end(rank: int, code: int, message: str) -> str:
    """A line on what ended a rank: its message, which has the exit code 2 when it is the user's to mend."""
    if message:
        return message if code == 2 else f"rank {rank}: {message}"
    if code > 0:
        return f"rank {rank} ended with exit code {code} and without a word; {GO_ON}"
    reasons = {
        signal.SIGKILL: " (for want of memory, most likely)",
        signal.SIGABRT: " (by NCCL, most likely: a rank that did not answer in time, or a lost GPU)",
    }
    number = signal.Signals(-code)
    return f"rank {rank} was ended by {number.name}{reasons.get(number, '')}; {GO_ON}"
