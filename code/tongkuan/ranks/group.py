"""Ranks: join, shard, gather and stop.

Nothing outside this file and `launch` knows whether there is one rank or sixteen.
"""

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from tongkuan.base.errors import FailureError, LostError, UserError, clip, is_out_of_memory
from tongkuan.base.machine import available_cores
from tongkuan.ranks.arithmetic import set_arithmetic
from tongkuan.ranks.network import await_listener, interface_to, is_here, is_taken
from tongkuan.ranks.packing import Packer, Unpacker, empty, layout
from tongkuan.ranks.place import (
    GO_ON,
    LAUNCH_NODE,
    LAUNCHER,
    REPORTS,
    SRUN,
    STOPPING,
    TORCHRUN,
    Place,
    alone,
    find_place,
    is_own_rank,
    seconds_of,
)

T = TypeVar("T")
# How gloo, NCCL and torch's store say that the other end has gone.
LOST_RANK = re.compile(
    r"gloo/transport|onnection (was )?(closed|reset|refused)|Broken pipe|remote process exited|ncclRemoteError"
)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its ranks."""

    rank: int
    world_size: int
    device: torch.device
    store: Any = None
    """torch's store, where ranks leave each other words without a device taking part; None for an only rank."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Every item whose place is this rank modulo the world size; together the ranks hold each item once."""
        return items[self.rank :: self.world_size]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; a UserError that it raises there is raised on every rank.

        Tensors in it arrive on the rank's device, one after the other: a pickle of all would take their memory again.
        """
        if self.world_size == 1:
            return make()
        sent: list[Any] = [None, None]  # the value less its tensors, an error
        tensors: list[torch.Tensor] = []
        if self.is_first:
            try:
                packed = Packer(made := make())
                sent[0], tensors = packed.data, packed.tensors
            except UserError as error:
                sent[1] = error
        dist.broadcast_object_list(sent, device=self.device)
        if sent[1] is not None:
            raise sent[1]
        if self.is_first:
            for tensor in tensors:
                self._broadcast(empty(*layout(tensor), self.device).copy_(tensor))
            return made
        unpacked = Unpacker(sent[0], self.device)
        received: T = unpacked.load()
        for tensor in unpacked.tensors:
            self._broadcast(tensor)
        return received

    def _broadcast(self, tensor: torch.Tensor) -> None:
        """Fill a dense tensor of this rank's device with rank 0's, as bytes: not every backend has every type."""
        if tensor.numel():
            dist.broadcast(tensor.as_strided([tensor.numel()], [1]).view(torch.uint8), 0)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the process group that the environment describes, or be the only rank.

    Raises UserError when the environment describes none that can be, FailureError when its other ranks do not come.
    """
    place = find_place()
    set_arithmetic()
    device = choose_device(place)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (cores := available_cores()):
        torch.set_num_threads(cores)  # torch does not see a container's quota
    if place.world_size == 1:
        yield Ranks(0, 1, device)
        return
    end_with_launcher()
    seconds = seconds_of("TONGKUAN_STUCK_SECONDS")
    store = join(place, device, seconds)
    try:
        yield Ranks(place.rank, place.world_size, device, PrefixStore("stop", store))
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError):  # "the launch timed out" is no word of another rank
            raise
        if "imed out" in str(error) or "timeout" in str(error).lower():
            setting = "TONGKUAN_STUCK_SECONDS"
            raise FailureError(f"another rank did not answer for {seconds:g} s ({setting}); {GO_ON}") from error
        if LOST_RANK.search(str(error)):
            reason = clip(str(error).strip().split("\n")[0], 160)
            raise LostError(f"rank {place.rank} lost another one ({reason}); {GO_ON}") from error
        raise  # the group is left to the process's end: without this rank the others would wait in its closing
    dist.destroy_process_group()


