"""Requests to stop, ranks that die or hang, memory that runs out: nothing lost, one line, no process left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment, ok, run_verb, wait_for
from test_train import state_bytes
from worlds import tiny_preset, tiny_settings

from tongkuan.base.errors import UserError
from tongkuan.learn.run import Run
from tongkuan.learn.step import TrainStep
from tongkuan.learn.train import train
from tongkuan.ranks.group import Ranks
from tongkuan.ranks.launch import Fleet
from tongkuan.ranks.place import LOST, seconds_of
from tongkuan.ranks.stop import StopRequests

LONG = ("train.steps=100000", "train.save_every=100000", "train.validate_every=100000")


def processes_naming(text: Path) -> list[str]:
    """Ids of processes with this in their command line; one that has ended is none."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(text) in (path / "cmdline").read_text(errors="replace") and " Z " not in (path / "stat").read_text():
                found.append(path.name)
    return found


class Training:
    """A training run in a process of its own that has begun to take steps."""

    def __init__(self, data: Path, run_dir: Path, *words: object, patch: str = "", **env: object) -> None:
        self.run_dir = run_dir
        self.before = self.curves()
        folder = run_dir.parent
        self.words = ["train", "--preset", tiny_preset(folder), "--data", data, "--run", run_dir]
        self.words += ["--model", run_dir / "model", *words]
        variables = environment() | {name: str(value) for name, value in env.items()}
        if patch:  # Python runs it in every rank before anything else
            (folder / "sitecustomize.py").write_text(patch)
            variables["PYTHONPATH"] += f":{folder}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tongkuan", *map(str, self.words)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def curves(self) -> set[Path]:
        """TensorBoard's files, a new one for each start that comes to a row."""
        return {*self.run_dir.glob("tensorboard/*")}

    def begun(self) -> "Training":
        wait_for(lambda: self.curves() != self.before or self.process.poll() is not None)
        return self

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[number])

    def ended(self, seconds: float = 30) -> tuple[int, str]:
        """Exit code, and what it said on stderr; no process of it is left."""
        try:
            _, said = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        wait_for(lambda: not processes_naming(self.run_dir), 5)
        return self.process.returncode, said


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 6, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_bytes_of_an_unbroken_one(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    step: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Step 3 is to be validated and 6 is the last: both are put off to the next call."""
    settings = tiny_settings(tmp_path, "train.save_every=4")
    train(settings, data, tmp_path / "whole", tmp_path / "whole.safetensors")
    take = TrainStep.take

    def ask(self: TrainStep, at: int, loaded: Iterator[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if at == step - 1:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        return take(self, at, loaded)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(TrainStep, "take", ask)
        train(settings, data, tmp_path / "run", tmp_path / "model")
    assert caught.value.code == 128 + number
    assert f"stopped after step {step}, which is saved; the same command goes on" in capfd.readouterr().err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step
    assert signal.getsignal(number) is before
    train(settings, data, tmp_path / "run", tmp_path / "model")
    assert state_bytes(tmp_path / "run") == state_bytes(tmp_path / "whole")
    assert (tmp_path / "model").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_request_after_the_last_step_still_ends(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Run.save

    def ask(self: Run, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    monkeypatch.setattr(Run, "save", ask)
    with pytest.raises(SystemExit) as caught:
        train(tiny_settings(tmp_path), data, tmp_path / "run", tmp_path / "model")
    assert caught.value.code == 143 and not (tmp_path / "model").exists()


@pytest.mark.slow
def test_two_ranks_stop_after_one_step_and_go_on_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    """Stopped by one signal, and where it went on by the other."""
    words = ("--nproc", 2, "train.steps=60", "train.validate_every=20", "train.save_every=50", "train.pairs=8")
    step = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        run = Training(data, tmp_path / "run", *words).begun()
        asked = time.monotonic()
        run.process.send_signal(number)
        code, said = run.ended()
        assert code == 128 + number and time.monotonic() - asked < 10
        assert said.count("\n") == 1 and "which is saved; the same command goes on from there" in said
        before, step = step, torch.load(run.run_dir / "last.pt", weights_only=True)["step"]
        assert before < step < 60
    ok(run_verb(*run.words))
    whole = Training(data, tmp_path / "whole", *words)
    assert whole.ended(60) == (0, "")
    assert state_bytes(tmp_path / "run") == state_bytes(tmp_path / "whole")
    assert (tmp_path / "run" / "model").read_bytes() == (tmp_path / "whole" / "model").read_bytes()


def test_a_rank_that_is_far_ahead_stops_after_the_step_that_all_have_yet_to_take() -> None:
    """Three hosts at steps of their own, as GPUs let them; the request comes to the last one."""
    store = torch.distributed.HashStore()
    stopped: dict[int, int] = {}

    def steps(rank: int) -> None:
        with suppress(SystemExit), StopRequests(Ranks(rank, 3, torch.device("cpu"), store)) as requests:
            for step in range(1, 2000):
                time.sleep(0.0005 * (1 + 3 * rank))  # the first is four steps ahead before long
                if rank == 2 and step == 20:
                    requests.number = signal.SIGTERM
                if requests.after(step):
                    stopped[rank] = step
                    return

    threads = [threading.Thread(target=steps, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stopped) == 3 and len(set(stopped.values())) == 1 and stopped[0] > 40


STUCK_IN_AN_OPERATOR = """
import os, pathlib, torch
from tongkuan.learn.step import TrainStep
def step(self, number, loaded):
    pathlib.Path(os.environ["BEGUN"] + os.environ.get("RANK", "")).touch()
    torch.linalg.matrix_power(torch.rand(3000, 3000), 1 << 40)
TrainStep.take = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["late", "twice"])
def test_a_step_that_takes_too_long_is_not_waited_for(data: Path, tmp_path: Path, how: str) -> None:
    """Within one operator of the processor, where no Python runs."""
    begun, limit = tmp_path / "begun", 1 if how == "late" else 100
    run = Training(data, tmp_path / "run", *LONG, patch=STUCK_IN_AN_OPERATOR, BEGUN=begun, TONGKUAN_STOP_SECONDS=limit)
    wait_for(begun.exists)
    asked = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    if how == "twice":
        time.sleep(0.3)
        run.process.send_signal(signal.SIGINT)
    code, said = run.ended()
    assert code == 130 and time.monotonic() - asked < 5
    told = "ended without a checkpoint, as the step was not done within 1 s" if how == "late" else "ended at once"
    assert said == f"tongkuan: {told}; the same command goes on from the last checkpoint\n"


