"""One reader: what resize makes of a picture is what all else sees in it, whether or not resize has been there."""

import ast
import base64
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from icc_profiles import cmyk, grey, rgb
from PIL import Image
from worlds import hand_out_pictures, read_jsonl, tiny_settings, write_jsonl

from tongkuan.cli.verbs import main
from tongkuan.encode import cache
from tongkuan.encode.store import ItemStore, side_of
from tongkuan.records import pictures
from tongkuan.records.items import Item
from tongkuan.report.problems import thumbnail
from tongkuan.report.views import Pictures
from tongkuan.result.predict import predict

TOP = Path(__file__).resolve().parents[2]
SIZE = 24


def encode(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def shapes(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth colours, no side like another."""
    down, right = np.mgrid[0:height, 0:width]
    pixels = np.stack([right * 255 / width, down * 255 / height, 200 - right - down], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def turned(turn: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return encode(shapes(), kind, exif=exif)


def faded() -> Image.Image:
    image = shapes().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def deep(mode: str) -> Image.Image:
    levels = np.asarray(shapes().convert("L"))
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    return Image.fromarray(levels.astype(kinds[mode]) * (1 if mode == "F" else 257))


WHOLE = {
    **{f"turned {turn}": turned(turn) for turn in range(1, 9)},
    **{f"turned, {kind}": turned(6, kind) for kind in ("PNG", "WEBP", "AVIF", "TIFF")},
    **{mode: encode(shapes().convert(mode), "PNG") for mode in ("1", "L", "P", "RGB")},
    **{mode: encode(deep(mode), "TIFF") for mode in ("I;16", "I", "F")},
    "deep PNG": encode(deep("I;16"), "PNG"),
    "LA": encode(faded().convert("LA"), "PNG"),
    "PA": encode(faded().quantize(), "PNG"),
    "RGBA": encode(faded(), "PNG"),
    "CMYK": encode(shapes().convert("CMYK"), "JPEG"),
    "CMYK, profile": encode(shapes().convert("CMYK"), "JPEG", icc_profile=cmyk()),
    "RGB, profile": encode(shapes(), "JPEG", icc_profile=rgb()),
    "P, profile": encode(shapes().convert("P"), "PNG", icc_profile=rgb()),
    "RGBA, profile": encode(faded(), "WEBP", icc_profile=rgb()),
    "L, profile": encode(shapes().convert("L"), "TIFF", icc_profile=grey()),
    "I;16, profile": encode(deep("I;16"), "PNG", icc_profile=grey()),
    "bad profile": encode(shapes(), "PNG", icc_profile=b"nonsense"),
    "JPEG": encode(shapes(), "JPEG"),
    "a square JPEG": encode(shapes(50, 50), "JPEG", quality=80),
    "a square JPEG of the very size": encode(shapes(SIZE, SIZE), "JPEG", quality=95),
    "a fine JPEG": encode(shapes(), "JPEG", quality=95, subsampling=0),
    "large": encode(shapes(1600, 1200), "JPEG"),
    "GIF": encode(shapes(), "GIF"),
    "BMP": encode(shapes(), "BMP"),
    "ICO": encode(shapes(32, 32), "ICO"),
    "JPEG2000": encode(shapes(), "JPEG2000"),
    "cut": encode(shapes(200, 200), "BMP")[:-40_000],
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("side", [SIZE, 64])
def test_a_picture_put_by_hand_is_read_as_resize_would_make_it(name: str, side: int, tmp_path: Path) -> None:
    (tmp_path / "by hand").write_bytes(WHOLE[name])
    (tmp_path / "resized").write_bytes(pictures.squash(WHOLE[name], side)[0])
    read = [pictures.read_image(tmp_path / way, SIZE, side) for way in ("by hand", "resized")]
    assert (read[0] == read[1]).all()
    assert read[0].std() > 5, "shapes are seen"


@pytest.mark.parametrize("side", [SIZE, 64, 384, 2000])
@pytest.mark.parametrize("size", [SIZE, 16, 100])
def test_what_resize_made_is_read_as_pillow_alone_reads_it(side: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(pictures.squash(encode(shapes(), "JPEG"), side)[0])
    with Image.open(path) as image:
        plain = image.convert("RGB")
    plain = plain if plain.size == (size, size) else plain.resize((size, size), Image.Resampling.BICUBIC)
    assert (pictures.read_image(path, size) == np.asarray(plain).transpose(2, 0, 1)).all()


def test_predict_gives_the_same_embeddings_either_way(model: Path, tmp_path: Path) -> None:
    chosen = ("turned 6", "I;16", "RGBA", "CMYK, profile", "RGB, profile", "JPEG", "a square JPEG", "large", "cut")
    raw = hand_out_pictures(tmp_path / "raw", {f"{n}.jpg": WHOLE[name] for n, name in enumerate(chosen)})
    main(["resize", "--raw", str(raw), "--data", str(tmp_path / "resized")])
    by_hand = tmp_path / "by hand"
    shutil.copytree(raw, by_hand)
    (by_hand / "item_test_images").rename(by_hand / "images")
    for data in ("resized", "by hand"):
        predict(tmp_path / data, "test", model, tmp_path / f"{data} submit")
    pairs = [read_jsonl(tmp_path / f"{data} submit" / "result.jsonl") for data in ("resized", "by hand")]
    for one, other in zip(*pairs, strict=True):
        for side in ("src_item_emb", "tgt_item_emb"):
            difference = np.abs(np.array(orjson.loads(one[side])) - np.array(orjson.loads(other[side])))
            assert difference.max() <= 1e-3


def ledger_of(data_dir: Path, names: list[str]) -> None:
    write_jsonl(data_dir / "ledger.jsonl", [{"image": name} for name in names])


def test_pictures_put_beside_resized_ones_are_squashed_to_their_side(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    assert side_of(images) == pictures.SIDE
    (images / "b.jpg").write_bytes(WHOLE["a square JPEG"])
    assert side_of(images) == pictures.SIDE
    (images / "c.jpg").write_bytes(pictures.squash(WHOLE["JPEG"], 96)[0])
    assert side_of(images) == 96
    (images / "a.jpg").write_bytes(pictures.squash(WHOLE["JPEG"], 32)[0])
    ledger_of(tmp_path, ["", "gone.jpg", "b.jpg", "c.jpg"])
    assert side_of(images) == 96, "by the ledger, where there is one"
    store = ItemStore({"b": Item("b", image_name="b.jpg")}, images, tiny_settings(tmp_path).model, None)
    assert (store.image("b") == pictures.read_image(images / "b.jpg", 32, 96)).all()  # type: ignore[union-attr]
    for rubbish in (b"", b"no json\n", b"[]\n", b'{"image": 3}\n', b"\xff" * 100_000, b'{"image": "../../x"}\n'):
        (tmp_path / "ledger.jsonl").write_bytes(rubbish)
        assert side_of(images) in (32, pictures.SIDE)
    assert side_of(tmp_path / "nowhere") == pictures.SIDE


def test_the_caches_key_knows_the_reader(model: Path, tmp_path: Path) -> None:
    assert {"records/pictures", "records/colours", "encode/store"} <= set(cache.SOURCES)
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(WHOLE["RGB"])

    def key() -> str:
        store = ItemStore({"a": Item("a", image_name="a.png")}, images, tiny_settings(tmp_path).model, None)
        return cache.Cache(tmp_path, model, "fp32", torch.device("cpu")).key(store, ["a"])

    before = key()
    assert key() == before
    (images / "b.jpg").write_bytes(pictures.squash(WHOLE["JPEG"], 96)[0])
    assert key() != before, "a.png is read otherwise now"


UNREADABLE = {
    "empty": b"",
    "page": b"<html>404</html>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "little": encode(shapes(300, 300), "BMP")[:20_000],
    "a header": encode(shapes(), "JPEG")[:100],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_resize_cannot_read_is_blank(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a.jpg"
    path.write_bytes(UNREADABLE[name])
    with pytest.raises(pictures.UnreadableError):
        pictures.squash(UNREADABLE[name], SIZE)
    with pytest.raises(pictures.UnreadableError):
        pictures.read_image(path, SIZE)
    store = ItemStore({"a": Item("a", image_name="a.jpg")}, path.parent, tiny_settings(tmp_path).model, None)
    assert store.image("a") is None and store.unreadable == {"a.jpg"}
    assert thumbnail(path) is None
    shown = Pictures(tmp_path)
    assert shown.encoded("a.jpg") == "" and shown.damaged == {"a.jpg"}


def test_bounds_hold_for_pictures_put_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(WHOLE["RGB"])
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(pictures.UnreadableError, match="megapixels"):
        pictures.read_image(path, SIZE)
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    with pytest.raises(pictures.UnreadableError, match="larger than"):
        pictures.read_image(path, SIZE)
    os.mkfifo(tmp_path / "pipe")
    for odd in ("pipe", "missing", "", "\0", "x" * 300):
        with pytest.raises(pictures.UnreadableError):
            pictures.read_image(tmp_path / odd, SIZE)
        assert pictures.prepared_side(tmp_path / odd) is None
        assert Pictures(tmp_path).encoded(odd) == ""


@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6))
def test_wild_bytes_are_a_picture_or_unreadable(name: str, changes: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE[name][:8000])
    for place, value in changes:
        content[place % len(content)] = value
    try:
        found = pictures.open_picture(bytes(content), 8)
    except pictures.UnreadableError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert found.image.mode == "RGB" and min(found.image.size) > 0


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"])
)
def test_any_bytes_are_unreadable_or_a_picture(content: bytes, start: bytes) -> None:
    try:
        pictures.open_picture(start + content)
    except pictures.UnreadableError as error:
        assert str(error) and "\n" not in str(error)


def test_threads_repair_side_by_side_what_each_would_alone(tmp_path: Path) -> None:
    whole = encode(shapes(300, 300), "JPEG", quality=100)
    noisy = encode(Image.effect_noise((300, 300), 90).convert("RGB"), "PNG")
    damaged = [noisy[:-cut] for cut in range(1000, 61_000, 5000)] + [whole[: len(whole) // 2], whole[:900]]
    files = [whole, *damaged, WHOLE["RGBA"]] * 3

    def outcome(data: bytes) -> Any:
        try:
            return pictures.squash(data, SIZE)
        except pictures.UnreadableError as error:
            return str(error)

    alone = [outcome(data) for data in files]
    assert {found[1] for found in alone if not isinstance(found, str)} == {"ok", "repaired"}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files)) == alone


def test_the_report_shows_pictures_upright_and_in_their_colours(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.new("RGB", (40, 20), "white")
    lying.paste("red", (0, 0, 20, 20))  # on the left; turned by 90 degrees clockwise it is on top
    faint = Image.new("RGBA", (20, 40), (0, 0, 0, 0))
    files = {"lying.jpg": encode(lying, "JPEG", exif=exif, quality=100), "faint.png": encode(faint, "PNG")}
    files["ink.jpg"] = encode(Image.new("CMYK", (20, 40), (255, 0, 0, 0)), "JPEG", icc_profile=cmyk())

    def seen(name: str, at: tuple[int, int]) -> Any:
        (tmp_path / "images" / name).write_bytes(files[name])
        with Image.open(io.BytesIO(base64.b64decode(Pictures(tmp_path).encoded(name)))) as image:
            assert image.size == (20, 40)
            return image.convert("RGB").getpixel(at)

    assert seen("lying.jpg", (10, 3)) == pytest.approx((255, 0, 0), abs=12)
    assert seen("lying.jpg", (10, 36)) == pytest.approx((255, 255, 255), abs=12)
    assert seen("faint.png", (10, 20)) == (255, 255, 255)
    assert seen("ink.jpg", (10, 20))[0] < 120 and seen("ink.jpg", (10, 20)) != (0, 255, 255)
    small = thumbnail(tmp_path / "images" / "lying.jpg")
    assert small is not None and small.reshape(8, 8, 3)[0, :, 1].max() < 60


def test_nobody_else_opens_pictures() -> None:
    for path in sorted([*(TOP / "code" / "tongkuan").rglob("*.py"), *(TOP / "data_scripts").rglob("*.py")]):
        if path.name == "pictures.py" and path.parent.name == "records":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("Image.open", "PIL.Image.open"), f"{path}:{getattr(node, 'lineno', 0)}"
