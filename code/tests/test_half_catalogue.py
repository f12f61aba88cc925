"""A catalogue without pictures, and one without texts, from raw files to the pages."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from worlds import COLOURS, train_words, write_jsonl

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main

SPLITS = ("train", "valid", "test")


def hand_out(raw: Path, has_pictures: bool, has_texts: bool) -> Path:
    """Raw files of twelve products with three listings each, and answers."""
    raw.mkdir()
    for split in SPLITS:
        items, pairs = [], []
        for product in range(12):
            for listing in range(3):
                item = {"item_id": f"{split}-{product}-{listing}"}
                if has_texts:
                    item |= {"title": f"杯子 {'大' * listing}", "item_pvs": f"型号#:#A{product}"}
                if has_pictures:
                    item["item_image_name"] = f"{product}/{listing}.png"
                    place = raw / f"item_{split}_images" / item["item_image_name"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    buffer = io.BytesIO()
                    shade = (*COLOURS[product % 4][:2], product * 9 + listing)
                    Image.new("RGB", (16, 16), shade).save(buffer, "PNG")
                    place.write_bytes(buffer.getvalue())
                items.append(item)
            for other, label in (
                (f"{split}-{product}-1", "1"),
                (f"{split}-{product // 2 * 2 + 1 - product % 2}-2", "0"),
            ):
                pairs.append({"src_item_id": f"{split}-{product}-0", "tgt_item_id": other, "item_label": label})
        write_jsonl(raw / f"item_{split}_info.jsonl", items)
        write_jsonl(raw / f"item_{split}_pair.jsonl", pairs)
    path = raw / "item_test_pair.jsonl"
    shutil.copy(path, raw / "item_test_answers.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [{key: value for key, value in row.items() if key != "item_label"} for row in rows])
    return raw


def test_resize_asks_for_no_pictures_that_no_item_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = hand_out(tmp_path / "raw", has_pictures=False, has_texts=True)
    assert main(["resize", "--raw", str(raw), "--data", str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert "train 36, valid 36, test 36; 108 without a picture" in out and "missing 0" in out
    assert (tmp_path / "data" / "ledger.jsonl").read_bytes() == b""


def test_one_split_may_have_pictures_and_another_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = hand_out(tmp_path / "raw", has_pictures=True, has_texts=True)
    rows = [json.loads(line) for line in (raw / "item_test_info.jsonl").read_text().splitlines()]
    for row, empty in zip(rows, ("", None, "none") * 12, strict=True):
        row["item_image_name"] = empty
        if empty == "none":
            del row["item_image_name"]
    write_jsonl(raw / "item_test_info.jsonl", rows)
    shutil.rmtree(raw / "item_test_images")
    assert main(["resize", "--raw", str(raw), "--data", str(tmp_path / "data"), "--size", "16"]) == 0
    assert "36 without a picture" in capsys.readouterr().out


def test_one_name_is_enough_to_ask_for_pictures(tmp_path: Path) -> None:
    raw = hand_out(tmp_path / "raw", has_pictures=False, has_texts=True)
    rows = [json.loads(line) for line in (raw / "item_valid_info.jsonl").read_text().splitlines()]
    rows[7]["item_image_name"] = "a.jpg"
    write_jsonl(raw / "item_valid_info.jsonl", rows)
    with pytest.raises(
        UserError, match=r"no pictures of valid, though its items name some; put item_valid_images\.zip"
    ):
        main(["resize", "--raw", str(raw), "--data", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()
    (raw / "item_valid_images").mkdir()  # what the line says
    Image.new("RGB", (9, 9)).save(raw / "item_valid_images" / "a.jpg")
    assert main(["resize", "--raw", str(raw), "--data", str(tmp_path / "data")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "keeps_images"), [("text", True), ("text", False), ("image", True)])
def test_half_a_catalogue_is_enough(
    inputs: str, keeps_images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without pictures, the folder of pictures need not be there either."""
    raw = hand_out(tmp_path / "raw", inputs == "image", inputs == "text")
    data, model, submit = tmp_path / "data", tmp_path / "m", tmp_path / "submit"

    def verb(*words: object) -> None:
        assert main([str(word) for word in words]) == 0, words

    verb("resize", "--raw", raw, "--data", data, "--size", 16)
    verb("split", "--data", data)
    if not keeps_images:
        (data / "images").rmdir()
    verb(*train_words(tmp_path, data, f"model.inputs={inputs}"))
    verb("evaluate", "--data", data, "--model", model)
    verb("predict", "--data", data, "--model", model, "--submit", submit)
    verb("verify", "--data", data, "--model", model, "--submit", submit)
    verb("check", "--submit", submit, "--pairs", data / "item_test_pair.jsonl")
    judge = ["--submit", submit, "--pairs", data / "item_test_answers.jsonl"]
    verb("score", *judge)
    verb("plot", *judge)
    verb("report", *judge, "--data", data, "--run", tmp_path / "run")
    verb("explain", "--data", data, "--model", model, "--out", submit / "explain.html")
    out = capsys.readouterr().out
    assert f"24 pairs, {24 if inputs == 'image' else 0} with pictures" in out
    for page in ("report.html", "explain.html"):
        has_pictures = re.search(r'id="pictures">[^<]*[A-Za-z0-9+/]{100}', (submit / page).read_text(encoding="utf-8"))
        assert bool(has_pictures) == (inputs == "image"), page
