"""Small worlds for tests: a few items with 16-pixel pictures, random towers of some thousand weights."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from tongkuan.base.files import sha256_of
from tongkuan.presets import load_settings
from tongkuan.settings import Settings

TINY = """
model:
  embedding_size: 8
  attribute_keys: [型号]
  text:
    config: {model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
             max_position_embeddings: 32, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}
    max_tokens: 24
  image:
    architecture: convnext_atto
    size: 32
    arguments: {depths: [1, 1, 1, 1], dims: [8, 8, 8, 16]}
train:
  steps: 6
  pairs: 4
  learning_rate: 1.0e-3
  validate_every: 3
  save_every: 2
  log_every: 1
data:
  workers: 2
  encode_batch: 5
"""
# Overrides: one tower with a few numbers of each part, fitted without a step.
ONE = (
    "model.towers=one",
    "model.embedding_size=64",
    "model.parts={text: 4, image: 4, object_colour: 4, whole_colour: 4, keys: 4}",
    "train.steps=0",
)
COLOURS = ((200, 30, 30), (30, 160, 60), (40, 60, 200), (220, 200, 40))


def tiny_settings(folder: Path, *overrides: str) -> Settings:
    """Settings of the smallest preset, with overrides."""
    return load_settings(str(tiny_preset(folder)), overrides)


def tiny_preset(folder: Path) -> Path:
    """The smallest preset as a file."""
    path = folder / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


def train_words(folder: Path, data: Path, *more: object) -> list[str]:
    """The verb with the smallest preset, its run and its model in the folder."""
    words = ("train", "--preset", tiny_preset(folder), "--data", data, "--run", folder / "run", "--model", folder / "m")
    return [*map(str, words), *map(str, more)]


def snapshot(folder: Path) -> dict[str, str]:
    """The sha256 of every file by its path; of TensorBoard's curves not: they hold the time, and are no artefact."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and "tensorboard" not in path.parts)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def hand_out_pictures(raw_dir: Path, pictures: dict[str, bytes]) -> Path:
    """A raw folder of test items named as their pictures, each in a pair with the first."""
    folder = raw_dir / "item_test_images"
    folder.mkdir(parents=True)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    names = list(pictures)
    write_jsonl(raw_dir / "item_test_info.jsonl", [{"item_id": name, "item_image_name": name} for name in names])
    write_jsonl(raw_dir / "item_test_pair.jsonl", [{"src_item_id": names[0], "tgt_item_id": name} for name in names])
    return raw_dir


def make_data(data_dir: Path, num_products: int = 6, listings: int = 3) -> Path:
    """train, valid and test of the same few products: a colour and a model number tell them apart."""
    images = data_dir / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        items, by_product = [], []
        for product in range(num_products):
            ids = [f"{split}-{product}-{listing}" for listing in range(listings)]
            by_product.append(ids)
            for item_id in ids:
                noise = generator.integers(0, 40, (16, 16, 3))
                pixels = np.clip(np.array(COLOURS[product % len(COLOURS)]) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(images / f"{item_id}.png")
                title = f"正品 杯子 {'大' * int(generator.integers(1, 6))}"
                row = {"item_id": item_id, "title": title, "item_pvs": f"型号#:#A{product}#;#产地#:#杭州"}
                items.append(row | {"item_image_name": f"{item_id}.png"})
        pairs = []
        for product, ids in enumerate(by_product):
            other = by_product[(product + 1) % num_products]
            for left, right, label in (
                (ids[0], ids[1], "1"),
                (ids[1], ids[2], "1"),
                (ids[0], other[0], "0"),
                (ids[2], other[1], "0"),
            ):
                pair = {"src_item_id": left, "tgt_item_id": right}
                pairs.append(pair if split == "test" else pair | {"item_label": label})
        write_jsonl(data_dir / f"item_{split}_info.jsonl", items)
        write_jsonl(data_dir / f"item_{split}_pair.jsonl", pairs)
    return data_dir
