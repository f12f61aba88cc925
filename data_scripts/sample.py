"""Make a sample catalogue by code, in the organiser's raw format and with its disorder; labels are known exactly.

`./entrypoint.sh sample --raw data/raw`; half of the products have siblings that only the picture tells apart,
the other half siblings that only the text tells apart, so neither text nor picture alone will do.
"""

import hashlib
import io
import itertools
import math
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from data_scripts.made import Made, hash_of_files
from data_scripts.sample_words import COLOURS, INKS, SHAPES, Listing, Look, Rng, choose, deal, plan_products, write_row
from tongkuan.base.errors import entrypoint
from tongkuan.base.files import part_of, publish, sole_process
from tongkuan.records.items import Pair, item_file, pair_file, pair_row

ITEMS_A_PRODUCT = (4, 6)  # from, to
POSITIVE_SHARE = 0.42  # of the pairs
SIBLING_SHARE = 0.5  # of the negative pairs; the others join two families
FAMILIES_A_SHELF = 3  # families whose listings meet in pairs
POSITIVES_A_PRODUCT = 12  # at most
ARCHIVE_PARTS = 3  # always the same number, so that a smaller catalogue leaves no stale part of a larger one
ANSWERS = "item_test_answers.jsonl"
# Dealt like cards, so that a small catalogue has every suffix too. A .SS2 file is a JPEG under another name.
SUFFIXES = (".jpg",) * 40 + (".jpeg",) * 3 + (".png",) * 2 + (".gif",) * 2 + (".bmp",) + (".SS2",) * 2
BULKY = (".png", ".gif", ".bmp")  # kept small in pixels
DEFECTS = {"train": ("truncated", "unreadable", "missing"), "valid": ("truncated",), "test": ("truncated", "missing")}
LAYER = 240  # pixels a side on which a product is drawn before it is scaled into its picture
OUTLINE, TRIM = (62, 60, 64), (84, 80, 88)  # RGB of every product, whatever its colour
# Random streams: the plan draws from (seed, 0), the picture of item i from (seed, 1, split, i).


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything but the pictures. Listings and pairs by split, in file order."""

    listings: dict[str, list[Listing]]
    pairs: dict[str, list[Pair]]


# ---------------------------------------------------------------------------------------------------------------------
# The plan: families, products, listings, pairs


def generator(seed: int, *stream: int) -> Rng:
    """A random stream of its own for each purpose, so that one more draw here moves nothing there."""
    return np.random.Generator(np.random.PCG64([seed, *stream]))


def plan(products: int, seed: int = 0) -> Catalogue:
    """The catalogue without its pictures: quick, and the same for the same arguments."""
    rng = generator(seed, 0)
    ids, names, suffixes = opaque_ids(rng), opaque_names(rng), deal(rng, SUFFIXES)
    listings: dict[str, list[Listing]] = {split: [] for split in DEFECTS}
    for product in plan_products(rng, products):
        for _ in range(int(rng.integers(ITEMS_A_PRODUCT[0], ITEMS_A_PRODUCT[1] + 1))):
            image_name = next(names) + next(suffixes)
            row = {"item_id": next(ids), **write_row(rng, product, image_name)}
            listings[product.family.split].append(Listing(product, row, image_name))
    for split, rows in listings.items():
        rows = [rows[index] for index in rng.permutation(len(rows))]
        listings[split] = with_defects(rows, DEFECTS[split], share_stem=split == "train")
    pairs = {split: plan_pairs(rng, rows) for split, rows in listings.items()}
    return Catalogue(listings, pairs)


def opaque_ids(rng: Rng) -> Iterator[str]:
    """Distinct 12-digit ids that say nothing about the product."""
    seen = set()
    while True:
        item_id = str(rng.integers(5 * 10**11, 7 * 10**11))
        if item_id not in seen:
            seen.add(item_id)
            yield item_id


def opaque_names(rng: Rng) -> Iterator[str]:
    """Picture stems in the way of the big marketplaces; they say nothing either, and 60 bits do not collide."""
    while True:
        yield f"O1CN01{rng.integers(1 << 60):015x}"


def with_defects(rows: list[Listing], defects: Sequence[str], share_stem: bool) -> list[Listing]:
    """The rows with one faulty picture each for the first of them, and perhaps a .jpg and a .png of one stem."""
    jpegs = [index for index, listing in enumerate(rows) if listing.image_name.endswith(".jpg")]
    for index, defect in zip(jpegs, defects, strict=False):
        rows[index] = replace(rows[index], defect=defect)
    if share_stem:
        twin = rows[jpegs[-2]]
        name = Path(rows[jpegs[-1]].image_name).stem + ".png"
        rows[jpegs[-2]] = replace(twin, row={**twin.row, "item_image_name": name}, image_name=name)
    return rows


def plan_pairs(rng: Rng, rows: Sequence[Listing]) -> list[Pair]:
    """Labelled pairs among the listings of one split, none twice, in random order and direction."""
    by_product: dict[int, list[Listing]] = {}
    by_family: dict[int, list[Listing]] = {}
    for row in rows:
        by_product.setdefault(row.product.number, []).append(row)
        by_family.setdefault(row.product.family.number, []).append(row)
    same: list[tuple[Listing, Listing]] = []
    for members in by_product.values():
        same += choose(rng, list(itertools.combinations(members, 2)), POSITIVES_A_PRODUCT)
    num_negatives = round(len(same) * (1 - POSITIVE_SHARE) / POSITIVE_SHARE)
    siblings = [
        (left, right)
        for members in by_family.values()
        for left, right in itertools.combinations(members, 2)
        if left.product is not right.product
    ]
    different = choose(rng, siblings, round(num_negatives * SIBLING_SHARE))
    # Only neighbouring families meet: as in a shop's data, pairs fall into many components that share no item.
    shelf = {number: place // FAMILIES_A_SHELF for place, number in enumerate(sorted(by_family))}
    strangers = [
        (left, right)
        for (one, ones), (other, others) in itertools.combinations(sorted(by_family.items()), 2)
        if shelf[one] == shelf[other]
        for left, right in itertools.product(ones, others)
    ]
    different += choose(rng, strangers, num_negatives - len(different))
    labelled = [(*pair, 1) for pair in same] + [(*pair, 0) for pair in different]
    pairs = []
    for index in rng.permutation(len(labelled)):
        left_row, right_row, label = labelled[index]
        if rng.random() < 0.5:
            left_row, right_row = right_row, left_row
        pairs.append(Pair(left_row.item_id, right_row.item_id, label))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@lru_cache(maxsize=8)
def draw_product(look: Look) -> tuple[Image.Image, Image.Image]:
    """RGB (LAYER, LAYER), the product with its trim and outline, and L (LAYER, LAYER), where it is."""
    category, shape, colour, pattern = look
    body, trim = Image.new("L", (LAYER, LAYER)), Image.new("L", (LAYER, LAYER))
    for primitive in SHAPES[category][shape].split(";"):
        kind, *numbers = primitive.split()
        stamp(ImageDraw.Draw(trim if kind.isupper() else body), kind.lower(), [float(number) for number in numbers])
    fill = np.array(COLOURS[colour][1], dtype=np.float32)
    inked = Image.new("L", (LAYER, LAYER))
    left, top, right, bottom = body.getbbox() or (0, 0, LAYER, LAYER)  # the pattern spans the product, be it small
    inked.paste(Image.fromarray(pattern_mask(pattern)).resize((right - left, bottom - top)), (left, top))
    ink = np.array(INKS[pattern], dtype=np.float32)
    paint = np.where(np.asarray(inked)[..., None] > 0, ink, fill)  # (LAYER, LAYER, 3)
    paint *= np.linspace(1.04, 0.92, LAYER, dtype=np.float32)[:, None]  # light from the left
    both = np.maximum(np.asarray(body), np.asarray(trim))
    grown = (
        Image.fromarray(both).filter(ImageFilter.BoxBlur(4)).point([255 if level > 24 else 0 for level in range(256)])
    )
    picture = Image.new("RGB", (LAYER, LAYER), OUTLINE)
    picture.paste(Image.fromarray(paint.clip(0, 255).astype(np.uint8)), mask=body)
    picture.paste(TRIM, mask=trim)
    return picture, grown


def stamp(draw: ImageDraw.ImageDraw, kind: str, numbers: list[float]) -> None:
    """One primitive of sample_words.SHAPES on a mask, with a margin of 5 % all round."""
    scale = LAYER / 110
    if kind == "p":
        draw.polygon([(5 + number) * scale for number in numbers], fill=255)
        return
    box = [(5 + number) * scale for number in numbers[:4]]
    if kind == "o":
        draw.ellipse(box, fill=255)
    elif kind == "r":
        draw.rounded_rectangle(box, radius=numbers[4] * scale, fill=255)
    else:
        draw.arc(box, numbers[4], numbers[5], fill=255, width=round(numbers[6] * scale))


@cache
def pattern_mask(pattern: str) -> NDArray[np.bool_]:
    """bool (LAYER, LAYER): where the second colour goes. Bold enough to be told apart at 16 x 16."""
    y, x = np.meshgrid(*[np.linspace(0, 1, LAYER, endpoint=False)] * 2, indexing="ij")
    masks = {
        "plain": x < 0,
        "rows": y * 5 % 2 >= 1,
        "columns": x * 5 % 2 >= 1,
        "diagonal": (x + y) * 2.5 % 2 >= 1,
        "checks": (np.floor(x * 3) + np.floor(y * 3)) % 2 >= 1,
        "halves": y > 0.5,
        "ring": abs(np.hypot(x - 0.5, y - 0.5) - 0.22) < 0.1,
    }
    return masks[pattern]


def photograph(rng: Rng, look: Look, bulky: bool) -> Image.Image:
    """RGB, 160 to 360 pixels a side: the product as one seller shows it, on any ground, at any place and light."""
    long_side = int(rng.integers(160, 221)) if bulky else round(160 + 200 * rng.random() ** 2)
    short_side = max(160, round(long_side * float(rng.choice((1, 1, 1, 0.8, 0.67)))))
    width, height = (long_side, short_side) if rng.random() < 0.5 else (short_side, long_side)
    picture = draw_ground(rng, width, height)
    product, outline = draw_product(look)
    copies = 2 if rng.random() < 0.08 else 1
    for copy in range(copies):
        side = min(width, height) * rng.uniform(0.8, 1.05) * (1 if copy == copies - 1 else 0.6)
        # From a pixel of the picture back to the layer: shift to the centre, turn, stretch, perhaps mirror.
        centre = [space / 2 + rng.uniform(-0.4, 0.4) * max(space - side, 8) for space in (width, height)]
        angle, stretch = math.radians(rng.normal(0, 5)), rng.uniform(0.92, 1.08)
        across, down = (-1 if rng.random() < 0.3 else 1) * stretch * LAYER / side, LAYER / side
        turn = np.array(
            [[math.cos(angle) * across, math.sin(angle) * across], [-math.sin(angle) * down, math.cos(angle) * down]]
        )
        shift = LAYER / 2 - turn @ centre
        matrix = (*turn[0], shift[0], *turn[1], shift[1])
        thing, mask = (
            layer.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            for layer in (product, outline)
        )
        picture.paste(thing, mask=mask)
    if rng.random() < 0.1:
        draw_badge(rng, picture)
    light = rng.uniform(0.92, 1.06) * rng.uniform(0.985, 1.015, size=3)  # brightness and tint
    levels = (np.arange(256) * light[:, None]).clip(0, 255).astype(np.uint8)  # (3, 256)
    return picture.point(levels.ravel().tolist())


def draw_ground(rng: Rng, width: int, height: int) -> Image.Image:
    """RGB (height, width): a studio white, a pastel gradient, a strong colour, some with texture."""
    lot = rng.random()
    if lot < 0.75:
        corners = rng.uniform(238, 255) + rng.uniform(-6, 0, (2, 2, 1)) * np.ones(3)
    elif lot < 0.98:
        corners = rng.uniform(222, 248, 3) + rng.uniform(-12, 6, (2, 2, 3))
    else:
        corners = rng.uniform(60, 240, 3) + rng.uniform(-25, 25, (2, 2, 3))
    ground = Image.fromarray(corners.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        grain = rng.normal(0, 5, (height // int(rng.integers(3, 9)), width // int(rng.integers(3, 60)) + 1, 1))
        texture = Image.fromarray((128 + grain[..., 0]).clip(0, 255).astype(np.uint8)).resize((width, height))
        shaded = np.asarray(ground, dtype=np.int16) + (np.asarray(texture, dtype=np.int16) - 128)[..., None]
        ground = Image.fromarray(shaded.clip(0, 255).astype(np.uint8))
    return ground


def draw_badge(rng: Rng, picture: Image.Image) -> None:
    """A seller's corner badge: a loud block with bars for its words."""
    draw = ImageDraw.Draw(picture)
    width, height = round(picture.width * rng.uniform(0.15, 0.26)), round(picture.height * rng.uniform(0.08, 0.16))
    left = 0 if rng.random() < 0.5 else picture.width - width
    top = 0 if rng.random() < 0.7 else picture.height - height
    colour = ((225, 30, 40), (250, 120, 10), (20, 120, 220), (240, 200, 30), (30, 30, 30))[int(rng.integers(5))]
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    for bar in range(4):
        x = left + width * (0.12 + 0.2 * bar)
        draw.rectangle((x, top + height * 0.3, x + width * 0.12, top + height * 0.7), fill=(255, 255, 255))


