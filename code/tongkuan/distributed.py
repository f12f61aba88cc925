"""Ranks: start, stop, shard and gather; and the launch of several ranks through torchrun's own engine.

Nothing outside this file knows whether there is one rank or sixteen.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tongkuan.processor import available_cores

T = TypeVar("T")
STUCK_AFTER = timedelta(minutes=30)  # of a collective; real-size validation takes minutes, a lost rank for ever


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    count: int
    device: torch.device

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
    """Join the process group that torchrun's environment describes, or be the only rank."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if count == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=STUCK_AFTER)
    try:
        yield Ranks(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "LOCAL_RANK" in os.environ


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m tongkuan ARGUMENTS` on `count` ranks of this machine; the first failed rank's exit code, or 0.

    This is torchrun called from Python: its command line would swallow options of ours that look like its own.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failed rank has said in one line what is wrong; the launcher's own banner would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // count)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a container without network cannot look up its own name
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="tongkuan",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tongkuan", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
