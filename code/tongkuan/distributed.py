"""Ranks: start, stop, shard and gather.

Nothing outside this file knows whether there is one rank or sixteen.
"""

import ctypes
import os
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import TCPStore, rendezvous  # type: ignore[attr-defined]

from tongkuan.errors import FaultError, UserError
from tongkuan.processor import available_cores

T = TypeVar("T")
STOPPING = (signal.SIGTERM, signal.SIGINT)
GO_ON = "the same command goes on from the last checkpoint"
# Seconds, each to be changed by an environment variable of this name.
SECONDS = {
    "TONGKUAN_STUCK_SECONDS": 1800.0,  # of a collective; real-size validation takes minutes, a lost rank for ever
    "TONGKUAN_STOP_SECONDS": 8.0,  # from a request to stop until the step must be saved; `docker stop` waits for 10
}
LEAVE_SECONDS = 2  # more, after which the launcher ends ranks that were asked to stop


def seconds_of(name: str) -> float:
    """One of SECONDS, as the environment has it. UserError when that is no positive number."""
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else SECONDS[name]
        if not 0 < seconds < 1e9:
            raise ValueError
    except ValueError:
        raise UserError(f"{name}={text}: not a positive number of seconds; change it or leave it out") from None
    return seconds


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    count: int
    device: torch.device
    store: Any = None
    """torch's store, where ranks leave each other words without a device taking part; None for an only rank."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Every count-th item from this rank's own; together the ranks hold each item once."""
        return items[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the process group that the launcher's environment describes, or be the only rank."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if count == 1:
        yield Ranks(0, 1, device)
        return
    end_with_launcher()
    seconds = seconds_of("TONGKUAN_STUCK_SECONDS")
    store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        store=PrefixStore("ranks", store),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=seconds),
    )
    try:
        yield Ranks(rank, count, device, PrefixStore("stop", store))
    except RuntimeError as error:
        if "imed out" in str(error) or "timeout" in str(error).lower():
            setting = "TONGKUAN_STUCK_SECONDS"
            raise FaultError(f"another rank did not answer for {seconds:g} s ({setting}); {GO_ON}") from error
        raise  # the group is left to the process's end: without this rank the others would wait in its closing
    dist.destroy_process_group()


def is_launched() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "LOCAL_RANK" in os.environ


# ---------------------------------------------------------------------------------------------------------------------
# Requests to stop


