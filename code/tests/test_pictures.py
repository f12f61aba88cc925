"""One picture: the fast ways stay within a grey level of a full decode and Pillow's bicubic, else nothing changes."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tongkuan.records import pictures

SIZE = 48


def encode(pixels: np.ndarray[Any, Any], kind: str = "JPEG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, kind, **how)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray[Any, Any]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape)


def zone_plate(side: int) -> np.ndarray[Any, Any]:
    """Rings that grow finer up to the finest there can be."""
    down, right = np.mgrid[0:side, 0:side] - side / 2
    return np.repeat(127.5 + 127.5 * np.sin((down**2 + right**2) * np.pi / side)[..., None], 3, axis=2)


def plainly(data: bytes, size: int) -> np.ndarray[Any, Any]:
    """What Pillow alone makes of it, as float (size, size, 3)."""
    with Image.open(io.BytesIO(data)) as image:
        rgb, _ = pictures.to_rgb(pictures.upright(image))
        return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC), dtype=float)


def apart(data: bytes, size: int = SIZE) -> float:
    """Mean grey levels between our squashed picture, before it is written, and Pillow's."""
    image = pictures.decode_reduced(data, size * pictures.ROOM).image
    return float(np.abs(np.asarray(pictures.bicubic(image, size), dtype=float) - plainly(data, size)).mean())


@pytest.mark.parametrize("times", [1, 2.1, 4, 8, 9, 16, 33])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_the_finest_patterns_stay_within_a_grey_level(times: float, subsampling: int) -> None:
    side = int(SIZE * times)
    for pixels in (noise(side, side), zone_plate(side)):
        assert apart(encode(pixels, quality=90, subsampling=subsampling)) <= 1


@pytest.mark.parametrize(
    ("width", "height", "least", "scale"),
    [
        (800, 800, 1536, 1),
        (3070, 3072, 1536, 1),
        (3072, 3072, 1536, 2),
        (3074, 3073, 1536, 1),  # one side would be padded
        (6148, 6144, 1536, 4),
        (6146, 6144, 1536, 2),
        (12288, 12288, 1536, 8),
        (30000, 10, 1536, 1),
        (10, 30000, 1, 2),
    ],
)
def test_how_far_a_picture_is_reduced(width: int, height: int, least: int, scale: int) -> None:
    assert pictures.reduction(width, height, least) == scale


def test_a_large_jpeg_is_decoded_reduced_and_its_stored_size_is_reported() -> None:
    data = encode(noise(400, 800))
    found = pictures.decode(data, 48 * pictures.ROOM)
    assert found.image.size == (400, 200), "else nothing is gained"
    assert pictures.squash(data, 48)[1:] == ("ok", "", found.width, found.height) == ("ok", "", 800, 400)


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(noise(40, 48).repeat(10, axis=0).repeat(10, axis=1), exif=exif)


def in_mode(mode: str) -> bytes:
    buffer = io.BytesIO()
    smooth = Image.fromarray(noise(40, 40).astype(np.uint8)).resize((800, 800))
    smooth.convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        *(pytest.param(oriented(turn), id=f"turned {turn}") for turn in (*range(1, 9), 9)),
        *(pytest.param(in_mode(mode), id=mode) for mode in ("RGB", "L", "CMYK", "YCbCr")),
        pytest.param(encode(noise(400, 400), progressive=True), id="progressive"),
        pytest.param(encode(noise(401, 803)), id="odd sides"),
        pytest.param(encode(noise(10, 30_000)), id="30,000 x 10"),
        pytest.param(encode(noise(3000, 1)), id="a pixel wide"),
        pytest.param(encode(noise(1, 1), "PNG"), id="a pixel"),
        pytest.param(encode(noise(900, 900), "PNG"), id="PNG"),
    ],
)
def test_odd_pictures_come_out_as_pillow_has_them(data: bytes) -> None:
    assert apart(data) <= 1
    with Image.open(io.BytesIO(data)) as image:
        assert pictures.squash(data, SIZE)[1:] == ("ok", "", *image.size)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.4, 0.6, 0.8, 0.9, 0.99, 0.9999])
def test_a_damaged_jpeg_is_judged_by_a_full_decode(
    share: float, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(noise(600, 600), progressive=progressive)
    data = whole[: int(len(whole) * share)]

    def outcome() -> Any:
        try:
            return pictures.squash(data, SIZE)
        except pictures.UnreadableError as error:
            return str(error), error.width, error.height

    ours = outcome()
    monkeypatch.setattr(pictures, "ROOM", 1000)  # no reduction
    assert outcome() == ours
    assert ours[1:] != ("ok", "", 600, 600), "a damaged picture must not pass for a whole one"
