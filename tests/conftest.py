"""Where the real inputs are, and how a test asks for one (it skips where they are absent)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# --import-mode=importlib puts no test folder on it.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "contract")]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real slides and tiles (``WSI_PIPELINE_TEST_DATA``)."""
    path = Path(os.environ.get("WSI_PIPELINE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real test data at {path}; set WSI_PIPELINE_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tiny random weights, both directions with local encoders; not to be changed."""
    from wsi_pipeline.models.bundle import save_bundle
    from wsi_pipeline.models.random_weights import random_weights

    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_bundle(random_weights(), path)
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: on tiny networks a second only waits, and other processes want the core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parity_folders(variable: str, default: str) -> list[Path]:
    """Every fixture set: the sub-folders of the folder that ``variable`` names; none where it is absent."""
    root = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``parity_set`` (Diffusion-FFPE) or ``other_set`` (the other translators) runs once
    for each set, and is skipped where there is none."""
    for fixture, variable, default in (
        ("parity_set", "WSI_PIPELINE_PARITY", "parity"),
        ("other_set", "WSI_PIPELINE_PARITY_OTHER", "parity_other"),
    ):
        if fixture in metafunc.fixturenames:
            none = pytest.param(None, marks=pytest.mark.skip(f"no fixture sets; set {variable}"))
            folders = parity_folders(variable, default)
            metafunc.parametrize(fixture, folders or [none], ids=lambda path: path and path.name)
