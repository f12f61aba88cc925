"""The one reader of pictures, hostile ones included: decoded, upright, sRGB, squashed to a square."""

import functools
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError

from tongkuan.records.colours import jpeg2000_profile, to_srgb

# Only decoders that stay inside the process: Pillow hands EPS, for one, to Ghostscript.
PICTURE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "ICO", "PPM", "JPEG2000")
MAX_BYTES = 64 << 20  # of one picture file, unpacked
MAX_PIXELS = 100_000_000
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} megapixels"
# A JPEG is decoded at 1/2, 1/4 or 1/8 only when that leaves this many times the wanted side. The mean difference from
# the full decode is then at most 0.92 grey levels, on white noise; 0.45 on noisy shapes. At 2 times noise is 3.6 off.
ROOM = 4
QUALITY = 95  # of the JPEGs that resize makes, stored without halving the colours' resolution
LOSSLESS = ("PNG", "BMP", "PPM")
PLAIN = {"jfif", "jfif_version", "jfif_unit", "jfif_density"}  # what Pillow says of them
SIDE = 384  # pixels of such a JPEG unless resize is given another
ENOUGH_ROWS = 0.5  # a truncated picture is kept when at least this share of its rows was decoded


class UnreadableError(Exception):
    """This picture cannot be read; the text says why, the size is 0 where the header does not say."""

    def __init__(self, cause: str, width: int = 0, height: int = 0) -> None:
        super().__init__(cause)
        self.width, self.height = width, height


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upright RGB picture; width and height as stored. `detail` says what was repaired or set aside, "" nothing."""

    image: Image.Image
    width: int
    height: int
    kind: str | None = None
    detail: str = ""
    is_repaired: bool = False
    is_prepared: bool = False
    """Whether it is a square JPEG as `squash` writes them."""
    is_plain_square: bool = False
    """Whether it is a square of RGB stored without loss and without anything else that tells how it looks."""


def squash(data: bytes, size: int) -> tuple[bytes, str, str, int, int]:
    """(JPEG of size x size without metadata, "ok" or "repaired", detail, source width, source height).

    Raises UnreadableError for anything that is not a picture or not enough of one.
    """
    found = open_picture(data, size * ROOM)
    status = "repaired" if found.is_repaired else "ok"
    return to_jpeg(found.image, size), status, found.detail, found.width, found.height


def read_image(path: Path, size: int, side: int = SIDE) -> NDArray[np.uint8]:
    """A picture squashed to (3, size, size), RGB. Raises UnreadableError.

    What resize has made is taken as it is, and so is a plain square without loss that is no larger than `size`: nothing
    is left to do there. Anything else is read as if `resize --size SIDE` had been there, its JPEG included, since an
    embedding tells the two apart: the same picture put by hand gives the same numbers.
    """
    data = read_file(path)
    found = open_picture(data, side * ROOM)
    if found.is_plain_square and found.width <= size:
        image = found.image
    elif found.is_prepared:
        is_whole = found.image.size == (found.width, found.height)
        image = found.image if is_whole else open_picture(data).image
    else:
        image = decode(to_jpeg(found.image, side)).image
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def prepared_side(path: Path) -> int | None:
    """Pixels a side of a picture that resize has made, from its header; None when it is another or none."""
    try:
        if not path.is_file():  # a named pipe would block for ever
            return None
        with decoding.many(), Image.open(path, formats=("JPEG",)) as image:
            return image.width if is_prepared(image) else None
    except Exception:  # hostile bytes raise all sorts
        return None


def read_file(path: Path) -> bytes:
    """A picture file's bytes, at most MAX_BYTES. Raises UnreadableError."""
    try:
        if not path.is_file():  # a named pipe would block for ever
            raise UnreadableError("no such file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UnreadableError("cannot be opened") from error
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"larger than {MAX_BYTES >> 20} MB")
    return data


def open_picture(data: bytes, least: int | None = None) -> Decoded:
    """A picture of any known format, repaired where enough of it is there. Raises UnreadableError and nothing else.

    With `least`, a JPEG may come reduced, to no fewer pixels a side than that.
    """
    try:
        return decode_reduced(data, least)
    except UnreadableError:
        raise
    except Exception as error:  # decoders of hostile bytes raise all sorts; each concerns this picture alone
        try:
            return decode_truncated(data, reason(error))
        except UnreadableError:
            raise
        except Exception:
            raise UnreadableError(reason(error)) from error


def to_jpeg(image: Image.Image, size: int) -> bytes:
    """An RGB picture squashed to size x size, as the JPEG that resize writes."""
    buffer = io.BytesIO()
    bicubic(image, size).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


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


class Decoding:
    """Lets many threads decode at once, or one alone that has Pillow's switch for truncated files set.

    The switch, and what is done with warnings, hold for the whole process: a picture decoded beside one that is being
    repaired would lose rows without a word.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._is_taken = 0, False

    @contextmanager
    def many(self) -> Iterator[None]:
        """Among others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._inside += 1
            if self._inside == 1:
                self._warnings = warnings.catch_warnings()
                self._warnings.__enter__()
                warnings.simplefilter("ignore")  # on odd metadata and on sizes, which are checked
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._warnings.__exit__(None, None, None)
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Alone, truncated files welcome."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._is_taken = True
            self._changed.wait_for(lambda: not self._inside)
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()


