"""Networks from weights: merged to be run, or with live adapters to be trained and compared.

Merged: W' = W + s B A (Hu et al., LoRA, 2021); of a convolution A carries the kernel and B is 1x1, so
W'[o, i, u, v] = W[o, i, u, v] + s sum_r B[o, r] A[r, i, u, v]. The sum is taken in float32, then cast.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipeline.models.layout import VAES, Direction, meta_unet, meta_vae
from wsi_pipeline.models.lora_turbo import Translator
from wsi_pipeline.models.weights import TurboWeights

__all__ = ["adapted_vae", "assemble", "merged_tensor", "with_adapters", "without_adapters"]

ADAPTER = "lora"

_IN_FLOAT32 = re.compile(
    r"unet\.conv_out|.*quant_conv"
    r"|.*encoder\.(conv_in|mid_block|conv_norm_out|conv_out)|.*decoder\.(conv_in|mid_block|conv_out)"
)
"""Parts that stay float32: the ends of the networks, where rounding reaches all that follows, or nothing
smooths it. They are 5 % of the arithmetic, and for them bfloat16 comes a fifth closer to float32."""


def assemble(
    weights: TurboWeights,
    direction: Direction,
    *,
    text: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    unet_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Translator:
    """One direction to be run: adapters merged, parts that it does not use left out.

    ``dtype``: of the autoencoders, which do nearly all of the arithmetic; ``unet_dtype``: rounding in the
    UNet reaches x0 14.6 times enlarged; ``text``: embedding of another caption than the direction's. Tensors
    are taken one at a time, so that beside the result only one float32 tensor is in memory. Raises KeyError
    where the weights lack the direction (``weights.directions`` tells).
    """
    text = weights.prompts[direction].embedding if text is None else text
    whole, local = VAES[direction]
    unet, vae = meta_unet(weights.layout.unet_config), meta_vae(weights.layout.vae_config)
    local_encoder = meta_vae(weights.layout.vae_config).encoder if weights.multi_view(direction) else None
    parts = {
        "unet": unet,
        f"{whole}.encoder": vae.encoder,
        f"{whole}.decoder": vae.decoder,
        f"{whole}.quant_conv": vae.quant_conv,
        f"{whole}.post_quant_conv": vae.post_quant_conv,
        **({f"{local}.encoder": local_encoder} if local_encoder is not None else {}),
    }
    for prefix, module in parts.items():
        names = (f"{prefix}.{key}" for key in module.state_dict())
        state = {
            # Copied, so that the file behind lazy tensors is released.
            name.removeprefix(f"{prefix}."): merged_tensor(weights, name).to(
                device, _type(name, unet_dtype if prefix == "unet" else dtype), copy=True
            )
            for name in names
        }
        module.load_state_dict(state, assign=True)
    unet.conv_out = InFloat32(unet.conv_out)
    net: Translator = _translator(unet, vae, local_encoder, text).to(device).eval().requires_grad_(False)
    # GroupNorm sums channels-last float32 naively, with ten times the error; half types hide that.
    if dtype != torch.float32:
        net.to(memory_format=torch.channels_last)
    return net


def with_adapters(weights: TurboWeights, directions: Iterable[Direction]) -> dict[Direction, Translator]:
    """Directions with one UNet between them and live peft adapters, float32: to be trained, or compared.

    Parts that a direction does not use (the local decoder) are left out. Tensors are copies.
    """
    layout = weights.layout
    unet = meta_unet(layout.unet_config)
    _adapt(unet, weights, "unet", list(layout.unet_adapted), layout.rank_unet, weights.unet_scale)
    return _sharing(unet, lambda name: adapted_vae(weights, name), weights, directions)


def without_adapters(weights: TurboWeights, directions: Iterable[Direction]) -> dict[Direction, Translator]:
    """As ``with_adapters``, but plain layers with the adapters merged into them: to be trained as a whole."""

    def filled(module: Any, prefix: str) -> Any:
        state = {key: merged_tensor(weights, f"{prefix}.{key}").clone() for key in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module

    unet = filled(meta_unet(weights.layout.unet_config), "unet")
    return _sharing(unet, lambda name: filled(meta_vae(weights.layout.vae_config), name), weights, directions)


def _sharing(
    unet: nn.Module, vae: Callable[[str], Any], weights: TurboWeights, directions: Iterable[Direction]
) -> dict[Direction, Translator]:
    """Translators around one UNet; ``vae`` builds the autoencoder of a name in ``VAES``."""
    built = {}
    for direction in directions:
        whole, local = VAES[direction]
        local_encoder = vae(local).encoder if weights.multi_view(direction) else None
        text = weights.prompts[direction].embedding.clone()
        built[direction] = _translator(unet, vae(whole), local_encoder, text)
    return built


def adapted_vae(weights: TurboWeights, name: str) -> Any:
    """One whole autoencoder with live adapters, float32; ``name`` as in ``VAES``."""
    layout = weights.layout
    vae = meta_vae(layout.vae_config)
    _adapt(vae, weights, name, list(layout.vae_adapted), layout.rank_vae, weights.vae_scale)
    return vae


class InFloat32(nn.Module):
    """A layer in float32 inside a network of another type.

    Why: the last layer of the UNet makes eps, whose rounding is multiplied by 14.6; there, float32 is free.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


def _type(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if _IN_FLOAT32.match(name) else dtype


def _translator(unet: Any, vae: Any, local_encoder: Any, text: Tensor) -> Translator:
    return Translator(
        unet=unet,
        encoder=vae.encoder,
        decoder=vae.decoder,
        quant_conv=vae.quant_conv,
        post_quant_conv=vae.post_quant_conv,
        local_encoder=local_encoder,
        text=text,
        scaling_factor=float(vae.config.scaling_factor),
    )


def merged_tensor(weights: TurboWeights, name: str) -> Tensor:
    """A base tensor by its canonical name, float32, with its adapter added where it has one."""
    base = weights.tensors[name].float()
    module = name.removesuffix(".weight")
    if module == name or f"{module}.lora_A.weight" not in weights.tensors:
        return base
    a, b = (weights.tensors[f"{module}.lora_{m}.weight"].float() for m in "AB")
    scale = weights.unet_scale if name.startswith("unet.") else weights.vae_scale
    delta = b.flatten(1) @ a.flatten(1)
    return base + scale * delta.reshape(base.shape)


def _adapt(
    module: nn.Module, weights: TurboWeights, prefix: str, adapted: list[str], rank: int, scale: float
) -> None:
    """Put adapters into a module of the meta device and give it its tensors.

    One peft adapter holds what the published UNet splits into three: the split names tensors in files
    (``Layout.unet_adapted``) and has no part in the arithmetic.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=adapted, init_lora_weights=False)
    inject_adapter_in_model(config, module, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    state = {}
    for key in module.state_dict():
        name = key.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")
        state[key] = weights.tensors[f"{prefix}.{name}"].to(torch.float32, copy=True)
    module.load_state_dict(state, assign=True)
