"""A file of records as a stream of UTF-8, whatever it was written in: gzip, UTF-16, UTF-32, GB18030."""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from tongkuan.base.errors import UserError, missing
from tongkuan.records.unfit import beside, in_place, packed

BLOCK = 1 << 20  # bytes read ahead
MAX_LINE = 64 << 20  # bytes; a line is held in memory whole
MAX_WRAPS = 3  # of gzip around gzip
SAMPLE = 1 << 16  # bytes by which an encoding is recognised
UTF8 = "utf-8"
GB18030 = "gb18030"
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# JSON begins with two ASCII characters: where their zeros stand tells the width and the order.
ZEROS: dict[tuple[int, ...], str] = {
    (0, 1, 1, 1): "utf-32-le",
    (1, 1, 1, 0): "utf-32-be",
    (0, 1, 0, 1): "utf-16-le",
    (1, 0, 1, 0): "utf-16-be",
}
CODECS = {  # names that iconv knows, and Python's
    GB18030: GB18030,
    "big5": "big5",
    "shift_jis": "cp932",
    "euc-jp": "euc_jp",
    "euc-kr": "euc_kr",
    "windows-1251": "cp1251",
    "windows-1252": "cp1252",
}
MIN_DISTINCT = 16  # characters from which on a text of Hangul positions alone is no Chinese
MIN_SHARE = 0.5  # of characters that GB2312 has; 0.9 and more in shops' titles, 0.6 in traditional ones
FROM_BOTH = (
    "import sys; sys.stdout.buffer.writelines((line.decode() if b else line.decode('gb18030')).encode() "
    "for line in open(sys.argv[1], 'rb') for b in [line.decode(errors='ignore').encode() == line])"
)


@dataclass(slots=True)
class Stream:
    """The bytes of a file as UTF-8, and what it was taken for on the way."""

    file: BinaryIO
    encoding: str = UTF8
    codec: str = "utf-8-sig"
    """The name by which Python reads the file, byte order mark and all."""
    kinds: list[str] = field(default_factory=list)


def open_file(path: Path, advice: str) -> BinaryIO:
    """Open a file. UserError when it is not there (ending in `advice`) or may not be read."""
    try:
        return path.open("rb", buffering=BLOCK)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise absent(path, f"no such file; {advice}") from error
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror}); check its name and permissions") from error


@contextmanager
def open_stream(path: Path, advice: str, encoding: str | None = None) -> Iterator[Stream]:
    """As `open_file`, for a file in any form. UserError also when it is no text, or in no encoding that is read."""
    with ExitStack() as stack:
        stream = Stream(stack.enter_context(open_file(path, advice)))
        with reading(path):
            while peek(stream.file, 2) == b"\x1f\x8b":
                if len(stream.kinds) == MAX_WRAPS:
                    raise UserError(f"{path}: gzip in gzip {MAX_WRAPS} times over; unpack it")
                unpacked = stack.enter_context(gzip.GzipFile(fileobj=stream.file, mode="rb"))
                stream.file = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, unpacked), BLOCK))
                stream.kinds.append("gzip")
            head = peek(stream.file, BLOCK)
            if unfit := packed(path, head):
                raise UserError(f"{path}: {unfit}")
            stream.encoding = encoding or encoding_of(head)
            if encoding is None and stream.encoding == UTF8 and not is_utf8(head, is_whole=False) and path.is_file():
                stream.encoding = GB18030 if is_gb18030(path, gather_evidence(path)) else UTF8
            if stream.encoding != UTF8:
                is_marked = head.startswith(tuple(mark for mark, _ in MARKS))
                stream.codec = stream.encoding[:6] if is_marked else stream.encoding
                recoded = Recoded(stream.file, stream.encoding)
                stream.file = cast(BinaryIO, io.BufferedReader(recoded, BLOCK))
                stream.kinds.append(stream.encoding.upper())
        yield stream