def encode_picture(rng: Rng, listing: Listing) -> bytes:
    """The bytes of a listing's picture file, spoilt if it has a defect."""
    if listing.defect == "unreadable":
        return rng.bytes(4000)
    suffix = Path(listing.image_name).suffix
    picture, file = photograph(rng, listing.product.look, suffix in BULKY), io.BytesIO()
    if suffix in BULKY:
        reduced = picture.quantize(128, dither=Image.Dither.NONE) if suffix == ".gif" else picture
        reduced.save(file, {".png": "PNG", ".gif": "GIF", ".bmp": "BMP"}[suffix])
    else:
        picture.save(file, "JPEG", quality=int(rng.integers(60, 91)))
    return file.getvalue()[: file.tell() * 4 // 5] if listing.defect == "truncated" else file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_catalogue(raw_dir: Path, catalogue: Catalogue, seed: int) -> int:
    """Publish every file of the catalogue into `raw_dir`; returns the number of pictures."""
    made = Made(raw_dir, "sample")
    made.check("item_*")
    publish_bytes(made, ANSWERS, b"".join(pair_row(pair) for pair in catalogue.pairs["test"]))
    total = sum(len(rows) for rows in catalogue.listings.values())
    num_pictures = 0
    with tqdm(total=total, desc="sample", unit="item", disable=None) as progress:
        for number, (split, rows) in enumerate(catalogue.listings.items()):
            items = b"".join(orjson.dumps(row.row) + b"\n" for row in rows)
            publish_bytes(made, item_file(raw_dir, split).name, items)
            pairs = [replace(pair, label=None) if split == "test" else pair for pair in catalogue.pairs[split]]
            publish_bytes(made, pair_file(raw_dir, split).name, b"".join(pair_row(pair) for pair in pairs))
            pictures: dict[str, bytes] = {}
            # By product, so that the cache holds what is drawn again; the order of the files stays that of the items.
            for index in sorted(range(len(rows)), key=lambda index: rows[index].product.number):
                listing = rows[index]
                if listing.defect != "missing":
                    pictures[listing.image_name] = encode_picture(generator(seed, 1, number, index), listing)
                progress.update()
            stray = replace(rows[0], image_name=next(opaque_names(generator(seed, 2, number))) + ".jpg", defect="")
            pictures[stray.image_name] = encode_picture(generator(seed, 2, number, 1), stray)  # named by no item
            publish_pictures(made, split, dict(sorted(pictures.items())))
            num_pictures += len(pictures)
    made.finish()
    return num_pictures


def publish_bytes(made: Made, name: str, content: bytes) -> None:
    """One whole file, known as ours before it is there."""
    made.note(name, hashlib.sha256(content).hexdigest())
    with publish(made.folder / name) as file:
        file.write(content)


def publish_pictures(made: Made, split: str, pictures: dict[str, bytes]) -> None:
    """As handed out: an archive in parts for train, one archive for valid, a plain folder for test."""
    name = f"item_{split}_images"
    if split == "test":
        hashes = {image_name: hashlib.sha256(content).hexdigest() for image_name, content in pictures.items()}
        made.note(name, hash_of_files(hashes))
        publish_folder(made.folder / name, pictures)
        return
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for image_name, content in pictures.items():
            entry = zipfile.ZipInfo(f"{name}/{image_name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED if image_name.endswith(".bmp") else zipfile.ZIP_STORED
            file.writestr(entry, content)
    content = archive.getvalue()
    if split == "valid":
        publish_bytes(made, f"{name}.zip", content)
        return
    size = -(-len(content) // ARCHIVE_PARTS)
    for part in range(ARCHIVE_PARTS):
        publish_bytes(made, f"{name}.zip.parta{'abc'[part]}", content[part * size : (part + 1) * size])


def publish_folder(folder: Path, files: dict[str, bytes]) -> None:
    """A folder appears whole too: written beside its place, then renamed into it. For a `sole_process`."""
    temporary = part_of(folder)
    if temporary.exists():  # what a killed run left
        shutil.rmtree(temporary)
    try:
        (temporary / "new").mkdir(parents=True)
        for name, content in files.items():
            (temporary / "new" / name).write_bytes(content)
        if folder.exists():
            folder.rename(temporary / "old")
        (temporary / "new").rename(folder)
    finally:
        shutil.rmtree(temporary)


def sample(raw_dir: Path, products: int, seed: int) -> str:
    """Make the catalogue in `raw_dir`; returns the closing lines. Raises UserError for what the user can mend."""
    catalogue = plan(products, seed)
    with sole_process(raw_dir):
        num_pictures = write_catalogue(raw_dir, catalogue, seed)
    items = "/".join(str(len(rows)) for rows in catalogue.listings.values())
    pairs = "/".join(str(len(pairs)) for pairs in catalogue.pairs.values())
    made = f"{raw_dir}: {products} products, {items} items, {pairs} pairs (train/valid/test), {num_pictures} pictures"
    return f"{made}\nnext: {entrypoint('resize', '--raw', raw_dir)}"
