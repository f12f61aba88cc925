"""Name, version and licence of all that an SBOM lists; a package without a licence is an error.

`.venv/bin/cyclonedx-py environment --gather-license-texts --output-reproducible -o sbom.cdx.json .venv/bin/python`
`.venv/bin/python code/licences.py sbom.cdx.json`; the image has the outcome, /app/licences.txt.
"""

import base64
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import orjson

# What neither package data nor a licence file of theirs tell.
KNOWN = {"cuda-toolkit": "LicenseRef-NVIDIA-Proprietary (only asks for other packages)"}
APPROVED = "License :: OSI Approved :: "


def words_of(licence: dict[str, Any]) -> tuple[int, str]:
    """(how exact it is, 0 the most; the words) of one entry: SPDX, a classifier, or the first line of a text."""
    if "expression" in licence:
        return 0, str(licence["expression"])
    told = licence["license"]
    name = str(told.get("id") or told["name"])
    if name.startswith(APPROVED):
        return 1, name.removeprefix(APPROVED)
    if not name.startswith(("declared license", "License ::")):
        return 0, name
    text = told.get("text", {})
    content = str(text.get("content", ""))
    if text.get("encoding") == "base64":
        content = base64.b64decode(content).decode(errors="replace")
    line = content.strip().partition("\n")[0].strip()
    return 2, "" if line == "UNKNOWN" else line


def from_file(name: str) -> str:
    """The first line of an installed package's licence file, "" without one."""
    files = importlib.metadata.files(name) or []
    texts = (str(file.locate()) for file in files if file.name.upper().startswith("LICEN"))
    lines = (line for text in texts for line in Path(text).read_text(encoding="utf-8").splitlines())
    return next(filter(None, map(str.strip, lines)), "")


def licence_of(component: dict[str, Any]) -> str:
    """One line, the most exact that somebody says; "" when nobody does."""
    found = sorted(set(map(words_of, component.get("licenses", []))))
    told = " AND ".join(words for level, words in found if words and level == found[0][0])
    return told or KNOWN.get(component["name"], "") or from_file(component["name"])


def main(path: Path) -> int:
    """Print the table; 1 when a licence is unknown."""
    components = orjson.loads(path.read_bytes())["components"]
    licences = {f"{each['name']} {each['version']}": licence_of(each) for each in components}
    width = max(map(len, licences))
    for package, licence in sorted(licences.items(), key=lambda row: row[0].lower()):
        print(f"{package:<{width}}  {licence or '?'}")
    if unknown := [package for package, licence in licences.items() if not licence]:
        print(f"licences.py: no licence of {', '.join(unknown)}; look it up and name it in KNOWN", file=sys.stderr)
    return bool(unknown)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
