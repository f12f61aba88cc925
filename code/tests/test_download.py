"""Downloads: lists of links, folders and parts are read for what they are; no half file gets a final name."""

import itertools
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from commands import ok, run_verb
from download_worlds import CONTENT, JSONL, PARTS, ZIP, files, folder_of, take
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts import download
from data_scripts.archives import sources
from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_at_any_step_it_ends_with_the_same_files(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "from", {JSONL: CONTENT[JSONL], **PARTS})
    left = 0

    def count_down(method: str) -> None:
        original = getattr(Path, method)

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return original(*arguments, **options)

        monkeypatch.setattr(Path, method, step)

    monkeypatch.setattr(os, "fsync", lambda _: None)
    for method in ("replace", "unlink", "write_bytes", "open"):
        count_down(method)
    for steps in itertools.count(1):
        target, left = raw / str(steps), steps
        with suppress(Killed):
            take(target, folder)
            break
        left = 0
        there = files(target) if target.exists() else {}
        assert all({**CONTENT, **PARTS}.get(name, content) == content for name, content in there.items())
        take(target, folder)
        assert files(target) == CONTENT
    left = 0
    assert steps > 40 and files(target) == CONTENT


def test_a_folders_files_are_copied_and_left_alone(raw: Path, tmp_path: Path) -> None:
    mine = {"notes.txt": b"mine", ".item_test_info.jsonl.part": b"mine"}
    folder = folder_of(tmp_path / "from", CONTENT | mine)
    out = ok(run_verb("download", "--raw", raw, "--from", folder))
    assert "not there yet: item_train_info.jsonl" in out and ZIP not in out.partition("not there yet")[2]
    assert files(raw) == CONTENT and files(folder) == CONTENT | mine
    assert "2 there already" in take(raw, folder)
    (folder / JSONL).write_bytes(CONTENT[JSONL].replace(b"2", b"3"))
    os.utime(folder / JSONL, ns=(1, 1))
    assert f"brought {JSONL} (" in take(raw, folder)
    assert (raw / JSONL).read_bytes() == (folder / JSONL).read_bytes()


def test_parts_are_joined_into_what_resize_reads(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(raw, {f".{ZIP}.part": b"of a call killed while it joined"})
    folder = folder_of(tmp_path / "from", PARTS)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 9}))
        assert "for want of room" in take(raw, folder)
    assert files(raw) == PARTS
    assert f"{ZIP} is joined" in take(raw, folder)
    assert files(raw) == {ZIP: CONTENT[ZIP]}
    assert [name for name, _ in sources.find_source(raw, "valid").entries()] == ["a.jpg", "b.jpg"]
    assert "4 there already" in take(raw, folder)


