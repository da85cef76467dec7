"""Other translators: Haar coefficients against pixels at equal width, and the noise of the lattice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.noise import lattice_normal
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.translators.bundle import TranslatorSpec, build_translator
from wsi_pipeline.translators.parts import make_parts
from wsi_pipeline.translators.sampler import draw
from wsi_pipeline.translators.settings import (
    ConditionConfig,
    DiffusionConfig,
    PathConfig,
    RepresentationConfig,
    SamplingConfig,
)

pytestmark = pytest.mark.benchmark

SIDE, NFE = 256, 2


def median(call: Callable[[], object], times: int = 5) -> float:
    call()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def test_haar_against_pixels() -> None:
    pixels = DiffusionConfig(
        path=PathConfig(kind="vp", prediction="sample"), condition=ConditionConfig(concat=True)
    )
    source = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    spent = {}
    for name, config in {
        "pixels": pixels,
        "haar": replace(pixels, representation=RepresentationConfig(kind="haar")),
    }.items():
        spec = TranslatorSpec(network=NetworkConfig(), diffusion=config, tile=SIDE)
        network, parts = build_translator(spec, None), make_parts(config)

        def once(network: torch.nn.Module = network, parts: object = parts) -> None:
            draw(
                network,
                parts,
                SamplingConfig(nfe=NFE),
                source=source,
                noise=lambda k: torch.randn_like(source),
            )

        spent[name] = median(once, 3)
    print(f"\ntiles/s, Haar over pixels: {spent['pixels'] / spent['haar']:.2f} ({spent})")


def test_noise_of_a_tile() -> None:
    region = Region(1000, 2000, 256, 256)
    spent = median(lambda: lattice_normal(region, key=1, channels=3), 20)
    torch_spent = median(lambda: torch.randn(3, 256, 256), 20)
    print(f"\n3 x 256 x 256 normals: {spent * 1e3:.2f} ms, {spent / torch_spent:.1f} x torch.randn")
