"""benchmarks/gpu.py: every section runs on a CPU too, what fails is told and leaves the other rows."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from worlds import read_jsonl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu
from gpu_sections import kernels, limits, train
from gpu_sections.bench import SMALL, Bench
from gpu_sections.book import Book, OutOfTimeError, Page, at_most

CPU = torch.device("cpu")


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "gpu.jsonl")


@pytest.fixture
def page(book: Book) -> Page:
    return Page(book, "section", time.monotonic() + 100)


@pytest.fixture
def as_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench on the CPU that goes where a GPU would."""
    monkeypatch.setattr(Bench, "is_gpu", True)
    return Bench(CPU, SMALL, tmp_path)


WORDS = ("--tiny", "--device", "cpu", "--out")


def rows_of(out: Path, shown: str) -> list[dict[str, Any]]:
    """The rows that a run has left, all measured but for what needs a GPU."""
    rows = read_jsonl(out / "gpu.jsonl")
    table = (out / "gpu.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == len(rows) + 2 and table in shown
    for row in rows:
        assert row["status"] == "measured" or "needs CUDA" in row["note"], row
    return rows


@pytest.mark.slow
def test_every_section_runs_on_a_cpu_in_small(tmp_path: Path) -> None:
    command = [sys.executable, gpu.__file__, *WORDS, tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    rows = rows_of(tmp_path / "out", run.stdout)
    measured = Counter(row["section"] for row in rows if row["status"] == "measured")
    assert [*measured] == [section.name for section in gpu.SECTIONS if section.name != "memory"]
    same = [row["value"] for row in rows if row["unit"] == "tensors differ"]
    assert len(same) == 12 and not any(same), "a CPU learns the same bytes each time"


def test_a_section_compares_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*WORDS, str(tmp_path / "out"), "--only", "right"]) == 0
    rows = rows_of(tmp_path / "out", capsys.readouterr().out)
    verdicts = {row["name"].split(":")[0]: row["value"] for row in rows if row["unit"] == "verdicts"}
    assert [*verdicts] == ["tf32", "bf16", "bf16, head halved", "fp16", "fp16, head halved", "bf16-residual"]
    assert verdicts["tf32"] == 0, "on a CPU it is fp32"


def test_a_section_that_fails_leaves_the_other_rows(
    book: Book, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def works(_: Bench, page: Page) -> None:
        page.measured("speed", [3.0, 1.0, 2.0], "items/s")

    def fails(_: Bench, page: Page) -> None:
        page.measured("before", 1.0)
        raise RuntimeError("no such kernel")

    def sleeps(*_: object) -> None:
        time.sleep(60)

    sections = [gpu.Section(name, 1, run) for name, run in {"a": works, "b": fails, "c": sleeps, "d": works}.items()]
    gpu.run_sections(sections, Bench(CPU, SMALL, tmp_path), book, 2.0)
    assert gpu.finish(book, tmp_path, 2.0) == 1
    rows = read_jsonl(book.path)
    ends = [(row["section"], row["status"]) for row in rows]
    assert ends[:4] == [("a", "measured"), ("b", "measured"), ("b", "failed"), ("c", "failed")]
    assert ends[4][0] == "d", "measured, or told that no time was left"
    assert (rows[0]["value"], rows[0]["least"], rows[0]["most"], rows[0]["runs"]) == (2.0, 1.0, 3.0, 3)
    told = capsys.readouterr().err
    assert "FAILED: b: the rest of it: RuntimeError: no such kernel" in told
    assert "FAILED: c: the rest of it: did not end in its time" in told


def test_what_is_left_of_the_time_is_looked_at_before_each_part(book: Book) -> None:
    late = Page(book, "section", time.monotonic() - 1)
    assert not late.has_time("part")
    assert book.rows[0].status == "not measured" and "--seconds" in book.rows[0].note


def test_an_alarm_of_others_still_rings() -> None:
    with pytest.raises(OutOfTimeError), at_most(0.3):
        with at_most(60):
            pass
        time.sleep(60)


def test_what_does_not_fit_is_no_failure(book: Book, page: Page) -> None:
    with page.trying("large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")
    assert book.rows[0].status == "not measured" and "90 GiB" in book.rows[0].note


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_that_is_not_fused_fails(
    book: Book, page: Page, as_gpu: Bench, monkeypatch: pytest.MonkeyPatch, backend: SDPBackend
) -> None:
    monkeypatch.setattr(kernels, "ProfilerActivity", SimpleNamespace(CPU=kernels.ProfilerActivity.CPU, CUDA=None))
    monkeypatch.setattr(kernels, "profile", lambda activities: torch.profiler.profile(activities=activities[:1]))
    query = torch.rand(1, 2, 16, 8)
    with sdpa_kernel(backend):
        found = kernels.attention_of(lambda: scaled_dot_product_attention(query, query, query), as_gpu, "fp32")
    kernels.judge(page, "attention", found, is_strict=True)
    kernels.judge(page, "none", Counter(), is_strict=True)
    first, none = book.rows
    assert first.status == ("failed" if backend == SDPBackend.MATH else "measured")
    assert none.status == "failed"


def test_what_a_gpu_does_is_summed(book: Book, page: Page, as_gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, device: DeviceType, time: float = 0, is_user_annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=device, self_device_time_total=time, is_user_annotation=is_user_annotation
        )

    seen = [
        *[event("cudaLaunchKernel", DeviceType.CPU)] * 3,
        *[event("cudaDeviceSynchronize", DeviceType.CPU)] * 2,
        *[event("gemm", DeviceType.CUDA, 1000)] * 2,
        event("softmax", DeviceType.CUDA, 500),
        event("Optimizer.step", DeviceType.CUDA, 9999, is_user_annotation=True),
    ]
    monkeypatch.setattr(kernels, "events_of", lambda work, bench: seen)
    kernels.describe(page, "pass", as_gpu, lambda: time.sleep(0.01))
    values = {row.name: row.value for row in book.rows}
    assert values["pass: kernels"] == 2.5 and values["pass: launches"] == 3
    assert values["pass: the host waits"] == 1, "one is the profiler's own"
    assert values["pass: gemm"] == 2.0


def test_the_probes_memory_is_set_beside_what_came_later(
    book: Book, page: Page, as_gpu: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "peaks", lambda *_, **__: (9 << 30, 10 << 30, 11 << 30))
    train.memory(as_gpu, page)
    assert [row.value for row in book.rows[:3]] == [9, 10, 11]
    assert "-10.0%" in book.rows[1].note


def test_the_drivers_words_are_kept(book: Book, page: Page, as_gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="570.1, 1980 MHz\n"))
    limits.clocks(as_gpu, page)
    assert book.rows[0].value == "570.1, 1980 MHz"


@pytest.mark.parametrize(("words", "told"), [(["--device", "cpu"], "--tiny"), ([], "no GPU")])
def test_without_a_gpu_it_says_what_to_do(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        gpu.main([*words, "--out", str(tmp_path)])
    assert left.value.code == 2 and told in capsys.readouterr().err
