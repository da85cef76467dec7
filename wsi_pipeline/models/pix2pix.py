"""Networks of pix2pix (Isola et al., CVPR 2017): U-Net and ResNet generators, PatchGAN discriminator.

Sources: Isola et al. (U-Net, PatchGAN of 70 x 70 pixels), Johnson et al., ECCV 2016 (ResNet). Names of
parameters are those of the published program, so that its ``latest_net_G.pth`` and ``latest_net_D.pth`` fit:

    U-Net level  LeakyReLU, 4x4 convolution to half the side, norm, (next level), ReLU, 4x4 transposed
                 convolution back, norm, dropout; its input is concatenated to what it makes
    ResNet       7x7, two 3x3 of stride 2, blocks of two 3x3, two 3x3 transposed, 7x7; reflected borders

Why ``group`` is the norm of our own training: batch and instance norms take their statistics from a tile, so
that neighbouring tiles of a slide get different colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.network_config import NetworkConfig

__all__ = ["Norm", "PatchGAN", "ResNetTranslator", "UNetTranslator"]

Norm: TypeAlias = Literal["batch", "instance", "group", "none"]

_SLOPE = 0.2
_DROPOUT_FROM = 4  # level of the first dropout: the published ones lie just outside the innermost level


def _norm(config: NetworkConfig, channels: int) -> nn.Module:
    match config.norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "instance":
            return nn.InstanceNorm2d(channels)
        case "group":
            return nn.GroupNorm(math.gcd(config.groups, channels), channels)
        case "none":
            return nn.Identity()


def _biased(kind: Norm) -> bool:
    """Whether convolutions before a norm have a bias: where the norm has none."""
    return kind in ("instance", "none")


def _begin(module: nn.Module) -> None:
    """Published initial values: N(0, 0.02) for convolutions, N(1, 0.02) for scales, 0 for biases."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, nn.Parameter):
        nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 1.0, 0.02)
    if isinstance(bias, nn.Parameter):
        nn.init.zeros_(bias)


class _Model(nn.Module):
    """Layers under the published name ``model``; ``widen``: the input is concatenated to what they make."""

    def __init__(self, layers: Iterable[nn.Module], widen: bool = False) -> None:
        super().__init__()
        self.model, self._widen = nn.Sequential(*layers), widen

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.model(x)
        return torch.cat([x, made], dim=1) if self._widen else made


class UNetTranslator(_Model):
    """[B, in, H, W] -> [B, out, H, W]; sides are multiples of ``config.multiple``.

    ``config.mult``: published (1, 2, 4, 8, 8, 8, 8, 8), one 8 less for 128 pixels, one more for 512.
    ``config.dropout``: in the levels just outside the innermost. Raises ConfigError for a single level.
    """

    def __init__(self, config: NetworkConfig, in_channels: int, out_channels: int) -> None:
        if len(config.mult) < 2:
            raise ConfigError("network.mult: pix2pix needs two levels or more")
        widths = [times * config.base for times in config.mult]
        last, below = len(widths) - 1, list[nn.Module]()
        for place in range(last, 0, -1):
            outer, inner, bias = widths[place - 1], widths[place], _biased(config.norm)
            down = [nn.LeakyReLU(_SLOPE), nn.Conv2d(outer, inner, 4, 2, 1, bias=bias)]
            if place < last:
                down.append(_norm(config, inner))
            taken = 2 * inner if below else inner
            up = [nn.ReLU(), nn.ConvTranspose2d(taken, outer, 4, 2, 1, bias=bias), _norm(config, outer)]
            if config.dropout and _DROPOUT_FROM <= place < last:
                up.append(nn.Dropout(config.dropout))
            below = [_Model([*down, *below, *up], widen=True)]
        first = nn.Conv2d(in_channels, widths[0], 4, 2, 1, bias=_biased(config.norm))
        final = nn.ConvTranspose2d(2 * widths[0], out_channels, 4, 2, 1)
        bound = [nn.Tanh()] if config.tanh else []
        super().__init__([_Model([first, *below, nn.ReLU(), final, *bound])])
        self.model = self.model[0]  # one level of names less
        self.apply(_begin)


class _ResidualBlock(nn.Module):
    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for between in ([nn.ReLU(), *([nn.Dropout(config.dropout)] if config.dropout else [])], []):
            convolution = nn.Conv2d(channels, channels, 3, bias=_biased(config.norm))
            layers += [nn.ReflectionPad2d(1), convolution, _norm(config, channels), *between]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv_block(x)
        return x + made


class ResNetTranslator(_Model):
    """[B, in, H, W] -> [B, out, H, W]; sides are multiples of 4. ``config.blocks``: 9 as published."""

    def __init__(self, config: NetworkConfig, in_channels: int, out_channels: int) -> None:
        base, bias = config.base, _biased(config.norm)
        first = nn.Conv2d(in_channels, base, 7, bias=bias)
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), first, _norm(config, base), nn.ReLU()]
        for width in (base, 2 * base):
            down = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=bias)
            layers += [down, _norm(config, 2 * width), nn.ReLU()]
        layers += [_ResidualBlock(config, 4 * base) for _ in range(config.blocks)]
        for width in (2 * base, base):
            up = nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1, bias=bias)
            layers += [up, _norm(config, width), nn.ReLU()]
        bound = [nn.Tanh()] if config.tanh else []
        super().__init__([*layers, nn.ReflectionPad2d(3), nn.Conv2d(base, out_channels, 7), *bound])
        self.apply(_begin)


class PatchGAN(_Model):
    """Source and image side by side, [B, in, H, W] -> logits of patches, [B, 1, H/8 - 2, W/8 - 2].

    ``layers``: of stride 2; with three each logit sees 70 x 70 pixels.
    """

    def __init__(
        self, in_channels: int = 6, *, base: int = 64, layers: int = 3, norm: Norm = "batch", groups: int = 32
    ) -> None:
        config = NetworkConfig(family="pix2pix", norm=norm, groups=groups)
        widths = [base * min(2**place, 8) for place in range(layers + 1)]
        made: list[nn.Module] = [nn.Conv2d(in_channels, base, 4, 2, 1), nn.LeakyReLU(_SLOPE)]
        for place in range(1, layers + 1):
            stride, bias = 2 if place < layers else 1, _biased(norm)
            made.append(nn.Conv2d(widths[place - 1], widths[place], 4, stride, 1, bias=bias))
            made += [_norm(config, widths[place]), nn.LeakyReLU(_SLOPE)]
        super().__init__([*made, nn.Conv2d(widths[-1], 1, 4, 1, 1)])
        self.apply(_begin)
