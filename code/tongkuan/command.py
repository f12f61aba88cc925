"""The command line that all verbs share: errors of usage in one line, help that fits a screen and ends in an example.

Examples go on from what `./entrypoint.sh demo` leaves in `runs/demo`, so that each can be pasted as it stands.
"""

import argparse
from pathlib import Path
from typing import Any

from tongkuan.errors import UserError, nearest

RAW, DATA = Path("data/raw"), Path("data")


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
        self.example = example

    def error(self, message: str) -> Any:
        """UserError with the nearest known option."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            if word.startswith("--"):
                message += nearest(word.partition("=")[0], known)
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