decoding = Decoding()


def decode_reduced(data: bytes, least: int | None) -> Decoded:
    """`decode` with `least`; a damaged picture gets a full decode, whose error is the one that the ledger quotes."""
    if least is None:
        return decode(data)
    try:
        return decode(data, least)
    except UnreadableError:
        raise
    except Exception:
        return decode(data)


def decode(data: bytes, least: int | None = None) -> Decoded:
    """The first frame of a whole picture, as `open_picture` has it; raises what Pillow raises."""
    with decoding.many():
        return decode_now(data, least)


def decode_now(data: bytes, least: int | None = None) -> Decoded:
    """`decode` for a thread that `decoding` has let in."""
    with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableError(TOO_LARGE, width, height)
        if least and (scale := reduction(width, height, least)) > 1:
            image.draft(None, (width // scale, height // scale))  # does nothing to what is not a JPEG
        image.load()
        profile = image.info.get("icc_profile", b"")
        if image.format == "JPEG2000" and not profile:
            profile = jpeg2000_profile(data) or b""
        turned = upright(image)
        rgb, problem = to_rgb(turned, profile)
        is_plain = image.format in LOSSLESS and turned is image and rgb is image and width == height and not problem
        return Decoded(rgb, width, height, image.format, problem, False, is_prepared(image), is_plain)


def is_prepared(image: Image.Image) -> bool:
    """Whether an opened picture is a JPEG as `to_jpeg` writes them. One put by hand that is so too is as good."""
    return (
        isinstance(image, JpegImagePlugin.JpegImageFile)
        and image.format == "JPEG"  # MPO is a JPEG too
        and image.width == image.height
        and image.mode == "RGB"
        and image.info.keys() <= PLAIN
        and image.quantization == prepared_tables()
        and [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    )


@functools.cache
def prepared_tables() -> dict[int, list[int]]:
    """The quantisation tables that tell QUALITY."""
    with Image.open(io.BytesIO(to_jpeg(Image.new("RGB", (8, 8)), 8)), formats=("JPEG",)) as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        return image.quantization


def decode_truncated(data: bytes, cause: str) -> Decoded:
    """A damaged file's picture, where rows that never came are white. Raises UnreadableError when too few came."""
    with decoding.alone():
        found = decode_now(data)
    kind = found.kind
    pixels = np.array(found.image)  # (rows, columns, 3)
    rows = pixels[::-1] if kind == "BMP" else pixels  # a BMP is stored from the bottom up
    # Decoders fill what never came with one colour: zero, or for a JPEG the last colour that did come.
    is_lost = (rows == rows[-1, -1]).all(axis=(1, 2))
    if kind != "GIF":  # whose rows come interlaced; elsewhere only the last ones can be lost, the rest is plain picture
        is_lost = is_lost[::-1].cumprod()[::-1].astype(bool)
    share = 1 - is_lost.mean()
    if share < ENOUGH_ROWS:
        raise UnreadableError(f"{cause}; only {share:.0%} of its rows came through", found.width, found.height)
    rows[is_lost] = 255
    detail = "; ".join(filter(None, (f"{cause}; {share:.0%} of its rows came through", found.detail)))
    return replace(found, image=Image.fromarray(pixels), detail=detail, is_repaired=True, is_plain_square=False)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; broken EXIF says nothing."""
    try:
        # Asked first: exif_transpose copies what lies upright.
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if is_turned else image
    except Exception:
        return image


def to_rgb(image: Image.Image, profile: bytes | None = b"") -> tuple[Image.Image, str]:
    """(RGB, 8 bits, problem): deep greys scaled rather than cut off at 255, sRGB, transparency on white.

    `profile` is the embedded ICC profile, b"" without one; the problem says why it was not used, else "".
    """
    colours, layered = image, None
    if image.mode.startswith(("I", "F")):
        colours = shallow(image)
        if isinstance(key := image.info.get("transparency"), int):  # of a PNG: this level means nothing is there
            layered = Image.merge("LA", (colours, Image.fromarray(np.asarray(image) != key).convert("L")))
            layered = layered.convert("RGBA")
    elif image.has_transparency_data:
        layered = image.convert("RGBA")
    problem = ""
    if profile != b"":
        converted, problem = to_srgb(colours, profile if isinstance(profile, bytes) else None)
        colours = converted or colours
    if layered is None:
        return (colours if colours.mode == "RGB" else colours.convert("RGB")), problem  # which would copy
    page = Image.new("RGB", image.size, "white")
    page.paste(layered if colours.mode != "RGB" else colours, mask=layered.getchannel("A"))
    return page, problem


def shallow(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits in 8."""
    levels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    highest = float(levels.max(initial=0))
    # I;16 says its range; for the 32-bit modes the smallest usual range that holds the values is taken.
    usual = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0, highest)
    top = next(limit for limit in usual if highest <= limit)
    return Image.fromarray((levels / top * 255).clip(0, 255).round().astype(np.uint8))


def reason(error: Exception) -> str:
    """A short cause for the ledger, the same on every run: no addresses, no paths."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    text = re.sub(r"<.*?>|0x[0-9a-f]+", "…", str(error).strip().split("\n")[0])[:80]
    return text or type(error).__name__
