"""The U-Net of deformation-equivariant training: translator and registration (Honkamaa et al., MedIA 2023).

    level       two 3 x 3 convolutions, each with a group norm (not on the finest level) and LeakyReLU
    down, up    2 x 2 convolution with stride 2; 2 x 2 transposed convolution, then the skip is appended
    out         1 x 1 convolution, linear

Names of parameters are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PlainUNet"]


class _DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int | None, slope: float, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv1 = conv(inputs, outputs, 3, padding=1)
        self.conv2 = conv(outputs, outputs, 3, padding=1)
        self.group_norm_1, self.group_norm_2 = (
            nn.Identity() if groups is None else nn.GroupNorm(groups, outputs) for _ in range(2)
        )
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.group_norm_1(self.conv1(x)), self.slope)
        return F.leaky_relu(self.group_norm_2(self.conv2(x)), self.slope)


class _Step(nn.Module):
    """One level down, or up to a skip."""

    def __init__(self, name: str, scale: nn.Module, double_conv: _DoubleConv) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, scale)
        self.double_conv = double_conv

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        return self.double_conv(torch.cat([self.get_submodule(self.name)(x), *skip], dim=1))


class PlainUNet(nn.Module):
    """``widths``: channels from the finest level to the coarsest; ``groups``: of the norms (None: no norms);
    ``slope``: of LeakyReLU (0: ReLU); ``dims``: 2 or 3.

    Sides have to be multiples of 2 ** (levels - 1). Widths 64, 128, 256, 512, 1024: 46,016,899 parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        groups: int | None = None,
        *,
        slope: float = 0.01,
        dims: int = 2,
    ) -> None:
        super().__init__()
        conv, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        self.initial_conv = _DoubleConv(in_channels, widths[0], None, slope, dims)
        self.downsampling_blocks = nn.ModuleList(
            _Step("downsampling", conv(fine, coarse, 2, 2), _DoubleConv(coarse, coarse, groups, slope, dims))
            for fine, coarse in pairwise(widths)
        )
        self.upsampling_blocks = nn.ModuleList(
            _Step(
                "upsampling",
                up(coarse, coarse, 2, 2),
                _DoubleConv(coarse + fine, fine, groups if level else None, slope, dims),
            )
            for level, (fine, coarse) in reversed(list(enumerate(pairwise(widths))))
        )
        self.final_conv = conv(widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, *S] -> [B, out, *S]."""
        x = self.initial_conv(x)
        skips = [x]
        for step in self.downsampling_blocks:
            x = step(x)
            skips.append(x)
        for step, skip in zip(self.upsampling_blocks, skips[-2::-1], strict=True):
            x = step(x, skip)
        out: Tensor = self.final_conv(x)
        return out