def is_utf8(data: bytes, is_whole: bool = True) -> bool:
    """Whether bytes are UTF-8; the end may be cut within a character when they are not whole."""
    try:
        codecs.getincrementaldecoder(UTF8)("strict").decode(data, final=is_whole)
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """UserError for bytes that are not what the first ones promise."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: its gzip data is damaged or breaks off ({error}); copy the file again") from error
    except UnicodeDecodeError as error:
        command = in_place(path, f"iconv -c -f {error.encoding.upper()} -t UTF-8")
        raise UserError(
            f"{path}: not {error.encoding.upper()} throughout, as its beginning is ({error.reason}); copy it again, or "
            f"leave out what is damaged: {command}"
        ) from error


def absent(path: Path, message: str) -> UserError:
    """The error to raise for records that are not there; it names those that lie beside in another form."""
    found = beside(path)
    return UserError(f"{path}: missing; {found}") if found else missing(path, message)


def peek(file: BinaryIO, size: int) -> bytes:
    """The next bytes, which stay to be read."""
    return cast(io.BufferedReader, file).peek(size)[:size]


def encoding_of(head: bytes) -> str:
    """By a byte order mark, or by where zeros stand; UTF-8 else."""
    marked = next((name for mark, name in MARKS if head.startswith(mark)), "")
    return marked or ZEROS.get(tuple(int(byte == 0) for byte in head[:4]), UTF8)


class Recoded(io.RawIOBase):
    """A stream of another encoding as UTF-8. Raises UnicodeDecodeError while it is read."""

    def __init__(self, source: BinaryIO, encoding: str) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._left = memoryview(b"")
        self._is_begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._left:
            block = self._source.read(BLOCK)
            text = self._decoder.decode(block, final=not block)
            if text and not self._is_begun:
                self._is_begun, text = True, text.removeprefix("\ufeff")
            # A lone half of a pair is no character; in a row it would be an error that names its line.
            self._left = memoryview(text.encode("utf-8", "surrogatepass"))
            if not block and not text:
                return 0
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no UTF-8


@dataclass(slots=True)
class Evidence:
    """Lines of a file that are not ASCII, by what they can be; line numbers from 1, 0 for none."""

    first: int = 0
    num_utf8: int = 0
    num_wide: int = 0
    """Of them, those with characters that take three bytes: by chance no other encoding has many."""
    num_gb18030: int = 0
    first_gb18030: int = 0
    num_neither: int = 0
    first_neither: int = 0
    sample: bytes = b""
    """Lines that are not UTF-8."""


def gather_evidence(path: Path) -> Evidence:
    """Go through the file once, with any gzip taken off."""
    found = Evidence()
    with open_stream(path, "", UTF8) as stream:
        for number, line in enumerate(iter(partial(stream.file.readline, MAX_LINE + 1), b""), 1):
            if line.isascii():
                continue
            found.first = found.first or number
            try:
                text = line.decode(UTF8)
            except UnicodeDecodeError:
                found.sample += line[: max(0, SAMPLE - len(found.sample))]
                try:
                    line.decode(GB18030)
                except UnicodeDecodeError:
                    found.num_neither += 1
                    found.first_neither = found.first_neither or number
                else:
                    found.num_gb18030 += 1
                    found.first_gb18030 = found.first_gb18030 or number
            else:
                found.num_utf8 += 1
                found.num_wide += max(text) > "\u07ff"
    return found


def is_gb18030(path: Path, found: Evidence) -> bool:
    """Whether a file that is not UTF-8 is GB18030. UserError when it is neither, or lines are of both."""
    others = found.num_gb18030 + found.num_neither
    if found.num_wide or found.num_utf8 >= others:
        if found.num_gb18030 > 1 and not found.num_neither:
            command = in_place(path, f'python3 -c "{FROM_BOTH}"')
            raise UserError(
                f"{path}:{found.first_gb18030}: {found.num_gb18030:,} lines are GB18030 and {found.num_utf8:,} UTF-8; "
                f"make them all UTF-8: {command}"
            )
        return False
    guess = guess_encoding(found.sample)
    if guess == GB18030:
        if found.num_neither:
            raise UserError(
                f"{path}:{found.first_neither}: not GB18030, as {found.num_gb18030:,} other lines are; mend or delete "
                "the line"
            )
        return True
    if not guess and others == 1:
        return False
    name = guess.upper() or "ENCODING"
    is_like = f"looks like {name}" if guess else "name its encoding"
    raise UserError(
        f"{path}:{found.first_gb18030 or found.first_neither}: not a JSON line: the file is not UTF-8 nor GB18030; "
        f"{is_like}: {in_place(path, f'iconv -f {name} -t UTF-8')}"
    )


def guess_encoding(sample: bytes) -> str:
    """What lines that are not UTF-8 are likely written in, as iconv names it; empty when nothing fits."""
    # Cyrillic stands in words, Latin letters with accents stand alone; the bytes are the same.
    one_byte = "windows-1251" if len(max(re.findall(rb"[\x80-\xff]+", sample), key=len)) > 2 else "windows-1252"
    shares = {name: share_of_common(sample, CODECS[name]) for name in CODECS if one_byte == name or name[0] != "w"}
    best = max(shares, key=lambda name: shares[name])
    if best == GB18030 and shares["euc-kr"] == shares[best]:
        distinct = {character for character in sample.decode("euc_kr", "ignore") if not character.isascii()}
        best = "euc-kr" if len(distinct) >= MIN_DISTINCT else best
    return best if shares[best] >= MIN_SHARE else ""


def share_of_common(sample: bytes, codec: str) -> float:
    """Of the characters that are not ASCII, those that its texts are mostly made of; 0 when it does not fit."""
    text = sample.decode(codec, "ignore")
    lost = len(sample) - len(text.encode(codec))
    characters = [character for character in text if not character.isascii()]
    if not characters or lost > len(sample) / 100 + 3 * (len(sample) >= SAMPLE):
        return 0.0
    if codec in ("cp932", "euc_jp") and 10 * sum("\u3040" <= each <= "\u30ff" for each in characters) < len(characters):
        return 0.0  # no Japanese without kana
    return sum(is_common(character, codec) for character in characters) / len(characters)


def is_common(character: str, codec: str) -> bool:
    """Whether a character is one that texts of an encoding are mostly made of."""
    if codec == "euc_kr":
        return "\uac00" <= character <= "\ud7a3"
    if codec == "cp1251":
        return "\u0410" <= character <= "\u044f"
    if codec == "cp1252":
        return "\u00c0" <= character <= "\u00ff"
    raw = character.encode(codec)
    if codec == GB18030:
        return len(raw) == 4 or (raw[1] >= 0xA1 and (raw[0] in (0xA1, 0xA3) or 0xB0 <= raw[0] <= 0xF7))
    if codec == "big5":
        return 0xA1 <= raw[0] <= 0xC6
    return len(raw) > 1 and ("\u3000" <= character <= "\u30ff" or "\u4e00" <= character <= "\u9fff")
