"""A page out of a template and facts, that runs no other scripts than it is told.

Apart from page.py, whose chart library takes seconds to import: pages without charts need none of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def filled(template: str, facts: Mapping[str, Any], scripts: Sequence[str] = ("'none'",)) -> bytes:
    """A page that runs these scripts and no others, by their hashes."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(template).render(
        **facts, style=(HERE / "page.css").read_text(encoding="utf-8"), policy=POLICY.format(scripts=" ".join(scripts))
    )
    return page.encode("utf-8", "replace")


def flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of every value of a nested JSON object."""
    if isinstance(value, dict):
        return [row for key in value for row in flat(value[key], f"{name}.{key}" if name else str(key))]
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return [(name, text if len(text) <= 2000 else text[:1999] + "…")]
