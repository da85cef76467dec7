"""What tests of the other translators read from a fixture set (``other_set``, see ``conftest``)."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

Arrays = Mapping[str, npt.NDArray[Any]]


@functools.cache
def _arrays(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def arrays(folder: Path, name: str) -> Arrays:
    """All arrays of ``name``.npz of a set; skips where the set has none."""
    path = folder / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"the set has no {path.name}")
    return _arrays(path)


def facts(folder: Path, name: str) -> dict[str, Any]:
    """``name``.json of a set; skips where the set has none."""
    path = folder / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the set has no {path.name}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def prefixes(recorded: Arrays, start: str, end: str) -> list[str]:
    """Names before ``end`` of all arrays that begin with ``start`` and end with ``end``; skips for none."""
    found = [name.removesuffix(end) for name in recorded if name.startswith(start) and name.endswith(end)]
    if not found:
        pytest.skip(f"the set has no case {start}...{end}")
    return found


def weights(
    folder: Path, shapes: Mapping[str, Any], salt: str, *, prefix: str = "", gain: float = 1.0
) -> dict[str, torch.Tensor]:
    """Tensors by key, drawn from ``salt + prefix + key`` as the set's ``formula_weights.py`` says."""
    spec = importlib.util.spec_from_file_location("formula_weights", folder / "formula_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = {key: module.formula_array(prefix + key, shape, salt, gain) for key, shape in shapes.items()}
    return {key: torch.from_numpy(np.array(value)) for key, value in made.items() if value is not None}


def close(found: Any, wanted: npt.NDArray[Any], limit: float, what: str = "") -> None:
    """Assert that no value is further off than ``limit``; shapes have to be equal."""
    found = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    off = float(np.abs(found.astype(np.float64) - wanted).max()) if wanted.size else 0.0
    assert off <= limit, f"{what}: off by {off:.3g}, allowed {limit:g}"
