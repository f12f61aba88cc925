"""Resizing: what a shop or an organiser hands out becomes square JPEGs, and no picture is lost without a word."""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_scripts import resize
from data_scripts.archives import sources
from tongkuan.base.errors import UserError
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


def snapshot(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.mark.parametrize("how", ["zip", "parts", "folder"])
def test_every_way_of_handing_pictures_out_gives_the_same_result(raw: Path, data: Path, how: str) -> None:
    pictures = {"a.jpg": picture("red"), "sub/b.png": picture("blue", "PNG"), "c.SS2": picture("lime")}
    hand_out(raw, "train", pictures, ["a.jpg", "b.png", "c.SS2"], how)
    assert run(raw, data) == 0
    assert images(data, "train") == {"train0": "a.jpg", "train1": "b.png.jpg", "train2": "c.SS2.jpg"}
    assert colour(data, "a.jpg")[0] > 250
    assert colour(data, "b.png.jpg")[2] > 250
    assert colour(data, "c.SS2.jpg")[1] > 250
    assert {row["status"] for row in ledger(data).values()} == {"ok"}
    assert ledger(data)["train", "a.jpg"] | {"width": 40, "height": 30} == ledger(data)["train", "a.jpg"]


def test_lines_keep_all_else_and_train_is_published_for_split_to_draw_from(raw: Path, data: Path) -> None:
    hand_out(raw, "train", {"a.jpg": picture()})
    hand_out(raw, "test", {"t.jpg": picture()})
    run(raw, data)
    assert read_rows(data / "item_train_info.jsonl") == read_rows(raw / "item_train_info.jsonl")
    assert read_rows(data / "item_test_pair.jsonl") == [{"src_item_id": "test0", "tgt_item_id": "test0"}]
    for kind in ("info", "pair"):
        name = f"item_train_{kind}.jsonl"
        assert (data / "handed_out" / name).read_bytes() == (data / name).read_bytes()
    assert not (data / "handed_out" / "item_test_info.jsonl").exists()


def test_answers_of_the_sample_come_along(raw: Path, data: Path) -> None:
    hand_out(raw, "test", {"t.jpg": picture()})
    (raw / "item_test_answers.jsonl").write_text('{"src_item_id":"test0","tgt_item_id":"test0","item_label":"1"}\n')
    run(raw, data)
    assert (data / "item_test_answers.jsonl").read_text() == (raw / "item_test_answers.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("alpha.png", picture((255, 0, 0, 0), "PNG", mode="RGBA"), (255, 255, 255)),
        ("grey_alpha.png", picture((0, 0), "PNG", mode="LA"), (255, 255, 255)),
        ("palette.gif", picture(0, "GIF", mode="P", transparency=0), (255, 255, 255)),
        ("key.png", picture((9, 9, 9), "PNG", transparency=(9, 9, 9)), (255, 255, 255)),
        ("deep.png", picture(32768, "PNG", mode="I;16"), (128, 128, 128)),
        ("deep32.tif", picture(65535, "TIFF", mode="I"), (255, 255, 255)),
        ("float.tif", picture(0.5, "TIFF", mode="F"), (128, 128, 128)),
        ("cmyk.jpg", picture((0, 255, 255, 0), "JPEG", mode="CMYK", quality=100), (255, 0, 0)),
        ("one_bit.png", picture(1, "PNG", mode="1"), (255, 255, 255)),
        ("bitmap.bmp", picture((0, 0, 255), "BMP"), (0, 0, 255)),
        ("web.jpg", picture((0, 0, 255), "WEBP", lossless=True), (0, 0, 255)),
    ],
)
def test_every_colour_mode_becomes_rgb_on_white(
    raw: Path, data: Path, name: str, content: bytes, expected: tuple[int, ...]
) -> None:
    hand_out(raw, "train", {name: content})
    run(raw, data)
    assert ledger(data)["train", name]["status"] == "ok", ledger(data)
    assert colour(data, images(data, "train")["train0"]) == pytest.approx(expected, abs=3)


