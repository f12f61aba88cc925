"""Archives in archives, encrypted, in several files, or hostile: read, or named in a line."""

import os
import pickle
import shutil
import struct
import subprocess
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from archive_worlds import (
    FILES,
    STEM,
    TOLD,
    byte_parts,
    disk_parts,
    flagged,
    in_zip,
    locked,
    notes,
    plain,
    put,
    read_all,
    refused,
)
from hypothesis import given
from hypothesis import strategies as st

from data_scripts.archives import listing, sources, zips
from tongkuan.base.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Archives inside archives


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("outer", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_in_a_zip_is_read_by_every_process(tmp_path: Path, outer: int, method: int) -> None:
    inner = in_zip({f"{n}.jpg": bytes([n]) * 3000 for n in range(5)}, method)
    put(tmp_path, in_zip({"sets/one.zip": inner, "b.jpg": b"b", "TWO.ZIP": plain("c.jpg")}, outer))
    source = sources.find_source(tmp_path, "train")
    travelled = pickle.loads(pickle.dumps(source))
    told = {path: travelled.read(pickle.loads(pickle.dumps(key))) for path, key in source.entries()}
    expected = {f"sets/one/{n}.jpg": bytes([n]) * 3000 for n in range(5)}
    assert told == {**expected, "b.jpg": b"b", "TWO/c.jpg": b"c.jpg"}
    assert ["one.zip' in it: an archive among the pictures, 5 files" in line for line in source.notes] == [True, False]


def read_here(task: tuple[Any, Any]) -> bytes:
    source, key = task
    return bytes(source.read(key))


@pytest.mark.slow
def test_an_unpacked_inner_archive_is_read_by_others_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    put(tmp_path, in_zip({"in.zip": plain(*(f"{n}.jpg" for n in range(8)))}, zipfile.ZIP_DEFLATED))
    source = sources.find_source(tmp_path, "train")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        tasks = [(source, key) for _, key in reversed(list(source.entries()))]
        assert list(pool.map(read_here, tasks)) == [f"{n}.jpg".encode() for n in reversed(range(8))]
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("inner", "detail"),
    [
        (b"<html>404</html>", "not a whole zip archive (has no table of contents at its end)"),
        (plain("a.jpg")[:-30], "not a whole zip archive (has no table of contents at its end)"),
        (plain("a.jpg")[20:], "not a whole zip archive (is shorter than its table of contents says)"),
        (flagged(plain("a.jpg", "b.jpg"), 1), "encrypted"),
        (in_zip({"deep.zip": plain("a.jpg")}), "an archive in an archive in an archive"),
    ],
    ids=["page", "end lost", "start lost", "encrypted", "deep"],  # the bytes hold the time
)
def test_an_inner_archive_that_cannot_be_read_is_named(tmp_path: Path, inner: bytes, detail: str) -> None:
    put(tmp_path, in_zip({"in.zip": inner, "ok.jpg": b"ok"}))
    told = read_all(tmp_path)
    assert told.pop("ok.jpg") == "ok"
    assert told and set(told.values()) == {f"! {detail}"}
    put(tmp_path, in_zip({"in.zip": inner, "read me.txt": b"x"}))
    line = refused(tmp_path)
    assert line.startswith(f"{tmp_path}/{STEM}.zip: ") and detail.partition(" (")[0] in line
    # The advice, followed: both are unpacked into the folder, and the zip is away.
    if detail == "encrypted":
        (tmp_path / f"{STEM}.zip").unlink()
        for name in ("a.jpg", "b.jpg"):
            put(tmp_path / STEM, b"unpacked", name)
        put(tmp_path / STEM, inner, "in.zip")
        assert set(read_all(tmp_path).values()) == {"unpacked"}


@pytest.mark.parametrize("name", ["a\nb.zip", "\x1b[31m.zip", "长" * 5000 + ".zip", "\u202e.zip"])
def test_a_hostile_name_of_an_inner_archive_stays_on_a_short_line(tmp_path: Path, name: str) -> None:
    put(tmp_path, in_zip({name: b"no zip"}))
    line = refused(tmp_path)
    assert line.isprintable() and len(line.replace(str(tmp_path), "")) < 300 and "not a whole zip archive" in line
    folder = tmp_path / "other"
    for raw in ("红.zip".encode("gb18030"), b"\n.zip"):
        put(folder / STEM, b"no zip", os.fsdecode(raw))
    put(folder / STEM, b"ok", "ok.jpg")
    assert all(line.isprintable() for line in notes(folder)) and len(notes(folder)) == 2


