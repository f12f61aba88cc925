"""What the benchmarks run on: sample items with 384-pixel pictures and long texts, random encoders of real size."""

from itertools import count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_scripts import sample
from tongkuan.records.attributes import item_text
from tongkuan.records.items import Item, Pair, parse_item
from tongkuan.records.pictures import squash
from tongkuan.settings import ModelSettings

TOKENS = (40, 110)  # of a text, from and to: as the competition's
SETTINGS = ModelSettings.model_validate(
    {
        "text": {"weights": "random", "config": {"model_type": "bert", "vocab_size": 21128}, "max_tokens": 140},
        "image": {
            "architecture": "swin_tiny_patch4_window7_224",
            "weights": "random",
            "size": 384,
            "arguments": {"img_size": 384, "window_size": 12},
        },
    }
)


def make_items(num_items: int, images: Path, side: int = SETTINGS.image.size) -> dict[str, Item]:
    """Items of the sample catalogue: pictures of `side` pixels in `images`, texts of TOKENS characters."""
    products = max(24, num_items // 3)
    listings = [row for rows in sample.plan(products).listings.values() for row in rows if not row.defect]
    generator = np.random.default_rng(0)
    words = "".join(str(row.row.get("title") or "") for row in listings)
    items: dict[str, Item] = {}
    images.mkdir(parents=True, exist_ok=True)
    for number, listing in zip(count(), tqdm(listings[:num_items], desc="drawing", unit="item", disable=None)):
        length, start = int(generator.integers(*TOKENS)), int(generator.integers(len(words) - TOKENS[1]))
        item = parse_item({**listing.row, "title": words[start : start + length], "item_pvs": "", "sku_pvs": ""}, "")
        picture, *_ = squash(sample.encode_picture(sample.generator(0, 1, 0, number), listing), side)
        (images / item.image_name).write_bytes(picture)
        items[item.item_id] = item
    return items


def make_pairs(items: dict[str, Item], rounds: int = 1) -> list[Pair]:
    """A round has as many pairs as items: each item in two on average."""
    ids, pairs = np.array(list(items)), []
    for number in range(rounds):
        left, right = (np.random.default_rng(2 * number + seed).permutation(len(ids)) for seed in (1, 2))
        pairs += [
            Pair(str(ids[a]), str(ids[b if a != b else (b + 1) % len(ids)])) for a, b in zip(left, right, strict=True)
        ]
    return pairs


def texts(items: dict[str, Item]) -> list[str]:
    """What the tokenizer learns its characters from."""
    return [item_text(item) for item in items.values()]
