"""Load a script of `data_scripts/` the way the verbs do: by its name, with its folder on the path."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "data_scripts"


def load_script(name: str) -> ModuleType:
    """The script as a module. It stays on the path, so that worker processes can import it too."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    module = importlib.import_module(name)
    assert Path(module.__file__ or "").parent == FOLDER, f"another module is called {name}"
    return module