@pytest.mark.slow
def test_a_second_request_to_the_launcher_ends_all_ranks_at_once(data: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    words = (*LONG, "--nproc", 2)
    run = Training(data, tmp_path / "run", *words, patch=STUCK_IN_AN_OPERATOR, BEGUN=begun, TONGKUAN_STOP_SECONDS=100)
    wait_for(lambda: all(Path(f"{begun}{rank}").exists() for rank in range(2)))
    for _ in range(2):
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    code, said = run.ended(10)
    assert code == 143 and said.count("\n") == 1 and "ended at once" in said


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_down(data: Path, tmp_path: Path) -> None:
    run = Training(data, tmp_path / "run", *LONG, "--nproc", 2).begun()
    os.kill(run.rank(1), signal.SIGKILL)
    code, said = run.ended(30)
    assert code == 1
    assert "tongkuan: rank 1 was ended by SIGKILL (for want of memory, most likely); the same command goes on" in said


ERRORS = {
    "ValueError('boom')": "rank 1: ValueError 'boom'; its traceback stands above",
    "torch.OutOfMemoryError('CUDA out of memory. Tried')": "rank 1: out of memory ('CUDA out of memory. Tried'); lower",
    "UserError('x.jsonl:3: no')": "x.jsonl:3: no",
}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_on_one_rank_is_told_once_and_ends_all(data: Path, tmp_path: Path, error: str) -> None:
    patch = f"""
import os
if os.environ.get("RANK") == "1":
    import torch
    from tongkuan.base.errors import UserError
    from tongkuan.learn.step import TrainStep
    def step(*_): raise {error}
    TrainStep.take = step
"""
    run = Training(data, tmp_path / "run", *LONG, "--nproc", 2, patch=patch)
    code, said = run.ended(60)
    assert code == (2 if "UserError" in error else 1)
    assert said.splitlines()[-1].startswith(f"tongkuan: {ERRORS[error]}")
    assert said.count("tongkuan: ") == 1 and said.count("Traceback") == ("ValueError" in error)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_bounded(data: Path, tmp_path: Path) -> None:
    run = Training(data, tmp_path / "run", *LONG, "--nproc", 2, TONGKUAN_STUCK_SECONDS=12).begun()
    os.kill(run.rank(1), signal.SIGSTOP)
    code, said = run.ended(40)
    assert code == 1
    assert said.startswith("tongkuan: rank 0: another rank did not answer for 12 s") and said.count("\n") == 1


@pytest.mark.slow
def test_ranks_end_with_their_launcher(data: Path, tmp_path: Path) -> None:
    run = Training(data, tmp_path / "run", *LONG, "--nproc", 2).begun()
    run.process.kill()
    assert run.ended()[0] == -signal.SIGKILL


LAST_SAVE_FAILS = """
import errno, os
from tongkuan.learn.run import Run
def save(self, *_):
    if os.environ.get("RANK") == "0":
        raise OSError(errno.ENOSPC, "No space left on device", "last.pt")
Run.save = save
"""


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_last_save_is_told_though_it_was_asked_to_stop(data: Path, tmp_path: Path) -> None:
    run = Training(data, tmp_path / "run", *LONG, "--nproc", 2, patch=LAST_SAVE_FAILS).begun()
    run.process.send_signal(signal.SIGTERM)
    code, said = run.ended(60)
    assert (code, said.count("\n")) == (1, 1), said
    assert said.startswith("tongkuan: rank 0: last.pt: No space left on device; files that were there before are whole")


def telling(words: str) -> str:
    """What a rank does to end in these words (its exit code first)."""
    return f"os.write(int(os.environ['TONGKUAN_REPORTS']), {words.encode()!r}); os._exit(1)"


STOPS, LEFT = "os._exit(143)", telling(f"{LOST} rank 1 lost another one (gloo)")
ENDS = {  # what each rank does when it is asked to stop; exit code and words of the whole
    "both stop": (STOPS, STOPS, 143, ""),
    "before there are handlers": ("signal.pthread_sigmask(signal.SIG_UNBLOCK, [15])", STOPS, 143, ""),
    "a full disk": (telling("1 last.pt: No space left"), STOPS, 1, "rank 0: last.pt: No space left"),
    "a full disk, late": (f"time.sleep(0.5); {telling('1 no room')}", STOPS, 1, "rank 0: no room"),
    "a full disk, and who noticed": (f"time.sleep(0.5); {telling('1 no room')}", LEFT, 1, "rank 0: no room"),
    "the user's to mend": (telling("2 x.jsonl:3: no"), STOPS, 2, "x.jsonl:3: no"),
    "who noticed that another stopped": (STOPS, LEFT, 143, ""),
    "for want of memory": ("os.kill(os.getpid(), 9)", "time.sleep(60)", 1, "rank 0 was ended by SIGKILL"),
    "nobody reads": ("os._exit(141)", "time.sleep(60)", 141, ""),
}
STUB = "import os, signal, time; {}; time.sleep(60)"


@pytest.mark.parametrize("name", ENDS)
def test_what_ended_ranks_that_were_asked_to_stop_is_reported(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    *doing, code, told = ENDS[name]
    with Fleet() as fleet:
        fleet.asked = signal.SIGTERM
        # They are asked as they start, and inherit what keeps that from ending them before they do anything.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            for rank, what in enumerate(doing):
                fleet.start(rank, [sys.executable, "-ISc", STUB.format(what)], dict(os.environ))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        assert fleet.watch() == code
    said = capfd.readouterr().err
    assert said.startswith(f"tongkuan: {told}") and said.count("\n") == 1 if told else not said


def test_a_rank_that_only_lost_another_is_heard_when_nobody_knows_more(capfd: pytest.CaptureFixture[str]) -> None:
    with Fleet() as fleet:
        for rank in range(2):
            fleet.start(rank, [sys.executable, "-ISc", STUB.format(LEFT)], dict(os.environ))
        assert fleet.watch() == 1
    assert capfd.readouterr().err == "tongkuan: rank 1 lost another one (gloo)\n"


def test_seconds_of_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_of("TONGKUAN_STUCK_SECONDS") == 1800
    monkeypatch.setenv("TONGKUAN_STOP_SECONDS", "100.5")
    assert seconds_of("TONGKUAN_STOP_SECONDS") == 100.5
    for wrong in ("-1", "0", "nan", "inf", "ten"):
        monkeypatch.setenv("TONGKUAN_STUCK_SECONDS", wrong)
        with pytest.raises(UserError, match=f"TONGKUAN_STUCK_SECONDS={wrong}: not a positive number of seconds"):
            seconds_of("TONGKUAN_STUCK_SECONDS")
