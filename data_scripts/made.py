"""Which files of a folder a verb has made, by their bytes: what a user put there or changed is never written over."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import orjson

from tongkuan.base.errors import UserError
from tongkuan.base.files import publish, sha256_of


class Made:
    """The record in `.VERB.json`: by name the hashes that a file may have, two while it is being replaced."""

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self.verb, self.path = folder, verb, folder / f".{verb}.json"
        self.known: dict[str, list[str]] = {}
        with suppress(OSError, ValueError, TypeError):  # nothing, or nothing readable, is known
            known = dict(orjson.loads(self.path.read_bytes()))
            self.known = {str(name): list(map(str, hashes)) for name, hashes in known.items()}

    def check(self, pattern: str) -> None:
        """Raise UserError for the first file or folder of such a name that is not as it was made."""
        for path in sorted(self.folder.glob(pattern)):
            if hash_of(path) not in self.known.get(path.name, []):
                raise UserError(
                    f"{self.folder}: holds other data ({path.name} is not as {self.verb} made it, or not made by it); "
                    "move it away or name an empty folder with --raw"
                )

    def note(self, name: str, sha256: str) -> None:
        """Remember a file that is about to be published: killed before or after, the next run knows it."""
        self.known[name] = [*dict.fromkeys([*self.known.get(name, [])[-1:], sha256])]
        self.save()

    def finish(self) -> None:
        """Forget what was replaced."""
        self.known = {name: hashes[-1:] for name, hashes in self.known.items() if (self.folder / name).exists()}
        self.save()

    def save(self) -> None:
        with publish(self.path) as file:
            file.write(orjson.dumps(self.known, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))


def hash_of(path: Path) -> str:
    """Of a file's bytes, or of all names and files below a folder. Raises UserError for what cannot be read."""
    try:
        if not path.is_dir():
            return sha256_of(path)
        files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        return hash_of_files({file.relative_to(path).as_posix(): sha256_of(file) for file in files})
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror}); mend its permissions or move it away") from error


def hash_of_files(hashes: Mapping[str, str]) -> str:
    """Of a folder, from the hash of each file by its path."""
    return hashlib.sha256(orjson.dumps(dict(hashes), option=orjson.OPT_SORT_KEYS)).hexdigest()
