"""Numbers as people write them, on the command line and in settings: in a range, or refused in a line."""

import argparse
import math
import re
from dataclasses import dataclass
from typing import Any

from tongkuan.base.errors import clip

# In ASCII and without blanks and underscores: what Python's int and float take besides is more likely a slip.
WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


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
    """An argparse type: a finite number, above `above` and at most `most`."""

    above: float = -math.inf
    most: float = math.inf

    def __call__(self, text: str) -> float:
        if REAL.fullmatch(text) and self.above < (number := float(text)) < math.inf and number <= self.most:
            return number
        bound = f" above {self.above:g}" if math.isfinite(self.above) else ""
        bound += f" up to {self.most:g}" if math.isfinite(self.most) else ""
        raise argparse.ArgumentTypeError(f"{clip(text)} is no finite number{bound}; write it as 0.5 or 1e-3")


def as_number(value: object) -> object:
    """The number that a value stands for: YAML has 1e-4 as a text. Texts of another form, yes and no stand for none."""
    if isinstance(value, bool) or (isinstance(value, str) and not REAL.fullmatch(value)):
        raise ValueError("input should be a number, written as 3, 0.5 or 1e-3")
    if isinstance(value, str):
        return int(value) if WHOLE.fullmatch(value) else float(value)
    return value


def finite_throughout(value: Any) -> Any:
    """A value of any depth, none of whose numbers is infinite or no number."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    for part in parts:
        finite_throughout(part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("input should hold finite numbers")
    return value
