"""Ranks: join, shard, gather and stop.

Nothing outside this file and `launch` knows whether there is one rank or sixteen.
"""

import ctypes
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from tongkuan.base.errors import FaultError, LostError, UserError, clip
from tongkuan.base.machine import available_cores
from tongkuan.ranks.place import LAUNCHER, TELL, Place, alone, find_place

T = TypeVar("T")
STOPPING = (signal.SIGTERM, signal.SIGINT)
GO_ON = "the same command goes on from the last checkpoint"
# Seconds, each to be changed by an environment variable of this name.
SECONDS = {
    "TONGKUAN_STUCK_SECONDS": 1800.0,  # of a collective; real-size validation takes minutes, a lost rank for ever
    "TONGKUAN_STOP_SECONDS": 8.0,  # from a request to stop until the step must be saved; `docker stop` waits for 10
}
# How gloo, NCCL and torch's store say that the other end has gone.
LOST_RANK = re.compile(
    r"gloo/transport|onnection (was )?(closed|reset|refused)|Broken pipe|remote process exited|ncclRemoteError"
)


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
    """Join the process group that the environment describes, or be the only rank.

    Raises UserError when the environment describes none that can be, FaultError when its other ranks do not come.
    """
    place = find_place()
    device = choose_device(place)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (cores := available_cores()):
        torch.set_num_threads(cores)  # torch does not see a container's quota
    if place.count == 1:
        yield Ranks(0, 1, device)
        return
    end_with_launcher()
    seconds = seconds_of("TONGKUAN_STUCK_SECONDS")
    store = join(place, device, seconds)
    try:
        yield Ranks(place.rank, place.count, device, PrefixStore("stop", store))
    except RuntimeError as error:
        if "imed out" in str(error) or "timeout" in str(error).lower():
            setting = "TONGKUAN_STUCK_SECONDS"
            raise FaultError(f"another rank did not answer for {seconds:g} s ({setting}); {GO_ON}") from error
        if LOST_RANK.search(str(error)):
            reason = clip(str(error).strip().split("\n")[0], 160)
            raise LostError(f"rank {place.rank} lost another one ({reason}); {GO_ON}") from error
        raise  # the group is left to the process's end: without this rank the others would wait in its closing
    dist.destroy_process_group()


def choose_device(place: Place) -> torch.device:
    """The GPU of this rank, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= (found := torch.cuda.device_count()):
        seen = f"{found} GPUs are to be seen, numbered from 0" if found > 1 else "one GPU is to be seen"
        raise UserError(f"LOCAL_RANK={place.local_rank}: {seen}; start at most {found} ranks here, or {alone()}")
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def join(place: Place, device: torch.device, seconds: float) -> Any:
    """Enter the process group when all its ranks are there; its store. A request to stop is answered while waiting."""
    limit, where = timedelta(seconds=seconds), f"{place.address}:{place.port}"
    is_server = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with ending_at_once():
        try:
            server = TCPStore(place.address, place.port, place.count, is_server, limit, wait_for_workers=False)
            store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
            await_ranks(store, place, time.monotonic() + seconds)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("ranks", store),
                rank=place.rank,
                world_size=place.count,
                timeout=limit,
            )
        except RuntimeError as error:
            reason = clip(str(error).strip().split("\n")[0], 200)
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise UserError(
                    f"{where}: another program listens there; set another MASTER_PORT, or {alone()}"
                ) from error
            kind = LostError if LOST_RANK.search(str(error)) else FaultError
            raise kind(
                f"rank {place.rank} cannot join the others at {where} ({reason}); start them, or {alone()}"
            ) from error
    return store


def await_ranks(store: Any, place: Place, deadline: float) -> None:
    """Return when every rank has come to the store. FaultError that names those that have not at the deadline."""
    store.set(f"here {place.rank}", "")
    absent = [rank for rank in range(place.count) if rank != place.rank]
    while absent := [rank for rank in absent if not store.check([f"here {rank}"])]:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, absent[:10])) + ("…" if len(absent) > 10 else "")
            where = f"{place.address}:{place.port}"
            told = f"rank {names} of WORLD_SIZE={place.count} did not come to {where} in time (TONGKUAN_STUCK_SECONDS)"
            raise FaultError(f"{told}; start them, or {alone()}")
        time.sleep(0.05)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a request to stop end the process while it waits in C++, where no handler of Python's would run."""
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        for number in iter(lambda: os.read(reading, 1), b""):
            if number[0] in STOPPING:
                os.write(2, b"tongkuan: stopped while waiting for the other ranks\n" if TELL not in os.environ else b"")
                os._exit(128 + number[0])

    thread = threading.Thread(target=listen, name="stop while joining", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def end_with_launcher() -> None:
    """Have the kernel end this rank when the launcher is gone, whatever killed it."""
    launcher = int(os.environ.get(LAUNCHER, "0"))
    if launcher:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # gone before
            os._exit(1)


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
