"""Listings to hold an exported model against torch on, where a user has none: with and without text and picture."""

from pathlib import Path

import numpy as np
from PIL import Image

from tongkuan.records.attributes import TEN_KEYS
from tongkuan.records.items import Item

COUNT = 12
SEED = 0
WORDS = ("正品", "杯子", "运动鞋", "cotton", "shirt", "AJ5909-001", "500ml", "新款", "🎁", "Größe")
COLOURS = ((255, 255, 255), (128, 128, 128), (200, 30, 30), (20, 60, 180))  # ground, or all of the picture


def made_items(folder: Path, size: int) -> dict[str, Item]:
    """The same listings each time, by id, their pictures of size x size pixels written to folder/images."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(SEED)
    found = {}
    for number in range(COUNT):
        item_id = f"made-{number}"
        words = generator.choice(WORDS, size=int(generator.integers(1, 60)))
        values = generator.choice(WORDS, size=3)
        keys = generator.choice(TEN_KEYS, size=3)
        name = f"{item_id}.png"
        Image.fromarray(picture(number, size, generator)).save(images / name)
        found[item_id] = Item(
            item_id=item_id,
            title="" if number in (0, 1) else " ".join(words),
            item_attributes="" if number in (0, 1, 2) else ";".join(map("#:#".join, zip(keys, values, strict=True))),
            image_name="" if number in (0, 3) else name,
        )
    return found


def picture(number: int, size: int, generator: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 (size, size, 3): plain ground with a patch of noise, one in three of noise throughout."""
    noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    if number % 3 == 0:
        return noise
    pixels = np.full_like(noise, COLOURS[number % len(COLOURS)])
    quarter = size // 4
    pixels[quarter : size - quarter, quarter : size - quarter] = noise[quarter : size - quarter, : size - 2 * quarter]
    return pixels
