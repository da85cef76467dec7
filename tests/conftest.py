"""Where the real inputs are, and how a test asks for one (it skips where they are absent)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real slides and tiles (``WSI_PIPELINE_TEST_DATA``)."""
    path = Path(os.environ.get("WSI_PIPELINE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real test data at {path}; set WSI_PIPELINE_TEST_DATA")
    return path
