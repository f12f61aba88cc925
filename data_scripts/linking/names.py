"""Names of pictures: safe ones to write, and the forms in which an item's name and a file's path are compared."""

import hashlib
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import unquote_to_bytes

MAX_NAME = 200  # bytes of UTF-8; file systems stop at 255
MAX_STEPS = 32  # of a path, from its end: a hostile one of thousands would have as many tails
MAX_CHARACTERS = 4096  # a longer path is compared as it stands only
# Only these are suffixes: the .0 of `sku1.0` is none. A shop's .SS2 and .dpg are JPEGs under another name.
KINDS = (
    "jpg|jpeg|jpe|jfif|png|apng|gif|bmp|dib|webp|tif|tiff|avif|heic|heif|ico|ppm|pgm|pbm|pnm|jp2|j2k|jpx|svg|ss2|dpg"
)
SUFFIX = re.compile(rf"\.(?:{KINDS})$")
QUERY = re.compile(rf"^(.*?\.(?:{KINDS}))\?.*$", re.DOTALL | re.IGNORECASE)  # `a.jpg?x=1`
# What shops append to a whole name to ask for a size or a kind: a.jpg_400x400q90.jpg_.webp, a.jpg_sum.jpg, a.jpg!w400
RENDITION = re.compile(
    rf"(\.(?:{KINDS}))(?:_(?:\d{{1,5}}x\d{{1,5}}[a-z0-9]*|q\d{{1,3}}[a-z0-9]*|sum|[bms])?(?:\.(?:{KINDS})|(?=_|$)))*"
    r"(?:_?[!@~][^/]*)?$"
)
SELLER = re.compile(rf"_?!!\d[^./]*(?=\.(?:{KINDS})$)")  # Taobao's, after the picture's own id: O1CN01x_!!123.jpg
STYLE = re.compile(rf"\._[a-z0-9,_]*_(?=\.(?:{KINDS})$)")  # Amazon's: 71x._ac_sx300_.jpg
ROOT = re.compile(r"(?:[a-z]|https?|ftp|file):", re.IGNORECASE)  # C: and the scheme of an address
MARKED = re.compile(r"[%?!@~]|\.[^/]*_")  # no name without one of these has anything to take off
ESCAPE = re.compile(r"%[0-9a-fA-F]{2}")


def path_steps(path: str) -> list[str]:
    """`C:\\a\\./b.jpg` -> [`a`, `b.jpg`]: the last MAX_STEPS steps; roots, `.` and `..` are dropped."""
    steps = [step for step in path.replace("\\", "/").split("/") if step not in ("", ".", "..")]
    if len(steps) > 1 and ROOT.fullmatch(steps[0]):
        del steps[0]
    return steps[-MAX_STEPS:]


def tails(path: str) -> list[str]:
    """`a/b/c.jpg` -> [`a/b/c.jpg`, `b/c.jpg`, `c.jpg`]; none of an empty path."""
    steps = path.split("/") if path else []
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
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


# ---------------------------------------------------------------------------------------------------------------------
# Forms of a path, from the strictest on. Each gives the keys under which a path is found.


def written(path: str) -> tuple[str, ...]:
    """As it stands."""
    return ("/".join(path_steps(path)),)


def folded(path: str) -> tuple[str, ...]:
    """Blind to letter case and to how accents are written."""
    return (fold(*written(path)),)


@lru_cache(1024)  # asked for again at once, by `stems` for one
def original(path: str) -> tuple[str, ...]:
    """`folded`, less what addresses and shops add: escapes, a query, a size, a style."""
    if len(path) > MAX_CHARACTERS or not MARKED.search(path):
        return folded(path)
    for _ in range(2):  # a saved address may hold its query escaped
        path = unescaped(QUERY.sub(r"\1", path))
    (key,) = folded(path)
    for pattern, kept in ((RENDITION, r"\1"), (SELLER, ""), (STYLE, "")):
        key = pattern.sub(kept, key)
    return (key,)


def unescaped(path: str) -> str:
    """Without %20 and the like, where they spell a text."""
    if not ESCAPE.search(path):
        return path
    raw = unquote_to_bytes(path)
    for encoding in ("utf-8", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return path


def stems(path: str) -> tuple[str, ...]:
    """`original` with and without its picture suffix: `a.jpg` meets `a.png`, `a` and `a.jpg.png`."""
    (key,) = original(path)
    stem = SUFFIX.sub("", key)
    return (key, stem) if stem not in ("", key) and not stem.endswith("/") else (key,)


FORMS: tuple[Callable[[str], tuple[str, ...]], ...] = (written, folded, original, stems)
