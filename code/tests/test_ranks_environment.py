"""A group of ranks that the environment names: found, checked, and joined or given up in time."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import environment
from worlds import train_words

from tongkuan.base.errors import UserError
from tongkuan.cli import exits as ending
from tongkuan.cli.verbs import main
from tongkuan.ranks.group import join_ranks
from tongkuan.ranks.place import LAUNCHER, REPORTS, VARIABLES, Place, find_place, num_ranks

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, LAUNCHER, REPORTS):
        monkeypatch.delenv(name, raising=False)


def name_group(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    for word in said.split():
        monkeypatch.setenv(*word.split("=", 1))


MASTER = "MASTER_ADDR=127.0.0.1 MASTER_PORT=29517"


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
    "WORLD_SIZE=2": "WORLD_SIZE=2 is set and RANK, MASTER_ADDR, MASTER_PORT not",
    f"WORLD_SIZE=2 {MASTER}": "WORLD_SIZE=2 is set and RANK not",
    "WORLD_SIZE=2 RANK=0 MASTER_PORT=1": "WORLD_SIZE=2 is set and MASTER_ADDR not",
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


@pytest.mark.parametrize("said", ["RANK=1", "WORLD_SIZE=2", "WORLD_SIZE=x RANK=y LOCAL_RANK=9"])
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


def test_a_rank_without_a_gpu_of_its_own_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    name_group(monkeypatch, f"WORLD_SIZE=4 RANK=3 LOCAL_RANK=3 {MASTER}")
    with pytest.raises(UserError, match="LOCAL_RANK=3: one GPU is to be seen; start at most 1 ranks"), join_ranks():
        pass