@pytest.mark.parametrize("name", ["in.7z", "in.rar", "in.tar.gz", "x/in.tgz", "in.zip.001", "in.z01"])
def test_other_archives_in_an_archive_are_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, in_zip({name: b"x", "ok.jpg": b"ok"}))
    assert read_all(tmp_path) == {name: "! an archive in an archive, and not a whole zip", "ok.jpg": "ok"}
    assert any(name in line for line in notes(tmp_path))


def test_what_inner_archives_unpack_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = in_zip({"a.jpg": bytes(3 << 20)})
    names = {"bomb.zip": inner, "b.zip": plain("b.jpg"), "ok.jpg": b"ok"}
    put(tmp_path, in_zip(names, zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(listing, "MAX_SPOOL_BYTES", 2 << 20)
    assert read_all(tmp_path) == {
        "bomb.zip": "! not a whole zip archive (unpacks to more than 2 MB)", "b/b.jpg": "b.jpg", "ok.jpg": "ok",
    }  # fmt: skip
    lie = (tmp_path / f"{STEM}.zip").read_bytes().replace(struct.pack("<L", len(inner)), struct.pack("<L", 9))
    put(tmp_path, lie)
    assert read_all(tmp_path)["bomb.zip"] == "! not a whole zip archive (its checksum is another)", (
        "no more is unpacked"
    )


def test_the_number_of_inner_archives_and_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, in_zip({f"{n}.zip": plain("a.jpg", "b.jpg") for n in range(4)}))
    monkeypatch.setattr(listing, "MAX_INNER", 2)
    told = read_all(tmp_path)
    assert told["1/a.jpg"] == "a.jpg" and told["2.zip"] == told["3.zip"] == "! one of more than 2 archives in archives"
    monkeypatch.setattr(listing, "MAX_ENTRIES", 6)
    assert "more than 6 files" in refused(tmp_path)
    monkeypatch.setattr(zips, "MAX_ENTRIES", 3)
    assert "more than 3 entries" in refused(tmp_path)


def test_without_room_for_an_inner_archive_the_line_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, in_zip({"in.zip": plain("a.jpg")}, zipfile.ZIP_DEFLATED))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert "no room in /" in (line := refused(tmp_path)) and "in.zip" in line and "set TMPDIR" in line
    monkeypatch.undo()
    place = tmp_path / "room"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert read_all(tmp_path) == {"in/a.jpg": "a.jpg"}


def test_a_folder_with_archives_in_it_is_read(tmp_path: Path) -> None:
    put(tmp_path / STEM, plain("a.jpg"), "photos.zip")
    whole = plain(*(f"{n}.jpg" for n in range(9)))
    for number in range(3):
        put(
            tmp_path / STEM, whole[number * 300 : (number + 1) * 300 if number < 2 else None], f"x/p.zip.00{number + 1}"
        )
    put(tmp_path / STEM, b"Rar!", "y/z.rar")
    told = read_all(tmp_path)
    assert told.pop("y/z.rar") == "! rar archives are not read"
    assert told == {"photos/a.jpg": "a.jpg"} | {f"x/p/{n}.jpg": f"{n}.jpg" for n in range(9)}


def test_what_lies_unpacked_beside_its_archive_is_read_from_there(tmp_path: Path) -> None:
    put(tmp_path / STEM, plain("a.jpg", "b.jpg", "c.jpg"), "set/photos.zip")
    put(tmp_path / STEM, b"own a", "set/a.jpg")
    put(tmp_path / STEM, b"own b", "set/photos/b.jpg")
    expected = {"set/a.jpg": "own a", "set/photos/b.jpg": "own b", "set/photos/c.jpg": "c.jpg"}
    assert read_all(tmp_path) == expected
    assert ["1 files in it are read, 2 more lie unpacked beside it" in line for line in notes(tmp_path)] == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Encrypted archives


