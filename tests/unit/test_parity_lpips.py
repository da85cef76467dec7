"""LPIPS against the published program: terms, totals and the gradient, of every fixture set."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wsi_pipeline.models.lpips import Lpips, make_lpips

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cases(parity_set: Path) -> Mapping[str, np.ndarray]:
    path = parity_set / "metrics_cases.npz"
    if not path.exists():
        pytest.skip("this set has no metrics")
    with np.load(path) as arrays:
        found = {name: arrays[name] for name in arrays.files if name.startswith("lpips.")}
    if not found:
        pytest.skip("this set has no LPIPS case")
    return found


@pytest.fixture
def distance(parity_set: Path, cases: Mapping[str, np.ndarray]) -> Lpips:
    spec = importlib.util.spec_from_file_location("formula_weights", parity_set / "formula_weights.py")
    assert spec is not None and spec.loader is not None
    formula = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formula)
    salt = json.loads((parity_set / "manifest.json").read_text())["salt"]
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    outputs = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    state = {}
    for place, inputs, channels in zip(places, (3, *outputs), outputs, strict=False):
        for part, shape in (("weight", (channels, inputs, 3, 3)), ("bias", (channels,))):
            name = f"features.{place}.{part}"
            value = formula.formula_array(f"vgg16.{name}", shape, salt, 2**0.5)
            if f"lpips.vgg_crc32_{name}" in cases:
                assert formula.checksum(value) == cases[f"lpips.vgg_crc32_{name}"]
            state[name] = torch.from_numpy(value)
    heads = {
        f"lin{i}.model.1.weight": torch.from_numpy(cases[f"lpips.head{i}"])[None, :, None, None]
        for i in range(5)
    }
    return Lpips(state, heads)


def image(cases: Mapping[str, np.ndarray], which: int) -> Tensor:
    pixels = torch.from_numpy(cases[f"lpips.image{which}_uint8"]).permute(0, 3, 1, 2)
    return (pixels / 255 - 0.5) / 0.5


def close(found: Tensor, wanted: np.ndarray, limit: float = 1e-6) -> None:
    np.testing.assert_allclose(found.detach().numpy().reshape(wanted.shape), wanted, rtol=0, atol=limit)


def test_terms_totals_and_gradient(cases: Mapping[str, np.ndarray], distance: Lpips) -> None:
    x, y = image(cases, 0).requires_grad_(), image(cases, 1)
    close(distance.per_layer(x, y), cases["lpips.per_layer"])
    total = distance(x, y)
    close(total, cases["lpips.total"])
    total.mean().backward()
    wanted = cases["lpips.grad_image0_of_mean"]
    assert np.linalg.norm(x.grad.numpy() - wanted) <= 1e-3 * np.linalg.norm(wanted)


def test_an_image_is_no_distance_from_itself(cases: Mapping[str, np.ndarray], distance: Lpips) -> None:
    close(distance(image(cases, 0), image(cases, 0)), cases["lpips.self"])


def test_shipped_heads_are_the_published_ones(cases: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    outputs = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    state = {}
    for place, inputs, channels in zip(places, (3, *outputs), outputs, strict=False):
        state[f"features.{place}.weight"] = torch.zeros(channels, inputs, 3, 3)
        state[f"features.{place}.bias"] = torch.zeros(channels)
    torch.save(state, tmp_path / "vgg.pth")
    for level, weight in enumerate(make_lpips(tmp_path / "vgg.pth").heads):
        close(weight, cases[f"lpips.head{level}"], 0.0)
