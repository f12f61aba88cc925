"""The machine, the shell and the cluster around a verb: quotas, closed streams, other encodings, stray variables."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from commands import environment, ok
from worlds import tiny_preset

from tongkuan.__main__ import main, num_ranks
from tongkuan.base import machine as processor
from tongkuan.base.errors import UserError
from tongkuan.base.machine import available_cores
from tongkuan.cli import exits as ending
from tongkuan.ranks.group import join_ranks
from tongkuan.ranks.place import LAUNCHER, TELL, VARIABLES, Place, find_place

TOP = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------------------------------------------------------------
# Cores

V2 = "35 24 0:30 {top} {place} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 32 0:29 {top} {place} rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
OTHER = "36 32 0:33 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"


def machine(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A folder with what a kernel tells of control groups."""
    told = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    for name, text in told.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def v2(
    path: str = "/", place: str = "/sys/fs/cgroup", top: str = "/", **quotas: str
) -> tuple[str, str, dict[str, str]]:
    files = {f"{place}/{name.replace('__', '/').strip('/')}/cpu.max": text for name, text in quotas.items()}
    return f"0::{path}", V2.format(top=top, place=place.replace(" ", "\\040")), files


def v1(path: str = "/", place: str = "/sys/fs/cgroup/cpu,cpuacct", top: str = "/") -> tuple[str, str]:
    return f"9:cpuset:/elsewhere\n4:cpu,cpuacct:{path}\n0::/", f"{OTHER}\n{V1.format(top=top, place=place)}"


CPU = "/sys/fs/cgroup/cpu,cpuacct"
MACHINES = {
    "a container's own group, version 2": (v2(__="300000 100000"), 3),
    "unlimited, version 2": (v2(__="max 100000"), 16),
    "part of a core": (v2(__="50000 100000"), 1),
    "a core and a half": (v2(__="150000 100000"), 1),
    "a quota of more than there is": (v2(__="9900000 100000"), 16),
    "a tighter group around this one": (v2("/a/b/c", a="200000 100000", a__b="max 100000", a__b__c="800000 100000"), 2),
    "a tighter group within": (v2("/a/b", a="800000 100000", a__b="400000 100000"), 4),
    "another's group": (v2("/a/b", c="100000 100000"), 16),
    "the host's path where only its own group is mounted": (v2("/docker/x", top="/docker/x", __="500000 100000"), 5),
    "a path outside of the mount": (v2("/../../x", __="600000 100000"), 6),
    "a folder with a blank": (v2("/", "/sys/fs/c group", __="700000 100000"), 7),
    "nonsense": (v2(__="many few"), 16),
    "a period of zero": (v2(__="100000 0"), 16),
    "version 1": ((*v1(), {f"{CPU}/cpu.cfs_quota_us": "250000", f"{CPU}/cpu.cfs_period_us": "50000"}), 5),
    "unlimited, version 1": ((*v1(), {f"{CPU}/cpu.cfs_quota_us": "-1", f"{CPU}/cpu.cfs_period_us": "100000"}), 16),
    "version 1, around": (
        (*v1("/x/y"), {f"{CPU}/x/cpu.cfs_quota_us": "300000", f"{CPU}/x/cpu.cfs_period_us": "100000"}),
        3,
    ),
    "version 1, in docker": (
        (*v1("/docker/z", top="/docker/z"), {f"{CPU}/cpu.cfs_quota_us": "20000", f"{CPU}/cpu.cfs_period_us": "10000"}),
        2,
    ),
    "nothing mounted": (("0::/", "22 1 0:1 / /proc rw - proc proc rw", {}), 16),
}


@pytest.mark.parametrize("name", MACHINES)
def test_cores_are_bounded_by_the_quotas_of_containers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    told, cores = MACHINES[name]
    assert available_cores(machine(tmp_path, *told)) == cores


def test_a_system_that_tells_nothing_has_the_cores_of_the_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7})
    assert available_cores(tmp_path) == 3
    assert available_cores(machine(tmp_path, *v2(__="200000 100000"))) == 2


def test_all_that_counts_cores_asks_for_the_quota() -> None:
    asked = [*(TOP / "code/tongkuan").glob("**/*.py"), *(TOP / "data_scripts").rglob("*.py")]
    asked += [TOP / "entrypoint.sh", TOP / "Dockerfile"]
    for path in filter(Path.is_file, asked):  # the image has no Dockerfile
        if path.name != "machine.py":
            text = path.read_text(encoding="utf-8")
            assert "sched_getaffinity" not in text and "$(nproc)" not in text, path
    printed = subprocess.run([sys.executable, processor.__file__], capture_output=True, text=True, check=True).stdout
    assert int(printed) == available_cores()