@pytest.mark.parametrize("name", [f"{STEM}.zip", f"{STEM}.ZIP", f"{STEM}/photos.zip"])
@pytest.mark.parametrize("more", [{}, {"readme.txt": b"the password is pw"}])
def test_an_encrypted_zip_is_refused_and_the_advice_works(tmp_path: Path, name: str, more: dict[str, bytes]) -> None:
    files = {"a.jpg": b"a", "t/b.jpg": b"b"}
    path = put(tmp_path, locked(files | more, more), name)
    assert refused(tmp_path) == (
        f"{path}: encrypted; unpack it with its password into the folder {tmp_path}/{STEM}, and move the zip away"
    )
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / STEM, pwd=b"pw")
    path.rename(tmp_path / "away.zip")
    told = read_all(tmp_path)
    assert {name: told[name] for name in files} == {"a.jpg": "a", "t/b.jpg": "b"}


def test_some_encrypted_entries_are_unreadable_alone(tmp_path: Path) -> None:
    put(tmp_path, locked({"a.jpg": b"a", "b.jpg": b"b"}, ["b.jpg"]))
    assert read_all(tmp_path) == {"a.jpg": "! encrypted", "b.jpg": "b"}


@pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (93, "Zstandard"), (77, "method 77")])
def test_a_compression_that_is_not_read_is_refused_before_any_work(tmp_path: Path, method: int, name: str) -> None:
    content = bytearray(plain("a.jpg"))
    content[content.index(b"PK\1\2") + 10] = method
    put(tmp_path, bytes(content))
    assert f"compressed by {name}" in (line := refused(tmp_path)) and f"unpack it into the folder {tmp_path}" in line


def test_an_encrypted_zip_beside_its_unpacked_folder_says_that_moving_it_away_is_enough(tmp_path: Path) -> None:
    path = put(tmp_path, locked({"a.jpg": b"a"}))
    put(tmp_path / STEM, b"unpacked", "a.jpg")
    assert refused(tmp_path).endswith(f"; or move it away, then the folder {tmp_path}/{STEM} is read")
    path.rename(tmp_path / "away.zip")
    assert read_all(tmp_path) == {"a.jpg": "unpacked"}


# ---------------------------------------------------------------------------------------------------------------------
# Archives in several files


@pytest.mark.parametrize(
    "suffixes",
    [
        [".partaa", ".partab", ".partac"],
        [".001", ".002", ".003"],
        [".part00", ".part01"],
        [".aa", ".ab", ".ac", ".ad"],
        [".01"],
        [f".part{a}{b}" for a in "ab" for b in "abcdefghijklmnopqrstuvwxyz"],
    ],
)
def test_parts_of_any_naming_are_read_as_one(tmp_path: Path, suffixes: list[str]) -> None:
    byte_parts(tmp_path, suffixes)
    assert read_all(tmp_path) == TOLD


@pytest.mark.parametrize(
    "suffixes", [[".partaa", ".partab", ".partac"], [".001", ".002", ".003"], [".00", ".01", ".02"]]
)
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_part_is_named_and_putting_it_there_helps(tmp_path: Path, suffixes: list[str], gone: int) -> None:
    paths = byte_parts(tmp_path, suffixes)
    away = paths[gone].rename(tmp_path / "away")
    assert refused(tmp_path).startswith(f"{paths[gone]}: this part is missing")
    away.rename(paths[gone])
    assert read_all(tmp_path) == TOLD


def test_a_cut_part_and_parts_of_two_kinds_are_named(tmp_path: Path) -> None:
    paths = byte_parts(tmp_path, [".001", ".002", ".003"])
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-5])
    assert refused(tmp_path).startswith(f"{paths[1]}: this part is cut")
    paths[1].write_bytes(whole)
    other = put(tmp_path, b"x", f"{STEM}.zip.partaa")
    assert "parts of two kinds" in refused(tmp_path)
    other.unlink()
    assert read_all(tmp_path) == TOLD


@pytest.mark.parametrize(("size", "last"), [(1100, f"{STEM}.zip"), (700, f"{STEM}.zip"), (1999, f"{STEM.upper()}.ZIP")])
def test_a_zip_spread_over_disks_is_read(tmp_path: Path, size: int, last: str) -> None:
    paths = disk_parts(tmp_path, size, last)
    assert len(paths) > 2
    assert read_all(tmp_path) == TOLD


