"""Read a split's picture files, hostile ones included, and turn each into a square JPEG; `resize.py` calls this."""

import bisect
import hashlib
import io
import itertools
import logging
import os
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from tongkuan.files import PICTURE_FORMATS, UserError

MAX_PIXELS = 100_000_000
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} megapixels"
MAX_BYTES = 64 << 20  # of one picture file, unpacked
MAX_NAME = 200  # bytes of UTF-8; file systems stop at 255
# A JPEG is decoded at 1/2, 1/4 or 1/8 only when that leaves this many times the wanted side. The mean difference from
# the full decode is then at most 0.92 grey levels, on white noise; 0.45 on noisy shapes. At 2 times noise is 3.6 off.
ROOM = 4
ENOUGH_ROWS = 0.5  # a truncated picture is kept when at least this share of its rows was decoded


class UnreadableError(Exception):
    """This picture cannot be read; the text says why, the size is 0 where the header does not say."""

    def __init__(self, cause: str, width: int = 0, height: int = 0) -> None:
        super().__init__(cause)
        self.width, self.height = width, height


# ---------------------------------------------------------------------------------------------------------------------
# Where pictures come from


class Folder:
    """Picture files below a folder; a key is the path of one."""

    def __init__(self, root: str) -> None:
        self.root = root

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield (path below the root with `/`, key)."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                if path.is_file():  # a named pipe would block for ever
                    yield decode_name(os.fsencode(path.relative_to(self.root).as_posix())), str(path)

    def read(self, key: Any) -> bytes:
        """A file's bytes, at most MAX_BYTES. Raises UnreadableError."""
        try:
            with open(key, "rb") as file:
                return checked_size(file.read(MAX_BYTES + 1))
        except OSError as error:
            raise UnreadableError(error.strerror or "cannot be opened") from error


class Archive:
    """Picture files of a zip in one or more parts; a key is the number of an entry. Each process opens its own."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self.parts = parts
        try:
            self.zip = zipfile.ZipFile(io.BufferedReader(Joined(parts)))
        except Exception as error:  # a damaged table of contents raises all sorts
            name = parts[0] if len(parts) == 1 else f"{parts[0]} and the {len(parts) - 1} parts after it"
            raise UserError(f"{name}: not a whole zip archive; run ./entrypoint.sh download again") from error
        self.infos = self.zip.infolist()

    def __reduce__(self) -> tuple[type["Archive"], tuple[tuple[str, ...]]]:
        return Archive, (self.parts,)  # an open file cannot travel to a worker, its name can

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield (path in the archive, key). A Mac's resource forks are no pictures and are passed over."""
        for number, info in enumerate(self.infos):
            if not info.is_dir() and not info.filename.startswith("__MACOSX/"):
                is_utf8 = info.flag_bits & 0x800
                yield info.filename if is_utf8 else decode_name(info.filename.encode("cp437", "replace")), number

    def read(self, key: Any) -> bytes:
        """An entry's bytes, at most MAX_BYTES. Raises UnreadableError."""
        info = self.infos[key]
        if info.flag_bits & 0x1:
            raise UnreadableError("encrypted")
        try:
            with self.zip.open(info) as file:
                return checked_size(file.read(MAX_BYTES + 1))
        except UnreadableError:
            raise
        except Exception as error:  # zlib, lzma, bad checksums, unknown methods: all of them this entry's fault
            raise UnreadableError(f"cannot be unpacked ({reason(error)})") from error


Source: TypeAlias = Folder | Archive


class Joined(io.RawIOBase):
    """Files read as if they were one, seekable, without writing the joined file."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.files = [open(path, "rb") for path in paths]  # noqa: SIM115 - they live as long as this object
        sizes = [file.seek(0, io.SEEK_END) for file in self.files]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.starts[-1]}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill what the part under the position can give; 0 at the end."""
        if self.position >= self.starts[-1]:
            return 0
        part = bisect.bisect_right(self.starts, self.position) - 1
        self.files[part].seek(self.position - self.starts[part])
        count = self.files[part].readinto(buffer)
        self.position += count
        return count

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()


def checked_size(data: bytes) -> bytes:
    """`data`, unless it is more than one picture may have."""
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"larger than {MAX_BYTES >> 20} MB")
    return data


def decode_name(raw: bytes) -> str:
    """A file name's text: UTF-8, else GBK as Chinese Windows writes it, else with marks for what is neither."""
    for encoding in ("utf-8", "gbk"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("utf-8", "replace")


def find_source(raw_dir: Path, split: str) -> Source | None:
    """A split's pictures: the zip, else its parts, else the folder, else None. Raises UserError for a missing part."""
    archive = raw_dir / f"item_{split}_images.zip"
    if archive.is_file():
        return Archive((str(archive),))
    parts = sorted(raw_dir.glob(f"{archive.name}.part[a-z][a-z]"))
    if parts:
        letters = ("".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2))
        for part, suffix in zip(parts, letters, strict=False):
            if not part.name.endswith(suffix):
                raise UserError(f"{archive}.part{suffix}: this part is missing; run ./entrypoint.sh download again")
        return Archive(tuple(str(part) for part in parts))
    folder = raw_dir / f"item_{split}_images"
    return Folder(str(folder)) if folder.is_dir() else None


