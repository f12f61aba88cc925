"""Raw folders of pictures for the tests of resize, and what it makes of them."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tongkuan.cli.verbs import main

SIZE = 32


def picture(
    colour: Any = "red", kind: str = "JPEG", size: tuple[int, int] = (40, 30), mode: str = "RGB", **how: Any
) -> bytes:
    """A plain picture's file."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **how)
    return buffer.getvalue()


def noise(kind: str = "JPEG", **how: Any) -> bytes:
    """A picture whose file is long enough to be cut."""
    pixels = np.random.default_rng(0).integers(1, 256, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **how)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """The start of a PNG that promises this many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT" + bytes(13)


def hand_out(
    raw: Path, split: str, pictures: dict[str, bytes], names: Iterable[str] | None = None, how: str = "zip"
) -> None:
    """A split as the organiser has it; item `{split}{n}` names the n-th of `names` (all pictures by default)."""
    raw.mkdir(parents=True, exist_ok=True)
    names = list(pictures if names is None else names)
    rows = [
        {"item_id": f"{split}{n}", "title": f"t{n}", "item_image_name": name, "extra": n}
        for n, name in enumerate(names)
    ]
    (raw / f"item_{split}_info.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"src_item_id": f"{split}0", "tgt_item_id": row["item_id"], "item_label": "1"} for row in rows]
    if split == "test":
        pairs = [{key: value for key, value in pair.items() if key != "item_label"} for pair in pairs]
    (raw / f"item_{split}_pair.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    folder = raw / f"item_{split}_images"
    if how == "folder":
        for name, data in pictures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
    data = buffer.getvalue()
    if how == "zip":
        folder.with_suffix(".zip").write_bytes(data)
    else:
        step = -(-len(data) // 3)
        for number, letter in enumerate("abc"):
            Path(f"{folder}.zip.parta{letter}").write_bytes(data[number * step : (number + 1) * step])


def run(raw: Path, data: Path, *more: str) -> int:
    return main(["resize", "--raw", str(raw), "--data", str(data), "--size", str(SIZE), *more])


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ledger(data: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["split"], row["name"]): row for row in read_rows(data / "ledger.jsonl")}


def images(data: Path, split: str) -> dict[str, str]:
    return {row["item_id"]: row["item_image_name"] for row in read_rows(data / f"item_{split}_info.jsonl")}


def colour(data: Path, name: str) -> tuple[int, ...]:
    """The middle of an output picture, RGB."""
    with Image.open(data / "images" / name) as image:
        assert image.size == (SIZE, SIZE)
        assert image.mode == "RGB"
        pixel = image.getpixel((SIZE // 2, SIZE // 2))
    assert isinstance(pixel, tuple)
    return pixel
