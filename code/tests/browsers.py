"""Pages in a real browser: Chromium without a window, driven by selenium.

Debian: apt-get install chromium chromium-driver. Without a browser or selenium its tests fail, they are not skipped.
"""

import base64
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def launch(profile: Path) -> Any:
    """A Chromium of our own, logging its console and every request. RuntimeError where there is none."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs) or find_spec("selenium") is None:
        raise RuntimeError("needs chromium, chromium-driver (Debian packages) and selenium (PyPI)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(programs[1])))
    driver.set_script_timeout(60)
    return driver


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
    drawn = "document.documentElement.dataset.charts === 'ready' || document.querySelector('.chart') === null"
    until(lambda: browser.execute_script(f"return document.readyState === 'complete' && ({drawn})"))
    return float(browser.execute_script("return performance.now()")) / 1000


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.01)


def assert_quiet(browser: Any, page: Path, num_scripts: int = 4) -> None:
    """Nothing on the console, nothing asked of any host, no script but the page's own, nothing from a title has run."""
    assert browser.get_log("browser") == []
    asked = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    outside = [message for message in asked if page.as_uri() not in message and '"url":"data:' not in message]
    assert outside == []
    assert browser.execute_script("return document.querySelectorAll('img[src=x], script').length") == num_scripts


def assert_accessible(browser: Any, page: Path, width: int, is_dark: bool) -> None:
    """axe-core finds no violation, and nothing stands out of the window."""
    found = find_spec("axe_playwright_python")
    assert found is not None and found.origin is not None, "needs axe-playwright-python (PyPI), for its axe-core"
    script = Path(found.origin).parent / "axe.min.js"
    emulate(browser, width, is_dark)
    opened(browser, page)
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


def shoot(browser: Any, out: Path, width: int, height: int) -> None:
    """The top of the open page as a PNG."""
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    out.write_bytes(base64.b64decode(shot["data"]))
