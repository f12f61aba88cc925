"""Speed, memory and numbers on one GPU in one call: a table, and its rows as they come in FOLDER/gpu.jsonl.

`PYTHONPATH=code:. .venv/bin/python code/benchmarks/gpu.py --out runs/gpu --seconds 540`
Networks of the published sizes with random weights; nothing is downloaded. `--tiny` runs every section in small, also
with `--device cpu`. The exit code is 1 when a section failed, or when attention is not fused on the GPU.
"""

import argparse
import faulthandler
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_sections.bench import REAL, SMALL, Bench
from gpu_sections.book import Book, OutOfTimeError, Page, at_most, free
from gpu_sections.feed import feed
from gpu_sections.kernels import kernels
from gpu_sections.limits import limits
from gpu_sections.near import near
from gpu_sections.predict import predict
from gpu_sections.right import right
from gpu_sections.same_bytes import same_bytes
from gpu_sections.train import memory, train

from tongkuan.ranks.arithmetic import set_arithmetic

GRACE = 10  # seconds, after which a call that Python cannot interrupt is ended
SHARE = 0.9  # of the seconds is dealt to sections; one that does not look at the clock may use the rest


@dataclass(frozen=True)
class Section:
    """A part of the table."""

    name: str
    weight: float
    """Of the time."""
    run: Callable[[Bench, Page], None]


SECTIONS = (
    Section("limits", 40, limits),
    Section("kernels", 40, kernels),
    Section("right", 60, right),
    Section("predict", 90, predict),
    Section("train", 90, train),
    Section("memory", 30, memory),
    Section("same bytes", 90, same_bytes),
    Section("feed", 40, feed),
    Section("near the limit", 90, near),
)


def run_sections(sections: Sequence[Section], bench: Bench, book: Book, seconds: float) -> None:
    """All sections; what one leaves of its time is the next ones'. One that fails leaves the others as they are."""
    started, whole, dealt = time.monotonic(), sum(section.weight for section in sections), 0.0
    for section in sections:
        dealt += section.weight
        deadline = started + SHARE * seconds * dealt / whole
        page = Page(book, section.name, deadline)
        if not page.has_time("all of it"):
            continue
        try:
            with at_most(deadline - time.monotonic() + (1 - SHARE) * seconds), page.trying("the rest of it"):
                section.run(bench, page)
        except OutOfTimeError:
            page.failed("the rest of it", "did not end in its time")
        free()


def finish(book: Book, out: Path, seconds: float) -> int:
    """Print the table, write it, and say what failed: the exit code."""
    (out / "gpu.md").write_text(book.table() + "\n", encoding="utf-8")
    counts = book.counts()
    print("\n" + book.table() + "\n\n" + ", ".join(f"{count} {status}" for status, count in counts.items()), end="")
    print(f", in {seconds:.0f} s; rows: {book.path}, table: {out / 'gpu.md'}", flush=True)
    failed = [row for row in book.rows if row.status == "failed"]
    for row in failed:
        print(f"FAILED: {row.section}: {row.name}: {row.note}", file=sys.stderr)
    return 1 if failed else 0


def main(words: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="for rows and table (default runs/gpu)")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it (default 540)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="every section in small: does it run?")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], help="these sections")
    arguments = parser.parse_args(words)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("a CPU takes hours at real size; give --tiny too")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --tiny shows that all lines run")
    chosen = [section for section in SECTIONS if not arguments.only or section.name in arguments.only]
    started = time.monotonic()
    faulthandler.dump_traceback_later(arguments.seconds + GRACE, exit=True, file=2)
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")
    set_arithmetic()  # as a group of ranks begins
    book = Book(arguments.out / "gpu.jsonl")
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        bench = Bench(device, SMALL if arguments.tiny else REAL, Path(folder))
        try:
            run_sections(chosen, bench, book, arguments.seconds)
        finally:
            faulthandler.cancel_dump_traceback_later()
            code = finish(book, arguments.out, time.monotonic() - started)
    return code


if __name__ == "__main__":
    sys.exit(main())
