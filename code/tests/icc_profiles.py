"""ICC profiles made by hand for tests: RGB by a matrix, grey by a curve, CMYK by a table."""

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from PIL import Image, ImageCms

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))  # XYZ of R, G, B at D50
WIDE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
INKS = ((55, -37, -50), (48, 74, -3), (89, -5, 93), (16, 0, 0))  # Lab of full cyan, magenta, yellow and black


def profile(kind: bytes, space: bytes, pcs: bytes, tags: Mapping[bytes, bytes], version: int = 0x02400000) -> bytes:
    """A profile of these tags."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"wtpt": xyz(0.9642, 1, 0.8249),
    } | tags
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    size = start + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s", size, version, kind, space, pcs, b"acsp").ljust(68, b"\0")
    head += struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in values))


def gamma(exponent: float) -> bytes:
    """A curve by its exponent."""
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def table_curve(points: int, curve: Callable[[float], float]) -> bytes:
    """A curve by its values."""
    values = [round(65535 * curve(number / (points - 1))) for number in range(points)]
    return b"curv\0\0\0\0" + struct.pack(f">I{points}H", points, *values)


def srgb_curve(level: float) -> float:
    """Light of an sRGB level."""
    return level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4


def rgb(primaries: Sequence[Sequence[float]] = WIDE, curve: bytes | None = None, **more: bytes) -> bytes:
    """A display's profile; of a wide gamut unless told otherwise."""
    tags = {name: xyz(*values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve or gamma(2.2))
    return profile(b"mntr", b"RGB ", b"XYZ ", tags | {name.encode(): content for name, content in more.items()})


def grey(exponent: float = 1.5) -> bytes:
    """A grey profile."""
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": gamma(exponent)})


def cmyk() -> bytes:
    """A press: each ink darkens the paper towards its own colour."""
    table = b""
    for inks in product((0, 1), repeat=4):
        light, a, b = 95.0, 0.0, -2.0
        for amount, (ink_light, ink_a, ink_b) in zip(inks, INKS, strict=True):
            if amount:
                light, a, b = light * ink_light / 95, (a + ink_a) * ink_light / 95, (b + ink_b) * ink_light / 95
        table += bytes(round(max(0, min(255, value))) for value in (light * 2.55, a + 128, b + 128))
    plain = bytes(range(256))
    content = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": content + plain * 4 + table + plain * 3})


def by_lcms(image: Image.Image, icc: bytes) -> Image.Image:
    """What littleCMS makes of it in sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    found = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert found is not None
    return found
