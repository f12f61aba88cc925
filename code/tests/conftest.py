"""Fixtures: a small data folder and a model trained on it, made once."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # worlds.py, browsers.py, scripts.py

from browsers import launch
from worlds import make_data, tiny_settings

# A first example that imports a library or meets a busy machine is no slow test; pytest's own limit bounds each.
settings.register_profile("tongkuan", deadline=None)
settings.load_profile("tongkuan")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that no test writes to."""
    return make_data(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="session")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six steps."""
    from tongkuan.learn.train import train

    folder = tmp_path_factory.mktemp("model")
    train(tiny_settings(folder), data, folder / "run", folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Where raw files go."""
    return tmp_path / "raw"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Towers of a few thousand weights are fastest on one thread, and threads of several processes would fight.

    Before each test and its fixtures, whatever one before has set: faiss shares OpenMP with torch.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser of the tests' own."""
    driver = launch(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()
