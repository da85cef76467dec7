"""Weights to begin with: fresh adapters on a base model, or a small network from nothing.

Adapters (Hu et al., LoRA, 2021; as peft's ``init_lora_weights="gaussian"``, which the published program
uses): A ~ N(0, 1/rank^2), B = 0, so the fresh model is the base model. The two directions begin with the
same autoencoders, the local ones equal to the global ones.

From nothing (``from_scratch``): weights are uniform with variance 1 / (3 fan-in), as torch's own layers
begin, and then the outermost skip is set so that the network begins as the identity (``_carry_picture``).
Why: without it a small network spends its training on learning to copy, and the last normalisation, which
takes mean and spread out of each tile, makes it paint bright blobs to carry brightness past it (the droplets
of Karras et al., StyleGAN2, 2020).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.base_model import Base
from wsi_pipeline.models.layout import DIRECTIONS, SKIP_INIT, VAES, Direction, Layout, Shape
from wsi_pipeline.models.turbo_formats import VAE_ALPHA
from wsi_pipeline.models.weights import Prompt, TurboWeights, tensors_digest

__all__ = ["fresh_adapters", "from_scratch"]

_GAINS = {"unet.conv_out.weight": 0.1, "decoder.conv_in.weight": 0.05}
"""Layers of ``from_scratch`` that begin smaller, by the end of their names: x0 enlarges eps 14.6 times, and
the decoder divides by 0.18215; the skips would drown."""

_CONSTANT = 5.0  # against pictures in [-1, 1]: between black and white the last norm's spread differs by 1 %
_PICTURE_POWER = 0.35  # mean square of an H&E tile in [-1, 1]


def fresh_adapters(
    base: Base,
    prompts: Mapping[Direction, Prompt],
    *,
    rank_unet: int,
    rank_vae: int,
    multi_view: bool,
    seed: int,
    mpp: float,
    tile: int,
    licence: str,
) -> TurboWeights:
    """A base model with adapters that do nothing yet; directions are those of ``prompts``."""
    layout = Layout(
        unet_config=base.unet_config,
        vae_config=base.vae_config,
        rank_unet=rank_unet,
        rank_vae=rank_vae,
        vaes=_vaes(prompts, multi_view),
    )

    def base_tensor(name: str, shape: Shape) -> Tensor:
        part, _, key = name.partition(".")
        if ".skip_conv_" in key:
            return torch.full(shape, SKIP_INIT)
        return (base.unet if part == "unet" else base.vae)[key].float()

    return _weights(layout, base_tensor, prompts, seed, base.name, base.digest, mpp, tile, licence)


def from_scratch(
    unet_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
    captions: Mapping[Direction, str],
    *,
    rank_unet: int,
    rank_vae: int,
    multi_view: bool,
    seed: int,
    mpp: float,
    tile: int,
    licence: str,
) -> TurboWeights:
    """A network of its own, to be trained as a whole, that begins as the identity.

    Its embeddings of the captions are random and stay so. Raises ConfigError for an autoencoder that cannot
    carry the picture (see ``_carry_picture``).
    """
    first, second, *_ = vae_config["block_out_channels"]
    if first < 8 or first == second or vae_config["norm_num_groups"] != 1:
        raise ConfigError(
            "a network from nothing needs a first width of 8 or more, another second one, and norms of "
            "one group"
        )
    width = int(unet_config["cross_attention_dim"])
    prompts = {
        direction: Prompt(text=text, embedding=torch.randn(1, 8, width, generator=_stream(seed, text)))
        for direction, text in captions.items()
    }
    layout = Layout(
        unet_config=unet_config,
        vae_config=vae_config,
        rank_unet=rank_unet,
        rank_vae=rank_vae,
        vaes=_vaes(prompts, multi_view),
    )

    def drawn(name: str, shape: Shape) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        key = name if name.startswith("unet.") else f"vae.{name.partition('.')[2]}"
        values = torch.empty(shape).uniform_(-1, 1, generator=_stream(seed, key))
        gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
        return values * (gain * values[0].numel() ** -0.5)

    weights = _weights(layout, drawn, prompts, seed, "none", f"{seed:064x}", mpp, tile, licence)
    tensors = dict(weights.tensors)
    for vae in layout.vaes:
        _carry_picture(tensors, vae, int(vae_config["layers_per_block"]), 0.5 if multi_view else 1.0)
    return replace(weights, tensors=tensors, digest=tensors_digest(tensors))


def _carry_picture(tensors: dict[str, Tensor], vae: str, layers: int, gain: float) -> None:
    """Set the layers between the picture and the output so that an autoencoder with skips returns its input.

    The first convolution copies R, G, B into three features, the outermost skip takes them to the last block
    of the decoder (``gain`` undoes that two encoders are summed), whose shortcut lays them out as +R, -R, +G,
    -G, +B, -B. The other features become constants +K, -K. Then the last norm, over one group, sees a mean of
    0 and a spread that K decides and the picture hardly changes, and since silu(v) - silu(-v) = v, the last
    convolution gets R, G and B back exactly.
    """

    def at(name: str) -> Tensor:
        return tensors[f"{vae}.{name}"]

    width = len(at("decoder.conv_norm_out.weight"))
    middle = (1, 1)
    for name in ("weight", "bias"):
        for layer in range(layers + 1):
            at(f"decoder.up_blocks.3.resnets.{layer}.conv2.{name}").zero_()
        at(f"decoder.up_blocks.2.upsamplers.0.conv.{name}")[:3] = 0.0
        at(f"decoder.conv_out.{name}").zero_()
    spread = ((_CONSTANT**2 * (width - 6) + 6 * _PICTURE_POWER) / width) ** 0.5
    shortcut, skip = (
        at("decoder.up_blocks.3.resnets.0.conv_shortcut.weight"),
        at("decoder.skip_conv_4.weight"),
    )
    shortcut[:6], skip[:3] = 0.0, 0.0
    at("encoder.conv_in.weight")[:3] = 0.0
    for c in range(3):
        at("encoder.conv_in.weight")[c, c][middle] = 1.0
        skip[c, c] = gain
        for sign in (0, 1):
            shortcut[2 * c + sign, c] = 1.0 - 2.0 * sign
            at("decoder.conv_out.weight")[c, 2 * c + sign][middle] = spread * (1.0 - 2.0 * sign)
    signs = torch.tensor([1.0, -1.0]).repeat(width)[: width - 6]
    at("decoder.up_blocks.3.resnets.0.conv_shortcut.bias")[6:] = _CONSTANT * signs


def _weights(
    layout: Layout,
    base_tensor: Callable[[str, Shape], Tensor],
    prompts: Mapping[Direction, Prompt],
    seed: int,
    base_name: str,
    base_digest: str,
    mpp: float,
    tile: int,
    licence: str,
) -> TurboWeights:
    tensors = {}
    for name, shape in layout.canonical().items():
        if ".lora_B." in name:
            tensors[name] = torch.zeros(shape)
        elif ".lora_A." in name:
            # The four autoencoders begin alike, as copies of the first.
            key = name if name.startswith("unet.") else f"vae.{name.partition('.')[2]}"
            tensors[name] = torch.randn(shape, generator=_stream(seed, key)) / shape[0]
        else:
            tensors[name] = base_tensor(name, shape)
    return TurboWeights(
        layout=layout,
        tensors=tensors,
        unet_scale=1.0,
        vae_scale=VAE_ALPHA / layout.rank_vae,
        prompts=prompts,
        base_name=base_name,
        base_digest=base_digest,
        source="wsi-pipeline",
        licence=licence,
        mpp=mpp,
        tile=tile,
        digest=tensors_digest(tensors),
    )


def _vaes(directions: Mapping[Direction, Any], multi_view: bool) -> tuple[str, ...]:
    views = 2 if multi_view else 1
    return tuple(VAES[d][view] for view in range(views) for d in DIRECTIONS if d in directions)


def _stream(seed: int, name: str) -> torch.Generator:
    """Each tensor has its own stream, so its values depend on its name and on nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