# ---------------------------------------------------------------------------------------------------------------------
# One picture


def squash(data: bytes, size: int) -> tuple[bytes, str, int, int]:
    """(JPEG of size x size without metadata, "" or what was repaired, source width, source height).

    Raises UnreadableError for anything that is not a picture or not enough of one.
    """
    try:
        image, width, height = decode_reduced(data, size * ROOM)
        repair = ""
    except UnreadableError:
        raise
    except Exception as error:  # decoders of hostile bytes raise all sorts; each is this picture's fault alone
        try:
            image, repair, width, height = decode_truncated(data, reason(error))
        except UnreadableError:
            raise
        except Exception:
            raise UnreadableError(reason(error)) from error
    buffer = io.BytesIO()
    bicubic(image, size).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue(), repair, width, height


def silence_pillow() -> None:
    """Keep its log off the terminal: what is wrong with a picture goes into the ledger."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def bicubic(image: Image.Image, size: int) -> Image.Image:
    """An RGB picture squashed to size x size, without metadata.

    Pillow's bicubic is Catmull-Rom: this differs by 0.2 grey levels on average, 0.4 on enlarged noise, in a fifth of
    the time. Pixels travel as bytes: the package's way with Pillow pictures, 0.7 ms faster, reaches into their memory.
    """
    squashed = ImageData(size, size, PixelType.U8x3)
    options = ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False)
    Resizer().resize(ImageData(*image.size, PixelType.U8x3, image.tobytes()), squashed, options)
    return Image.frombytes("RGB", (size, size), squashed.get_buffer())


def reduction(width: int, height: int, least: int) -> int:
    """The largest of 8, 4, 2 and 1 that leaves `least` pixels a side and divides both.

    A side that is not divided is padded by the decoder, which would shift the picture.
    """
    fits = (scale for scale in (8, 4, 2) if min(width, height) >= scale * least)
    return next((scale for scale in fits if width % scale == height % scale == 0), 1)


def decode_reduced(data: bytes, least: int) -> tuple[Image.Image, int, int]:
    """`decode` with `least`; a damaged picture gets a full decode, whose error is the one that the ledger quotes."""
    try:
        return decode(data, least)[:3]
    except UnreadableError:
        raise
    except Exception:
        return decode(data)[:3]


def decode(data: bytes, least: int | None = None) -> tuple[Image.Image, int, int, str | None]:
    """(upright RGB picture of the first frame, width and height as stored, format).

    With `least`, a JPEG may come reduced, to no fewer pixels a side than that; width and height stay the stored ones.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata and on sizes, which are checked below
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableError(TOO_LARGE, width, height)
            if least and (scale := reduction(width, height, least)) > 1:
                image.draft(None, (width // scale, height // scale))  # does nothing to what is not a JPEG
            image.load()
            return to_rgb(upright(image)), width, height, image.format


def decode_truncated(data: bytes, cause: str) -> tuple[Image.Image, str, int, int]:
    """(picture, what was repaired, width, height) of a damaged file; rows that never came turn white.

    Raises UnreadableError when too few came. Pillow's switch is global, so it is set only here: a process decodes one
    picture at a time.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        image, width, height, kind = decode(data)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    pixels = np.array(image)  # (rows, columns, 3)
    rows = pixels[::-1] if kind == "BMP" else pixels  # a BMP is stored from the bottom up
    # Decoders fill what never came with one colour: zero, or for a JPEG the last colour that did come.
    is_lost = (rows == rows[-1, -1]).all(axis=(1, 2))
    if kind != "GIF":  # whose rows come interlaced; elsewhere only the last ones can be lost, the rest is plain picture
        is_lost = is_lost[::-1].cumprod()[::-1].astype(bool)
    share = 1 - is_lost.mean()
    if share < ENOUGH_ROWS:
        raise UnreadableError(f"{cause}; only {share:.0%} of its rows came through", width, height)
    rows[is_lost] = 255
    return Image.fromarray(pixels), f"{cause}; {share:.0%} of its rows came through", width, height


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; broken EXIF says nothing."""
    try:
        # Asked first: exif_transpose copies what lies upright.
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if is_turned else image
    except Exception:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits: deep greys scaled rather than cut off at 255, transparency on white."""
    if image.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(image, dtype=np.float32))
        highest = float(levels.max(initial=0))
        # I;16 says its range; for the 32-bit modes the smallest usual range that holds the values is taken.
        usual = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0, highest)
        top = next(limit for limit in usual if highest <= limit)
        return Image.fromarray((levels / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(layered, mask=layered.getchannel("A"))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def reason(error: Exception) -> str:
    """A short cause for the ledger, the same on every run: no addresses, no paths."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    text = re.sub(r"<.*?>|0x[0-9a-f]+", "…", str(error).strip().split("\n")[0])[:80]
    return text or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Names


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
