"""Translators with random weights, small enough to be run on slides in tests."""

from __future__ import annotations

from pathlib import Path

import torch

from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.translators.bundle import TranslatorSpec, build_translator, save_translator
from wsi_pipeline.translators.settings import (
    ConditionConfig,
    DiffusionConfig,
    PathConfig,
    RepresentationConfig,
    SamplingConfig,
)

SIDE = 32
TINY = NetworkConfig(family="unet2d", base=8, mult=(1, 2), blocks=1, groups=4)
PIX2PIX = NetworkConfig(family="pix2pix", base=4, mult=(1,) * 4, groups=2)
BESIDE = ConditionConfig(concat=True)
SYSTEMS = {
    "i2sb": DiffusionConfig(condition=BESIDE),
    "cwdm": DiffusionConfig(
        path=PathConfig(kind="vp", prediction="sample"),
        representation=RepresentationConfig(kind="haar"),
        condition=BESIDE,
    ),
}
"""Of paths; ``pix2pix`` is the third system."""


def bundle(folder: Path, system: str, tile: int = SIDE, nfe: int = 3) -> Path:
    """A weights file of the system."""
    spec = TranslatorSpec(
        network=TINY if system in SYSTEMS else PIX2PIX,
        diffusion=SYSTEMS.get(system),
        sampling=SamplingConfig(nfe=nfe),
        tile=tile,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = build_translator(spec, None)
    path = folder / f"{system}.safetensors"
    save_translator(spec, network.state_dict(), path)
    return path
