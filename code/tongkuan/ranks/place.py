"""Which group of ranks the environment names this process to, as launchers have it, and how many to start without one.

A cluster sets these variables in every shell of a job, also where nobody has launched ranks.
"""

import os
import signal
from dataclasses import dataclass

from tongkuan.base.errors import UserError, clip
from tongkuan.base.machine import available_cores
from tongkuan.base.terminal import say

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MOST_RANKS = 100_000
FEW_RANKS = 16  # so many may be asked for on any machine without GPUs
# Set by our own launcher for its ranks: its process id, and the descriptor on which a rank reports what ended it.
LAUNCHER, REPORTS = "TONGKUAN_LAUNCHER", "TONGKUAN_REPORTS"
LOST = 3  # what a rank reports instead of exit code 1 when all that it knows is that another one has gone
STOPPING = (signal.SIGTERM, signal.SIGINT)
GO_ON = "the same command goes on from the last checkpoint"
# Seconds, each to be changed by an environment variable of this name.
SECONDS = {
    "TONGKUAN_STUCK_SECONDS": 1800.0,  # of a collective; real-size validation takes minutes, a lost rank for ever
    "TONGKUAN_STOP_SECONDS": 8.0,  # from a request to stop until the step must be saved; `docker stop` waits for 10
}


@dataclass(frozen=True, slots=True)
class Place:
    """This process among the ranks of its group; alone when there are no others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine: which GPU it takes."""
    has_launcher: bool = False
    """Whether a launcher has started a process a GPU already."""
    address: str = ""
    port: int = 0


def is_own_rank() -> bool:
    """Whether our own launcher has started this process."""
    return os.environ.get(LAUNCHER) == str(os.getppid()) and REPORTS in os.environ


def find_place() -> Place:
    """The place that the environment names. UserError when it names half of one, or one that cannot be."""
    given = {name: os.environ[name].strip() for name in VARIABLES if os.environ.get(name, "").strip()}
    ranks = [name for name in ("RANK", "LOCAL_RANK") if given.get(name, "0") != "0"]
    if "WORLD_SIZE" not in given:
        if not ranks and not given.keys() >= {"RANK", "MASTER_ADDR"}:
            return Place()
        name = (ranks or ["RANK"])[0]
        raise UserError(f"{name}={clip(given[name])[1:-1]} is set and WORLD_SIZE is not; set it too, or {alone()}")
    world_size = whole(given, "WORLD_SIZE", 1, MOST_RANKS)
    if world_size > 1 and (missing := [name for name in VARIABLES if name != "LOCAL_RANK" and name not in given]):
        raise UserError(
            f"WORLD_SIZE={world_size} is set and {', '.join(missing)} not; set what is missing, or {alone()}"
        )
    return Place(
        whole(given, "RANK", 0, world_size - 1),
        world_size,
        whole(given, "LOCAL_RANK", 0, world_size - 1),
        "LOCAL_RANK" in given,
        given.get("MASTER_ADDR", ""),
        whole(given, "MASTER_PORT", 1, 65_535) if world_size > 1 else 0,
    )


def whole(given: dict[str, str], name: str, low: int, high: int) -> int:
    """A variable's whole number from `low` to `high`; 0 when it is not given."""
    text = given.get(name, "0")
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if name in given and not low <= number <= high:
        group = f", as WORLD_SIZE={given['WORLD_SIZE']}" if "RANK" in name else ""
        raise UserError(
            f"{name}={clip(text)[1:-1]}: no whole number from {low} to {high:,}{group}; set it, or {alone()}"
        )
    return number


def alone() -> str:
    """How to run without a group."""
    return f"run alone after: unset {' '.join(name for name in VARIABLES if name in os.environ)}"


def awaited(place: Place) -> str:
    """Whom a rank waits for, and where."""
    others = [str(rank) for rank in range(min(place.world_size, 10)) if rank != place.rank]
    more = f" and {place.world_size - 10} more" if place.world_size > 10 else ""
    return (
        f"rank {place.rank} of WORLD_SIZE={place.world_size}, as the environment has it: meets "
        f"rank{'s'[: len(others) > 1]} {', '.join(others)}{more} at {clip(place.address)[1:-1]}:{place.port}; {alone()}"
    )


def num_ranks(asked: int | None) -> int:
    """How many ranks to start from here: 1 as a rank of a group, else as asked, else one a GPU.

    Raises UserError when the machine has too few GPUs, or when the environment names a group and the user a number.
    """
    if is_own_rank():
        return 1
    place = find_place()
    if place.world_size > 1:
        if asked is not None:
            group = f"the environment's WORLD_SIZE={place.world_size} would join ranks that others start"
            raise UserError(f"--nproc {asked} starts ranks of its own, {group}; leave out --nproc, or {alone()}")
        if place.local_rank == 0:
            say(f"tongkuan: {awaited(place)}")
        return 1
    if asked == 1 or (asked is None and place.has_launcher):
        return 1
    import torch  # takes seconds: not before it is needed

    gpus = torch.cuda.device_count()
    if asked is None:
        return gpus
    most = gpus or max(FEW_RANKS, available_cores())
    if asked > most:
        reason = f"{gpus} to be seen, and a rank takes one" if gpus else "without a GPU"
        raise UserError(f"--nproc {asked}: more than {most} ranks ({reason}); ask for at most {most}")
    return asked


def forget() -> None:
    """Take the group out of the environment, for a verb that runs no ranks or only such as it starts itself."""
    for name in VARIABLES:
        os.environ.pop(name, None)


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
