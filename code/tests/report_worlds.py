"""A result with catalogue for the tests of `report`: scores are given, hostile texts stand among plain ones."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from PIL import Image

from tongkuan import TOP

SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(2)>'
CLOSING = "</script><script>alert(3)</script><!--"


@dataclass(frozen=True, slots=True)
class World:
    """Folders and files of a result, and its scores and labels in the order of the pairs."""

    submit: Path
    pairs: Path
    data: Path
    scores: list[float]
    labels: list[int]


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def make_world(folder: Path, num_pairs: int = 60, seed: int = 0, threshold: float = 0.25) -> World:
    """Pairs of items of their own; the first three carry hostile texts, one names a picture outside the folder."""
    generator = np.random.default_rng(seed)
    data, submit = folder / "data", folder / "submit"
    (data / "images").mkdir(parents=True)
    submit.mkdir()
    for number in range(8):
        pixels = generator.integers(0, 255, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(data / "images" / f"{number}.jpg")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "secret.jpg")
    (data / "images" / "broken.jpg").write_bytes(b"no picture")
    items: list[dict[str, object]] = []
    for number in range(2 * num_pairs):
        title = f"正品 杯子 {number} 号 " + "大" * int(generator.integers(1, 6))
        row = {"item_id": f"i{number}", "title": title, "item_pvs": f"型号#:#A{number % 7}#;#产地#:#杭州"}
        items.append(row | {"item_image_name": f"{number % 8}.jpg", "cate_name": f"类{number // 2 % 5}"})
    items[0] |= {"title": SCRIPT, "item_image_name": "", "cate_name": IMAGE}
    items[1] |= {"title": IMAGE, "item_pvs": f"{SCRIPT}#:#{CLOSING}", "item_image_name": "../../secret.jpg"}
    items[2] |= {"item_id": CLOSING, "title": CLOSING, "item_image_name": "gone.jpg"}
    items[3] |= {"item_image_name": "broken.jpg"}
    labels = (generator.random(num_pairs) < 0.4).astype(int).tolist()
    scores = [float(s) for s in np.round(generator.normal(2 * np.array(labels) - 1, 1.5), 6)]
    labels[:2], scores[:2] = [0, 1], [9.5, -9.5]  # the surest mistakes
    ids = [str(item["item_id"]) for item in items]
    pairs: list[dict[str, object]] = []
    rows: list[dict[str, object]] = []
    for number, (score, label) in enumerate(zip(scores, labels, strict=True)):
        ends = {"src_item_id": ids[2 * number], "tgt_item_id": ids[2 * number + 1]}
        texts = {"src_item_emb": "[1.0, 1.0]", "tgt_item_emb": f"[2.0, {score + 2.0!r}]"}
        rows.append({**ends, **texts, "threshold": threshold})
        pairs.append({**ends, "item_label": str(label)})
    write_rows(data / "item_test_info.jsonl", items)
    write_rows(submit / "result.jsonl", rows)
    write_rows(folder / "answers.jsonl", pairs)
    shutil.copy(TOP / "submit" / "similarity.py", submit / "similarity.py")
    return World(submit, folder / "answers.jsonl", data, scores, labels)
