"""colours.py: an embedded profile is heeded as littleCMS heeds it, and a bad one costs nothing but a remark."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icc_profiles import SRGB, WIDE, by_lcms, cmyk, gamma, grey, profile, rgb, srgb_curve, table_curve
from PIL import Image, ImageCms
from worlds import hand_out_pictures, read_jsonl

from tongkuan.cli.verbs import main
from tongkuan.records import colours, pictures

SIZE = 32
NOT_USED = "colour profile not used"
GENTLE: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def encode(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **GENTLE.get(kind, {}), **how)
    return buffer.getvalue()


def middle(data: bytes, size: int = SIZE) -> tuple[int, ...]:
    """The middle of the squashed picture, RGB."""
    made, status, detail, *_ = pictures.squash(data, size)
    assert (status, detail) == ("ok", "")
    with Image.open(io.BytesIO(made)) as image:
        pixel = image.getpixel((size // 2, size // 2))
    assert isinstance(pixel, tuple)
    return pixel


def lcms(mode: str, colour: Any, icc: bytes) -> tuple[int, ...]:
    pixel = by_lcms(Image.new(mode, (1, 1), colour), icc).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def boxed(image: Image.Image, icc: bytes) -> bytes:
    """A JPEG 2000 with a profile in the place of the name of its colours, as cameras and archives write it."""
    data = encode(image, "JPEG2000")
    start = data.index(b"colr") - 4
    old = struct.unpack(">I", data[start : start + 4])[0]
    header = data.index(b"jp2h") - 4
    box = struct.pack(">I4s3B", 8 + 3 + len(icc), b"colr", 2, 0, 0) + icc
    length = struct.unpack(">I", data[header : header + 4])[0] + len(box) - old
    return data[:header] + struct.pack(">I", length) + data[header + 4 : start] + box + data[start + old :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("colour", [(200, 30, 30), (20, 160, 90), (250, 250, 245)])
def test_a_wide_gamut_comes_out_in_srgb_from_every_format(kind: str, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (40, 40), colour)
    data = boxed(image, rgb()) if kind == "JPEG2000" else encode(image, kind, icc_profile=rgb())
    assert middle(data) == pytest.approx(lcms("RGB", colour, rgb()), abs=4)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("ink", [(255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 0), (40, 90, 10, 60)])
def test_ink_is_what_the_press_prints(kind: str, ink: tuple[int, int, int, int]) -> None:
    data = encode(Image.new("CMYK", (40, 40), ink), kind, icc_profile=cmyk())
    assert middle(data) == pytest.approx(lcms("CMYK", ink, cmyk()), abs=4)


def test_a_large_cmyk_picture_is_decoded_reduced_and_heeds_its_profile() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (25, 25, 4), dtype=np.uint8).repeat(32, axis=0).repeat(32, axis=1)
    image = Image.fromarray(noise, "CMYK")
    data = encode(image, "JPEG", icc_profile=cmyk())
    assert pictures.decode(data, SIZE * pictures.ROOM).image.size == (200, 200)
    wanted = by_lcms(image, cmyk()).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    found = pictures.bicubic(pictures.decode(data, SIZE * pictures.ROOM).image, SIZE)
    assert np.abs(np.asarray(wanted, dtype=int) - np.asarray(found, dtype=int)).mean() < 2


@pytest.mark.parametrize(
    ("mode", "value", "kind"),
    [("L", 100, "JPEG"), ("L", 30, "PNG"), ("L", 200, "TIFF"), ("1", 1, "PNG"), ("I;16", 100 * 257, "PNG")],
)
def test_grey_by_a_grey_profile(mode: str, value: int, kind: str) -> None:
    level = {"1": 255, "I;16": value // 257}.get(mode, value)
    data = encode(Image.new(mode, (40, 40), value), kind, icc_profile=grey())
    assert middle(data) == pytest.approx(lcms("L", level, grey()), abs=3)


def blended(over: tuple[int, ...], alpha: int) -> list[float]:
    return [255 + (level - 255) * alpha / 255 for level in over]


@pytest.mark.parametrize("alpha", [0, 100, 255])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_laid_on_white_once_colours_are_right(kind: str, alpha: int) -> None:
    data = encode(Image.new("RGBA", (40, 40), (200, 30, 30, alpha)), kind, icc_profile=rgb())
    assert middle(data) == pytest.approx(blended(lcms("RGB", (200, 30, 30), rgb()), alpha), abs=4)


def test_grey_with_transparency_and_palettes_heed_their_profiles() -> None:
    data = encode(Image.new("LA", (40, 40), (100, 128)), "PNG", icc_profile=grey())
    assert middle(data) == pytest.approx(blended(lcms("L", 100, grey()), 128), abs=3)
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    wanted = lcms("RGB", (200, 30, 30), rgb())
    assert middle(encode(palette, "PNG", icc_profile=rgb())) == pytest.approx(wanted, abs=4)
    half = encode(palette, "PNG", icc_profile=rgb(), transparency=bytes((255, 128)))
    assert middle(half) == pytest.approx(blended(wanted, 128), abs=4)


def test_lab_and_deep_grey_with_a_transparent_level() -> None:
    assert middle(encode(Image.new("LAB", (40, 40), (255, 128, 128)), "TIFF")) == pytest.approx((255,) * 3, abs=3)
    deep = encode(Image.new("I;16", (40, 40), 9000), "PNG", transparency=9000)
    assert middle(deep) == (255, 255, 255)


NEARLY = {
    "littleCMS's own": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "by a table": rgb(SRGB, table_curve(1024, srgb_curve)),
    "by a short table": rgb(SRGB, table_curve(256, srgb_curve)),
    "rounded otherwise": rgb([[round(v, 4) for v in p] for p in SRGB], table_curve(1024, srgb_curve)),
    "another description": rgb(SRGB, table_curve(1024, srgb_curve), cprt=b"text\0\0\0\0nobody's\0"),
}


@pytest.mark.parametrize("name", NEARLY)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_srgb_under_another_name_leaves_every_byte(name: str, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    plain, named = (pictures.squash(encode(noise, kind, **how), SIZE) for how in ({}, {"icc_profile": NEARLY[name]}))
    assert plain == named


PROFILE = rgb()
UNUSABLE = {
    "no profile at all": ("RGB", b"nonsense"),
    "random": ("RGB", np.random.default_rng(0).bytes(3000)),
    "random behind a fair header": ("RGB", PROFILE[:132] + np.random.default_rng(0).bytes(3000)),
    "cut in the header": ("RGB", PROFILE[:100]),
    "cut in the table": ("RGB", PROFILE[:150]),
    "cut in the colours": ("RGB", PROFILE[:-100]),
    "no tags": ("RGB", PROFILE[:128] + bytes(4)),
    "a billion tags": ("RGB", PROFILE[:128] + b"\xff" * 4 + PROFILE[132:]),
    "huge": ("RGB", PROFILE + bytes(colours.MAX_PROFILE)),
    "ink": ("RGB", cmyk()),
    "grey": ("RGB", grey()),
    "colours for a grey picture": ("L", PROFILE),
    "colours for ink": ("CMYK", PROFILE),
    "ink that says it is colours": ("RGB", cmyk().replace(b"CMYK", b"RGB ", 1)),
    "colours that say they are ink": ("CMYK", PROFILE.replace(b"RGB ", b"CMYK", 1)),
    "colours that say they are grey": ("L", PROFILE.replace(b"RGB ", b"GRAY", 1)),
    "seven inks": ("RGB", PROFILE.replace(b"RGB ", b"7CLR", 1)),
    "from device to device": ("RGB", PROFILE.replace(b"mntr", b"link", 1)),
    "named colours": ("RGB", PROFILE.replace(b"mntr", b"nmcl", 1)),
    "a program": ("RGB", rgb(D2B0=b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, 100_000))),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_profile_that_cannot_be_used_is_a_remark_on_a_picture_as_it_was(name: str) -> None:
    mode, icc = UNUSABLE[name]
    image = Image.new(mode, (40, 40), {"RGB": (10, 200, 90), "L": 90, "CMYK": (10, 200, 90, 0)}[mode])
    plain = pictures.squash(encode(image, "TIFF"), SIZE)
    made, status, detail, *size = pictures.squash(encode(image, "TIFF", icc_profile=icc), SIZE)
    assert (made, status, size) == (plain[0], "ok", [40, 40])
    assert detail.startswith(NOT_USED) and "\n" not in detail and len(detail) < 120


def test_a_jpeg_that_lost_a_piece_of_its_profile_says_so() -> None:
    data = encode(Image.new("RGB", (40, 40)), "JPEG", icc_profile=rgb(x000=bytes(100_000)))
    second = data.index(b"ICC_PROFILE\0\2")
    lost = data[:second] + b"ICC_profile\0\2" + data[second + 13 :]
    assert pictures.squash(lost, SIZE)[1:3] == ("ok", f"{NOT_USED}: it is damaged")


def test_the_ledger_says_which_pictures_kept_their_numbers(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 40), (10, 200, 90))
    found = {"good.png": rgb(), "bad.png": b"nonsense", "ink.png": cmyk()}
    files = {name: encode(image, "PNG", icc_profile=icc) for name, icc in found.items()}
    raw = hand_out_pictures(tmp_path / "raw", files)
    main(["resize", "--raw", str(raw), "--data", str(tmp_path / "data"), "--size", "32"])
    rows = {row["name"]: row for row in read_jsonl(tmp_path / "data" / "ledger.jsonl")}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["good.png"]["detail"] == ""
    assert rows["ink.png"]["detail"] == f"{NOT_USED}: it is for CMYK, the picture is RGB"
    assert rows["bad.png"]["detail"] == f"{NOT_USED}: it is damaged"


def test_a_shops_pictures_share_a_transform_and_few_are_kept() -> None:
    colours.transform_of.cache_clear()
    data = encode(Image.new("RGB", (40, 40), (1, 2, 3)), "PNG", icc_profile=rgb())
    for _ in range(5):
        pictures.squash(data, SIZE)
    assert colours.transform_of.cache_info()[:2] == (4, 1)
    for number in range(40):
        colours.transform_of(rgb(curve=gamma(1.8 + number / 100)), "RGB")
    assert colours.transform_of.cache_info().currsize <= 16


@given(
    st.sampled_from([("RGB", rgb()), ("L", grey()), ("CMYK", cmyk()), ("RGB", NEARLY["littleCMS's own"])]),
    st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 255)), max_size=8),
    st.integers(0, 200),
)
def test_any_damaged_profile_gives_a_picture(odd: tuple[str, bytes], changes: list[tuple[int, int]], cut: int) -> None:
    mode, icc = odd
    content = bytearray(icc)
    for place, value in changes:
        content[place % len(content)] = value
    image, problem = colours.to_srgb(Image.new(mode, (4, 4)), bytes(content[: len(content) - cut]))
    assert image is None or (image.mode, image.size, problem) == ("RGB", (4, 4), "")


def test_the_profiles_here_are_what_they_are_taken_for() -> None:
    assert lcms("RGB", (255, 255, 255), rgb(WIDE)) == pytest.approx((255, 255, 255), abs=1)
    assert lcms("CMYK", (255, 0, 0, 0), cmyk())[2] > 150
    assert profile(b"mntr", b"RGB ", b"XYZ ", {})[36:40] == b"acsp"
