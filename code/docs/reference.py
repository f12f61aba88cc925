"""Write reference.md, the options of all verbs and all settings, from the parsers and the settings themselves.

`PYTHONPATH=code:. .venv/bin/python -P code/docs/reference.py`
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from tongkuan.cli.verbs import VERBS, parser_of
from tongkuan.settings import Section, Settings

REFERENCE = Path(__file__).with_suffix(".md")
COMMAND = "PYTHONPATH=code:. .venv/bin/python -P code/docs/reference.py"
NAMES = tuple(VERBS)
INTRODUCTION = f"""\
# Options and settings

<!-- Made by {COMMAND}; change the parser or the setting, not this file. -->

`./entrypoint.sh VERB --help` prints the same. `./entrypoint.sh settings --preset P` prints all settings of a preset and
where each value comes from. `./entrypoint.sh test` runs the test suite and hands its arguments to pytest.

## Verbs
"""


def reference() -> str:
    """The whole page."""
    verbs = "\n".join(describe_verb(name) for name in NAMES)
    sections = "\n".join(describe_section(name, section) for name, section in sections_of(Settings))
    settings = "For a preset, or as `section.key=value` on the command line.\n"
    return f"{INTRODUCTION}\n{verbs}\n## Settings\n{settings}\n{sections}"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def describe_verb(name: str) -> str:
    """What a verb is for, a row an option, what its help explains, and its example."""
    parser = parser_of(name)
    more = (parser.epilog or "").partition("example, after")[0].strip()
    text = f"### {name}\n{parser.description}; for example, after the demo, `{parser.example}`\n\n"
    text += table(("option", "what"), ((option_name(action), action.help or "") for action in options_of(parser)))
    if more:
        text += f"\n```text\n{more}\n```\n"
    return text


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Its options in their order, less --help."""
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def option_name(action: argparse.Action) -> str:
    """An option with what it takes, as code."""
    takes = action.metavar or "|".join(map(str, action.choices or ()))
    value = " ".join(takes) if isinstance(takes, tuple) else takes
    if not action.option_strings:
        return f"`{value}`"
    name, *others = action.option_strings
    return ", ".join(f"`{each}`" for each in (f"{name}{f' {value}' if action.nargs != 0 else ''}", *others))


def sections_of(section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """(name, section) of the sections that one holds."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield name, field.annotation


def describe_section(name: str, section: type[Section]) -> str:
    """What a section of settings is for, and a row a setting."""
    about = " ".join((section.__doc__ or "").split())
    return f"### Section {name}\n{about}\n\n{table(('setting', 'default', 'what'), setting_rows(section, f'{name}.'))}"


def setting_rows(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str]]:
    """(name, default, what it is) of each setting of a section, those of the sections within it last."""
    inner = dict(sections_of(section))
    for name, field in section.model_fields.items():
        if name in inner:
            continue
        default = getattr(section(), name)
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        what = " ".join((field.description or "").split())  # a line's end would end the row
        yield f"`{prefix}{name}`", "" if shown is None else f"`{shown}`", what
    for name, within in inner.items():
        yield from setting_rows(within, f"{prefix}{name}.")


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
