"""Which group of ranks the environment names this process to, as launchers have it, and how many to start without one.

A cluster sets these variables in every shell of a job, also where nobody has launched ranks.
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from tongkuan.base.errors import UserError, clip
from tongkuan.base.machine import available_cores
from tongkuan.base.terminal import say


@dataclass(frozen=True, slots=True)
class Launcher:
    """What starts ranks, by the names of the variables in which it tells them where they stand."""

    rank: str
    world_size: str
    local_rank: str

    @property
    def names(self) -> tuple[str, str, str]:
        """All three."""
        return self.rank, self.world_size, self.local_rank


TORCHRUN = Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK")  # a PyTorchJob, too, which lacks the last one
MPIRUN = Launcher("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
SRUN = Launcher("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
STEP_TASKS = "SLURM_STEP_NUM_TASKS"  # of this srun, where a job's SLURM_NTASKS are more
# All that can name a group: without them a process is alone.
VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(*MPIRUN.names, *SRUN.names, STEP_TASKS),
)
STEP, JOB, LAUNCH_NODE = "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_LAUNCH_NODE_IPADDR"
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
    launcher: Launcher = TORCHRUN
    job: str = ""
    """Tells apart groups that meet at one port by mistake."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """This host among several on each of which our own launcher starts ranks."""

    count: int
    rank: int
    address: str
    """Of the first host, where all ranks meet."""
    port: int


def nodes_of(nnodes: int | None, node_rank: int | None, master: tuple[str, int] | None) -> Nodes | None:
    """What the options of these names say; None without any. UserError when some are missing or do not fit."""
    given = {"--nnodes N": nnodes, "--node-rank R": node_rank, "--master HOST:PORT": master}
    if missing := [option for option, value in given.items() if value is None]:
        if len(missing) == len(given):
            return None
        raise UserError(f"{', '.join(missing)} missing: for many hosts, give each one all of {', '.join(given)}")
    assert nnodes is not None and node_rank is not None and master is not None
    if node_rank >= nnodes:
        raise UserError(f"--node-rank {node_rank}: of --nnodes {nnodes}, the last is {nnodes - 1}; number hosts from 0")
    return Nodes(nnodes, node_rank, *master)


def is_own_rank() -> bool:
    """Whether our own launcher has started this process."""
    return os.environ.get(LAUNCHER) == str(os.getppid()) and REPORTS in os.environ


def find_place() -> Place:
    """The place that the environment names. UserError when it names half of one, or one that cannot be.

    Of several launchers the nearest counts: srun starts mpirun or torchrun, and not the other way round.
    """
    given = {name: text for name in (*VARIABLES, STEP, JOB, LAUNCH_NODE) if (text := os.environ.get(name, "").strip())}
    if not given.keys() >= {TORCHRUN.rank, TORCHRUN.world_size}:
        srun = Launcher(SRUN.rank, STEP_TASKS, SRUN.local_rank) if STEP_TASKS in given else SRUN
        if names_group(MPIRUN, given):
            return place_of(MPIRUN, given)
        if names_group(srun, given) and is_step(given):
            return place_of(srun, given)
    ranks = strays(TORCHRUN, given)
    if "WORLD_SIZE" in given or ranks:
        return place_of(TORCHRUN, given)
    if given.keys() >= {"RANK", "MASTER_ADDR"}:
        raise half(given, ["RANK"], ["WORLD_SIZE"])
    return Place()


def strays(launcher: Launcher, given: Mapping[str, str]) -> list[str]:
    """Those of a launcher's ranks that are not the first of their group."""
    return [name for name in (launcher.rank, launcher.local_rank) if given.get(name, "0") != "0"]


def names_group(launcher: Launcher, given: Mapping[str, str]) -> bool:
    """Whether variables of a launcher say that there are other ranks."""
    return given.get(launcher.world_size, "1") != "1" or bool(strays(launcher, given))


def is_step(given: Mapping[str, str]) -> bool:
    """Whether srun has started this process. Slurm's own shell of a job looks like its first task otherwise."""
    step = given.get(STEP, "")
    is_numbered = step.isdecimal() and int(step) < 2**32 - 16  # above are its own shells
    return is_numbered or bool(strays(SRUN, given)) or LAUNCH_NODE in given or "MASTER_ADDR" in given


