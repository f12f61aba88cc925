"""The rows of the table: each is written the moment it is known, and says so when nothing could be measured."""

import gc
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import orjson
import torch

Status = Literal["measured", "not measured", "failed"]
HEADER = "| section | what | measured | spread | beside the first | note |\n|---|---|---|---|---|---|"


class OutOfTimeError(BaseException):
    """A section has used up its time. No Exception, so that no library takes it for one of its own."""


@dataclass(frozen=True)
class Row:
    """A line of gpu.jsonl."""

    section: str
    name: str
    status: Status
    value: float | str | None = None
    """The median of `runs`, or words."""
    unit: str = ""
    least: float | None = None
    most: float | None = None
    runs: int | None = None
    ratio: float | None = None
    """Median over the runs of this way's rate by that of the first way of the same comparison."""
    note: str = ""

    def line(self) -> str:
        """The row in Markdown."""
        value = f"**{self.status}**" if self.value is None else f"{shown(self.value)} {self.unit}".strip()
        spread = "" if self.least is None or self.most is None else f"{shown(self.least)} to {shown(self.most)}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} x"
        cells = (self.section, self.name, value, spread, ratio, self.note)
        return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def shown(value: float | str) -> str:
    """A number with four digits, words as they are."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Book:
    """All rows, in the order in which they came, and the file that has them."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def add(self, row: Row) -> None:
        """Append a row to the file, at once, and show it."""
        self.rows.append(row)
        with self.path.open("ab") as file:
            file.write(orjson.dumps(asdict(row)) + b"\n")
        print(row.line(), flush=True)

    def table(self) -> str:
        """All rows in Markdown."""
        return "\n".join([HEADER, *(row.line() for row in self.rows)])

    def counts(self) -> dict[Status, int]:
        """Rows by how they ended."""
        return {status: sum(row.status == status for row in self.rows) for status in get_args(Status)}


class Page:
    """What a section writes its rows with, and its time."""

    def __init__(self, book: Book, section: str, deadline: float) -> None:
        self.book, self.section, self.deadline = book, section, deadline

    def measured(
        self,
        name: str,
        values: float | str | Sequence[float],
        unit: str = "",
        note: str = "",
        ratio: float | None = None,
    ) -> None:
        """A row of one value, or of several with their median and spread."""
        if isinstance(values, float | int | str):
            self.book.add(Row(self.section, name, "measured", values, unit, ratio=ratio, note=note))
            return
        median = statistics.median(values)
        ends = min(values), max(values)
        self.book.add(Row(self.section, name, "measured", median, unit, *ends, len(values), ratio, note))

    def not_measured(self, name: str, reason: str) -> None:
        """A row that says why there is no figure."""
        self.book.add(Row(self.section, name, "not measured", note=reason))

    def failed(self, name: str, reason: str) -> None:
        """A row that makes the whole program fail, told loudly."""
        self.book.add(Row(self.section, name, "failed", note=reason))
        print(f"\nFAILED: {self.section}: {name}: {reason}\n", file=sys.stderr, flush=True)

    def has_time(self, name: str) -> bool:
        """Whether the section's time is not used up; if it is, a row says so."""
        if time.monotonic() < self.deadline:
            return True
        self.not_measured(name, "the section's time was used up; give --seconds more")
        return False

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """What fails inside becomes a row, and what comes after goes on; so does what a device has no memory for."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.not_measured(name, f"does not fit: {first_line(error)}")
        except Exception as error:  # whatever it is, the other rows are worth having
            traceback.print_exc()
            self.failed(name, f"{type(error).__name__}: {first_line(error)}")
        free()


def free() -> None:
    """Give a GPU's memory back that nothing holds any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """Of what an error says, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """OutOfTimeError inside, in the main thread, when it takes longer."""

    def ring(*_: object) -> None:
        raise OutOfTimeError

    before, started = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        # Somebody else's alarm, such as a test's, rings when it would have.
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 0.01) if left else 0)
        signal.signal(signal.SIGALRM, before)
