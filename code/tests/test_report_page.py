"""The page of `report` in a real browser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import assert_accessible, assert_quiet, emulate, opened
from report_worlds import CLOSING, IMAGE, SCRIPT, World, make_world

from tongkuan.base.metrics import quality_at
from tongkuan.report.report import report

pytestmark = pytest.mark.slow
# One turn of the slider as a reader has it: from the input event to what follows the next frame.
TURN = """
const [place, done] = arguments, slider = document.getElementById("slider"), start = performance.now();
slider.value = place;
slider.dispatchEvent(new Event("input", { bubbles: true }));
requestAnimationFrame(() => setTimeout(() => done(performance.now() - start), 0));
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small result and its page."""
    made = make_world(tmp_path_factory.mktemp("world"))
    other = make_world(tmp_path_factory.mktemp("other"), threshold=-1.0)
    report(made.submit, made.pairs, made.data, made.submit / "report.html", against_dir=other.submit)
    return made


def text(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def turn(browser: Any, place: int) -> float:
    """Milliseconds that the slider took to a place."""
    return float(browser.execute_async_script(TURN, place))


def cards(browser: Any) -> list[str]:
    return list(browser.execute_script("return [...document.querySelectorAll('.pair')].map(card => card.textContent)"))


def assert_figures(browser: Any, world: World) -> float:
    """What the page shows at its threshold is what Python computes there."""
    threshold = float(browser.execute_script("return document.getElementById('threshold').value"))
    quality = quality_at(np.array(world.scores), np.array(world.labels), threshold)
    for name in ("f1", "precision", "recall"):
        assert text(browser, f"[data-figure={name}]") == f"{getattr(quality, name):.4f}", (threshold, name)
    for name, count in {
        "tp": quality.true_positives, "fp": quality.false_positives,
        "fn": quality.false_negatives, "tn": quality.true_negatives,
    }.items():  # fmt: skip
        assert text(browser, f"[data-figure={name}]").replace(",", "") == str(count)
    mistakes = quality.false_positives + quality.false_negatives
    assert f"of {mistakes:,} pairs" in text(browser, "#status")
    cells = "row => [...row.cells].map(cell => cell.textContent)"
    rows = browser.execute_script(f"return [...document.querySelectorAll('#categories tr')].map({cells})")
    assert sum(int(row[3].replace(",", "")) for row in rows) == quality.false_positives
    assert sum(int(row[4].replace(",", "")) for row in rows) == quality.false_negatives
    return threshold


def test_the_slider_moves_every_figure_as_python_computes_them(browser: Any, world: World) -> None:
    emulate(browser)
    page = world.submit / "report.html"
    opened(browser, page)
    assert assert_figures(browser, world) == 0.25
    first, last = (int(browser.execute_script(f"return slider.{end}")) for end in ("min", "max"))
    seen = set()
    for share in (0.3, 0.5, 0.7):
        turn(browser, round(first + share * (last - first)))
        seen.add(assert_figures(browser, world))
    turn(browser, first)
    assert text(browser, "[data-figure=recall]") == "1.0000"
    assert len(seen) == 3
    assert_quiet(browser, page)


def test_hostile_titles_are_read_as_text(browser: Any, world: World) -> None:
    emulate(browser)
    page = world.submit / "report.html"
    opened(browser, page)
    first, second = cards(browser)[:2]  # the surest mistakes are theirs
    assert CLOSING in first and all(hostile in second for hostile in (SCRIPT, IMAGE, CLOSING))
    assert "P(same) 0." in first and "P(same) 0." in second, "beside each verdict"
    assert "names no picture" in second and "no such picture file" in second
    assert "no such picture file" in first and "picture cannot be read" in first
    assert_quiet(browser, page)


def test_a_search_finds_pairs_by_id_title_and_attribute(browser: Any, world: World) -> None:
    emulate(browser)
    opened(browser, world.submit / "report.html")
    field = browser.find_element("id", "search")
    browser.find_element("css selector", "input[value=all]").click()
    field.send_keys("杯子 44 号")
    assert [card.count("杯子") for card in cards(browser)] == [2] and "i44" in cards(browser)[0]
    field.clear()
    field.send_keys("a3")
    assert "12 of" in text(browser, "#status") and all("a3" in card for card in cards(browser))
    field.clear()
    field.send_keys("<script>")
    assert all(SCRIPT in card or CLOSING in card for card in cards(browser)) and len(cards(browser)) == 2
    browser.find_element("css selector", "input[value=changed]").click()
    field.clear()
    field.send_keys("正品")
    moved = sum(-1.0 < score <= 0.25 for score in world.scores)
    assert f"of {moved} pairs" in text(browser, "#status")


def test_all_is_reached_and_moved_by_the_keyboard_alone(browser: Any, world: World) -> None:
    from selenium.webdriver import ActionChains, Keys

    emulate(browser)
    opened(browser, world.submit / "report.html")
    press = lambda *keys: ActionChains(browser).send_keys(*keys).perform()  # noqa: E731
    focus = lambda: browser.execute_script("return document.activeElement.id || document.activeElement.value")  # noqa: E731
    reached = []
    while len(reached) < 60 and "search" not in reached:
        press(Keys.TAB)
        reached.append(focus())
        if reached[-1] == "slider":
            before = text(browser, "[data-figure=recall]")
            press(*[Keys.ARROW_RIGHT] * 40, Keys.PAGE_UP)
            assert text(browser, "[data-figure=recall]") < before
            assert_figures(browser, world)
        if reached[-1] == "mistakes":
            press(Keys.ARROW_RIGHT)
            assert focus() == "different" and "labelled different" in cards(browser)[0]
    assert {"slider", "threshold", "mistakes", "search"} <= set(reached)
    press("i1", Keys.TAB)
    assert focus() == "everywhere"
    press(Keys.ENTER)
    assert focus() == "search" and browser.execute_script("return document.querySelector('input[value=all]').checked")


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_violation(browser: Any, world: World, width: int, is_dark: bool) -> None:
    assert_accessible(browser, world.submit / "report.html", width, is_dark)


def test_twenty_thousand_pairs_load_and_answer_quickly(browser: Any, tmp_path: Path) -> None:
    own = make_world(tmp_path, num_pairs=20_000)
    page = tmp_path / "report.html"
    report(own.submit, own.pairs, own.data, page)
    assert page.stat().st_size < 15_000_000
    emulate(browser)
    loaded = min(opened(browser, page) for _ in range(2))
    first, last = (int(browser.execute_script(f"return slider.{end}")) for end in ("min", "max"))
    places = [first + (last - first) * (17 * number % 20) // 20 for number in range(20)]
    times = sorted(turn(browser, place) for place in places)
    print(f"loaded in {loaded:.2f} s; slider: median {times[10]:.0f} ms, slowest {times[-1]:.0f} ms")
    assert loaded < 3
    assert times[10] < 100
    assert_figures(browser, own)
    assert_quiet(browser, page)
