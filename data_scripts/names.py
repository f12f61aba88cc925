"""Names of pictures: safe ones to write, and which picture an item's name means."""

import hashlib
import unicodedata

MAX_NAME = 200  # bytes of UTF-8; file systems stop at 255


def path_tails(path: str) -> list[str]:
    """`a/b/c.jpg` -> [`a/b/c.jpg`, `b/c.jpg`, `c.jpg`]; roots and `..` are dropped."""
    steps = [step for step in path.replace("\\", "/").split("/") if step not in ("", ".", "..")]
    return ["/".join(steps[start:]) for start in range(len(steps))]


def safe_name(name: str, tail: str = "") -> str:
    """A flat file name that ends in .jpg, at most MAX_NAME bytes; `tail` goes before the suffix."""
    text = "".join("_" if c in "/\\" or unicodedata.category(c).startswith("C") else c for c in name).lstrip(".") or "_"
    stem, suffix = text.removesuffix(".jpg"), f"{tail}.jpg"
    if len(stem.encode()) + len(suffix) > MAX_NAME:
        suffix = f"~{hashlib.sha256(name.encode()).hexdigest()[:8]}{suffix}"
        stem = stem.encode()[: MAX_NAME - len(suffix)].decode("utf-8", "ignore")
    return stem + suffix


def fold(name: str) -> str:
    """The same for names that a file system blind to case, or to how accents are written, takes for one."""
    return unicodedata.normalize("NFC", name).casefold()
