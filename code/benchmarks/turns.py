"""Ways of doing one thing, run in turn and compared. Imports nothing heavy: spawned processes load it."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def in_turn(runs: int, *ways: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each, run by run: the machine's drift meets both."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(runs):
        for taken, run in zip(seconds, ways, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return seconds


def report(name: str, unit: str, amount: int, seconds: Sequence[Sequence[float]]) -> None:
    """A line of the table on the published way and ours: medians, and the ratio with its spread over the runs."""
    rates = [amount / statistics.median(taken) for taken in seconds]
    ratios = [published / ours for published, ours in zip(*seconds, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{name:<10}{rates[0]:>12,.2f}{rates[1]:>12,.2f} {unit:<10}{statistics.median(ratios):>7.2f} x  ({spread})",
        flush=True,
    )
