"""The U-Net for volumes of WDM and cWDM (Friedrich et al., 2024): guided-diffusion's, in three dimensions.

Residual blocks (norm, SiLU, convolution, twice) get the step through a linear layer; a block of the same kind
halves or doubles the sides, with a mean over 2 x 2 x 2 and nearest neighbours. No attention. Skips are
concatenated (cWDM), or averaged with what comes from below, (h + skip) / 2 (WDM): then each block of the
decoder makes as many channels as the next skip has.

Why a module of its own: diffusers has no general U-Net in three dimensions. Names of parameters are the
published ones, so that plain state dicts of both programs fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.network_config import NetworkConfig

__all__ = ["UNet3D", "step_embedding"]

_EPSILON = 1e-5
_LONGEST = 10_000.0


def step_embedding(t: Tensor, width: int) -> Tensor:
    """[B] -> [B, width] float32: cosines, then sines, of t f_k with f_k = 10000^(-2k / width)."""
    places = torch.arange(width // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(_LONGEST) * places / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Block(nn.Module):
    """A residual block [B, channels, D, H, W] -> [B, out, ...]; ``factors``: of its sides, if they change."""

    def __init__(
        self,
        config: NetworkConfig,
        channels: int,
        out: int,
        factors: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        self.factors, self.scale_shift = factors, config.scale_shift
        self.in_layers = _output(config, channels, out)
        wanted = 2 * out if config.scale_shift else out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.base, wanted))
        self.out_layers = _output(config, out, out, zero=True)
        self.out_layers.insert(2, nn.Dropout(config.dropout))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv3d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers[:-1](x)
        h, x = self._resampled(h), self._resampled(x)
        h = self.in_layers[-1](h)
        step = self.emb_layers(embedding)[:, :, None, None, None]
        if self.scale_shift:
            scale, shift = step.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + step)
        skipped: Tensor = self.skip_connection(x)
        return skipped + h

    def _resampled(self, x: Tensor) -> Tensor:
        if self.factors is None:
            return x
        if self.factors[-1] > 1:
            return F.interpolate(x, scale_factor=self.factors, mode="nearest")
        return F.avg_pool3d(x, [round(1 / factor) for factor in self.factors])


def _output(config: NetworkConfig, channels: int, out: int, zero: bool = False) -> nn.Sequential:
    """Norm, SiLU, convolution; ``zero``: it begins with an output of zeros, as published."""
    convolution = nn.Conv3d(channels, out, 3, padding=1)
    if zero:
        for parameter in convolution.parameters():
            nn.init.zeros_(parameter)
    return nn.Sequential(nn.GroupNorm(config.groups, channels, _EPSILON), nn.SiLU(), convolution)


class UNet3D(nn.Module):
    """[B, in, D, H, W], step [B] float32, label [B] int64 or None -> [B, out, D, H, W].

    ``classes`` > 0: one more embedding, the last, stands for "no label". Sides have to be multiples of
    ``config.multiple``, D only where ``config.halve_depth`` is set. Raises ConfigError for attention.
    """

    def __init__(self, config: NetworkConfig, in_channels: int, out_channels: int, classes: int = 0) -> None:
        super().__init__()
        if config.attention:
            raise ConfigError("network.attention: unet3d has none; leave it empty")
        self.config, self.classes = config, classes
        base, blocks = config.base, config.blocks
        down, up = ((side if config.halve_depth else 1.0, side, side) for side in (0.5, 2.0))
        self.time_embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        if classes:
            self.label_emb = nn.Embedding(classes + 1, 4 * base)
        width, skips = base, [base]
        stages = [nn.ModuleList([nn.Conv3d(in_channels, base, 3, padding=1)])]
        for level, times in enumerate(config.mult):
            if level:
                stages.append(nn.ModuleList([_Block(config, width, width, down)]))
                skips.append(width)
            for _ in range(blocks):
                stages.append(nn.ModuleList([_Block(config, width, times * base)]))
                width = times * base
                skips.append(width)
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = nn.ModuleList([_Block(config, width, width) for _ in range(2)])
        self.output_blocks = nn.ModuleList()
        for level, times in reversed(list(enumerate(config.mult))):
            for place in range(blocks + 1):
                skip, taken = skips.pop(), width
                if config.additive_skips:
                    width = skips[-1] if skips else base
                else:
                    taken, width = width + skip, times * base
                stage = nn.ModuleList([_Block(config, taken, width)])
                if level and place == blocks:
                    stage.append(_Block(config, width, width, up))
                self.output_blocks.append(stage)
        self.out = _output(config, width, out_channels, zero=True)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        embedding = self.time_embed(step_embedding(t, self.config.base))
        if self.classes:
            nothing = torch.full(t.shape, self.classes, device=t.device)
            embedding = embedding + self.label_emb(nothing if label is None else label)
        h = self.input_blocks[0][0](x)
        skips = [h]
        for (block,) in self.input_blocks[1:]:
            h = block(h, embedding)
            skips.append(h)
        for block in self.middle_block:
            h = block(h, embedding)
        for stage in self.output_blocks:
            skip = skips.pop()
            h = (h + skip) / 2 if self.config.additive_skips else torch.cat([h, skip], dim=1)
            for block in stage:
                h = block(h, embedding)
        made: Tensor = self.out(h)
        return made
