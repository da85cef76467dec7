"""What a network is made of, as a recipe says it; ``networks.build_network`` makes it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wsi_pipeline.errors import ConfigError

__all__ = ["DENOISERS", "Family", "NetworkConfig"]

Family: TypeAlias = Literal["unet2d", "unet3d", "unet", "pix2pix", "resnet"]

DENOISERS: tuple[Family, ...] = ("unet2d", "unet3d")
"""Networks of (x, step, label); the others are networks of x alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """``family``: ``unet2d`` (diffusers' UNet2DModel) and ``unet3d`` are denoisers; ``unet`` (Honkamaa et
    al.), ``pix2pix`` (U-Net-256, Isola et al.) and ``resnet`` (nine blocks, Johnson et al.) translate at
    once.

    ``base``: channels of the first level; ``mult``: multiples of it, one for each level from fine to coarse
    (``pix2pix``: 8 levels make U-Net-256, 9 U-Net-512); ``blocks``: residual blocks a level (``resnet``: in
    all); ``attention``: levels with attention, 0 the finest; ``head_width``: channels of a head; ``heads``:
    their number in place of it (0: by width); ``groups``: of the group norms; ``scale_shift``: the step
    scales and shifts (ADM) or is added; ``additive_skips``: (h + skip) / 2 in place of concatenation
    (``unet3d``: WDM); ``halve_depth``: levels halve z too (``unet3d``; false for stacks of few sections);
    ``norm``: of ``pix2pix`` and ``resnet``; ``dropout``: probability; ``tanh``: bound the output of
    ``pix2pix`` and ``resnet`` to [-1, 1].
    """

    family: Family = "unet2d"
    base: int = 64
    mult: tuple[int, ...] = (1, 2, 2, 4, 4)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    head_width: int = 64
    heads: int = 0
    groups: int = 32
    scale_shift: bool = False
    additive_skips: bool = False
    halve_depth: bool = True
    norm: Literal["batch", "instance", "group", "none"] = "group"
    dropout: float = 0.0
    tanh: bool = True

    def __post_init__(self) -> None:
        numbers = (self.base, self.blocks, self.head_width, self.groups, *self.mult)
        too_large = max(numbers, default=1) > 2**14 or self.blocks * len(self.mult) > 256
        if not self.mult or min(numbers) < 1 or too_large or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                "network: base, mult, blocks, head_width and groups are 1 or more (and no millions), dropout "
                "in [0, 1)"
            )
        if any(not 0 <= level < len(self.mult) for level in self.attention):
            raise ConfigError(
                f"network.attention: {list(self.attention)} names levels 0 to {len(self.mult) - 1}"
            )
        widths = [self.base * multiple for multiple in self.mult]
        if self.is_denoiser and (fitting := math.gcd(self.groups, *widths)) != self.groups:
            raise ConfigError(
                f"network.groups: {self.groups} do not divide channels {widths}; give {fitting}"
            )
        heads = [widths[level] for level in self.attention if not self.heads]
        if self.family == "unet2d" and (fitting := math.gcd(self.head_width, *heads)) != self.head_width:
            raise ConfigError(
                f"network.head_width: {self.head_width} does not divide {heads}; give {fitting}"
            )

    @property
    def is_denoiser(self) -> bool:
        """Whether it is called with a step and a label."""
        return self.family in DENOISERS

    @property
    def multiple(self) -> int:
        """Sides of what it gets have to be multiples of this."""
        halvings = len(self.mult) if self.family == "pix2pix" else len(self.mult) - 1
        return 4 if self.family == "resnet" else int(2**halvings)
