"""One HTML file out of the template, the style, the scripts and the data, with nothing to fetch.

Whatever comes from a result or a catalogue is hostile: the template escapes it, and the scripts read it from compressed
JSON and set it as text. Scripts run by their hash alone, so that none can come in with a title.
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping
from functools import cache
from math import ceil, floor, log10
from typing import Any

import altair as alt
import orjson
import vl_convert
from numpy.typing import NDArray

from tongkuan.report.template import HERE, filled

SHARED = ("numbers.js", "charts.js", "pairs.js")
SCRIPTS = {"page.html.j2": "page.js", "explain.html.j2": "explain.js"}
SLIDER_STEPS = 1000


def packed(array: NDArray[Any]) -> str:
    """Little-endian bytes in base64, as a typed array of the page reads them."""
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def compressed(data: Mapping[str, Any]) -> str:
    """zlib-compressed JSON in base64: no character of it means anything to HTML."""
    return base64.b64encode(zlib.compress(orjson.dumps(data), 9)).decode()


def slider(low: float, high: float) -> dict[str, int]:
    """A slider over [low, high] in SLIDER_STEPS or fewer: at place i stands the threshold i * factor * 10^exponent.

    Decimal steps, so that the threshold a reader sees is the one that is computed with.
    """
    span = max(high - low, 1e-6 * max(abs(low), abs(high))) or 1.0
    exponent = floor(log10(span / SLIDER_STEPS))
    factor = next((factor for factor in (1, 2, 5) if factor * 10.0**exponent >= span / SLIDER_STEPS), 10)
    step = factor * 10.0**exponent
    return {"factor": factor, "exponent": exponent, "first": floor(low / step) - 1, "last": ceil(high / step) + 1}


def script_hash(script: str) -> str:
    """What the policy lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def chart_library() -> str:
    """What draws the charts. It takes two seconds to bundle, once for all pages of a process."""
    bundle: str = vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", vl_version=alt.SCHEMA_VERSION.rpartition(".")[0]
    )
    return bundle


def render(template: str, facts: Mapping[str, Any], data: Mapping[str, Any], pictures: Mapping[int, str]) -> bytes:
    """A page: `facts` go into the template, `data` and `pictures` (base64 by item's number) to its scripts."""
    library = chart_library()
    own = "".join((HERE / name).read_text(encoding="utf-8") for name in (*SHARED, SCRIPTS[template]))
    scripts = {"library": library, "own": own, "data": compressed(data), "pictures": pictures}
    return filled(template, {**facts, **scripts}, [script_hash(script) for script in (library, own)])
