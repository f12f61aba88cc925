"""Requests to stop: SIGTERM and SIGINT, answered by all ranks after the same step, or at once while they wait."""

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from tongkuan.ranks.group import Ranks
from tongkuan.ranks.place import GO_ON, STOPPING, seconds_of


class StopRequests:
    """SIGTERM and SIGINT while steps are taken: every rank stops after the same step; leaving the block then exits.

    A second signal ends at once, and so does the first when its step is not saved within TONGKUAN_STOP_SECONDS. A
    thread sees to that: Python's own handlers wait for the operator that runs, which may be a backward of minutes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.number, self.seconds = ranks, 0, seconds_of("TONGKUAN_STOP_SECONDS")
        self._last: int | None = None  # the step to stop after
        self._saved = ""
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if self.ranks.store:
            self.ranks.store.set(f"at {self.ranks.rank}", "0")
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
            if self.ranks.is_first:
                print(f"tongkuan: stopped{self._saved}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(128 + self.number)

    def after(self, step: int) -> bool:
        """Whether every rank is to stop after `step` steps, which this one has taken. No device is waited for.

        Hosts run ahead of their devices and of each other, so one rank cannot name a step that all have yet to take.
        Each leaves word how far it is before it looks whether there is a request; who makes the request reads these
        words after it. So a rank that has not seen the request is no further than its word, and sees it one step on.
        """
        store, world_size = self.ranks.store, self.ranks.world_size
        if store is None:
            is_last = self.number != 0
        else:
            store.set(f"at {self.ranks.rank}", str(step))
            if not self.number and not store.check(["asked"]):
                return False
            if self._last is None:
                if self.number and store.add("asked", 1) == 1:
                    furthest = max(int(store.get(f"at {rank}")) for rank in range(world_size))
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
        if self.ranks.is_first:
            with suppress(Exception):
                sys.stdout.flush()
            os.write(2, f"tongkuan: {how}; {GO_ON}\n".encode())
        os._exit(128 + self.number)
