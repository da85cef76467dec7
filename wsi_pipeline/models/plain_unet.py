"""The U-Net of deformation-equivariant training: translator and registration (Honkamaa et al., MedIA 2023).

    level       two 3 x 3 convolutions, each with a group norm (not on the finest level) and LeakyReLU
    down, up    2 x 2 convolution with stride 2; 2 x 2 transposed convolution, then the skip is appended
    out         1 x 1 convolution, linear

Names of parameters are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
        double = partial(_DoubleConv, slope=slope, dims=dims)
        self.initial_conv = double(in_channels, widths[0], None)
        self.downsampling_blocks, self.upsampling_blocks = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in pairwise(widths):
            down = {"downsampling": conv(fine, coarse, 2, 2), "double_conv": double(coarse, coarse, groups)}
            self.downsampling_blocks.append(nn.ModuleDict(down))
            norms = groups if len(self.upsampling_blocks) else None
            rise = {"upsampling": up(coarse, coarse, 2, 2), "double_conv": double(coarse + fine, fine, norms)}
            self.upsampling_blocks.insert(0, nn.ModuleDict(rise))
        self.final_conv = conv(widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, *S] -> [B, out, *S]."""
        x = self.initial_conv(x)
        skips = [x]
        for step in self.downsampling_blocks:
            x = step["double_conv"](step["downsampling"](x))
            skips.append(x)
        for step, skip in zip(self.upsampling_blocks, skips[-2::-1], strict=True):
            x = step["double_conv"](torch.cat([step["upsampling"](x), skip], dim=1))
        out: Tensor = self.final_conv(x)
        return out
