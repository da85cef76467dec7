"""What explains misalignment, and what judges pairs, in deformation-equivariant training (Honkamaa et al.).

    rigid    residual encoder of both images -> angle and shift
    cross    U-Net of the roughly aligned target and the source -> velocities, between the two kinds of images
    intra    U-Net of the aligned target and the translation -> velocities, between images of one kind
    judge    residual encoder with spectral norms of source and image -> logit

They are needed for training alone. Names of parameters are the published ones. Two differences: the last
layers of the three begin at zero, so that registration begins as the identity; and the judge's first layer
pads nothing (the published 1 x 1 convolution pads by a pixel: ``stem_padding=1``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from wsi_pipeline.models.plain_unet import PlainUNet

__all__ = ["PairJudge", "RegistrationConfig", "RigidEncoder", "make_judge", "make_registration"]

_Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationConfig:
    """Channels of the levels, from fine to coarse: of the encoder, of both U-Nets, of the judge."""

    rigid: tuple[int, ...] = (32, 64, 128, 256, 256)
    fields: tuple[int, ...] = (32, 64, 128, 256, 256)
    judge: tuple[int, ...] = (64, 128, 256, 512, 1024)


class _Block(nn.Module):
    """Two convolutions beside a skip; ``halve``: at half the side."""

    def __init__(self, inputs: int, outputs: int, halve: bool, slope: float, wrap: _Wrap) -> None:
        super().__init__()
        self.conv1 = wrap(nn.Conv2d(inputs, outputs, 4 if halve else 3, 2 if halve else 1, 1))
        self.conv2 = wrap(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.projection = wrap(nn.Conv2d(inputs, outputs, 1)) if halve else None
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        main = F.leaky_relu(self.conv1(x), self.slope)
        main = F.leaky_relu(self.conv2(main), self.slope)
        skip = x if self.projection is None else self.projection(F.avg_pool2d(x, 2))
        return main + skip


def _blocks(widths: Sequence[int], slope: float, wrap: _Wrap) -> tuple[_Block, nn.Sequential, _Block]:
    downs = [_Block(i, o, True, slope, wrap) for i, o in pairwise([widths[0], *widths])]
    first, last = (_Block(width, width, False, slope, wrap) for width in (widths[0], widths[-1]))
    return first, nn.Sequential(*downs), last


def _pooled(x: Tensor) -> Tensor:
    return F.relu(x).mean(dim=(2, 3))


class RigidEncoder(nn.Module):
    """[B, in, H, W] -> [B, outputs]: angle in radians, shifts in pixels. Widths as published: 4,440,387."""

    def __init__(self, in_channels: int, widths: Sequence[int], outputs: int = 3) -> None:
        super().__init__()
        self.initial_conv = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.initial_block, self.res_blocks, self.final_block = _blocks(widths, 0.0, lambda layer: layer)
        self.linear = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.final_block(self.res_blocks(self.initial_block(self.initial_conv(x))))
        out: Tensor = self.linear(_pooled(x))
        return out


class PairJudge(nn.Module):
    """Logits [B] of (source, image), each [B, C, H, W]; training mode moves its spectral norms."""

    def __init__(self, in_channels: int, widths: Sequence[int], stem_padding: int = 0) -> None:
        super().__init__()
        self.initial_conv = nn.Conv2d(in_channels, widths[0], 1, padding=stem_padding)
        self.initial_block_joint, self.joint_blocks, self.final_block = _blocks(widths, 0.01, spectral_norm)
        self.linear = spectral_norm(nn.Linear(widths[-1], 1))

    def forward(self, source: Tensor, image: Tensor) -> Tensor:
        x = self.initial_conv(torch.cat([source, image], dim=1))
        x = self.final_block(self.joint_blocks(self.initial_block_joint(x)))
        out: Tensor = self.linear(_pooled(x))
        return out[:, 0]


def make_registration(config: RegistrationConfig, seed: int, channels: int = 3) -> nn.ModuleDict:
    """``rigid``, ``cross`` and ``intra``, which move nothing yet."""
    pair = 2 * (channels + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rigid = RigidEncoder(pair + 2, config.rigid)
        cross, intra = (PlainUNet(inputs, 2, config.fields, slope=0.0) for inputs in (pair, pair + 2))
    for layer in (rigid.linear, cross.final_conv, intra.final_conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.ModuleDict({"rigid": rigid, "cross": cross, "intra": intra})


def make_judge(config: RegistrationConfig, seed: int, channels: int = 3) -> PairJudge:
    """The judge of pairs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PairJudge(2 * channels, config.judge)
