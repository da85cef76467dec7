"""The base model as a value: what adapters were trained on top of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Base"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """UNet and autoencoder of a latent diffusion model, by diffusers' keys.

    ``name``: how the user named it (folder or hub id); ``digest``: ``tensors_digest`` of both networks;
    ``unet_config``, ``vae_config``: diffusers configurations; ``unet``, ``vae``: floating-point of any width,
    without skip convolutions.
    """

    name: str
    digest: str
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    unet: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
