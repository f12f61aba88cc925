"""The table of verbs fits the functions that they call, and what needs no library imports none."""

import importlib
import subprocess
import sys
from inspect import Parameter, signature
from typing import Any, get_args

import pytest
from commands import environment

from tongkuan.cli.options import PRECISION, STYLE
from tongkuan.cli.verbs import VERBS, Verb
from tongkuan.records.attributes import AttributeStyle
from tongkuan.settings import Precision

HELPS = """
import contextlib, sys
from tongkuan.cli.verbs import VERBS, main
for words in ((verb, option) for verb in VERBS for option in ("--help", "--nonsense")):
    with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit, Exception):
        main(words)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_a_help_and_a_wrong_option_are_answered_without_any_library() -> None:
    """Libraries take seconds to import, and the help is there before they are installed."""
    command = [sys.executable, "-S", "-c", HELPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert set(done.stdout.split()) <= {*sys.stdlib_module_names, "__main__", "tongkuan"}, done.stdout


def functions_of(verb: Verb) -> list[Any]:
    """What a verb may call, for its arguments and with them."""
    found = []
    for target in (verb.function, *verb.instead.values(), *verb.derived.values()):
        module, _, name = target.partition(":") if isinstance(target, str) else ("", "", "")
        found.append(getattr(importlib.import_module(module), name) if module else target)
    return found


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_each_option_fills_a_parameter_and_each_parameter_without_a_default_is_filled(verb: Verb) -> None:
    options = {option.parameter for option in (*verb.options, *verb.one_of)}
    parameters = [parameter for found in functions_of(verb) for parameter in signature(found).parameters.values()]
    used_here = {*verb.instead, *({"nproc", "nnodes", "node_rank", "master"} if verb.has_ranks else ())}
    assert options <= {parameter.name for parameter in parameters} | used_here
    required = {parameter.name for parameter in parameters if parameter.default is Parameter.empty}
    assert required <= options | verb.derived.keys()
    assert set(verb.outputs) <= options


def test_options_offer_what_settings_know() -> None:
    assert PRECISION.more["choices"] == get_args(Precision) and STYLE.more["choices"] == get_args(AttributeStyle)
