"""Which picture an item's name means: steps from strict to loose, and nothing where two files fit."""

import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resize_worlds import hand_out, images, ledger, picture, run

from data_scripts.linking import ledger as ledger_script
from data_scripts.linking import matching, names
from tongkuan.records.items import Item


class Files:
    """A split's pictures by path; each has bytes of its own, or those that are given."""

    def __init__(self, paths: dict[str, bytes] | list[str]) -> None:
        self.content = paths if isinstance(paths, dict) else {path: path.encode() for path in paths}

    def entries(self) -> Iterator[tuple[str, Any]]:
        return ((path, path) for path in self.content)

    def read(self, key: Any) -> bytes:
        return self.content[key]


def match(
    files: dict[str, bytes] | list[str], *wanted: str, others: list[str] | None = None
) -> list[str | tuple[str, ...]]:
    """By name: `split/path` of the picture, paths of those between which nothing decides, or ""."""
    sources = {"train": Files(files), "valid": Files(others or [])}
    pictures, digests = ledger_script.list_pictures(sources), ledger_script.Digests(sources)
    items = [Item(str(number), image_name=name) for number, name in enumerate(wanted)]
    matches = matching.Matches({"train": items, "valid": []}, pictures, digests)
    found = []
    for item in items:
        one = matches.of["train", item.image_name]
        rivals = tuple(rival.path for rival in one.rivals)
        found.append(rivals or (one.picture and f"{one.picture.split}/{one.picture.path}") or "")
    return found


NFD = unicodedata.normalize("NFD", "café.jpg")


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        # as written
        (["a.jpg", "A.jpg", "a.png"], "a.jpg", "a.jpg"),
        (["a.jpg", "sub/a.jpg"], "a.jpg", "a.jpg"),
        (["sub/a.jpg", "b.jpg"], "a.jpg", "sub/a.jpg"),
        (["x/1.jpg", "y/1.jpg"], "x\\1.jpg", "x/1.jpg"),
        (["x/1.jpg", "y/1.jpg"], "./y//1.jpg", "y/1.jpg"),
        (["x/1.jpg", "y/1.jpg"], "C:\\y\\1.jpg", "y/1.jpg"),
        (["images/a.jpg", "images/sub/a.jpg"], "a.jpg", "images/a.jpg"),
        (["item_train_images/x/1.jpg", "item_train_images/y/1.jpg"], "x/1.jpg", "item_train_images/x/1.jpg"),
        (["x/1.jpg", "y/1.jpg", "z/1.jpg"], "1.jpg", ("x/1.jpg", "y/1.jpg", "z/1.jpg")),
        # letter case and accents
        (["A.JPG", "b.jpg"], "a.jpg", "A.JPG"),
        (["Straße/1.jpg", "b/1.jpg"], "STRASSE/1.JPG", "Straße/1.jpg"),
        ([NFD, "b.jpg"], "café.jpg", NFD),
        (["A.jpg", "a.JPG"], "a.jpg", ("A.jpg", "a.JPG")),
        # a shop's additions, on either side
        (["a.jpg", "b.jpg"], "a.jpg_400x400.jpg", "a.jpg"),
        (["a.jpg_400x400.jpg", "b.jpg"], "a.jpg", "a.jpg_400x400.jpg"),
        (["a.jpg_60x60q90.jpg_.webp", "b.jpg"], "a.jpg_400x400.jpg", "a.jpg_60x60q90.jpg_.webp"),
        (["a.jpg", "b.jpg"], "a.jpg?x=1&y=b/c.png", "a.jpg"),
        (["a.jpg%3Fx=1", "b.jpg"], "a.jpg", "a.jpg%3Fx=1"),
        (["O1CN01ab.jpg", "b.jpg"], "O1CN01ab_!!2207-0-cib.jpg_60x60.jpg", "O1CN01ab.jpg"),
        (["71x.jpg", "b.jpg"], "71x._AC_SX300_.jpg", "71x.jpg"),
        (["a b.jpg", "红.png"], "a%20b.jpg", "a b.jpg"),
        (["a b.jpg", "红.png"], "%E7%BA%A2.png", "红.png"),
        (["i1/红.jpg", "i2/红.jpg"], "https://img.shop.com/i2/%E7%BA%A2.jpg?v=3", "i2/红.jpg"),
        (["a.jpg_60x60.jpg", "a.jpg_400x400.jpg"], "a.jpg", ("a.jpg_400x400.jpg", "a.jpg_60x60.jpg")),
        (["a.jpg_1.jpg", "b.jpg"], "a.jpg_2.jpg", ""),  # counts pictures, asks for no size
        (["rug_120x180.jpg", "b.jpg"], "rug_160x230.jpg", ""),
        # another suffix, or none
        (["a.png", "b.jpg"], "a.jpg", "a.png"),
        (["a.SS2", "b.jpg"], "a", "a.SS2"),
        (["a", "b"], "a.webp", "a"),
        (["sku1.0.jpg", "sku1.1.jpg"], "sku1.0", "sku1.0.jpg"),
        (["sku1.0", "b.jpg"], "sku1.1", ""),
        (["sku1.jpg", "b.jpg"], "sku1.0", ""),
        (["v2.5/a.jpg", "v2.6/a.jpg"], "v2.6/a.png", "v2.6/a.jpg"),
        (["a.png", "a.gif"], "a.jpg", ("a.gif", "a.png")),
        # the end of the path, when its folder is not there
        (["a.jpg", "b.jpg"], "photos/a.jpg", "a.jpg"),
        (["x/a.jpg", "y/a.jpg"], "photos/2024/x/a.jpg", "x/a.jpg"),
        (["x/a.jpg", "y/b.jpg"], "z/b.png", "y/b.jpg"),
        (["x/1.jpg", "y/1.jpg"], "z/1.jpg", ("x/1.jpg", "y/1.jpg")),
        (["x/1.jpg", "y/2.jpg"], "y/1.jpg", ""),
        (["x/1.jpg", "y/2.jpg"], "shop/Y/1.jpg", ""),
    ],
)
def test_the_first_step_that_gives_files_decides(files: list[str], name: str, expected: str | tuple[str, ...]) -> None:
    found = match(files, name)[0]
    assert found == (f"train/{expected}" if isinstance(expected, str) and expected else expected)