class StopRequests:
    """SIGTERM and SIGINT while steps are taken: every rank stops after the same step; leaving the block then exits.

    A second signal ends at once, and so does the first when its step is not saved within TONGKUAN_STOP_SECONDS. A
    thread sees to that: Python's own handlers wait for the operator that runs, which may be a backward of minutes.
    """

    def __init__(self, fellows: Ranks) -> None:
        self.fellows, self.number, self.seconds = fellows, 0, seconds_of("TONGKUAN_STOP_SECONDS")
        self._last: int | None = None  # the step to stop after
        self._saved = ""
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if self.fellows.store:
            self.fellows.store.set(f"at {self.fellows.rank}", "0")
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            threading.Thread(target=self._listen, args=(reading,), name="stop requests", daemon=True).start()
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writing)
        if self.number and kind is None:
            if self.fellows.is_first:
                print(f"tongkuan: stopped{self._saved}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(128 + self.number)

    def after(self, step: int) -> bool:
        """Whether every rank is to stop after `step` steps, which this one has taken. No device is waited for.

        Hosts run ahead of their devices and of each other, so one rank cannot name a step that all have yet to take.
        Each leaves word how far it is before it looks whether there is a request; who makes the request reads these
        words after it. So a rank that has not seen the request is no further than its word, and sees it one step on.
        """
        store, count = self.fellows.store, self.fellows.count
        if store is None:
            is_last = self.number != 0
        else:
            store.set(f"at {self.fellows.rank}", str(step))
            if not self.number and not store.check(["asked"]):
                return False
            if self._last is None:
                if self.number and store.add("asked", 1) == 1:
                    furthest = max(int(store.get(f"at {rank}")) for rank in range(count))
                    store.set("stop", f"{furthest + 1} {self.number}")
                self._last, number = map(int, store.get("stop").split())
                self.number = self.number or number
            is_last = step == self._last
        if is_last:
            self._saved = f" after step {step}, which is saved"
        return is_last

    def _listen(self, reading: int) -> None:
        """End this process on a second signal, or when the first has not been answered in time."""
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([reading], [], [], left)[0]:
                self._end(f"ended without a checkpoint, as the step was not done within {self.seconds:g} s")
            if not (numbers := os.read(reading, 64)):  # closed
                os.close(reading)
                return
            for number in numbers:
                if number in STOPPING:
                    if deadline is not None:
                        self._end("ended at once")
                    self.number, deadline = number, time.monotonic() + self.seconds

    def _end(self, how: str) -> None:
        if self.fellows.is_first:
            with suppress(Exception):
                sys.stdout.flush()
            os.write(2, f"tongkuan: {how}; {GO_ON}\n".encode())
        os._exit(128 + self.number)


# ---------------------------------------------------------------------------------------------------------------------
# The launcher


def end_with_launcher() -> None:
    """Have the kernel end this rank when the launcher is gone, whatever killed it."""
    launcher = int(os.environ.get("TONGKUAN_LAUNCHER", "0"))
    if launcher:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # gone before
            os._exit(1)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m tongkuan ARGUMENTS` on `count` ranks of this machine; the exit code of the whole.

    When a rank fails, the others are ended and stderr says why in a line. SIGTERM and SIGINT are passed on to all.
    """
    # Not torchrun's engine: on a second signal it leaves its ranks behind.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // count)),
        "GLOO_SOCKET_IFNAME": "lo",  # a container without network cannot look up its own name
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for: the launcher serves it
        "TONGKUAN_LAUNCHER": str(os.getpid()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    with Fleet() as fleet:
        for rank in range(count):
            fleet.start(rank, [sys.executable, "-m", "tongkuan", *arguments], shared)
        return fleet.watch()


class Fleet:
    """The ranks as their launcher sees them: processes, and pipes on which they tell what ended them."""

    def __init__(self) -> None:
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

    def start(self, rank: int, command: Sequence[str], shared: dict[str, str]) -> None:
        """Start a rank, in a session of its own: a terminal's Ctrl-C would come twice, from it and from here."""
        reading, writing = os.pipe()
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TONGKUAN_TELL": str(writing)}
        self._stack.callback(os.close, reading)
        self._pipes.register(reading, selectors.EVENT_READ, rank)
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
        """Wait for all; the exit code of the whole. Says on stderr what ended the first rank that failed."""
        stopped = 0
        while self._pipes.get_map():
            left = None if self._leave is None else max(0.0, self._leave - time.monotonic())
            ready = self._pipes.select(min(1.0, 1.0 if left is None else left))
            for key, _ in ready:
                rank, (code, told) = key.data, self._end_of(key)
                if self.asked and code:
                    stopped = 128 + self.asked
                elif code in (128 + number for number in STOPPING):  # asked itself, by somebody else
                    stopped = stopped or code
                    self._let_go()
                elif code:
                    print(f"tongkuan: {describe_end(rank, code, told)}", file=sys.stderr)
                    return 2 if code == 2 else 1
            if not ready and left == 0:
                return stopped or 1
        return stopped

    def _end_of(self, key: selectors.SelectorKey) -> tuple[int, str]:
        """(exit code, negative for a signal; what it told) of a rank that has told an error or closed its pipe."""
        told = os.read(key.fd, 1 << 16).decode(errors="replace").strip()
        self._pipes.unregister(key.fd)
        if told:  # before it ends, and before others stumble over its end
            code, _, line = told.partition(" ")
            return int(code), line
        return self.processes[key.data].wait(), ""

    def _pass_on(self, number: int, _frame: object) -> None:
        self.asked = number
        for process in self.processes:
            process.send_signal(number)  # does nothing to one that has ended
        self._let_go()

    def _let_go(self) -> None:
        self._leave = self._leave or time.monotonic() + seconds_of("TONGKUAN_STOP_SECONDS") + LEAVE_SECONDS


def describe_end(rank: int, code: int, told: str) -> str:
    """A line on what ended a rank: what it told, which has the exit code 2 when it is the user's to mend."""
    if told:
        return told if code == 2 else f"rank {rank}: {told}"
    if code > 0:
        return f"rank {rank} ended with exit code {code} and without a word; {GO_ON}"
    reasons = {
        signal.SIGKILL: " (for want of memory, most likely)",
        signal.SIGABRT: " (by NCCL, most likely: a rank that did not answer in time, or a lost GPU)",
    }
    number = signal.Signals(-code)
    return f"rank {rank} was ended by {number.name}{reasons.get(number, '')}; {GO_ON}"