BROKEN = b'{"item_id": "1"}\n{"item'
REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "a copy's name": (
        {"item_valid_info (1).jsonl": BROKEN},
        r"info \(1\)\.jsonl: unknown name; rename it to item_valid_info\.jsonl",
    ),
    "no name of theirs": ({"item_test_answers.jsonl": BROKEN}, "no file here is named item_train_info"),
    "a gap": ({name: PARTS[name] for name in (f"{ZIP}.partaa", f"{ZIP}.partac")}, "partab is missing before"),
    "whole and in parts": (CONTENT | PARTS, "whole and in parts"),
    "half a line": ({JSONL: BROKEN}, "is not whole lines of JSON objects"),
    "a part too short": (PARTS | {f"{ZIP}.partab": PARTS[f"{ZIP}.partab"][:-1]}, "make no whole zip archive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_folder_lacks_is_said_and_nothing_is_made_of_it(raw: Path, tmp_path: Path, case: str) -> None:
    contents, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        take(raw, folder_of(tmp_path / "from", contents))
    assert not raw.exists() or files(raw) == (contents if "short" in case else {})


def test_bad_usage_is_one_line(raw: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--from", str(tmp_path / "none")), "no file here"),
        (("--urls", str(tmp_path / "none")), "no readable text file"),
        (("--from", str(raw)), "both --from and --raw"),
    ):
        with pytest.raises(UserError, match=message):
            main(["download", "--raw", str(raw), *words])
    assert not raw.exists()


def test_a_second_download_waits_outside(raw: Path, tmp_path: Path) -> None:
    raw.mkdir()
    with (
        download.sole_process(raw),
        pytest.raises(UserError, match="another process fills this folder; wait for its end"),
    ):
        take(raw, folder_of(tmp_path / "from", CONTENT))
    take(raw, tmp_path / "from")


def test_every_problem_of_a_list_is_shown_with_its_line(tmp_path: Path) -> None:
    lines = {
        "# a comment": "",
        "https://h/p/item_train_info.jsonl?Expires=1&Signature=a%2Fb size=12 # so far": "",
        "item_train_pair.jsonl https://h/f/8a7b SHA256=12": "cannot use 'SHA256=12'",
        "item_train_pairs.jsonl https://h/x": "did you mean item_train_pair.jsonl?",
        "../item_test_info.jsonl https://h/x": "a path is no name: '../item_test_info.jsonl'",
        "item_test_info.jsonl ftp://h/x": "give an http or https link",
        "item_test_info.jsonl https:///x": "give an http or https link",
        "item_test_info.jsonl http://[::1": "Invalid",
        "item_test_info.jsonl": "no URL; write NAME URL",
        "item_train_info.jsonl https://h/y": "is on {}:2 already; keep one of the two",
        "item_test_pair.jsonl https://h/y size=1 size=1": "cannot use 'size=1'",
        "https://h/": "the names are item_train_info.jsonl,",
        "  ": "",
        "item_test_images.zip https://h/y": "item_test_images.zip comes whole and in parts",
        "https://h/item_test_images.zip.partab": "item_test_images.zip.partaa is missing before",
    }
    path = tmp_path / "links.txt"
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    with pytest.raises(UserError) as caught:
        download.read_list(path)
    told = str(caught.value).split("\n")
    expected = [(n, text.format(path)) for n, text in enumerate(lines.values(), 1) if text]
    assert len(told) == len(expected)
    for line, (number, text) in zip(told, expected, strict=True):
        assert line.startswith(f"{path}:{number}: ") and text in line, line
    assert "Signature" not in str(caught.value)


def test_a_list_says_names_sizes_and_sums(tmp_path: Path) -> None:
    path = tmp_path / "links.txt"
    path.write_text(f"{JSONL} https://h/8a7b?x=y#z sha256={'AB' * 32} size=7 # here\n\nhttp://h/p/{ZIP}?q=/a\n")
    first, second = download.read_list(path)
    assert (first.name, str(first.source), first.size, first.sha256) == (JSONL, "https://h/8a7b?x=y#z", 7, "ab" * 32)
    assert (second.name, second.size, second.sha256, second.where) == (ZIP, None, "", f"{path}:3")


PIECES = st.sampled_from(
    [JSONL, ZIP, f"{ZIP}.partaa", f"{ZIP}.partac", "https://", "http://h/", "size=", "9", "#", "\\", "..", "/"]
)
WILD = st.lists(st.lists(st.one_of(PIECES, st.text(max_size=8), st.just(" ")), max_size=6).map("".join), max_size=6)


@settings(max_examples=100)
@given(WILD)
def test_any_lines_are_known_files_or_numbered_problems(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "links"
    path.write_bytes("\n".join(lines).encode("utf-8", "replace"))
    try:
        wanted = download.read_list(path)
    except UserError as error:
        assert all(re.match(r".+/links:(\d+: .+| no links)", line) for line in str(error).split("\n")), str(error)
        return
    names = [entry.name for entry in wanted]
    assert names and len(set(names)) == len(names)
    assert all(re.fullmatch(r"item_\w+\.(jsonl|zip(\.part[a-z]{2})?)", name) for name in names)
    assert all(entry.source.scheme in ("http", "https") and entry.source.host for entry in wanted)
