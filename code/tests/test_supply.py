"""What the image is made of: every locked package stands in the SBOM, with a licence."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import licences
import orjson
import pytest

from tongkuan.base.errors import IMAGE

CODE = Path(__file__).resolve().parents[1]


def locked() -> set[tuple[str, str]]:
    """(name, version) of all in the lock, names as package indexes write them."""
    lock = (CODE / "requirements.lock").read_text(encoding="utf-8")
    return {(name, version) for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE)}


def listed(sbom: Path) -> set[tuple[str, str]]:
    components = orjson.loads(sbom.read_bytes())["components"]
    return {(re.sub(r"[-_.]+", "-", each["name"]).lower(), each["version"]) for each in components}


@pytest.mark.skipif(IMAGE not in os.environ, reason="the image has it")
def test_the_images_sbom_lists_what_is_locked_and_nothing_else() -> None:
    found = listed(CODE.parent / "sbom.cdx.json")
    assert locked() <= found
    assert {name for name, _ in found - locked()} <= {"pip"}
    table = (CODE.parent / "licences.txt").read_text(encoding="utf-8").splitlines()
    assert len(table) == len(found)
    assert [line for line in table if line.endswith("?")] == []


@pytest.mark.slow
def test_an_sbom_has_a_licence_for_each_package_and_is_the_same_when_made_again(tmp_path: Path) -> None:
    texts = []
    for number in range(2):
        sbom = tmp_path / f"{number}.json"
        command = [Path(sys.executable).with_name("cyclonedx-py"), "environment", "--output-reproducible"]
        options = ["--gather-license-texts", "--pyproject", CODE / "pyproject.toml", "--output-file", sbom]
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run([*command, *options, sys.executable], check=True, env=environment, cwd=tmp_path)
        texts.append(sbom.read_bytes())
    assert texts[0] == texts[1]
    assert b"serialNumber" not in texts[0] and b"timestamp" not in texts[0]
    assert str(CODE.parent).encode() not in texts[0]
    assert locked() <= listed(tmp_path / "0.json")
    assert licences.main(tmp_path / "0.json") == 0


def component(name: str, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": "1", "licenses": list(entries)}


def named(name: str, text: str = "") -> dict[str, Any]:
    return {"license": {"name": name, "text": {"content": text}}}


@pytest.mark.parametrize(
    ("entries", "licence"),
    [
        ([{"expression": "MIT OR Apache-2.0"}, named("License :: OSI Approved :: MIT License")], "MIT OR Apache-2.0"),
        ([named("License :: Other/Proprietary License"), named("LicenseRef-X")], "LicenseRef-X"),
        ([named("License :: OSI Approved :: BSD License"), named("declared license of 'x'", "Long")], "BSD License"),
        ([named("declared license of 'x'", "\n3-Clause BSD\nand so on")], "3-Clause BSD"),
        ([{"license": {"id": "MIT"}}, {"license": {"id": "0BSD"}}], "0BSD AND MIT"),
    ],
)
def test_of_several_words_for_a_licence_the_most_exact_count(entries: list[dict[str, Any]], licence: str) -> None:
    assert licences.licence_of(component("x", *entries)) == licence


def test_a_package_that_names_none_has_that_of_its_licence_file() -> None:
    assert licences.licence_of(component("axe-playwright-python")) == "MIT License"


def test_no_licence_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(licences.importlib.metadata, "files", lambda _: None)
    path = tmp_path / "sbom.json"
    path.write_bytes(orjson.dumps({"components": [component("some", named("declared license of 'some'", "UNKNOWN"))]}))
    assert licences.main(path) == 1
    shown = capsys.readouterr()
    assert shown.out.split() == ["some", "1", "?"] and "no licence of some 1; look it up" in shown.err
