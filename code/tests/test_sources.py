"""Where pictures come from: the names in archives, folders with links, and several sources of one split."""

import os
import shlex
import shutil
import struct
import subprocess
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from archive_worlds import (
    FILES,
    STEM,
    TOLD,
    byte_parts,
    in_zip,
    notes,
    plain,
    put,
    read_all,
    refused,
    zipped,
)
from hypothesis import given
from hypothesis import strategies as st

from data_scripts.archives import file_names, sources
from tongkuan.records.pictures import UnreadableError

CHINESE = ["红色连衣裙.jpg", "图片/許功蓋內商品.jpg", "x/誠品手機殼.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("encoding", "names"),
    [
        ("utf-8", CHINESE),
        ("gb18030", [*CHINESE, "𠮷野家菜单.jpg", "€uro€.jpg"]),
        ("cp950", ["許功蓋內商品.jpg", "手機殼/誠品.jpg", "藍色上衣.webp", "x/成功"]),
        ("big5hkscs", ["嘅咗啲啱.jpg", "許功蓋.jpg"]),
        ("cp932", ["ソニー製品.jpg", "表紙/商品一覧.png", "ｶﾀｶﾅ.jpg"]),
        ("cp437", ["Mädchenkleid.jpg", "été/café.png", "niño.jpg"]),
        ("utf-8", ["a.jpg", "b/c.jpg"]),
    ],
)
def test_names_are_read_in_the_encoding_that_finds_the_items(tmp_path: Path, encoding: str, names: list[str]) -> None:
    put(tmp_path, zipped((f"t/{name}".encode(encoding), b"x") for name in names))
    assert list(read_all(tmp_path, names)) == [f"t/{name}" for name in names]
    # Items may leave the folder out, write the suffix otherwise, add a size, or be typed on a Mac.
    for change in (
        lambda name: name.rpartition("/")[2],
        lambda name: name.rpartition(".")[0] + ".PNG",
        lambda name: f"{name}_400x400.jpg?x=1",
        lambda name: unicodedata.normalize("NFD", name).upper(),
    ):
        assert list(read_all(tmp_path, map(change, names))) == [f"t/{name}" for name in names]


def test_without_items_the_strictest_encoding_that_reads_all_names_is_taken(tmp_path: Path) -> None:
    for encoding, names in (("utf-8", CHINESE), ("gb18030", CHINESE), ("cp437", ["Ä.jpg", "café.jpg"])):
        put(tmp_path, zipped((name.encode(encoding), b"x") for name in names))
        assert list(read_all(tmp_path)) == names


def test_an_archive_of_two_encodings_serves_the_items_of_both(tmp_path: Path) -> None:
    raw = [CHINESE[0].encode(), CHINESE[1].encode("gb18030"), "蓝.jpg".encode("gb18030")]
    put(tmp_path, zipped((name, b"x") for name in raw))
    assert set(read_all(tmp_path, [*CHINESE, "蓝.jpg"])) == {*CHINESE[:2], "蓝.jpg"}


def unicode_field(raw: bytes, text: str, crc: int | None = None, version: int = 1) -> bytes:
    body = struct.pack("<BL", version, zlib.crc32(raw) if crc is None else crc) + text.encode()
    return struct.pack("<2H", 0x7075, len(body)) + body


@pytest.mark.parametrize(
    ("crc", "version", "expected"), [(None, 1, "红.jpg"), (7, 1, "blau.jpg"), (None, 2, "blau.jpg")]
)
def test_a_unicode_path_needs_a_right_checksum(tmp_path: Path, crc: int | None, version: int, expected: str) -> None:
    info = zipfile.ZipInfo("blau.jpg")
    info.extra = unicode_field(b"blau.jpg", "红.jpg", crc, version)
    with zipfile.ZipFile(tmp_path / f"{STEM}.zip", "w") as archive:
        archive.writestr(info, b"x")
    assert list(read_all(tmp_path)) == [expected]


def test_a_name_that_is_not_the_utf8_it_says_is_this_names_trouble_alone(tmp_path: Path) -> None:
    put(tmp_path, zipped([(name.encode("gb18030"), b"x") for name in CHINESE], flags=0x800))
    assert list(read_all(tmp_path, CHINESE)) == CHINESE


def test_an_entry_whose_own_header_has_another_name_is_read(tmp_path: Path) -> None:
    for own in (b"other.jpg", b"t\\a_a.jpg", "é_a.jpg".encode("latin-1") + b"##"):
        content = plain("t/aaa.jpg")
        put(tmp_path, content.replace(b"t/aaa.jpg", own[:9].ljust(9, b"#"), 1))
        assert list(read_all(tmp_path)) == ["t/aaa.jpg"]
        assert not next(iter(read_all(tmp_path).values())).startswith("!")


