"""Which letters the bytes of file names stand for: archives seldom say so, the items' names show it."""

import unicodedata
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

# The strictest first: where several fit equally well, a text that is right by chance is least likely in the first.
ENCODINGS = ("utf-8", "gb18030", "cp950", "big5hkscs", "cp932", "cp437")
LITTER = {"thumbs.db", ".ds_store", "desktop.ini"}


def decode_names(names: Sequence[tuple[bytes, str | None]], marks: AbstractSet[str]) -> list[str]:
    """Each (bytes, text where it is known) as text, all in the encoding that finds most of the items' `marks`.

    Only a name that is no text in that encoding, or that finds a mark in another one alone, is read in another.
    """
    unknown = [raw for raw, text in names if text is None and not raw.isascii()]
    if not unknown:
        return [text if text is not None else raw.decode("ascii") for raw, text in names]
    count = len(set(unknown))
    tables: dict[str, dict[bytes, str]] = {}
    found: dict[str, set[bytes]] = {}
    for encoding in ENCODINGS:
        tables[encoding] = decode_all(unknown, encoding)
        found[encoding] = {raw for raw, text in tables[encoding].items() if not marks.isdisjoint(marks_of(text))}
        if len(found[encoding]) == count:
            break
    ranked = sorted(tables, key=lambda encoding: (-len(found[encoding]), len(tables[encoding]) < count))

    def text_of(raw: bytes) -> str:
        fitting = [encoding for encoding in ranked if raw in found[encoding]]
        encoding = next(encoding for encoding in [*fitting, *ranked] if raw in tables[encoding])
        return tables[encoding][raw]

    return [text if text is not None else raw.decode("ascii") if raw.isascii() else text_of(raw) for raw, text in names]


def decode_all(names: Iterable[bytes], encoding: str) -> dict[bytes, str]:
    """Those of `names` that are text in the encoding."""
    table = {}
    for raw in names:
        try:
            table[raw] = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return table


def marks_of(path: str) -> set[str]:
    """What tells a path: its steps, and the last less its suffix and less all suffixes, where they are not ASCII."""
    steps = unicodedata.normalize("NFC", path.replace("\\", "/")).casefold().split("/")
    marks = (*steps, steps[-1].rpartition(".")[0], steps[-1].partition(".")[0])
    return {mark for mark in marks if not mark.isascii()}


def marks_of_all(paths: Iterable[str]) -> set[str]:
    return {mark for path in paths if not path.isascii() for mark in marks_of(path)}


def is_litter(path: str) -> bool:
    """Whether a system left the file beside the pictures: a Mac's resource forks, lists of previews."""
    *folders, name = path.replace("\\", "/").split("/")
    return "__MACOSX" in folders or name.startswith("._") or name.casefold() in LITTER


def printable(text: str) -> str:
    """The text on one line: what a terminal would obey, and bytes that are no text, as marks."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
