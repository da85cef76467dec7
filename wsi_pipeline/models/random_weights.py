"""Random weights of any size, to test and to time with: never a result.

Every tensor is drawn from its own stream, seeded by its name, when it is asked for: a generator of full size
costs no memory until a network is built from it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from wsi_pipeline.models.layout import (
    DIRECTIONS,
    SD_TURBO_UNET,
    SD_TURBO_VAE,
    SKIP_INIT,
    VAES,
    Layout,
    Shape,
)
from wsi_pipeline.models.weights import Prompt, TurboWeights, tensors_digest

CONTRAST = 0.55
"""Gain of the last layer: outputs get the contrast of H&E tiles (standard deviation 45 grey levels)."""

__all__ = ["TINY_UNET", "TINY_VAE", "RandomTensors", "random_weights"]

TINY_UNET: Mapping[str, Any] = {
    **SD_TURBO_UNET,
    "sample_size": 8,
    "block_out_channels": (16, 24, 32, 32),
    "attention_head_dim": (2, 3, 4, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
TINY_VAE: Mapping[str, Any] = {
    **SD_TURBO_VAE,
    "sample_size": 64,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
}


class RandomTensors(Mapping[str, torch.Tensor]):
    """Canonical name -> tensor drawn for that name; weights have variance 1 / fan-in, adapters less.

    Base tensors of the four autoencoders are the same, their adapters differ, as in published files.
    """

    def __init__(self, shapes: Mapping[str, Shape], seed: int = 0, adapter: float = 0.3) -> None:
        self._shapes = shapes
        self._seed = seed
        self._adapter = adapter

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        part, _, key = name.partition(".")
        is_lora = ".lora_" in name
        drawn_as = name if part == "unet" or is_lora else f"vae.{key}"
        random = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{drawn_as}".encode()))
        values = torch.randn(shape, generator=random)
        if is_lora:
            gain = self._adapter if ".lora_B." in name else 1.0
            return values * (gain / values[0].numel() ** 0.5)
        if ".skip_conv_" in name:
            return torch.full(shape, SKIP_INIT)
        if len(shape) > 1:
            gain = CONTRAST if "decoder.conv_out." in name else 1.0
            return values * (gain * values[0].numel() ** -0.5)
        return 1.0 + 0.1 * values if name.endswith(".weight") else 0.1 * values

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_weights(
    *,
    unet_config: Mapping[str, Any] = TINY_UNET,
    vae_config: Mapping[str, Any] = TINY_VAE,
    rank_unet: int = 4,
    rank_vae: int = 4,
    multi_view: bool = True,
    seed: int = 0,
) -> TurboWeights:
    """Both directions with random weights; ``tile`` 512 and 0.5 µm per pixel as the published model."""
    views = 2 if multi_view else 1
    layout = Layout(
        unet_config=unet_config,
        vae_config=vae_config,
        rank_unet=rank_unet,
        rank_vae=rank_vae,
        vaes=tuple(name for view in range(views) for name in (VAES[d][view] for d in DIRECTIONS)),
    )
    random = torch.Generator().manual_seed(seed)
    width = int(unet_config["cross_attention_dim"])
    prompts = {
        d: Prompt(text=f"random {d}", embedding=torch.randn(1, 77, width, generator=random))
        for d in DIRECTIONS
    }
    tensors = RandomTensors(layout.canonical(), seed)
    return TurboWeights(
        layout=layout,
        tensors=tensors,
        unet_scale=1.0,
        vae_scale=8.0 / rank_vae,
        prompts=prompts,
        base_name="random",
        base_digest=f"{seed:064x}",
        source="random",
        licence="random numbers: for tests and timings, never a result",
        mpp=0.5,
        tile=512,
        digest=tensors_digest(tensors),
    )
