"""The page of `report` in a real browser: Chromium without a window, driven by selenium.

Debian: apt-get install chromium chromium-driver. Without a browser or selenium these tests fail, they are not skipped.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_worlds import CLOSING, IMAGE, SCRIPT, World, make_world

from tongkuan.metrics import quality_at
from tongkuan.report import report

pytestmark = pytest.mark.slow
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# One turn of the slider as a reader has it: from the input event to what follows the next frame.
TURN = """
const [place, done] = arguments, slider = document.getElementById("slider"), start = performance.now();
slider.value = place;
slider.dispatchEvent(new Event("input", { bubbles: true }));
requestAnimationFrame(() => setTimeout(() => done(performance.now() - start), 0));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium of our own, logging its console and every request."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs) or find_spec("selenium") is None:
        pytest.fail("needs chromium, chromium-driver (Debian packages) and selenium (PyPI)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(programs[1])))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small result and its page."""
    made = make_world(tmp_path_factory.mktemp("world"))
    other = make_world(tmp_path_factory.mktemp("other"), threshold=-1.0)
    report(made.submit, made.pairs, made.data, made.submit / "report.html", against_dir=other.submit)
    return made


def emulate(browser: Any, width: int = 1400, is_dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def opened(browser: Any, page: Path) -> float:
    """Open a page from the disk and wait until all is drawn: seconds since navigation began."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # empties it
    browser.get(page.as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.charts === 'ready'"))
    return float(browser.execute_script("return performance.now()")) / 1000


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.01)


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


def assert_quiet(browser: Any, page: Path) -> None:
    """Nothing on the console, nothing asked of any host, nothing that a title brought has run."""
    assert browser.get_log("browser") == []
    asked = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    outside = [message for message in asked if page.as_uri() not in message and '"url":"data:' not in message]
    assert outside == []
    assert browser.execute_script("return document.querySelectorAll('img[src=x], script').length") == 4


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
    found = find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.fail("needs axe-playwright-python (PyPI), for its copy of axe-core")
    script = Path(found.origin).parent / "axe.min.js"
    emulate(browser, width, is_dark)
    opened(browser, world.submit / "report.html")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    # Parts out of sight are laid out too, or axe would not look at them.
    browser.execute_script(
        "for (const s of document.querySelectorAll('section')) s.style.contentVisibility = 'visible'"
    )
    browser.execute_script(script.read_text(encoding="utf-8"))
    result = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in result["violations"]] == []
    assert len(result["passes"]) > 20
    emulate(browser)


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