def place_of(launcher: Launcher, given: dict[str, str]) -> Place:
    """The place that a launcher's variables name."""
    if launcher.world_size not in given:
        raise half(given, strays(launcher, given)[:1], [launcher.world_size])
    for name, of_torch in zip(launcher.names, TORCHRUN.names, strict=True):
        if name in given and given.get(of_torch, given[name]) != given[name]:
            both = " and ".join(f"{each}={clip(given[each])[1:-1]}" for each in (of_torch, name))
            raise UserError(f"{both} do not fit each other; unset {of_torch}, or {alone()}")
    world_size = whole(given, launcher, launcher.world_size, 1, MOST_RANKS)
    if world_size > 1:
        if launcher.world_size.startswith("SLURM"):
            given = where_srun_meets(given)
        needed = [launcher.rank, *([] if launcher is TORCHRUN else [launcher.local_rank]), "MASTER_ADDR", "MASTER_PORT"]
        if missing := [name for name in needed if name not in given]:
            raise half(given, [launcher.world_size], missing)
    return Place(
        whole(given, launcher, launcher.rank, 0, world_size - 1),
        world_size,
        whole(given, launcher, launcher.local_rank, 0, world_size - 1),
        launcher.local_rank in given and (launcher is TORCHRUN or world_size > 1),
        given.get("MASTER_ADDR", ""),
        whole(given, launcher, "MASTER_PORT", 1, 65_535) if world_size > 1 else 0,
        launcher,
        ".".join(given.get(name, "") for name in (JOB, STEP)) if launcher.rank == SRUN.rank else "",
    )


def where_srun_meets(given: dict[str, str]) -> dict[str, str]:
    """With the node where srun was called, where the first rank is, and a port of the job's own."""
    found = {"MASTER_ADDR": given[LAUNCH_NODE]} if LAUNCH_NODE in given else {}
    if (job := given.get(JOB, "")).isdecimal() and len(job) < 20:
        step = given.get(STEP, "0")
        found["MASTER_PORT"] = str(15_000 + (16 * int(job) + int(step if step.isdecimal() else 0)) % 15_000)
    return found | given


def half(given: Mapping[str, str], names: list[str], missing: list[str]) -> UserError:
    """The error to raise for variables without others that belong to them."""
    said = ", ".join(f"{name}={clip(given[name])[1:-1]}" for name in names)
    what = "it" if len(missing) == 1 else "them"
    lacks = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not"
    return UserError(f"{said} is set and {lacks}; set {what} too, or {alone()}")


def whole(given: Mapping[str, str], launcher: Launcher, name: str, low: int, high: int) -> int:
    """A variable's whole number from `low` to `high`; 0 when it is not given."""
    text = given.get(name, "0")
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if name in given and not low <= number <= high:
        size = launcher.world_size
        group = f", as {size}={given[size]}" if name in (launcher.rank, launcher.local_rank) else ""
        raise UserError(
            f"{name}={clip(text)[1:-1]}: no whole number from {low} to {high:,}{group}; set it, or {alone()}"
        )
    return number


def alone() -> str:
    """How to run without a group."""
    if is_own_rank():
        return "leave out --nnodes"
    return f"run alone after: unset {' '.join(name for name in VARIABLES if name in os.environ)}"


def awaited(place: Place) -> str:
    """Whom a rank waits for, and where."""
    others = [str(rank) for rank in range(min(place.world_size, 10)) if rank != place.rank]
    more = f" and {place.world_size - 10} more" if place.world_size > 10 else ""
    return (
        f"rank {place.rank} of {place.launcher.world_size}={place.world_size}, as the environment has it: meets "
        f"rank{'s'[: len(others) > 1]} {', '.join(others)}{more} at {clip(place.address)[1:-1]}:{place.port}; {alone()}"
    )


def num_ranks(asked: int | None, nodes: Nodes | None = None) -> int:
    """How many ranks to start from here: 1 as a rank of a group, else as asked, else one a GPU.

    Raises UserError when the machine has too few GPUs, or when the environment names a group and the user one as well.
    """
    if is_own_rank():
        return 1
    place = find_place()
    if place.world_size > 1:
        if asked is not None or nodes:
            own = f"--nnodes {nodes.count}" if nodes else f"--nproc {asked}"
            size = f"{place.launcher.world_size}={place.world_size}"
            group = f"the environment's {size} would join ranks that others start"
            raise UserError(f"{own} starts ranks of its own, {group}; leave out {own.split()[0]}, or {alone()}")
        if place.local_rank == 0:
            say(f"tongkuan: {awaited(place)}")
        return 1
    if os.environ.get(SRUN.world_size, "1") not in ("", "1") and place == Place():
        size = clip(os.environ[SRUN.world_size])[1:-1]
        say(f"tongkuan: {SRUN.world_size}={size}, but this is no task of srun: goes on without the others")
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
