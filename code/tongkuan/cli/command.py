"""The command line that all verbs share: errors of usage in one line, help that fits a screen and ends in an example.

Examples go on from what `./entrypoint.sh demo` leaves in `runs/demo`, so that each can be pasted as it stands.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongkuan.base.errors import UserError, clip, nearest

RAW, DATA = Path("data/raw"), Path("data")
# In ASCII and without blanks and underscores: what Python's int and float take besides is more likely a slip.
WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
NEGATIVE = re.compile(r"-(\.?[0-9]|inf|nan)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Whole:
    """An argparse type: a whole number from `low` to `high`."""

    low: int
    high: int

    def __call__(self, text: str) -> int:
        if WHOLE.fullmatch(text) and self.low <= (number := int(text)) <= self.high:
            return number
        raise argparse.ArgumentTypeError(f"{clip(text)} is no whole number from {self.low:,} to {self.high:,}")


@dataclass(frozen=True, slots=True)
class Real:
    """An argparse type: a finite number, above `above`."""

    above: float = -math.inf

    def __call__(self, text: str) -> float:
        if REAL.fullmatch(text) and self.above < (number := float(text)) < math.inf:
            return number
        bound = f" above {self.above:g}" if math.isfinite(self.above) else ""
        raise argparse.ArgumentTypeError(f"{clip(text)} is no finite number{bound}; write it as 0.5 or 1e-3")


class Parser(argparse.ArgumentParser):
    """Options of a verb. `example` is a whole command; `more` stands between the options and it."""

    def __init__(self, verb: str, about: str, example: str, more: str = "") -> None:
        epilog = f"{more.strip()}\n\n" if more else ""
        super().__init__(
            prog=f"./entrypoint.sh {verb}",
            description=about,
            epilog=f"{epilog}example, after ./entrypoint.sh demo:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._negative_number_matcher = NEGATIVE  # argparse's own takes the value -1e-3 for an option
        self.example = example

    def error(self, message: str) -> Any:
        """UserError with the nearest known option."""
        if message.startswith("unrecognized arguments"):
            known = [option for action in self._actions for option in action.option_strings]
            for word in message.split():
                if word.startswith("--"):
                    message += nearest(word.partition("=")[0], known)
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