@given(st.lists(st.binary(min_size=1, max_size=12), max_size=6), st.lists(st.text(max_size=6), max_size=4))
def test_any_bytes_become_text_and_ascii_stays(raw: list[bytes], names: list[str]) -> None:
    texts = file_names.decode_names([(name, None) for name in raw], file_names.marks_of_all(names))
    assert len(texts) == len(raw)
    for name, text in zip(raw, texts, strict=True):
        assert text.encode() and (not name.isascii() or text == name.decode())


def test_folder_names_that_are_not_utf8_get_the_same_treatment(tmp_path: Path) -> None:
    for name in CHINESE:
        path = Path(os.fsdecode(os.fsencode(tmp_path / STEM) + b"/" + name.encode("gb18030")))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert set(read_all(tmp_path, CHINESE)) == set(CHINESE)


def test_what_systems_leave_behind_is_no_picture(tmp_path: Path) -> None:
    litter = [
        "__MACOSX/._a.jpg",
        "t/__MACOSX/b.jpg",
        "._a.jpg",
        "t/Thumbs.db",
        "t/thumbs.db",
        ".DS_Store",
        "desktop.ini",
    ]
    names = [*litter, "t/a.jpg"]
    put(tmp_path, in_zip({"inner.zip": plain(*names), **dict.fromkeys(litter, b"x")}))
    assert list(read_all(tmp_path)) == ["inner/t/a.jpg"]
    folder = tmp_path / "other"
    for name in names:
        put(folder / STEM, b"x", name)
    assert list(read_all(folder)) == ["t/a.jpg"]


# ---------------------------------------------------------------------------------------------------------------------
# Other archives, and several sources of one split


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tbz2"])
def test_a_tar_is_refused_with_the_command_that_unpacks_it(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "my raw"
    put(folder / "in", b"a", "t/a.jpg")
    mode = {"": "w", "gz": "w:gz", "xz": "w:xz", "z2": "w:bz2"}["" if suffix == ".tar" else suffix[-2:]]
    with tarfile.open(folder / f"{STEM}{suffix}", mode) as archive:  # type: ignore[call-overload]
        archive.add(folder / "in", ".")
    line = refused(folder)
    assert line.startswith(f"{folder}/{STEM}{suffix}: ") and "; unpack it: mkdir -p " in line
    if (program := {"xz": "xz", "z2": "bzip2"}.get(suffix[-2:])) and not shutil.which(program):
        return  # tar needs it, so only the words can be tried
    subprocess.run(line.partition("; unpack it: ")[2], shell=True, check=True)
    assert read_all(folder) == {"t/a.jpg": "a"}
    assert "move away what is not meant" in notes(folder)[0]


@pytest.mark.parametrize("style", [".part{:02}", ".{:03}", ".{:02}"])
def test_parts_of_a_tar_are_refused_with_the_command_that_joins_them(tmp_path: Path, style: str) -> None:
    for number in range(3):
        put(tmp_path, bytes([number]), f"{STEM}.tar.gz{style.format(number)}")
    subprocess.run(refused(tmp_path).partition("; join the parts: ")[2], shell=True, check=True)
    assert (tmp_path / f"{STEM}.tar.gz").read_bytes() == b"\0\1\2"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (".rar", "unrar x {} {}/"), (".part1.rar", "unrar x {} {}/"), (".part01.rar", "unrar x {} {}/"),
        (".7z", "7z x {} -o{}"), (".7z.001", "7z x {} -o{}"), (".RAR", "unrar x {} {}/"),
    ],
)  # fmt: skip
def test_rar_and_7z_are_refused_with_the_command_that_unpacks_them(tmp_path: Path, name: str, command: str) -> None:
    path = put(tmp_path, b"x", f"{STEM}{name}")
    assert refused(tmp_path).endswith(f"; unpack it: {command.format(shlex.quote(str(path)), tmp_path / STEM)}")


@pytest.mark.parametrize(("start", "kind"), [(b"Rar!\x1a\x07", "rar"), (b"7z\xbc\xaf", "7z"), (b"\x1f\x8b", "tar.gz")])
def test_an_archive_of_another_kind_that_is_called_zip_is_reported(tmp_path: Path, start: bytes, kind: str) -> None:
    path = put(tmp_path, start + bytes(40))
    line = refused(tmp_path)
    assert line.startswith(f"{path}: not a zip archive but {kind}")
    path.rename(tmp_path / line.partition("call it ")[2].partition(" and")[0])
    assert "; unpack it: " in refused(tmp_path)


SOURCES = ["zip", "partaa", "folder", "001", "tar"]


@pytest.mark.parametrize(
    "present", [*(SOURCES[n:] for n in range(4)), ["zip", "folder"], ["partaa", "folder"], ["001", "tar"]]
)
def test_of_several_sources_one_is_read_by_rule_and_the_note_names_all(tmp_path: Path, present: list[str]) -> None:
    for what in present:
        if what == "folder":
            put(tmp_path / STEM, b"x", "folder.jpg")
        elif what == "tar":
            put(tmp_path, b"x", f"{STEM}.tar")
        elif what != "001" or "partaa" not in present:
            put(tmp_path, plain(f"{what}.jpg"), f"{STEM}.zip{'' if what == 'zip' else '.' + what}")
    assert list(read_all(tmp_path)) == [f"{present[0]}.jpg"]
    (note,) = notes(tmp_path)
    left = [path.name for path in tmp_path.iterdir()]
    assert all(name in note for name in left) and note.endswith("move away what is not meant")
    assert note.startswith(f"{tmp_path}/{STEM}") and not notes_after_tidying(tmp_path, note)