def test_two_files_of_the_same_bytes_are_one() -> None:
    assert match({"x/1.jpg": b"same", "y/1.jpg": b"same"}, "1.jpg") == ["train/x/1.jpg"]
    assert match({"x/1.jpg": b"same", "y/1.jpg": b"same", "z/1.jpg": b"other"}, "1.jpg") == [("x/1.jpg", "z/1.jpg")]
    assert match({"a.png": b"same", "a.gif": b"same"}, "a.jpg") == ["train/a.gif"]


def test_the_end_of_a_path_takes_no_file_that_is_another_items() -> None:
    files = ["x/1.jpg", "x/2.jpg", "w.jpg"]
    assert match(files, "x/1.jpg", "d/1.jpg") == ["train/x/1.jpg", ""]
    assert match(files, "d/1.jpg", "e/1.jpg") == ["", ""]
    assert match(files, "d/1.jpg", "e/2.jpg") == ["train/x/1.jpg", "train/x/2.jpg"]
    assert match(["x/1.jpg"], "x/1.jpg", "d/1.jpg") == ["train/x/1.jpg", ""], "a lone folder is no wrapper"
    assert match(files, "d/1.jpg", "d/1.jpg_60x60.jpg") == ["train/x/1.jpg"] * 2, "one product under two names"


def test_another_split_helps_only_with_a_name_that_is_nowhere_else() -> None:
    assert match(["a.jpg"], "b.jpg", others=["b.jpg"]) == ["valid/b.jpg"]
    assert match(["a.jpg"], "b.png", "c.jpg?x=1", others=["b.jpg", "C.jpg"]) == ["valid/b.jpg", "valid/C.jpg"]
    assert match(["a.jpg"], "b.jpg", others=["x/b.jpg", "y/b.jpg"]) == [("x/b.jpg", "y/b.jpg")]
    assert match(["x/1.jpg", "d/2.jpg"], "d/1.jpg", others=["d/1.jpg"]) == [("x/1.jpg", "d/1.jpg")]
    assert match(["b.jpg"], "b.jpg", others=["b.jpg"]) == ["train/b.jpg"]


PARTS = st.sampled_from(["a", "A", "b", "1", "x.y", "é", "e\u0301"])
PATHS = st.lists(
    st.tuples(st.lists(PARTS, max_size=2), PARTS, st.sampled_from(["", ".jpg", ".PNG", ".0", ".jpg_60x60.jpg"])).map(
        lambda parts: "/".join([*parts[0], parts[1] + parts[2]])
    ),
    unique=True,
    max_size=6,
)


@given(PATHS, PATHS, st.randoms())
def test_wild_names_get_what_they_name_whatever_the_order(files: list[str], wanted: list[str], shuffler: Any) -> None:
    found = dict(zip(wanted, match(files, *wanted), strict=True))
    for name, picture_found in found.items():
        if name in files:
            assert picture_found == f"train/{name}"
        if isinstance(picture_found, str) and picture_found:
            last = picture_found.rpartition("/")[2]
            keys = names.stems(name.rpartition("/")[2])
            assert set(names.stems(last)) & set(keys), "the last step fits at least"
    shuffler.shuffle(files)
    shuffler.shuffle(wanted)
    assert dict(zip(wanted, match(files, *wanted), strict=True)) == found


