"""What tensors a one-step LoRA generator consists of: their names and shapes, from two configurations.

Everything that reads, checks, merges or writes weights asks here, so a name is spelled once. Names are
*canonical*: those of diffusers' modules behind the part's name, whatever wrapper a file was saved from.

    unet.<key>                          base weights, e.g. unet.conv_in.weight
    unet.<module>.lora_A.weight         adapters; module is the adapted Linear or Conv2d
    <vae>.<key>                         e.g. vae.encoder.conv_in.weight, vae.decoder.skip_conv_1.weight
    <vae>.<module>.lora_B.weight

with ``<vae>`` one of ``VAES``: a global and a local one for each direction. Networks are built on the meta
device: no memory, no weights. Source: Zhang et al., Diffusion-FFPE (BIBM 2024); Parmar et al., img2img-turbo
(2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

__all__ = [
    "ADAPTERS",
    "DIRECTIONS",
    "SD_TURBO_UNET",
    "SD_TURBO_VAE",
    "VAES",
    "Adapter",
    "Direction",
    "Layout",
    "Shape",
    "add_skip_convs",
    "meta_unet",
    "meta_vae",
]

Direction: TypeAlias = Literal["a2b", "b2a"]
"""``a2b``: fresh-frozen to FFPE; ``b2a``: back."""

Adapter: TypeAlias = Literal["default_encoder", "default_decoder", "default_others"]
Shape: TypeAlias = tuple[int, ...]

DIRECTIONS: tuple[Direction, Direction] = ("a2b", "b2a")

VAES: Mapping[Direction, tuple[str, str]] = {
    "a2b": ("vae", "vae_patch"),
    "b2a": ("vae_b2a", "vae_b2a_patch"),
}
"""Per direction the name of the VAE that sees the whole tile and of the one that sees its 4x4 cells."""

ADAPTERS: tuple[Adapter, Adapter, Adapter] = ("default_encoder", "default_decoder", "default_others")

SKIP_CONVS = 4
SKIP_INIT = 1e-5  # constant that the published code fills the skip convolutions with

_UNET_TARGETS = (
    *("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_in", "conv_shortcut"),
    *("conv_out", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj"),
)
_VAE_TARGETS = (
    *("conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0"),
    *(f"skip_conv_{k}" for k in range(1, SKIP_CONVS + 1)),
)

SD_TURBO_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
"""Stable Diffusion 2.1 base topology, which SD-Turbo shares (865,910,724 parameters)."""

SD_TURBO_VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}


def meta_unet(config: Mapping[str, Any]) -> nn.Module:
    """The UNet of a diffusers configuration, without weights; ValueError where it cannot be built."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def meta_vae(config: Mapping[str, Any]) -> nn.Module:
    """The autoencoder of a diffusers configuration with its skip convolutions, without weights."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
        add_skip_convs(vae.decoder, tuple(config["block_out_channels"]))
    return vae


def add_skip_convs(decoder: nn.Module, widths: tuple[int, ...]) -> None:
    """Give a decoder ``skip_conv_1..4``: 1x1, no bias, from encoder widths to what enters each up block.

    For (128, 256, 512, 512): 512->512, 256->512, 128->512, 128->256.
    """
    c0, c1, c2, c3 = widths
    for k, (into, out) in enumerate(((c2, c3), (c1, c3), (c0, c2), (c0, c1)), start=1):
        conv = nn.Conv2d(into, out, kernel_size=1, bias=False)
        nn.init.constant_(conv.weight, SKIP_INIT)
        decoder.add_module(f"skip_conv_{k}", conv)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and shapes of every tensor, in the order of the modules.

    ``unet_config``, ``vae_config``: diffusers configurations; ``rank_unet``, ``rank_vae``: of the adapters (0
    for none); ``vaes``: the autoencoders that exist, names from ``VAES``.
    """

    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    rank_unet: int
    rank_vae: int
    vaes: tuple[str, ...]

    @cached_property
    def unet_base(self) -> dict[str, Shape]:
        """diffusers key -> shape of the UNet."""
        return _shapes(self._unet)

    @cached_property
    def vae_base(self) -> dict[str, Shape]:
        """diffusers key -> shape of one autoencoder, skip convolutions included."""
        return _shapes(self._vae)

    @cached_property
    def unet_adapted(self) -> dict[str, Adapter]:
        """Adapted module -> adapter that it belongs to, in the order of the modules."""
        return {name: _bucket(name) for name in _adaptable(self._unet, _is_unet_target)}

    @cached_property
    def vae_adapted(self) -> tuple[str, ...]:
        """Adapted modules of one autoencoder; ``quant_conv`` and ``post_quant_conv`` are not among them."""
        return tuple(_adaptable(self._vae, _is_vae_target))

    def lora(self, part: Literal["unet", "vae"], module: str) -> dict[str, Shape]:
        """Shapes of ``lora_A`` and ``lora_B`` of one module; A of a convolution has its kernel, B is 1x1."""
        base, rank = (self.unet_base, self.rank_unet) if part == "unet" else (self.vae_base, self.rank_vae)
        out, into, *kernel = base[f"{module}.weight"]
        return {"lora_A": (rank, into, *kernel), "lora_B": (out, rank, *[1] * len(kernel))}

    def canonical(self) -> dict[str, Shape]:
        """Every canonical name with its shape."""
        names = {f"unet.{key}": shape for key, shape in self.unet_base.items()}
        names.update(self._loras("unet", "unet", self.unet_adapted if self.rank_unet else ()))
        for vae in self.vaes:
            names.update({f"{vae}.{key}": shape for key, shape in self.vae_base.items()})
            names.update(self._loras(vae, "vae", self.vae_adapted if self.rank_vae else ()))
        return names

    def _loras(self, prefix: str, part: Literal["unet", "vae"], modules: Any) -> Iterator[tuple[str, Shape]]:
        for module in modules:
            for matrix, shape in self.lora(part, module).items():
                yield f"{prefix}.{module}.{matrix}.weight", shape

    def count(self, names: Mapping[str, Shape]) -> int:
        """Number of parameters behind these names."""
        return sum(math.prod(shape) for shape in names.values())

    @cached_property
    def _unet(self) -> nn.Module:
        return meta_unet(self.unet_config)

    @cached_property
    def _vae(self) -> nn.Module:
        return meta_vae(self.vae_config)


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _adaptable(module: nn.Module, wanted: Any) -> Iterator[str]:
    """Names of Linear and Conv2d modules that get an adapter."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv2d) and wanted(name):
            yield name


def _is_unet_target(name: str) -> bool:
    """By substring, as the published code chooses; ``time_emb_proj`` and embeddings hold none of them."""
    return "norm" not in name and any(target in name for target in _UNET_TARGETS)


def _is_vae_target(name: str) -> bool:
    """By suffix after a dot, as peft matches."""
    return any(name.endswith(f".{target}") for target in _VAE_TARGETS)


def _bucket(name: str) -> Adapter:
    if "down_blocks" in name or "conv_in" in name:
        return "default_encoder"
    return "default_decoder" if "up_blocks" in name else "default_others"