def choose_device(place: Place) -> torch.device:
    """The GPU of this rank, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    found, name, number = torch.cuda.device_count(), place.launcher.local_rank, place.local_rank
    if place.world_size > 1 and found > 1 and not place.has_launcher:
        raise UserError(
            f"{name} is not set and {found} GPUs are to be seen: set it to the one of this rank, or start a rank a GPU "
            f"with torchrun, or {alone()}"
        )
    if found == 1 and place.launcher is not TORCHRUN:
        number = 0  # Slurm and Open MPI can give each rank a GPU of its own, as if there were no other
    if number >= found:
        seen = f"{found} GPUs are to be seen, numbered from 0" if found > 1 else "one GPU is to be seen"
        raise UserError(f"{name}={number}: {seen}; start at most {found} ranks here, or {alone()}")
    device = torch.device("cuda", number)
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = clip(str(error).strip().split("\n")[0], 160)
        raise UserError(
            f"GPU {number} cannot be used ({reason}); nvidia-smi shows its state and who holds it: free it, or name "
            "others, or none, in CUDA_VISIBLE_DEVICES"
        ) from error
    return device


def join(place: Place, device: torch.device, seconds: float) -> Any:
    """Enter the process group when all its ranks are there; its store. A request to stop is answered while waiting."""
    limit, where, deadline = timedelta(seconds=seconds), f"{place.address}:{place.port}", time.monotonic() + seconds
    is_server = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if place.rank == 0:
        check_launch_node(place)
    if name := interface_to(place.address, place.port):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    with exiting_at_once():
        try:
            if not is_server and (reason := await_listener(place.address, place.port, deadline)):
                raise RuntimeError(reason)
            server = TCPStore(place.address, place.port, place.world_size, is_server, limit, wait_for_workers=False)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"job {place.job} attempt {attempt}", server)
            await_ranks(store, place, deadline)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("ranks", store),
                rank=place.rank,
                world_size=place.world_size,
                timeout=limit,
                device_id=device if device.type == "cuda" else None,  # a GPU that is lost shows here, not in a step
            )
        except RuntimeError as error:
            reason = clip(str(error).strip().split("\n")[0], 200)
            if is_taken(error):
                raise UserError(
                    f"{where}: another program listens there; set another MASTER_PORT, or {alone()}"
                ) from error
            kind = LostError if LOST_RANK.search(str(error)) else FailureError
            raise kind(
                f"rank {place.rank} cannot join the others at {where} ({reason}); start them, or {alone()}"
            ) from error
    return store


def check_launch_node(place: Place) -> None:
    """UserError when srun was called on another node than that of rank 0, and so has not told where ranks can meet."""
    is_told = place.launcher.rank == SRUN.rank and not os.environ.get("MASTER_ADDR")
    if is_told and not is_here(place.address):
        raise UserError(
            f"{LAUNCH_NODE}={place.address} is not the node of rank 0: srun was called elsewhere; "
            "set MASTER_ADDR to that node's name, or call srun in a job of sbatch"
        )


def await_ranks(store: Any, place: Place, deadline: float) -> None:
    """Return when every rank has come to the store. FailureError that names those that have not at the deadline.

    UserError when two came as one rank, or one with another number of ranks: they were started apart from each other.
    """
    size, where = place.launcher.world_size, f"{place.address}:{place.port}"
    if store.add(f"came {place.rank}", 1) > 1:
        told = f"two processes have {place.launcher.rank}={place.rank}; number them apart"
        if is_own_rank():
            told = "give each host a --node-rank of its own, and all the same --nproc"
        raise UserError(f"rank {place.rank} is at {where} already: {told}, or {alone()}")
    store.set(f"here {place.rank}", str(place.world_size))
    absent = [rank for rank in range(place.world_size) if rank != place.rank]
    while absent := [rank for rank in absent if not store.check([f"here {rank}"])]:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, absent[:10])) + ("…" if len(absent) > 10 else "")
            raise FailureError(
                f"rank {names} of {size}={place.world_size} did not come to {where} in time "
                f"(TONGKUAN_STUCK_SECONDS); start them, or {alone()}"
            )
        time.sleep(0.05)
    counts = (int(store.get(f"here {rank}")) for rank in range(place.world_size))
    if odd := next((count for count in counts if count != place.world_size), None):
        alike = "give all hosts the same --nnodes and --nproc" if is_own_rank() else f"set {size} alike"
        raise UserError(f"{where}: ranks of {place.world_size} and of {odd} meet here; {alike}, or {alone()}")


@contextmanager
def exiting_at_once() -> Iterator[None]:
    """Let a request to stop end the process while it waits in C++, where no handler of Python's would run."""
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        for number in iter(lambda: os.read(reading, 1), b""):
            if number[0] in STOPPING:
                if REPORTS not in os.environ:
                    os.write(2, b"tongkuan: stopped while waiting for the other ranks\n")
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
