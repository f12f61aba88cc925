"""Take the README's picture of a page: its top, 1,400 pixels wide, in a palette of 128 colours.

`PYTHONPATH=code/tests .venv/bin/python code/figures/shoot.py runs/demo/submit/report.html code/figures/report.png`
"""

import sys
import tempfile
from pathlib import Path

from browsers import emulate, launch, opened, shoot
from PIL import Image

WIDTH, HEIGHT = 1400, 1200
COLOURS = 128


def main() -> None:
    page, out = (Path(word).resolve() for word in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as profile:
        browser = launch(Path(profile))
        try:
            emulate(browser, WIDTH)
            opened(browser, page)
            shoot(browser, out, WIDTH, HEIGHT)
        finally:
            browser.quit()
    with Image.open(out) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main()