def notes_after_tidying(folder: Path, note: str) -> list[str]:
    """The notes after what the note says is passed over was moved away."""
    for name in note.partition("and not ")[2].partition(" beside it")[0].split(", "):
        (folder / name).rename(folder / f"old {name}")
    return notes(folder)


def test_an_empty_folder_beside_an_archive_is_no_source(tmp_path: Path) -> None:
    (tmp_path / STEM).mkdir()
    byte_parts(tmp_path, [".001", ".002"])
    assert read_all(tmp_path) == TOLD and not notes(tmp_path)


@pytest.mark.parametrize("name", [f"{STEM}.ZIP", "Item_Train_Images.zip", f"{STEM}.Zip.001"])
def test_letter_case_of_an_archives_name_does_not_matter(tmp_path: Path, name: str) -> None:
    put(tmp_path, in_zip(FILES), name)
    assert read_all(tmp_path) == TOLD
    put(tmp_path, plain("own.jpg"))
    assert list(read_all(tmp_path)) == ["own.jpg"] and name in notes(tmp_path)[0]


def test_nothing_is_none_and_other_splits_are_none_of_this(tmp_path: Path) -> None:
    for name in ("item_valid_images.zip", "item_train_images_old.zip", f"{STEM}.txt"):
        put(tmp_path, plain("a.jpg"), name)
    assert sources.find_source(tmp_path, "train") is None
    assert sources.find_source(tmp_path / "nowhere", "train") is None


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_linked_folders_are_followed_once_each_and_loops_are_cut(tmp_path: Path) -> None:
    put(tmp_path / "disk", b"far", "deep/far.jpg")
    put(tmp_path / STEM, b"own", "real/own.jpg")
    (tmp_path / STEM / "a_far").symlink_to(tmp_path / "disk")
    (tmp_path / STEM / "again").symlink_to(tmp_path / "disk")
    (tmp_path / STEM / "alias").symlink_to("real")
    (tmp_path / STEM / "real" / "loop").symlink_to("..")
    (tmp_path / "disk" / "deep" / "back").symlink_to(tmp_path)
    assert read_all(tmp_path) == {"real/own.jpg": "own", "a_far/deep/far.jpg": "far"}
    put(tmp_path, b"x", "beside.jpg")
    assert read_all(tmp_path)["a_far/deep/back/beside.jpg"] == "x"


def test_a_linked_split_folder_and_linked_files_are_read(tmp_path: Path) -> None:
    put(tmp_path / "disk", b"far", "a.jpg")
    (tmp_path / STEM).symlink_to("disk")
    (tmp_path / "disk" / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "disk" / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "disk" / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(tmp_path / "disk" / "pipe.jpg")
    told = read_all(tmp_path)
    assert (told.pop("a.jpg"), told.pop("b.jpg")) == ("far", "far")
    assert told.keys() == {"broken.jpg", "circle.jpg", "pipe.jpg"} and all(text[0] == "!" for text in told.values())


def test_the_order_is_that_of_names_whatever_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jpg", "a/2.jpg", "a/1.jpg", "c/x.jpg", "a.jpg"):
        put(tmp_path / STEM, b"x", name)
    expected, scandir = list(read_all(tmp_path)), os.scandir

    class Reversed(list[Any]):
        def __enter__(self) -> list[Any]:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(reversed(list(scandir(path)))))
    assert list(read_all(tmp_path)) == expected == ["a.jpg", "b.jpg", "a/1.jpg", "a/2.jpg", "c/x.jpg"]


def test_a_closed_folder_and_a_file_that_vanishes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "gone.jpg", "shut/b.jpg"):
        put(tmp_path / STEM, b"x", name)
    scandir = os.scandir

    def shut(path: Any) -> Any:
        if str(path).endswith(bad):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", shut)
    bad = "shut"
    source = sources.find_source(tmp_path, "train")
    (tmp_path / STEM / "gone.jpg").unlink()
    told = {}
    for path, key in source.entries():
        try:
            told[path] = source.read(key).decode()
        except UnreadableError as error:
            told[path] = f"! {error}"
    assert told == {
        "shut": "! a folder that cannot be opened (Permission denied)", "a.jpg": "x",
        "gone.jpg": "! No such file or directory",
    }  # fmt: skip
    assert source.notes == [
        f"{tmp_path}/{STEM}/shut: this folder cannot be opened (permission denied); make it readable"
    ]
    bad = STEM
    assert refused(tmp_path) == f"{tmp_path}/{STEM}: this folder cannot be opened (permission denied); make it readable"