@given(st.text(max_size=60))
def test_any_text_has_all_forms(text: str) -> None:
    for form in names.FORMS:
        keys = form(text)
        assert 1 <= len(keys) <= 2 and all(isinstance(key, str) for key in keys)
    assert names.safe_name(text.encode("utf-8", "replace").decode()).endswith(".jpg")


@pytest.mark.parametrize(
    "text",
    [
        "/" * 1_000_000,
        "a/" * 500_000,
        ".jpg" * 250_000,
        ".jpg_" * 800,
        "%41" * 300_000,
        "!" * 4000,
        "._" * 2000 + ".jpg",
    ],
)
def test_a_hostile_name_costs_no_time(text: str) -> None:
    started = time.process_time()
    assert match(["a.jpg"], text) in ([""], ["train/a.jpg"])
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (lambda n: f"{n}/1.jpg", lambda _: "1.jpg"),
        (lambda n: f"{n}/1.jpg", lambda n: f"1.jpg?x={n}"),
        (lambda n: f"{n}/1.jpg", lambda n: f"x{n}/1.jpg"),
        (lambda n: f"img/{n}.jpg", lambda n: f"q/x{n}.jpg"),
    ],
)
def test_time_grows_with_the_number_of_pictures_and_not_with_its_square(files: Any, wanted: Any) -> None:
    times = []
    for count in (300, 2400):
        sources = {"train": Files([files(n) for n in range(count)])}
        items = [Item(str(n), image_name=wanted(n)) for n in range(count)]
        started = time.process_time()
        pictures, digests = ledger_script.list_pictures(sources), ledger_script.Digests(sources)
        matching.Matches({"train": items}, pictures, digests)
        ledger_script.assign_names(pictures, digests)
        times.append(time.process_time() - started)
    assert times[1] < 30 * times[0] + 0.5, "8 times as many; the square would be 64 times"


def test_the_ledger_and_the_screen_tell_what_was_ambiguous_or_of_another_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    pictures = {"x/1.jpg": picture("red"), "y/1.jpg": picture("blue"), "z/2.jpg": picture("lime")}
    hand_out(raw, "train", pictures, ["x/1.jpg", "1.jpg", "z/1.jpg", "other.jpg"], "folder")
    hand_out(raw, "test", {"other.jpg": picture("white")}, how="folder")
    run(raw, data)
    assert images(data, "train") == {"train0": "1.jpg", "train1": "", "train2": "", "train3": "other.jpg"}
    rows = [row for row in map(dict, ledger(data).values()) if row["status"] in ("ambiguous", "missing")]
    text = (data / "ledger.jsonl").read_text()
    assert rows and '"status":"ambiguous","image":"","detail":"may be x/1.jpg or y/1.jpg; named by item train1"' in text
    assert '"status":"missing","image":"","detail":"no such file; named by item train2 as z/1.jpg"' in text
    assert "also the picture of item train3 of train" in ledger(data)["test", "other.jpg"]["detail"]
    out = capsys.readouterr().out
    assert "missing 1," in out and "ambiguous 1 (" in out and "train 4, test 1; 2 without a picture" in out
    assert "1 ambiguous, such as '1.jpg' of train item 'train1' (may be x/1.jpg or y/1.jpg)" in out
    assert "1 missing: no such file, such as 'z/1.jpg' of train item 'train2'" in out
    assert "1 with a picture of another split, such as 'test/other.jpg' for train item 'train3'" in out


def test_a_file_under_another_suffix_that_another_item_names_in_full_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    hand_out(
        raw, "train", {"a.png": picture("blue", "PNG"), "b.png": picture("red", "PNG")}, ["a.png", "a.jpg", "b.jpg"]
    )
    run(raw, data)
    assert list(images(data, "train").values()) == ["a.png.jpg", "a.png.jpg", "b.png.jpg"]
    assert "1 with a picture that another item names in full, such as 'train/a.png'" in capsys.readouterr().out
    assert "item train1 of train, which names 'a.jpg'" in ledger(data)["train", "a.png"]["detail"]
    assert not ledger(data)["train", "b.png"]["detail"]


def test_an_unreadable_picture_is_replaced_by_no_other_product(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    pictures = {"a.jpg": b"broken", "a.png": picture("blue", "PNG"), "b.jpg": b"broken", "b.png": picture("red", "PNG")}
    hand_out(raw, "train", pictures, ["a.jpg", "b.jpg", "b.png"])
    run(raw, data)
    assert list(images(data, "train").values()) == ["a.png.jpg", "", "b.png.jpg"]