def test_torch_takes_no_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("tongkuan.ranks.group.available_cores", lambda: 2)
        with join_ranks():
            assert torch.get_num_threads() == 2
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own word
        with join_ranks():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $T is the program; `pipefail` tells of its exit code."""
    env = environment() | {"T": f"{sys.executable} -P -m tongkuan", **variables}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, env=env, timeout=120, errors="replace"
    )


@pytest.mark.parametrize("reader", ["| true", "2>&1 | true", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["", "predict --help", "settings --preset demo", "predict --threshold nan"])
def test_a_reader_that_goes_is_no_error(words: str, reader: str) -> None:
    done = shell(f"$T {words} {reader}")
    is_wrong = words.endswith("nan")
    assert done.returncode in ((2,) if is_wrong else (0, 141)), done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.stderr.count("\n") == (is_wrong and "2>" not in reader)


def test_files_are_whole_though_nobody_reads_what_is_said(tmp_path: Path) -> None:
    found = []
    for number, reader in enumerate(("| true", ">&-")):
        raw = tmp_path / str(number)
        done = shell(f"$T sample --raw {raw} --products 24 {reader}")
        assert done.returncode in (0, 141) and not done.stderr
        found.append({path.relative_to(raw): path.read_bytes() for path in raw.glob("**/*") if path.is_file()})
    assert found[0] == found[1] and len(found[0]) > 10


@pytest.mark.slow
def test_ranks_end_quietly_when_nobody_reads(data: Path, tmp_path: Path) -> None:
    words = f"--preset {tiny_preset(tmp_path)} --data {data} --run {tmp_path}/r --model {tmp_path}/m"
    done = shell(f"$T train {words} --nproc 2 train.steps=100000 | true")
    assert done.returncode == 141 and not done.stderr


def test_a_full_disk_under_the_output_is_one_line() -> None:
    done = shell("$T settings --preset demo >/dev/full")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.parametrize(
    "variables",
    [
        *({"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "gbk"}, {"LC_ALL": "POSIX"}),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_terminal_of_another_encoding_gets_replacements(variables: dict[str, str]) -> None:
    done = shell("$T settings --preset ccks2022-63 && $T check --submit 杯 --pairs 杯子é", **variables)
    assert done.returncode == 2 and done.stdout.startswith("model:\n") and "attribute_keys" in done.stdout
    assert done.stderr.count("\n") == 1 and "no such file" in done.stderr


def test_a_name_that_no_file_can_have_in_this_locale_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UnicodeEncodeError("ascii", "杯子.jpg", 0, 1, "ordinal not in range")
    assert ending.describe(error, "resize") == ""  # of a text, not of a name
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    line = ending.describe(error, "resize")
    assert line.endswith("set LC_ALL=C.UTF-8 and run the same command again") and "\n" not in line


def test_every_text_file_is_opened_in_utf_8() -> None:
    sources = [*(TOP / "code/tongkuan").glob("**/*.py"), *(TOP / "data_scripts").rglob("*.py")]
    words = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--preview",
        "--select",
        "PLW1514",
        *map(str, sources),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# A group of ranks that the environment names


@pytest.fixture(autouse=True)
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, LAUNCHER, TELL):
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
def test_half_an_environment_is_named_and_its_advice_works(
    said: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_whom_a_rank_waits_for_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


@pytest.mark.parametrize("said", ["RANK=1", "RANK=3 WORLD_SIZE=4", "RANK=1 LOCAL_RANK=1", f"{TELL}=9", f"{LAUNCHER}=1"])
def test_an_error_is_said_whatever_the_environment(
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
def test_a_rank_that_waits_for_others_answers_a_request_to_stop(
    rank: int, number: int, data: Path, tmp_path: Path
) -> None:
    words = [
        "train",
        "--preset",
        tiny_preset(tmp_path),
        "--data",
        data,
        "--run",
        tmp_path / "r",
        "--model",
        tmp_path / "m",
    ]
    (tmp_path / "own").mkdir()
    script = f"{JOINING}\nfrom tongkuan.__main__ import run\nsys.exit(run())"
    group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", script, *map(str, words)]
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


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    name_group(monkeypatch, f"WORLD_SIZE=4 RANK=3 LOCAL_RANK=3 {MASTER}")
    with (
        pytest.raises(UserError, match="LOCAL_RANK=3: one GPU is to be seen; start at most 1 ranks here, or"),
        join_ranks(),
    ):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Clones


def test_a_clone_of_git_for_windows_keeps_line_ends(tmp_path: Path) -> None:
    if not (TOP / ".git").exists():
        pytest.skip("no repository")
    made = ["git", "init", "--quiet", str(tmp_path / "made")]
    ok(subprocess.run(made, capture_output=True, text=True))
    for name in (".gitattributes", "entrypoint.sh", "Dockerfile"):
        (tmp_path / "made" / name).write_bytes((TOP / name).read_bytes())
    (tmp_path / "made" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\n")
    git = ["git", "-C", str(tmp_path / "made"), "-c", "user.name=n", "-c", "user.email=e"]
    ok(subprocess.run([*git, "add", "."], capture_output=True, text=True))
    ok(subprocess.run([*git, "commit", "--quiet", "-m", "m"], capture_output=True, text=True))
    clone = ["git", "clone", "-q", "-c", "core.autocrlf=true", str(tmp_path / "made"), str(tmp_path / "clone")]
    ok(subprocess.run(clone, capture_output=True, text=True))
    for name in ("entrypoint.sh", "Dockerfile", "x.png"):
        assert (tmp_path / "clone" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
