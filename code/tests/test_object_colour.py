"""colour.py: counted colours of pictures, against a count of our own, and what they tell apart."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tongkuan.model.colour import object_colours, to_lab, whole_colours

WHITE, GREY, RED, ORANGE, BLUE = (255, 255, 255), (225, 225, 225), (200, 20, 30), (230, 120, 20), (20, 40, 200)
Colour = tuple[int, int, int]
Place = tuple[int, int, int, int]
Count = Callable[[Tensor], Tensor]
COUNTS = pytest.mark.parametrize("count", [object_colours, whole_colours])


def picture(
    ground: Colour, colour: Colour | None = None, place: tuple[int, int, int, int] = (20, 20, 44, 44)
) -> Tensor:
    """float (3, 64, 64) in 0..1: a ground, and on it a rectangle: top, left, bottom, right."""
    pixels = np.full((64, 64, 3), ground, dtype=np.float32)
    if colour is not None:
        top, left, bottom, right = place
        pixels[top:bottom, left:right] = colour
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def noise(size: int, count: int = 3) -> Tensor:
    """float (count, 3, size, size) in 0..1."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def likeness(one: Tensor, other: Tensor) -> float:
    """Of two pictures' objects: 1 for the same colours in the same shares, 0 for none in common."""
    left, right = object_colours(torch.stack([one, other]))
    return float(left @ right)


def halves(counts: Tensor) -> Tensor:
    """Of the picture and of its middle, float (N, 2, bins)."""
    return counts.view(len(counts), 2, -1)


# ---------------------------------------------------------------------------------------------------------------------
# What they tell apart


@pytest.mark.parametrize("size", [1, 16, 32, 45, 96])
def test_counts_have_norm_1_whatever_the_pictures_size(size: int) -> None:
    assert object_colours(noise(size)).norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    assert halves(whole_colours(noise(size))).norm(dim=2).numpy() == pytest.approx(1, abs=1e-5)


def test_objects_of_other_colours_differ() -> None:
    assert likeness(picture(WHITE, RED), picture(WHITE, BLUE)) < 0.3
    assert likeness(picture(WHITE, RED), picture(WHITE, ORANGE)) < 0.4
    assert likeness(picture(WHITE, RED), picture(WHITE)) < 0.6


@pytest.mark.parametrize("place", [(20, 20, 44, 44), (30, 8, 54, 32), (8, 8, 56, 56), (9, 9, 50, 51), (30, 8, 64, 56)])
@pytest.mark.parametrize("ground", [WHITE, GREY])
def test_an_object_is_alike_wherever_it_is_and_however_large(ground: Colour, place: Place) -> None:
    """Also where the lower edge cuts it, and on another ground."""
    assert likeness(picture(WHITE, RED), picture(ground, RED, place)) > 0.9


def test_the_whole_counts_the_ground_and_its_middle_tells_the_object() -> None:
    red, blue, grey = halves(
        whole_colours(torch.stack([picture(WHITE, RED), picture(WHITE, BLUE), picture((90, 90, 90), RED)]))
    )
    assert float(red[0] @ blue[0]) > 0.8 > 0.5 > float(red[1] @ blue[1])
    assert float(red[0] @ grey[0]) < 0.2


@COUNTS
def test_a_picture_without_an_object_has_finite_counts(count: Count) -> None:
    plain = torch.stack([picture(colour) for colour in (WHITE, GREY, RED, (0, 0, 0))])
    counts = count(plain)
    assert counts.isfinite().all() and counts.any(dim=1).all()
    assert float(counts[2] @ counts[0]) < 0.6 * float(counts[0] @ counts[0])


@COUNTS
def test_a_mirrored_picture_has_the_same_counts(count: Count) -> None:
    for pictures in (noise(32), torch.stack([picture(WHITE, RED, (10, 4, 30, 40))])):
        assert torch.allclose(count(pictures), count(pictures.flip(3)), atol=1e-6)


@COUNTS
def test_a_picture_has_the_counts_that_it_has_alone(count: Count) -> None:
    pictures = noise(45)
    alone = torch.cat([count(pictures[place : place + 1]) for place in range(len(pictures))])
    assert torch.allclose(count(pictures), alone, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# A count of our own, pixel by pixel in float64


def pooled(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, S, S) -> (32, 32, 3), each the mean of the pixels that it covers or touches."""
    size = image.shape[1]
    edges = [(place * size // 32, math.ceil((place + 1) * size / 32)) for place in range(32)]
    return np.array([[image[:, a:b, c:d].mean(axis=(1, 2)) for c, d in edges] for a, b in edges])


def lab_of(red: float, green: float, blue: float) -> tuple[float, float, float]:
    """CIE 15 with the sRGB matrix of IEC 61966-2-1."""
    r, g, b = (((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in (red, green, blue))
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    fx, fy, fz = (math.cbrt(t) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def shares(value: float, low: float, high: float, count: int, spread: float) -> NDArray[np.float64]:
    """Of a value in each of `count` bins."""
    weights = np.exp(-0.5 * ((value - np.linspace(low, high, count)) / spread) ** 2)
    return weights / weights.sum()


def expected_object(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """(384,) of (3, S, S)."""
    lab = np.array([[lab_of(*pixel) for pixel in row] for row in pooled(image)])
    border = np.concatenate([lab[:2].reshape(-1, 3), lab[:, :2].reshape(-1, 3), lab[:, -2:].reshape(-1, 3)])
    ground = np.sort(border, axis=0)[(len(border) - 1) // 2]
    counts, total = np.zeros((6, 8, 8)), 0.0
    for lightness, a, b in lab.reshape(-1, 3):
        weight = 1 / (1 + math.exp(-(math.dist((lightness, a, b), ground) - 12) / 4))
        by_axis = (shares(lightness, 0, 100, 6, 12.8), shares(a, -60, 70, 8, 8), shares(b, -60, 80, 8, 8))
        counts += weight * np.einsum("i,j,k->ijk", *by_axis)
        total += weight
    return np.sqrt(counts / total).ravel()


def expected_whole(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """(384,) of (3, S, S)."""
    small = pooled(image)
    parts = []
    for pixels in (small, small[8:24, 8:24]):
        counts = np.zeros((12, 4, 4))
        for pixel in pixels.reshape(-1, 3):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            counts[min(11, int(12 * hue)), min(3, int(4 * saturation)), min(3, int(4 * value))] += 1
        parts.append(np.sqrt(counts / counts.sum()).ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("size", [32, 45, 64])
def test_counts_are_those_of_a_count_pixel_by_pixel(size: int) -> None:
    pictures = noise(size, 1)
    pictures[:, :, size // 4 : size // 2] *= 0.3  # mean grey only, else, where pictures are made smaller
    pictures[:, 0, size // 2 :] *= 0.2
    image = pictures[0].double().numpy()
    assert object_colours(pictures)[0].numpy() == pytest.approx(expected_object(image), abs=1e-4)
    assert whole_colours(pictures)[0].numpy() == pytest.approx(expected_whole(image), abs=1e-6)


def test_known_colours_have_their_published_lab() -> None:
    """Of white, black and the primaries of sRGB under D65."""
    rgb = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).T.reshape(1, 3, 5, 1)
    known = [(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86)]
    assert to_lab(rgb)[0, :, :, 0].T.numpy() == pytest.approx(np.array(known), abs=0.05)
