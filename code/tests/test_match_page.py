"""The page that `match run` writes on its groups."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from browsers import assert_accessible, assert_quiet, emulate, opened
from PIL import Image
from report_worlds import IMAGE, SCRIPT

from tongkuan.match.files import Folder, write_table
from tongkuan.match.page import MEMBERS, SHOWN, write_page
from tongkuan.records.items import Item
from tongkuan.report.views import Pictures

SIZES = [3, 40, 2, *[2] * 20]  # the first three: loose, large, sure


def make_page(folder: Path) -> Folder:
    """Groups g0, g1 and so on of SIZES and five listings alone; titles are hostile, every third picture is there."""
    (folder / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (20, 20), "teal").save(folder / "data" / "images" / "there.jpg")
    rows = [(f"g{group}", size) for group, size in enumerate(SIZES) for _ in range(size)]
    rows += [(f"alone{number}", 1) for number in range(5)]
    items = {}
    for number in range(len(rows)):
        name = ("there.jpg", "lost.jpg", "")[number % 3]
        items[f"id{number}"] = Item(f"id{number}", f"{number} {SCRIPT} {IMAGE}", "", "", name)
    weakest = {"g0": 1.0, "g1": 2.0, "g2": 9.0}
    columns = {
        "item_id": pa.array(items),
        "group_id": pa.array([name for name, _ in rows]),
        "size": pa.array([size for _, size in rows], pa.int32()),
        "density": pa.array([0.5 if name == "g0" else 1.0 for name, _ in rows], pa.float32()),
        "weakest": pa.array([None if size == 1 else weakest.get(name, 5.0) for name, size in rows], pa.float64()),
    }
    found = Folder(folder / "match")
    found.path.mkdir()
    write_table(found.groups, columns, "made of nothing")
    counts = {"listings": len(rows), "pairs": 800, "groups": len(SIZES), "largest": max(SIZES)}
    manifest = {"counts": counts, "recall": {"of_matches": 0.9876}, "embeddings": ["long"], "split": "test"}
    write_page(found, items, Pictures(folder / "data"), manifest, ["warning: many"])
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("page")).page


def section(page: Path, key: str) -> str:
    return page.read_text(encoding="utf-8").split(f'<section id="{key}">')[1].split("</section>")[0]


def groups_in(page: Path, key: str) -> list[str]:
    return re.findall(r"<h3>Group (\w+)</h3>", section(page, key))


def test_each_list_begins_with_what_it_is_about(page: Path) -> None:
    assert groups_in(page, "largest")[:2] == ["g1", "g0"]
    assert groups_in(page, "loosest")[:2] == ["g0", "g1"]
    assert groups_in(page, "surest")[0] == "g2"
    for key in ("largest", "loosest", "surest"):
        assert len(groups_in(page, key)) == SHOWN
        assert "alone" not in section(page, key)


def test_a_large_group_shows_some_and_says_how_many_more(page: Path) -> None:
    first = section(page, "largest").split("<h3>")[1]
    assert first.count('class="listing"') == MEMBERS
    assert f"And {40 - MEMBERS} more." in first


def test_a_listing_without_a_picture_says_why(page: Path) -> None:
    text = section(page, "largest")
    assert "data:image/jpeg;base64," in text
    assert "its picture is missing" in text
    assert "it names no picture" in text


def test_titles_are_text_and_nothing_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "script-src &#39;none&#39;" in text or "script-src 'none'" in text


def test_the_page_says_what_there_is_and_what_to_mind(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "warning: many" in text
    assert "0.9876" in text
    assert "long" not in section(page, "made-by")  # sums of partitions are for machines


def test_the_same_groups_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    assert make_page(tmp_path).page.read_bytes() == page.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_accessible_and_fetches_nothing(browser: Any, page: Path, width: int) -> None:
    assert_accessible(browser, page, width, is_dark=width == 400)
    emulate(browser)
    opened(browser, page)
    assert_quiet(browser, page, num_scripts=0)
