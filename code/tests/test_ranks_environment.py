"""A group of ranks that the environment names: found, checked, and joined or given up in time."""

import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import environment
from torch.distributed.run import get_args_parser as torchrun_parser
from worlds import train_words

from tongkuan.base.errors import UserError
from tongkuan.cli import exits as ending
from tongkuan.cli.verbs import VERBS, main, parser_of
from tongkuan.ranks.group import await_ranks, choose_device, join_ranks
from tongkuan.ranks.network import interface_to
from tongkuan.ranks.place import (
    JOB,
    LAUNCH_NODE,
    LAUNCHER,
    REPORTS,
    STEP,
    VARIABLES,
    Place,
    find_place,
    num_ranks,
)

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, LAUNCHER, REPORTS, STEP, JOB, LAUNCH_NODE):
        monkeypatch.delenv(name, raising=False)


def name_group(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    for word in said.split():
        monkeypatch.setenv(*word.split("=", 1))


MASTER = "MASTER_ADDR=127.0.0.1 MASTER_PORT=29517"
TASK = "SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1"  # as srun tells it
STARTED = "SLURM_STEP_ID=0 SLURM_JOB_ID=4711 SLURM_LAUNCH_NODE_IPADDR=10.0.0.1"
OF_MPI = "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1"


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("", Place()),
        ("RANK=0", Place()),
        ("RANK= WORLD_SIZE=", Place()),
        ("MASTER_ADDR=node-1 MASTER_PORT=1", Place()),
        ("WORLD_SIZE=1", Place()),
        ("WORLD_SIZE=1 RANK=0 MASTER_PORT=x", Place()),
        ("WORLD_SIZE=1 RANK=0 LOCAL_RANK=0", Place(has_launcher=True)),
        (f"WORLD_SIZE=2 RANK=1 {MASTER}", Place(1, 2, 0, False, "127.0.0.1", 29517)),
        (f"WORLD_SIZE=16 RANK=9 LOCAL_RANK=1 {MASTER}", Place(9, 16, 1, True, "127.0.0.1", 29517)),
        (f"{TASK} {STARTED}", Place(5, 8, 1, True, "10.0.0.1", 15_000 + 16 * 4711 % 15_000)),
        (f"{TASK} {STARTED} {MASTER}", Place(5, 8, 1, True, "127.0.0.1", 29517)),
        (f"{TASK} {MASTER}", Place(5, 8, 1, True, "127.0.0.1", 29517)),
        (f"{TASK} {STARTED} {MASTER} WORLD_SIZE=8", Place(5, 8, 1, True, "127.0.0.1", 29517)),
        (f"{OF_MPI} {MASTER}", Place(5, 8, 1, True, "127.0.0.1", 29517)),
        # srun starts mpirun's and torchrun's own helpers, one a node; torchrun's ranks count before theirs
        (f"{OF_MPI} {MASTER} SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0 {STARTED}", Place(5, 8, 1, True, "", 29517)),
        (f"RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 {MASTER} {OF_MPI} {TASK}", Place(1, 2, 1, True, "127.0.0.1", 29517)),
        # shells of a job, which nobody has launched as a rank
        ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_ID=4711", Place()),
        ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_STEP_ID=4294967291", Place()),
        (f"SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=1 {STARTED}", Place()),
        (f"SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 {STARTED}", Place()),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_LOCAL_RANK=0", Place()),
    ],
)
def test_a_whole_environment_is_a_place(said: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    name_group(monkeypatch, said)
    found = find_place()
    assert (found.rank, found.world_size, found.local_rank) == (place.rank, place.world_size, place.local_rank)
    assert found.has_launcher == place.has_launcher and found.port == place.port


HALVES = {
    "RANK=1": "RANK=1 is set and WORLD_SIZE is not",
    "LOCAL_RANK=3": "LOCAL_RANK=3 is set and WORLD_SIZE is not",
    f"RANK=0 {MASTER}": "RANK=0 is set and WORLD_SIZE is not",
    "RANK=gold": "RANK=gold is set and WORLD_SIZE is not",
    "WORLD_SIZE=2": "WORLD_SIZE=2 is set and RANK, MASTER_ADDR, MASTER_PORT are not",
    f"WORLD_SIZE=2 {MASTER}": "WORLD_SIZE=2 is set and RANK is not; set it too, or run alone after: unset WORLD_SIZE",
    "WORLD_SIZE=2 RANK=0 MASTER_PORT=1": "WORLD_SIZE=2 is set and MASTER_ADDR is not",
    f"WORLD_SIZE=2 RANK=5 {MASTER}": "RANK=5: no whole number from 0 to 1, as WORLD_SIZE=2",
    f"WORLD_SIZE=2 RANK=-1 {MASTER}": "RANK=-1: no whole number from 0 to 1",
    f"WORLD_SIZE=2 RANK=0 LOCAL_RANK=x {MASTER}": "LOCAL_RANK=x: no whole number from 0 to 1",
    "WORLD_SIZE=abc": "WORLD_SIZE=abc: no whole number from 1",
    "WORLD_SIZE=0": "WORLD_SIZE=0: no whole number from 1",
    "WORLD_SIZE=2.0 RANK=0": "WORLD_SIZE=2.0: no whole number",
    "WORLD_SIZE=１": "no whole number from 1",
    "WORLD_SIZE=1 RANK=1": "RANK=1: no whole number from 0 to 0, as WORLD_SIZE=1",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=0": "MASTER_PORT=0: no whole number from 1 to 65,535",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=tcp://10.0.0.1:80": "MASTER_PORT=tcp://10.0.0.1:80: no whole",
    "SLURM_PROCID=1": "SLURM_PROCID=1 is set and SLURM_NTASKS is not",
    "SLURM_LOCALID=1": "SLURM_LOCALID=1 is set and SLURM_NTASKS is not",
    TASK: "SLURM_NTASKS=8 is set and MASTER_ADDR, MASTER_PORT are not",
    f"{TASK} MASTER_ADDR=a": "SLURM_NTASKS=8 is set and MASTER_PORT is not",
    "SLURM_PROCID=1 SLURM_NTASKS=2 MASTER_ADDR=a SLURM_JOB_ID=1": "SLURM_NTASKS=2 is set and SLURM_LOCALID is not",
    f"SLURM_NTASKS=2 {STARTED}": "SLURM_NTASKS=2 is set and SLURM_PROCID, SLURM_LOCALID are not",
    f"SLURM_STEP_NUM_TASKS=2 {STARTED}": "SLURM_STEP_NUM_TASKS=2 is set and SLURM_PROCID, SLURM_LOCALID are not",
    f"SLURM_PROCID=8 SLURM_NTASKS=8 SLURM_LOCALID=0 {STARTED}": "SLURM_PROCID=8: no whole number from 0 to 7, as SLURM",
    f"SLURM_PROCID=1 SLURM_NTASKS=x SLURM_LOCALID=0 {STARTED}": "SLURM_NTASKS=x: no whole number from 1",
    f"{TASK} {STARTED} WORLD_SIZE=2": "WORLD_SIZE=2 and SLURM_NTASKS=8 do not fit each other; unset WORLD_SIZE, or run",
    f"{TASK} {STARTED} RANK=0": "RANK=0 and SLURM_PROCID=5 do not fit each other",
    f"{TASK} {STARTED} LOCAL_RANK=0": "LOCAL_RANK=0 and SLURM_LOCALID=1 do not fit each other",
    f"RANK=0 WORLD_SIZE=8 {TASK} {STARTED}": "WORLD_SIZE=8 is set and MASTER_ADDR, MASTER_PORT are not",
    OF_MPI: "OMPI_COMM_WORLD_SIZE=8 is set and MASTER_ADDR, MASTER_PORT are not",
    f"OMPI_COMM_WORLD_SIZE=2 {MASTER}": "OMPI_COMM_WORLD_SIZE=2 is set and OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_L",
    "OMPI_COMM_WORLD_RANK=1": "OMPI_COMM_WORLD_RANK=1 is set and OMPI_COMM_WORLD_SIZE is not",
}


@pytest.mark.parametrize("said", HALVES)
@pytest.mark.parametrize("verb", ["train", "predict", "evaluate"])
def test_half_an_environment_is_named_with_advice(said: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name_group(monkeypatch, said)
    with pytest.raises(UserError) as caught:
        main([verb])
    line = str(caught.value)
    assert HALVES[said] in line and "\n" not in line
    for name in line.partition("run alone after: unset ")[2].split():
        monkeypatch.delenv(name)
    assert find_place() == Place()


@pytest.mark.slow
def test_half_an_environment_ends_a_process_at_once(tmp_path: Path) -> None:
    """Before torch is there: 20 processes, each in less than 5 seconds of its own."""
    assert len(HALVES) >= 20
    for said in HALVES:
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        group = dict(word.split("=", 1) for word in said.split())
        command = [sys.executable, "-m", "tongkuan", *train_words(tmp_path, tmp_path)]
        done = subprocess.run(command, env=environment() | group, capture_output=True, text=True, timeout=60)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
        assert HALVES[said] in done.stderr
        assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 5


def test_a_shell_of_a_job_is_told_that_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name_group(monkeypatch, "SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_ID=4711")
    assert num_ranks(2) == 2
    line = "tongkuan: SLURM_NTASKS=8, but this is no task of srun: goes on without the others\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.has_ranks])
def test_torchrun_leaves_each_option_to_the_verb_by_one_of_its_names(verb: str) -> None:
    """It takes a word that begins one of its own options for that option, or for an error."""
    for action in parser_of(verb)._actions:
        passed = []
        for name in action.option_strings:
            with suppress(SystemExit):
                words = ["-m", "tongkuan", verb, name, "x"]
                passed.append(torchrun_parser().parse_args(words).training_script_args == words[2:])
        wanted = action.option_strings not in ([], ["--nproc"], ["--master"])  # of our own launcher
        assert any(passed) or not wanted, action.option_strings


def test_a_number_of_ranks_and_a_group_of_the_environment_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    name_group(monkeypatch, f"WORLD_SIZE=2 RANK=0 {MASTER}")
    with pytest.raises(UserError, match=r"--nproc 2 starts ranks of its own, .*WORLD_SIZE=2 .*; leave out --nproc, or"):
        main(["train", "--nproc", "2"])


def test_whom_a_rank_waits_for_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name_group(monkeypatch, f"WORLD_SIZE=3 RANK=1 {MASTER}")
    assert num_ranks(None) == 1
    line = capsys.readouterr().err
    assert line.startswith(
        "tongkuan: rank 1 of WORLD_SIZE=3, as the environment has it: meets ranks 0, 2 at 127.0.0.1:"
    )
    assert line.endswith("29517; run alone after: unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT\n")
    name_group(monkeypatch, "LOCAL_RANK=1")  # another one of this machine says it
    assert num_ranks(None) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize("said", ["RANK=1", "WORLD_SIZE=2", "WORLD_SIZE=x RANK=y LOCAL_RANK=9", TASK, OF_MPI])
def test_a_verb_without_ranks_ignores_the_group(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name_group(monkeypatch, said)
    assert main(["settings", "--preset", "demo"]) == 0
    with join_ranks() as ranks:
        assert ranks.world_size == 1


@pytest.mark.parametrize(
    "said", ["RANK=1", "RANK=3 WORLD_SIZE=4", "RANK=1 LOCAL_RANK=1", f"{REPORTS}=9", f"{LAUNCHER}=1"]
)
def test_an_error_is_always_printed(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name_group(monkeypatch, said)
    assert ending.report_error(UserError("x.jsonl:3: no"), "check") == 2
    assert ending.report_error(KeyboardInterrupt(), "check") == 130
    said_of = capsys.readouterr().err
    assert said_of.startswith("tongkuan: x.jsonl:3: no\ntongkuan: interrupted")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_rank(rank: int, port: int, words: list[object], **more: str) -> "subprocess.Popen[str]":
    group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tongkuan", *map(str, words)]
    return subprocess.Popen(command, env=environment() | group | more, stderr=subprocess.PIPE, text=True)


JOINING = """
import sys
from tongkuan.ranks import group as distributed
join = distributed.join
def told(*arguments):
    print("joining", file=sys.stderr, flush=True)
    return join(*arguments)
distributed.join = told
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_rank_that_waits_for_others_can_be_stopped(rank: int, number: int, data: Path, tmp_path: Path) -> None:
    script = f"{JOINING}\nfrom tongkuan.cli.exits import run\nsys.exit(run())"
    group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", script, *train_words(tmp_path, data)]
    waiting = subprocess.Popen(
        command,
        env=environment() | group,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # where the tests run behind a shell's `&`
    )
    assert waiting.stderr
    assert f"rank {rank} of WORLD_SIZE=2, as the environment has it: meets rank {1 - rank}" in waiting.stderr.readline()
    assert waiting.stderr.readline() == "joining\n"
    time.sleep(1)
    asked = time.monotonic()
    waiting.send_signal(number)
    _, said = waiting.communicate(timeout=20)
    assert waiting.returncode == 128 + number and time.monotonic() - asked < 1.5
    assert said.splitlines()[-1] == "tongkuan: stopped while waiting for the other ranks"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_do_not_come_says_so_in_time(rank: int, data: Path, model: Path, tmp_path: Path) -> None:
    words = ["predict", "--data", data, "--model", model, "--submit", tmp_path]
    waiting = start_rank(rank, free_port(), words, TONGKUAN_STUCK_SECONDS="2")
    _, said = waiting.communicate(timeout=120)
    last = said.splitlines()[-1]
    assert waiting.returncode == 1 and "Traceback" not in said and "run alone after: unset RANK" in last
    assert ("rank 1 of WORLD_SIZE=2 did not come to 127.0.0.1:" if rank == 0 else "rank 1 cannot join") in last


@pytest.mark.slow
def test_ranks_that_a_cluster_has_started_predict_the_same_bytes(data: Path, model: Path, tmp_path: Path) -> None:
    port = free_port()
    words: list[object] = ["predict", "--data", data, "--model", model, "--submit"]
    both = [start_rank(rank, port, [*words, tmp_path / "two"]) for rank in range(2)]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert main([*map(str, words), str(tmp_path / "one")]) == 0
    assert (tmp_path / "one/result.jsonl").read_bytes() == (tmp_path / "two/result.jsonl").read_bytes()


def test_a_port_that_is_taken_is_the_users_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        name_group(monkeypatch, f"WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={taken.getsockname()[1]}")
        with pytest.raises(UserError, match="another program listens there; set another MASTER_PORT"), join_ranks():
            pass


def have_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


@pytest.mark.parametrize(("said", "count", "gpu"), [(TASK, 1, 0), (TASK, 8, 1), (OF_MPI, 1, 0), ("", 8, 0)])
def test_a_task_that_sees_one_gpu_takes_it(said: str, count: int, gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, count)
    name_group(monkeypatch, f"{said} {STARTED} {MASTER}")
    assert choose_device(find_place()) == torch.device("cuda", gpu)


def test_a_rank_of_a_pytorchjob_that_sees_many_gpus_does_not_leave_them_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    name_group(monkeypatch, f"WORLD_SIZE=2 RANK=1 {MASTER}")
    have_gpus(monkeypatch, 1)
    assert choose_device(find_place()) == torch.device("cuda", 0)
    have_gpus(monkeypatch, 4)
    with pytest.raises(UserError, match=r"LOCAL_RANK is not set and 4 GPUs are to be seen: .* torchrun, or run alone"):
        choose_device(find_place())


def test_ranks_meet_by_the_interface_that_leads_to_the_first() -> None:
    assert interface_to("127.0.0.1", 1) == interface_to("localhost", 1) == "lo"
    assert interface_to("no-such-host.invalid", 1) == ""


def test_ranks_that_were_numbered_apart_are_told() -> None:
    """Two processes as one rank, and ranks of groups of another size."""
    soon = time.monotonic() + 60
    twice = "rank 0 is at :0 already: two processes have RANK=0"
    for count, came, told in (("2", "1", twice), ("3", "0", "ranks of 2 and of 3 meet here")):
        store = torch.distributed.HashStore()
        store.add("came 0", int(came))
        store.set("here 1", count)
        with pytest.raises(UserError, match=told):
            await_ranks(store, Place(0, 2), soon)


def test_srun_that_was_called_on_another_node_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = STARTED.replace("10.0.0.1", "192.0.2.1")
    name_group(monkeypatch, f"SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 {elsewhere}")
    with (
        pytest.raises(UserError, match=r"192\.0\.2\.1 is not the node of rank 0: srun was called elsewhere"),
        join_ranks(),
    ):
        pass


def test_a_rank_without_a_gpu_of_its_own_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 1)
    name_group(monkeypatch, f"WORLD_SIZE=4 RANK=3 LOCAL_RANK=3 {MASTER}")
    with pytest.raises(UserError, match="LOCAL_RANK=3: one GPU is to be seen; start at most 1 ranks"), join_ranks():
        pass


NODES = "--nnodes 2 --node-rank 0 --master 127.0.0.1:29517"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--nnodes 2", "--node-rank R, --master HOST:PORT missing: for many hosts, give each one all of --nnodes N"),
        ("--master 127.0.0.1:1 --node-rank 0", "--nnodes N missing"),
        (NODES.replace("-rank 0", "-rank 2"), "--node-rank 2: of --nnodes 2, the last is 1; number hosts from 0"),
        (NODES.replace("127.0.0.1", "192.0.2.1"), "--master 192.0.2.1:29517: no address of this host, which is"),
        (NODES.replace("29517", "0"), "argument --master: '127.0.0.1:0' is no HOST:PORT; 10.0.0.1:29500, say"),
        (NODES.replace(":29517", ""), "argument --master: '127.0.0.1' is no HOST:PORT"),
    ],
)
def test_hosts_that_cannot_meet_as_asked_are_told(words: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["train", *words.split()])
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_hosts_of_our_own_launcher_and_a_group_of_the_environment_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name_group(monkeypatch, f"{TASK} {STARTED}")
    with pytest.raises(UserError, match=r"--nnodes 2 starts ranks of its own, .*SLURM_NTASKS=8 .*; leave out --nnodes"):
        main(["train", *NODES.split()])


def test_a_port_that_is_taken_on_the_first_host_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--master {where}: another program listens there; take another port"):
            main(["train", *NODES.split()[:-1], where])


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_host_whose_other_does_not_come_says_so_in_time(node: int, data: Path, tmp_path: Path) -> None:
    words = train_words(tmp_path, data, "--nnodes", 2, "--node-rank", node, "--master", f"127.0.0.1:{free_port()}")
    command, limit = [sys.executable, "-m", "tongkuan", *words], {"TONGKUAN_STUCK_SECONDS": "2"}
    done = subprocess.run(command, env=environment() | limit, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    told = "rank 0: rank 1 of WORLD_SIZE=2 did not come to" if node == 0 else "rank 1 cannot join the others at"
    assert done.stderr.startswith(f"tongkuan: {told}") and "leave out --nnodes" in done.stderr
