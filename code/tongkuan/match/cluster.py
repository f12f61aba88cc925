"""The nodes of a Ray cluster as the machines that `match run` works on. `match run --ray HOST:PORT`

Ray only schedules. Inputs travel through its object store, results come back the same way, and this process publishes
them: the partitions' files are the record, and no folder is shared. A task takes the cores of the smallest node, so
that a node that dies takes one partition with it, which Ray has done again by another.
"""

import importlib
import logging
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from tongkuan.base.errors import FailureError, UserError, clip, pip_install
from tongkuan.base.terminal import say
from tongkuan.encode.inference import Inference
from tongkuan.encode.store import ItemStore
from tongkuan.match.machines import Done, EncodedPart, Job, Part
from tongkuan.match.ship import Encoder, Shipment

RETRIES = 5  # of a partition that is lost with its node
CONNECT_SECONDS = 5
WAIT_SECONDS = 30  # for a result, until it is worth while to ask whether there is a node at all


@contextmanager
def connect(address: str) -> Iterator["Cluster"]:
    """Join the cluster at HOST:PORT, of which this machine is a node. UserError when that cannot be."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        install = pip_install("--no-deps", "--require-hashes", "-r", "code/cluster.lock")
        raise UserError(f"--ray: Ray is not installed: {install}") from None
    before = signal.getsignal(signal.SIGTERM)
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself would try for minutes
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--ray {address}: cannot join a Ray cluster there ({first_line(error)}); "
            "run `ray start` on this machine first, see code/docs/cluster.md"
        ) from error
    try:
        with stopped_as(before):
            yield Cluster(ray)
    finally:
        ray.shutdown()


@contextmanager
def stopped_as(handler: Any) -> Iterator[None]:
    """Have SIGTERM handled as before Ray set a handler, and the exit code kept that it leads to: Ray makes it 1."""
    ends: list[SystemExit] = []

    def stop(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except SystemExit as end:
            ends.append(end)
            raise

    signal.signal(signal.SIGTERM, stop if callable(handler) else handler)
    try:
        yield
    except SystemExit as end:
        raise (ends or [end])[0] from None
    finally:
        signal.signal(signal.SIGTERM, handler)


class Cluster:
    """Machines of a cluster."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    def each(self, work: Callable[[Job], Done], jobs: Sequence[Job]) -> Iterator[tuple[int, Done]]:
        """As Machines."""
        return self.spread(work, jobs, self.whole_node()) if jobs else iter(())

    def encode(self, run: Inference, store: ItemStore, parts: Sequence[Part]) -> Iterator[tuple[int, EncodedPart]]:
        """As Machines: a GPU each where there are any."""
        if not parts:
            return iter(())
        needs = {"GPU": 1.0} if self.least("GPU") else self.whole_node()
        done = self.spread(Encoder.of(run), (Shipment.of(store, part) for part in parts), needs)
        return iter(tqdm(done, total=len(parts), desc="encode", unit="part", disable=None))

    def nodes(self) -> list[dict[str, float]]:
        """What each living node has, by the names of Ray."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def whole_node(self) -> dict[str, float]:
        """All cores of the smallest node that has any."""
        return {"CPU": self.least("CPU") or 1.0}

    def least(self, kind: str) -> float:
        """How many of a kind the smallest node that has any has; 0 when none has."""
        return min((node[kind] for node in self.nodes() if node.get(kind)), default=0.0)

    def room(self, needs: dict[str, float]) -> int:
        """How many tasks of these needs can run at a time."""
        return sum(int(min(node.get(kind, 0) / amount for kind, amount in needs.items())) for node in self.nodes())

    def spread(
        self, work: Callable[[Job], Done], jobs: Iterable[Job], needs: dict[str, float]
    ) -> Iterator[tuple[int, Done]]:
        """As `each`. One job waits beyond those that can run, so that no node does: each takes memory meanwhile."""
        options = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "max_retries": RETRIES}
        task = self.ray.remote(**options)(perform)
        shared = self.ray.put(work)
        running: dict[Any, int] = {}
        for place, job in enumerate(jobs):
            running[task.remote(shared, job)] = place
            if len(running) > self.room(needs):
                yield self.first_of(running, needs)
        while running:
            yield self.first_of(running, needs)

    def first_of(self, running: dict[Any, int], needs: dict[str, float]) -> tuple[int, Any]:
        """The next result, with the place of its job, which is taken from those that run."""
        while not (ready := self.ray.wait([*running], timeout=WAIT_SECONDS)[0]):
            if not self.room(needs):
                say("tongkuan: the cluster has no node that could work; waiting for one")
        place = running.pop(ready[0])
        try:
            return place, self.ray.get(ready[0])
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, self.ray.exceptions.RaySystemError):  # it could not unpack what it was sent
                raise UserError(
                    f"--ray: a node cannot run this program ({first_line(error.cause)}); install the same on all nodes "
                    "and start Ray there with PYTHONPATH set, see code/docs/cluster.md"
                ) from error
            raise (error.cause or error) from error
        except self.ray.exceptions.RayError as error:
            raise FailureError(
                f"--ray: a partition was lost {RETRIES + 1} times ({first_line(error)}); the same command goes on from "
                "those that are there"
            ) from error


def perform(work: Callable[[Job], Done], job: Job) -> Done:
    """What a task does."""
    return work(job)


def first_line(error: BaseException) -> str:
    """What an error says at first: Ray's texts have many lines."""
    lines = str(error).strip().splitlines()
    return clip(lines[0] if lines else type(error).__name__, 160)
