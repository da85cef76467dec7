"""From a ``NetworkConfig`` to a network.

The two-dimensional denoiser is diffusers' ``UNet2DModel`` with the settings that make it ADM's U-Net
(Dhariwal and Nichol, NeurIPS 2021): residual blocks that resample, the norm of every attention named
(otherwise the middle one is left out without a word), epsilon 1e-5, cosines first. Its state dict is that of
the class. diffusers is imported on use: it takes seconds, and the other networks do without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.models.pix2pix import ResNetTranslator, UNetTranslator
from wsi_pipeline.models.plain_unet import PlainUNet
from wsi_pipeline.models.unet3d import UNet3D

__all__ = ["build_network"]


def build_network(
    config: NetworkConfig, *, in_channels: int, out_channels: int, classes: int = 0
) -> nn.Module:
    """A network with fresh weights, in training mode: denoisers are called with (x, step, label or None), the
    others with x.

    ``classes`` > 0: labels 0 to classes - 1, and one more embedding, the last, which stands for "no label".
    Raises ConfigError for settings that make no network.
    """
    if classes and not config.is_denoiser:
        raise ConfigError(f"network.family: {config.family} takes no class; choose unet2d or unet3d")
    try:
        return _built(config, in_channels, out_channels, classes)
    except ValueError as error:  # of torch and diffusers: widths that norms and heads do not divide
        raise ConfigError(f"network: base, mult, groups and head_width make no network ({error})") from error


def _built(config: NetworkConfig, taken: int, given: int, classes: int) -> nn.Module:
    match config.family:
        case "unet2d":
            return _Denoiser2D(config, taken, given, classes)
        case "unet3d":
            return UNet3D(config, taken, given, classes)
        case "unet":
            return PlainUNet(taken, given, tuple(times * config.base for times in config.mult), config.groups)
        case "pix2pix":
            return UNetTranslator(config, taken, given)
        case "resnet":
            return ResNetTranslator(config, taken, given)


class _Denoiser2D(nn.Module):
    """[B, in, H, W], step [B], label [B] or None -> [B, out, H, W], by diffusers' class and with its keys."""

    def __init__(self, config: NetworkConfig, taken: int, given: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        inner = _unet2d(config, taken, given, classes)
        for name, child in inner.named_children():
            self.add_module(name, child)
        # Past nn.Module's register: its children, which hold all parameters, stand in it already.
        self.__dict__["inner"] = inner

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if self.classes and label is None:
            label = torch.full(t.shape, self.classes, device=t.device)
        made: Tensor = self.inner(x, t, label if self.classes else None, return_dict=False)[0]
        return made


def _unet2d(config: NetworkConfig, taken: int, given: int, classes: int) -> Any:
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention

    attends = [level in config.attention for level in range(len(config.mult))]
    widths = tuple(times * config.base for times in config.mult)
    cut = config.heads or config.head_width
    if config.attention and any(widths[level] % cut for level in (*config.attention, -1)):
        raise ValueError(
            f"{cut} {'heads' if config.heads else 'channels a head'} do not divide a level's width"
        )
    unet = UNet2DModel(
        in_channels=taken,
        out_channels=given,
        freq_shift=0,
        flip_sin_to_cos=True,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends[::-1]),
        block_out_channels=widths,
        layers_per_block=config.blocks,
        downsample_type="resnet",
        upsample_type="resnet",
        dropout=config.dropout,
        attention_head_dim=None if config.heads else config.head_width,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        add_attention=bool(config.attention),
        num_class_embeds=classes + 1 if classes else None,
    )
    if config.heads:
        # diffusers knows one head or heads of one width; how a width is cut into heads changes no tensor.
        for module in unet.modules():
            if isinstance(module, Attention):
                module.heads = config.heads
    return unet
