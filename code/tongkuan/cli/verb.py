"""What a verb is: its options, and the function it calls, which is imported when it is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tongkuan.cli.options import Option

Target = str | Callable[..., Any]
"""A function, or `module:function`. It is called with the arguments that it has parameters for."""
DEMO_DATA, DEMO_MODEL = "--data runs/demo/data", "--model runs/demo/weights/model.safetensors"
MATCHED = "--out runs/demo/match"
SUBMITTED, ANSWERS = "--submit runs/demo/submit", "--pairs runs/demo/data/item_test_answers.jsonl"


@dataclass(frozen=True)
class Verb:
    """One verb."""

    about: str
    example: str
    """What `./entrypoint.sh` is followed by, once the demo has run."""
    options: tuple[Option, ...]
    function: Target
    """A text that it returns is printed."""
    instead: Mapping[str, Target] = field(default_factory=dict)
    """Functions to call instead, by the option that asks for it."""
    derived: Mapping[str, Target] = field(default_factory=dict)
    """Arguments that follow from the options, by name."""
    one_of: tuple[Option, ...] = ()
    """Further options, of which exactly one is to be given."""
    outputs: tuple[str, ...] = ()
    """Arguments, of a verb that reads --data, that name what it writes: a folder (`…_dir`) or a file."""
    has_ranks: bool = False
    more: str = ""
    """What --help says between the options and the example."""
