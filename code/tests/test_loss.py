"""What is lost on the way from raw files is said; where nothing is left, nothing is made."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from resize_worlds import hand_out, images, ledger, noise, picture, run
from worlds import snapshot

from data_scripts import resize
from data_scripts import sample as script
from tongkuan.base.errors import UserError
from tongkuan.base.files import check_apart
from tongkuan.cli.verbs import main


def lock(archive: Path) -> None:
    """Make every entry of a zip say that it is encrypted."""
    content = archive.read_bytes()
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        for found in [match.start() for match in re.finditer(re.escape(mark), content)]:
            content = content[: found + place] + bytes([content[found + place] | 1]) + content[found + place + 1 :]
    archive.write_bytes(content)


def unpack_and_move(raw: Path) -> None:
    """What the line about encrypted archives says to do."""
    for name in ("a.jpg", "b.jpg"):
        (raw / "item_train_images").mkdir(exist_ok=True)
        (raw / "item_train_images" / name).write_bytes(picture())
    (raw / "item_train_images.zip").unlink()


LOST: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "names of another set": ({"x.jpg": picture()}, ["a.jpg", "b.jpg"], "2 missing: no such file, such as 'a.jpg'"),
    "no file at all": ({}, ["a.jpg", "b.jpg"], r"2 missing: .* there is none at all"),
    "web pages": (
        {"a.jpg": b"<html>", "b.jpg": b"<html>"},
        ["a.jpg", "b.jpg"],
        "2 unreadable: not a picture of a known",
    ),
    "cut short": ({"a.jpg": noise()[:3000]}, ["a.jpg"], "1 unreadable: image file is truncated, such as 'a.jpg'"),
    "one name for all": ({"x/1.jpg": picture(), "y/1.jpg": picture("blue")}, ["1.jpg"], "1 ambiguous, such as '1.jpg'"),
    "two causes": ({"a.jpg": b"no"}, ["b.jpg", "a.jpg", "c.jpg"], "none of the 3 .* 2 missing: no such file"),
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("has_earlier", [False, True])
def test_without_any_picture_nothing_is_made(case: str, has_earlier: bool, tmp_path: Path) -> None:
    pictures, names, message = LOST[case]
    data = tmp_path / "data"
    if has_earlier:
        hand_out(tmp_path / "earlier", "train", {"a.jpg": picture(), "e.jpg": picture("blue")})
        run(tmp_path / "earlier", data)
        (data / "split.json").write_text("drawn")
    hand_out(tmp_path / "raw", "train", {**pictures, "readme.txt": b"-", "unnamed.png": picture()}, names, "folder")
    if not pictures:
        for name in ("readme.txt", "unnamed.png"):
            (tmp_path / "raw" / "item_train_images" / name).unlink()
    before = snapshot(data)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "raw", data)
    assert "\n" not in str(caught.value) and "train item 'train0'" in str(caught.value)
    assert snapshot(data) == before
    assert has_earlier or not data.exists()


def test_an_encrypted_archive_is_said_and_the_advice_works(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    hand_out(raw, "train", {"a.jpg": picture(), "b.jpg": picture()})
    lock(raw / "item_train_images.zip")
    with pytest.raises(UserError, match=r"encrypted.*item_train_images"):
        run(raw, data)
    assert not data.exists()
    unpack_and_move(raw)
    run(raw, data)
    assert set(images(data, "train").values()) == {"a.jpg", "b.jpg"}


def test_a_readable_picture_of_like_name_is_enough(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    hand_out(raw, "train", {"a.jpg": b"broken", "a.png": picture("red", "PNG")}, ["a.jpg"])
    run(raw, data)
    assert images(data, "train") == {"train0": "a.png.jpg"}


def test_some_losses_are_reported_by_cause_with_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    pictures = {f"page{n}.jpg": b"<html>" for n in range(3)} | {"cut.jpg": noise()[:3000], "cut2.jpg": noise()[:4000]}
    pictures |= {"ok.jpg": picture(), "x/1.jpg": picture("blue"), "y/1.jpg": picture("lime")}
    hand_out(raw, "train", pictures, [*pictures, "gone.jpg", "1.jpg", ""], "folder")
    run(raw, data)
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "items: train 11; 8 without a picture"
    assert [line.split(",")[0] for line in out[2:-2]] == [
        "  3 unreadable: not a picture of a known format",
        "  2 unreadable: image file is truncated",
        "  1 missing: no such file",
        "  1 ambiguous",
    ]
    assert all("such as '" in line and "; " in line for line in out[2:-2])


def test_many_causes_are_few_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: bytes, _: int) -> Any:
        if data == b"good":
            return picture(), "ok", "", 1, 1
        raise resize.UnreadableError(f"cause {data.decode()}")

    monkeypatch.setattr(resize, "squash", fail)
    hand_out(tmp_path / "raw", "train", {f"{name}.jpg": name.encode() for name in ("good", *"abcdefgh")})
    run(tmp_path / "raw", tmp_path / "data")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 + 4 + 2
    assert out[5] == "  5 for 5 other causes, each in the ledger"


def test_a_name_with_control_characters_stays_on_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand_out(tmp_path / "raw", "train", {"a.jpg": picture()}, ["a.jpg", "x\n\x1b[2J" + "长" * 500])
    run(tmp_path / "raw", tmp_path / "data")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 5 and "\x1b" not in out
    assert max(map(len, out.splitlines()[2:3])) < 300


# ---------------------------------------------------------------------------------------------------------------------
# Outputs apart from inputs, and nobody's files written over


def linked(path: Path, to: Path) -> Path:
    path.symlink_to(to)
    return path


@pytest.mark.parametrize(
    "place",
    [
        lambda raw: raw,
        lambda raw: raw / "out",
        lambda raw: raw / "item_train_images" / "out",
        lambda raw: raw / ".." / raw.name,
        lambda raw: linked(raw.parent / "link", raw),
        lambda raw: linked(raw.parent / "inner", raw / "item_train_images"),
    ],
)
def test_resize_writes_nowhere_into_what_it_reads(place: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    hand_out(raw, "train", {"a.jpg": picture()}, how="folder")
    before, data = snapshot(tmp_path), place(raw)
    with pytest.raises(UserError, match="name another folder") as caught:
        run(raw, data)
    assert str(caught.value).startswith(str(data)) and "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before and not (raw / "out").exists()


def test_resize_writes_nowhere_into_linked_pictures_or_files(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    hand_out(raw, "train", {"a.jpg": picture()}, how="folder")
    data.mkdir()
    (raw / "item_train_images").rename(data / "images")
    linked(raw / "item_train_images", data / "images")
    with pytest.raises(UserError, match=r"images: is read here"):
        run(raw, data)
    (raw / "item_train_images").unlink()
    (data / "images").rename(raw / "item_train_images")
    (raw / "item_train_info.jsonl").rename(data / "item_train_info.jsonl")
    linked(raw / "item_train_info.jsonl", data / "item_train_info.jsonl")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"item_train_info\.jsonl: is read here"):
        run(raw, data)
    assert snapshot(tmp_path) == before


def test_raw_files_may_lie_in_the_data_folder_and_stay_as_they_are(tmp_path: Path) -> None:
    data = tmp_path / "data"
    hand_out(data / "raw", "train", {"a.jpg": picture()}, how="folder")
    before = snapshot(data / "raw")
    for _ in range(2):
        run(data / "raw", data)
    assert snapshot(data / "raw") == before
    assert (data / "ledger.jsonl").exists() and not (data / ".resize").exists()


@pytest.mark.parametrize(
    "theirs", ["item_train_info.jsonl", "item_test_pair.jsonl", "handed_out/item_valid_info.jsonl", "images/a.jpg"]
)
def test_resize_writes_over_nothing_that_it_did_not_make(theirs: str, tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    hand_out(raw, "train", {"a.jpg": picture()})
    (data / theirs).parent.mkdir(parents=True)
    (data / theirs).write_text("mine")
    with pytest.raises(UserError, match=re.escape(theirs) + ": not made by resize.*--data"):
        run(raw, data)
    assert snapshot(data).keys() == {theirs} and (data / theirs).read_text() == "mine"
    run(raw, tmp_path / "another")


def test_a_run_cut_short_is_ours_to_write_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    hand_out(raw, "train", {"a.jpg": picture()})
    run(raw, tmp_path / "whole")
    for place in ("assign_names", "convert_all", "write_records", "write_ledger"):
        original = getattr(resize, place)

        def cut(*arguments: Any, after: Any = original) -> None:
            after(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(resize, place, cut)
            with pytest.raises(KeyboardInterrupt):
                run(raw, data)
        run(raw, data)
        assert snapshot(data) == snapshot(tmp_path / "whole")


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which draws no pictures."""
    monkeypatch.setattr(script, "encode_picture", lambda _, listing: listing.image_name.encode())
    return script


