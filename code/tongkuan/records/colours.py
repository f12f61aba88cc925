"""What an embedded ICC profile says about a picture's colours, carried out by littleCMS: sRGB comes out."""

import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 4 << 20  # bytes; press profiles have up to about 3 MB
SAME = 2  # grey levels: a profile that moves no colour by more is sRGB under another name
HEADER, TAG = 128, 12  # bytes
KINDS = (b"scnr", b"mntr", b"prtr", b"spac")  # of devices; the others are no meaning of a picture's numbers
SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK", "LAB": b"Lab "}  # as profiles name what is in these modes
# Tags of programs, which may be as long as one likes and are run for each of 36,000 colours. Hardly a profile has them.
PROGRAMS = (b"D2B0", b"D2B1", b"D2B2", b"D2B3")


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image | None, str]:
    """(RGB picture in sRGB without its transparency, "") or (None, why the profile is not used, "" where it is sRGB).

    `profile` is None where the file has one that cannot be put together.
    """
    planes = image if image.mode in SPACES else image.convert(base_mode(image.mode))
    if not profile:
        return None, "colour profile not used: it is damaged"
    if len(profile) > MAX_PROFILE:
        return None, f"colour profile not used: larger than {MAX_PROFILE >> 20} MB"
    transform, problem = transform_of(profile, planes.mode)
    return (None, problem) if transform is None else (transform.apply(planes), "")


def base_mode(mode: str) -> str:
    """The mode whose planes a profile speaks of: grey or RGB, without palette and transparency."""
    return "L" if mode in ("1", "L", "LA", "La") else "RGB"


# A shop's pictures share a few profiles, and building a transform takes as long as applying it to a picture.
@functools.lru_cache(maxsize=16)
def transform_of(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """(transform from `mode` to RGB, ""), or (None, problem); no transform and no problem: it is sRGB already."""
    if problem := problem_of(profile, mode):
        return None, f"colour profile not used: {problem}"
    try:
        # Perceptual: the table that browsers take, and for profiles without tables the same as relative colorimetric.
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
        )
        colours = lattice(mode)
        if colours is None:
            return transform, ""
        moved = np.asarray(transform.apply(colours), dtype=int) - np.asarray(colours.convert("RGB"), dtype=int)
    except Exception:  # hostile profiles raise all sorts
        return None, "colour profile not used: it is damaged"
    return (None, "") if np.abs(moved).max() <= SAME else (transform, "")


def problem_of(profile: bytes, mode: str) -> str:
    """What forbids a profile for a picture of this mode, in a few words; "" when nothing does."""
    if len(profile) < HEADER + 4 or profile[36:40] != b"acsp":
        return "it is damaged"
    space, wanted = profile[16:20], SPACES[mode]
    if space not in SPACES.values():
        return "it is damaged, or for colours that no picture has"
    if space != wanted:
        return f"it is for {space.decode().strip()}, the picture is {wanted.decode().strip()}"
    if profile[12:16] not in KINDS:
        return "it describes no device"
    count = int.from_bytes(profile[HEADER : HEADER + 4], "big")
    table = profile[HEADER + 4 : HEADER + 4 + TAG * min(count, 1000)]
    if any(table[start : start + 4] in PROGRAMS for start in range(0, len(table), TAG)):
        return "it holds programs"
    return ""


def lattice(mode: str) -> Image.Image | None:
    """Colours all over the space, to see what a transform does; None where plain conversion is no measure."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode == "RGB":
        steps = np.linspace(0, 255, 17).round().astype(np.uint8)
        return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3))
    return None


def jpeg2000_profile(data: bytes) -> bytes | None:
    """The ICC profile of a JPEG 2000 file, which Pillow does not give; None when it has none."""
    for kind, header in boxes(data):
        if kind == b"jp2h":
            found = (body[3:] for name, body in boxes(header) if name == b"colr" and body[:1] in (b"\2", b"\3"))
            return next(found, None)
    return None


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, body) of each box of a JPEG 2000 file or box, as far as they are whole."""
    start = 0
    while start + 8 <= len(data):
        size, kind, head = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        end = start + size if size else len(data)
        if end < start + head or end > len(data):
            return
        yield kind, data[start + head : end]
        start = end