@pytest.mark.parametrize("gone", range(5))
def test_a_missing_disk_is_named_and_putting_it_there_helps(tmp_path: Path, gone: int) -> None:
    paths = disk_parts(tmp_path)
    assert len(paths) == 5
    away = paths[gone].rename(tmp_path / "away")
    assert refused(tmp_path).startswith(f"{paths[gone]}: this ")
    away.rename(paths[gone])
    assert read_all(tmp_path) == TOLD
    for path in paths[:-1]:
        path.unlink()
    assert refused(tmp_path).startswith(f"{tmp_path}/{STEM}.z01: this part is missing")


def test_what_the_zip_program_makes_is_read_as_what_is_made_by_hand(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    if not shutil.which("zip"):
        disk_parts(made)
    else:
        draw = b"".join(zlib.crc32(bytes([n % 251, n // 251])).to_bytes(4, "little") for n in range(40_000))
        put(tmp_path, draw, "in/a.jpg")
        put(tmp_path, b"b", "in/b.jpg")
        words = ["zip", "-q", "-r", "-s", "64k", str(made / f"{STEM}.zip"), "."]
        subprocess.run(words, cwd=tmp_path / "in", check=True)
    assert len(list(made.iterdir())) >= 3
    told = read_all(made)
    assert told == TOLD or (told["b.jpg"] == "b" and told["a.jpg"].encode("latin-1") == draw)


def test_entries_after_a_program_or_in_64_bits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, b"#!/bin/sh\nunzip $0\n" + in_zip(FILES))
    assert read_all(tmp_path) == TOLD
    with zipfile.ZipFile(tmp_path / f"{STEM}.zip", "a") as archive:
        archive.comment = b"made by PK\5\6" + bytes(30)
    assert read_all(tmp_path) == TOLD
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 600)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    put(tmp_path, in_zip(FILES))
    assert b"PK\6\6" in (tmp_path / f"{STEM}.zip").read_bytes()
    assert read_all(tmp_path) == TOLD


def test_a_mac_writes_any_number_of_files_of_any_size_without_64_bits(tmp_path: Path) -> None:
    content = in_zip(FILES)
    table, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    gap = (1 << 32) - 1000  # bytes between two files: places beyond are less 2 ** 32, a hole in the file costs nothing
    cut = content.index(b"PK\3\4", 3000)
    places = bytearray(content[table:end])
    start = 0
    while (start := places.find(b"PK\1\2", start)) >= 0:
        place = struct.unpack_from("<L", places, start + 42)[0]
        struct.pack_into("<L", places, start + 42, (place + (gap if place >= cut else 0)) % (1 << 32))
        start += 46
    with (tmp_path / f"{STEM}.zip").open("wb") as file:
        file.write(content[:cut])
        file.seek(cut + gap)
        file.write(content[cut:table])
        file.write(places)
        counts = struct.pack("<4H2L", 0, 0, 5, 5, len(places), (table + gap) % (1 << 32))
        file.write(b"PK\5\6" + counts + bytes(2))
    assert read_all(tmp_path) == TOLD


# ---------------------------------------------------------------------------------------------------------------------
# Hostile tables


@given(st.data())
def test_any_damage_is_a_line_or_that_files_trouble(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "wild"
    inner = in_zip({"a.jpg": b"a" * 40}, data.draw(st.sampled_from([0, 8, 12, 14])))
    content = bytearray(in_zip({"in.zip": inner, "b.jpg": b"b" * 40}, data.draw(st.sampled_from([0, 8]))))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    ):
        content[place] = value
    put(folder, bytes(content))
    try:
        told = read_all(folder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(len(text) < 200 for text in told.values())


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_is_stopped_while_it_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int) -> None:
    put(tmp_path, in_zip({"bomb.jpg": bytes(12 << 20), "ok.jpg": b"ok"}, method))
    monkeypatch.setattr(sources, "MAX_BYTES", 5 << 20)
    unpacked, largest = zips.pieces, []

    def watched(*words: Any) -> Any:
        for piece in unpacked(*words):
            largest.append(len(piece))
            yield piece

    monkeypatch.setattr(zips, "pieces", watched)
    assert read_all(tmp_path) == {"bomb.jpg": "! larger than 5 MB", "ok.jpg": "ok"}
    assert max(largest) <= zips.PIECE and sum(largest) < 8 << 20