def test_the_first_frame_counts(raw: Path, data: Path) -> None:
    frames = [Image.new("RGB", (20, 20), name) for name in ("blue", "red")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    hand_out(raw, "train", {"moving.gif": buffer.getvalue()})
    run(raw, data)
    assert colour(data, "moving.gif.jpg") == pytest.approx((0, 0, 255), abs=3)


def test_pictures_are_turned_as_exif_says_and_lose_their_metadata(raw: Path, data: Path) -> None:
    lying = Image.new("RGB", (40, 20), "white")
    lying.paste("red", (0, 0, 20, 20))  # red on the left; turned by 90 degrees clockwise it is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    lying.save(buffer, "JPEG", exif=exif, comment=b"secret", dpi=(300, 300), quality=100)
    hand_out(raw, "train", {"a.jpg": buffer.getvalue()})
    run(raw, data)
    with Image.open(data / "images" / "a.jpg") as image:
        assert image.getpixel((SIZE // 2, 2)) == pytest.approx((255, 0, 0), abs=4)
        assert image.getpixel((SIZE // 2, SIZE - 3)) == pytest.approx((255, 255, 255), abs=4)
        assert not image.getexif()
    assert b"secret" not in (data / "images" / "a.jpg").read_bytes()


def test_a_truncated_picture_is_repaired_if_most_of_it_is_there(raw: Path, data: Path) -> None:
    whole, bitmap = noise(), noise("BMP")
    pictures = {
        "most.jpg": whole[: len(whole) * 8 // 10],
        "little.jpg": whole[: len(whole) // 10],
        "most.bmp": bitmap[: len(bitmap) * 8 // 10],  # stored from the bottom up
        "most.png": noise("PNG")[:-20_000],
        "progressive.jpg": noise(progressive=True)[: len(whole) * 6 // 10],
        "start.jpg": noise(progressive=True)[:300],
        "little.gif": noise("GIF")[:12_000],  # interlaced
    }
    hand_out(raw, "train", pictures)
    run(raw, data)
    rows = ledger(data)
    for name in ("most.jpg", "most.bmp", "most.png", "progressive.jpg"):
        assert rows["train", name]["status"] == "repaired", rows[("train", name)]
        assert "rows came through" in rows["train", name]["detail"]
    for name in ("little.jpg", "start.jpg", "little.gif"):
        assert rows["train", name]["status"] == "unreadable", rows["train", name]
    with Image.open(data / "images" / "most.jpg") as image:
        assert image.getpixel((SIZE // 2, SIZE - 1)) == pytest.approx((255, 255, 255), abs=12)
    with Image.open(data / "images" / "most.bmp.jpg") as image:
        assert image.getpixel((SIZE // 2, 0)) == pytest.approx((255, 255, 255), abs=12)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "the switch is global and must be put back"


def test_hostile_pictures_are_reported_and_nothing_else(
    raw: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 50_000)
    pictures = {
        "page.jpg": b"<html>404</html>",
        "empty.jpg": b"",
        "ghost.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "bomb.png": bomb(11_000, 11_000),
        "huge.png": bomb(100_000, 100_000),
        "big.png": noise("PNG"),
        "good.jpg": picture(),
    }
    hand_out(raw, "train", pictures)
    run(raw, data)
    rows = ledger(data)
    for name in set(pictures) - {"good.jpg"}:
        assert rows["train", name]["status"] == "unreadable", name
        assert rows["train", name]["image"] == ""
        assert rows["train", name]["detail"]
    assert "megapixels" in rows["train", "bomb.png"]["detail"]
    assert "megapixels" in rows["train", "huge.png"]["detail"]
    assert rows["train", "bomb.png"]["width"] == 11_000
    assert [name for name in images(data, "train").values() if name] == ["good.jpg"]
    assert [path.name for path in (data / "images").iterdir()] == ["good.jpg"]
    assert "unreadable 6" in capsys.readouterr().out


def test_an_encrypted_or_damaged_entry_is_unreadable_alone(raw: Path, data: Path) -> None:
    hand_out(raw, "train", {"a.jpg": picture(), "b.jpg": picture("blue"), "c.jpg": picture("lime")})
    archive = raw / "item_train_images.zip"
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the first entry says that it is encrypted
    content[content.index(picture("blue")) + 100] ^= 255  # the second no longer fits its checksum
    archive.write_bytes(content)
    run(raw, data)
    assert [row["status"] for row in ledger(data).values()] == ["unreadable", "unreadable", "ok"]
    assert ledger(data)["train", "a.jpg"]["detail"] == "encrypted"


def test_names_from_an_archive_stay_inside_the_folder(raw: Path, data: Path, tmp_path: Path) -> None:
    hostile = ["../../up.jpg", "/etc/root.jpg", "..\\win.jpg", ".hidden.jpg", "tab\there.jpg", "长" * 90 + ".jpg"]
    hand_out(raw, "train", {name: picture((9, 9, n)) for n, name in enumerate(hostile)})
    run(raw, data)
    made = {path.name for path in (data / "images").rglob("*")}
    assert {"up.jpg", "root.jpg", "win.jpg", "hidden.jpg", "tab_here.jpg"} < made
    assert len(made) == len(hostile)
    assert all(len(name.encode()) <= 200 for name in made)
    assert set(images(data, "train").values()) == made
    assert not (tmp_path / "up.jpg").exists()


def test_the_same_name_in_two_splits(raw: Path, data: Path) -> None:
    hand_out(raw, "train", {"same.jpg": picture("red"), "other.jpg": picture("red", size=(8, 8))})
    hand_out(raw, "valid", {"same.jpg": picture("red"), "other.jpg": picture("blue")})
    run(raw, data)
    rows = ledger(data)
    assert rows["valid", "same.jpg"]["status"] == rows["valid", "other.jpg"]["status"] == "duplicate"
    assert images(data, "train") == {"train0": "same.jpg", "train1": "other.jpg"}
    assert images(data, "valid") == {"valid0": "same.jpg", "valid1": "other~2.jpg"}
    assert colour(data, "other.jpg")[0] > 250
    assert colour(data, "other~2.jpg")[2] > 250


def test_names_that_meet_only_on_some_file_systems_or_after_cleaning_do_not_collide(raw: Path, data: Path) -> None:
    names = ["A.jpg", "a.jpg", "b.png", "b.png.jpg", "c.jpg", "sub/c.jpg", "c~2.jpg"]
    hand_out(raw, "train", {name: picture((n * 20, 0, 0)) for n, name in enumerate(names)})
    run(raw, data)
    made = images(data, "train")
    assert len({name.casefold() for name in made.values()}) == len(names)
    for number in range(len(names)):
        assert colour(data, made[f"train{number}"])[0] == pytest.approx(number * 20, abs=3), names[number]


def test_an_item_finds_its_picture_by_name_then_stem_then_in_other_splits(raw: Path, data: Path) -> None:
    hand_out(
        raw,
        "train",
        {"a.jpg": picture(), "a.png": picture("blue", "PNG"), "b.png": picture("lime", "PNG"), "bad.jpg": b"no"},
        ["a.png", "b.jpg", "elsewhere.jpg", "stem.jpg", "nowhere.jpg", "", "bad.jpg", "nowhere.jpg"],
    )
    hand_out(raw, "valid", {"elsewhere.jpg": picture(), "stem.gif": picture(0, "GIF", mode="P")}, ["stem.gif"])
    run(raw, data)
    expected = ["a.png.jpg", "b.png.jpg", "elsewhere.jpg", "stem.gif.jpg", "", "", "", ""]
    assert list(images(data, "train").values()) == expected
    missing = [row for row in ledger(data).values() if row["status"] == "missing"]
    assert [row["name"] for row in missing] == ["nowhere.jpg"]
    assert "train4" in missing[0]["detail"]


def test_a_readable_picture_goes_before_an_unreadable_one_of_its_own_split(raw: Path, data: Path) -> None:
    hand_out(
        raw, "train", {"a.jpg": b"broken", "a.png": picture("blue", "PNG"), "b.jpg": b"broken"}, ["a.jpg", "b.jpg"]
    )
    hand_out(raw, "valid", {"b.jpg": picture()})
    run(raw, data)
    assert images(data, "train") == {"train0": "a.png.jpg", "train1": ""}, "the b.jpg of valid may show another product"
    assert "item train0 of train, for 'a.jpg' is broken" in ledger(data)["train", "a.png"]["detail"]


def test_folders_tell_pictures_of_one_name_apart(raw: Path, data: Path) -> None:
    pictures = {"red/1.jpg": picture("red"), "blue/1.jpg": picture("blue")}
    hand_out(raw, "train", pictures, ["red/1.jpg", "blue/1.jpg"], "folder")
    run(raw, data)
    made = images(data, "train")
    assert colour(data, made["train0"])[0] > 250
    assert colour(data, made["train1"])[2] > 250


def test_chinese_windows_names_are_read(raw: Path, data: Path) -> None:
    hand_out(raw, "train", {"a.jpg": picture()}, ["红色.jpg"])
    archive = raw / "item_train_images.zip"
    name = "红色.jpg".encode("gbk")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x" * len(name), picture())
    archive.write_bytes(archive.read_bytes().replace(b"x" * len(name), name))
    run(raw, data)
    assert images(data, "train") == {"train0": "红色.jpg"}


def test_the_summary_counts_and_says_what_is_next(raw: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand_out(raw, "train", {"a.jpg": picture(), "b.jpg": picture("blue")}, ["a.jpg", "gone.jpg"])
    run(raw, data)
    captured = capsys.readouterr()
    assert "ok 2, repaired 0, unreadable 0, missing 1, duplicate 0" in captured.out
    assert "1 that no item names" in captured.out
    assert f"./entrypoint.sh split --data {data}" in captured.out
    assert captured.err == "", "quiet when not a terminal"


def test_any_number_of_workers_and_any_repetition_give_the_same_bytes(
    raw: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {f"{n}.jpg": picture((n * 6, 0, 0)) for n in range(40)} | {"bad.jpg": b"no", "cut.jpg": noise()[:-9000]}
    hand_out(raw, "train", pictures, how="parts")
    run(raw, data, "--workers", "1")
    first = snapshot(data)
    assert len(first) == 4 + 1 + 41
    run(raw, data)
    assert snapshot(data) == first
    monkeypatch.setattr(resize, "MIN_TASKS", 1)
    run(raw, tmp_path / "other", "--workers", "2")
    assert snapshot(tmp_path / "other") == first


def test_a_new_run_takes_an_earlier_drawn_split_back(raw: Path, data: Path) -> None:
    hand_out(raw, "train", {"a.jpg": picture()})
    run(raw, data)
    before = snapshot(data)
    for name in ("split.json", "item_valid_info.jsonl", "item_valid_pair.jsonl", "item_train_info.jsonl"):
        (data / name).write_text("drawn")
    run(raw, data)
    assert snapshot(data) == before


def test_splits_of_two_raw_folders_are_not_mixed(raw: Path, data: Path, tmp_path: Path) -> None:
    hand_out(raw, "train", {"a.jpg": picture("red")})
    run(raw, data)
    hand_out(tmp_path / "raw2", "test", {"a.jpg": picture("blue")})
    before = snapshot(data)
    with pytest.raises(UserError, match="name another --data folder"):
        run(tmp_path / "raw2", data)
    assert snapshot(data) == before


def test_an_interrupted_run_leaves_no_ledger(raw: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_out(raw, "train", {"a.jpg": picture()})
    run(raw, data)
    monkeypatch.setattr(resize, "convert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(raw, data)
    assert not (data / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("item_train_info.jsonl", r"item_train_info\.jsonl: missing"),
        ("item_train_pair.jsonl", r"item_train_pair\.jsonl: missing"),
        ("item_train_images.zip", r"no pictures of train.*\.zip\.partaa"),
    ],
)
def test_half_a_split_is_an_error_that_says_what_is_missing(raw: Path, data: Path, gone: str, message: str) -> None:
    hand_out(raw, "train", {"a.jpg": picture()})
    (raw / gone).unlink()
    with pytest.raises(UserError, match=message) as caught:
        run(raw, data)
    assert "./entrypoint.sh d" in str(caught.value)
    assert not data.exists()


def test_nothing_there_at_all_says_what_is_looked_for(raw: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"_info\.jsonl.*download.*demo"):
        run(raw, data)


@pytest.mark.parametrize("part", ["aa", "ab", "ac"])
def test_a_missing_part_is_an_error(raw: Path, data: Path, part: str) -> None:
    hand_out(raw, "train", {"a.jpg": noise()}, how="parts")
    (raw / f"item_train_images.zip.part{part}").unlink()
    with pytest.raises(UserError, match="download again"):
        run(raw, data)


def test_a_pair_of_an_unknown_item_names_its_line(raw: Path, data: Path) -> None:
    hand_out(raw, "train", {"a.jpg": picture()})
    with (raw / "item_train_pair.jsonl").open("a") as file:
        file.write('{"src_item_id":"train0","tgt_item_id":"train00","item_label":"0"}\n')
    with pytest.raises(UserError, match=r"item_train_pair\.jsonl:2: unknown item 'train00'"):
        run(raw, data)