@pytest.mark.usefixtures("sample")
def test_sample_writes_over_nothing_that_it_did_not_make(tmp_path: Path) -> None:
    words = ["sample", "--raw", str(tmp_path), "--products", "24"]
    main(words)
    before = snapshot(tmp_path)
    assert main(words) == 0
    assert snapshot(tmp_path) == before
    for name in (
        "item_test_answers.jsonl",
        "item_train_info.jsonl",
        "item_valid_images.zip",
        "item_test_images/mine.jpg",
    ):
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"holds other data .{name.split('/')[0]} is not as sample made it"):
            main(words)
        assert (tmp_path / name).read_text() == "mine"
        if kept is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(kept)
    (tmp_path / ".sample.json").write_text("[1")
    with pytest.raises(UserError, match="empty folder with --raw"):
        main(words)


def test_a_sample_cut_short_is_ours_to_write_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Any) -> None:
    main(["sample", "--raw", str(tmp_path / "whole"), "--products", "24"])
    main(["sample", "--raw", str(tmp_path / "cut"), "--products", "25"])
    publish_bytes = sample.publish_bytes
    for count in range(1, 9, 2):
        left = count

        def cut(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            publish_bytes(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(sample, "publish_bytes", cut)
            with pytest.raises(KeyboardInterrupt):
                main(["sample", "--raw", str(tmp_path / "cut"), "--products", "24"])
    main(["sample", "--raw", str(tmp_path / "cut"), "--products", "24"])
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


def test_download_writes_over_nothing_that_it_did_not_bring(tmp_path: Path) -> None:
    source, raw = tmp_path / "from", tmp_path / "raw"
    hand_out(source, "train", {"a.jpg": picture()})
    words = ["download", "--from", str(source), "--raw", str(raw)]
    raw.mkdir()
    for name in ("item_train_info.jsonl", "item_train_images.zip"):
        (raw / name).write_text('{"item_id": "mine"}\n')
        with pytest.raises(UserError, match=f"{name}: not brought by download, or changed since; move it away"):
            main(words)
        assert (raw / name).read_text() == '{"item_id": "mine"}\n'
        (raw / name).unlink()  # what the line says
        assert main(words) == 0
        assert (raw / name).read_bytes() == (source / name).read_bytes()
    (source / "item_train_info.jsonl").write_text('{"item_id": "newer"}\n')
    assert main(words) == 0, "what it brought itself it may bring anew"
    (raw / "item_train_info.jsonl").write_text("edited")
    with pytest.raises(UserError, match="changed since"):
        main(words)
    for out in (source, source / "below", linked(tmp_path / "link", source)):
        with pytest.raises(UserError):
            main(["download", "--from", str(source), "--raw", str(out)])
    assert not (source / "below").exists()


@pytest.mark.parametrize(
    ("verb", "option", "places"),
    [
        ("predict", "--submit", ("", "images", "images/x", "handed_out")),
        ("predict", "--cache", ("", "images", "handed_out/x")),
        ("evaluate", "--cache", ("", "images/x", "handed_out")),
        ("train", "--run", ("", "images", "handed_out")),
        ("train", "--model", ("images/m.safetensors", "handed_out/m", "images")),
        ("explain", "--out", ("images/a.html", "handed_out/a.html", "images/../images/a.html")),
        ("report", "--out", ("images/a.html", "handed_out/a.html")),
    ],
)
def test_no_verb_writes_into_pictures_or_raw_pairs(
    verb: str, option: str, places: tuple[str, ...], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    more = ["--submit", str(tmp_path / "s"), "--pairs", str(tmp_path / "p")] if verb == "report" else []
    for place in places:
        with pytest.raises(UserError, match="name another folder"):
            main([verb, "--data", str(data), option, f"{data}/{place}", *more])
    assert [path.name for path in data.rglob("*")] == ["images"]


def test_other_folders_are_apart(tmp_path: Path) -> None:
    check_apart(tmp_path / "a", tmp_path / "b", tmp_path / "a" / "b", tmp_path / "ab")
    with pytest.raises(UserError, match="is read here"):
        check_apart(tmp_path / "b" / "..", tmp_path / "a", tmp_path)


def test_archives_of_one_path_twice_are_said_and_the_advice_works(tmp_path: Path, capsys: Any) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    hand_out(raw, "train", {"a.jpg": picture("red"), "b.jpg": picture()}, ["a.jpg", "b.jpg"])
    buffer = io.BytesIO((raw / "item_train_images.zip").read_bytes())
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.jpg", picture("blue"))
    (raw / "item_train_images.zip").write_bytes(buffer.getvalue())
    run(raw, data)
    assert "its path is twice in the archive: unpack that into item_train_images" in capsys.readouterr().out
    assert ledger(data)["train", "b.jpg"]["status"] == "ok"
    unpack_and_move(raw)
    run(raw, data)
    assert images(data, "train") == {"train0": "a.jpg", "train1": "b.jpg"}
