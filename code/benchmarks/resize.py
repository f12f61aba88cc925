"""How fast `resize` is beside one plain Pillow call a picture, on the same cores; or whether its time is linear.

`PYTHONPATH=code:. .venv/bin/python code/benchmarks/resize.py --pictures 600 --runs 5`, and the same with `--linear`.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from turns import in_turn, report

from tongkuan.base.machine import available_cores

SIZE = 384
CORES = available_cores()
DISTINCT = 40  # pictures drawn; the others hold the same bytes under other names


def make_picture(generator: np.random.Generator, side: int) -> bytes:
    """A JPEG as shops have them: smooth shapes on a plain ground, a camera's noise, quality 90, 4:2:0."""
    down, right = np.mgrid[0:side, 0:side] / side
    pixels = np.full((side, side, 3), generator.uniform(150, 255, 3))
    for _ in range(12):
        top, left, radius = generator.uniform(0, 1), generator.uniform(0, 1), generator.uniform(0.05, 0.3)
        inside = (right - left) ** 2 + (down - top) ** 2 < radius**2
        shade = (right - left)[inside][:, None] * generator.uniform(-200, 200, 3)
        pixels[inside] = generator.uniform(0, 255, 3) + shade
    pixels += generator.normal(0, 6, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_raw(folder: Path, num_pictures: int, side: int) -> Path:
    """A raw folder with one split of that many pictures, an item each."""
    generator = np.random.default_rng(0)
    contents = [make_picture(generator, side) for _ in range(min(DISTINCT, num_pictures))]
    (folder / "item_test_images").mkdir(parents=True)
    names = [f"{number:06}.jpg" for number in range(num_pictures)]
    for number, name in enumerate(names):
        (folder / "item_test_images" / name).write_bytes(contents[number % len(contents)])
    with (folder / "item_test_info.jsonl").open("w") as file:
        file.writelines(json.dumps({"item_id": name, "item_image_name": name}) + "\n" for name in names)
    pair = {"src_item_id": names[0], "tgt_item_id": names[-1]}
    (folder / "item_test_pair.jsonl").write_text(json.dumps(pair) + "\n")
    return folder


def resize_plainly(task: tuple[str, str]) -> None:
    source, target = task
    image = Image.open(source).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    image.save(target, "JPEG", quality=95, subsampling=0)


def run_plainly(raw: Path, images: Path) -> None:
    """Every picture by the plain call, in as many processes as `resize` takes."""
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    tasks = [(str(path), str(images / path.name)) for path in sorted((raw / "item_test_images").iterdir())]
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(resize_plainly, tasks, chunksize=8))


def run_ours(raw: Path, data: Path) -> None:
    """The verb as a user runs it, less the start of Python."""
    from data_scripts.resize import resize  # here, so that the plain way's processes need not load it

    shutil.rmtree(data, ignore_errors=True)
    resize(raw, data, SIZE, CORES)


def compare(folder: Path, num_pictures: int, side: int, runs: int) -> None:
    """Print both rates, their ratio, and how far the pictures are apart."""
    raw = make_raw(folder / "raw", num_pictures, side)
    plain, data = folder / "plain", folder / "data"
    print(f"{'':<10}{'plain':>12}{'ours':>12} {'':<10}{'ratio':>9}  (spread over {runs} runs, {CORES} cores)")
    seconds = in_turn(runs, lambda: run_plainly(raw, plain), lambda: run_ours(raw, data))
    report("resize", "pictures/s", num_pictures, seconds)
    apart = [difference(plain / path.name, path) for path in sorted((data / "images").iterdir())[:DISTINCT]]
    print(f"{'':<10}{statistics.mean(apart):.2f} grey levels apart on average, {max(apart):.2f} in the worst picture")


def difference(left: Path, right: Path) -> float:
    """Mean over all bytes of two pictures of one size, in grey levels."""
    with Image.open(left) as one, Image.open(right) as other:
        return float(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).mean())


def check_linear(folder: Path, num_pictures: int, side: int, runs: int) -> None:
    """Print how many times longer four times the pictures take, in turn."""
    few = make_raw(folder / "few", num_pictures, side)
    many = make_raw(folder / "many", 4 * num_pictures, side)
    data = folder / "data"
    seconds = in_turn(runs, lambda: run_ours(many, data), lambda: run_ours(few, data))
    times = [long / short for long, short in zip(*seconds, strict=True)]
    long, short = (statistics.median(taken) for taken in seconds)
    print(f"{num_pictures} pictures {short:.2f} s, {4 * num_pictures} pictures {long:.2f} s: ", end="")
    print(
        f"{statistics.median(times):.2f} times  ({min(times):.2f} to {max(times):.2f} over {runs} runs, {CORES} cores)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=600, help="default 600; with --linear also four times as many")
    parser.add_argument("--side", type=int, default=800, help="of the square JPEGs, in pixels (default 800)")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn (default 5)")
    parser.add_argument("--linear", action="store_true", help="four times the pictures beside one time")
    arguments = parser.parse_args()
    measure = check_linear if arguments.linear else compare
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.pictures, arguments.side, arguments.runs)


if __name__ == "__main__":
    main()
