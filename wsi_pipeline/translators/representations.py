"""What a path works on: pixels, or Haar coefficients of half (quarter, ...) the size.

Channels of coefficients: band-major, then colour, so channel = band * colours + colour. One level over axes
(y, x) has the bands LL, LH, HL, HH, over (z, y, x) LLL, LLH, ..., HHH: the letters follow the axes, L is
(even + odd) / sqrt(2), H is (even - odd) / sqrt(2). At more levels the lowest band is split again, and the
details of finer levels are dealt out to their 2 x 2 (x 2) phases (band, then phase), so that all bands share
one grid and no coefficient is lost.

Why noise has a method of its own: bands are divided by constants (the lowest is the largest), but standard
normals have to stay standard normals; without divisors the transform is orthonormal and keeps them so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators.settings import RepresentationConfig

__all__ = ["Representation", "make_representation"]

DIMENSION = {"z": -3, "y": -2, "x": -1}


def make_representation(config: RepresentationConfig) -> Representation:
    """The representation of a recipe."""
    return Representation(config)


class Representation:
    """Haar coefficients over some axes, divided by band (WDM: Friedrich et al., 2024); over none: pixels.

    Takes images [B,C,H,W] or volumes [B,C,D,H,W] of any float dtype; gradients pass. ``alignment``: sizes
    and origins of tiles are multiples of it, else ConfigError; ``bands``: channels that one colour becomes.
    """

    def __init__(self, config: RepresentationConfig) -> None:
        self.config = config
        self.axes = config.axes if config.kind == "haar" else ()
        self.alignment: int = 2**config.levels if self.axes else 1
        self.bands: int = self.alignment ** len(self.axes)
        self._dims = [DIMENSION[axis] for axis in self.axes]

    def channels(self, image_channels: int) -> int:
        """How many channels ``encode`` makes of so many."""
        return image_channels * self.bands

    def encode(self, x: Tensor) -> Tensor:
        """Pixels to coefficients."""
        if not self.axes:
            return x
        h = self.encode_noise(x)
        return h / self._divisors_of(h)

    def decode(self, h: Tensor) -> Tensor:
        """The inverse of ``encode``."""
        if not self.axes:
            return h
        if h.shape[1] % self.bands:
            raise ConfigError(f"representation: {h.shape[1]} channels are no multiple of {self.bands} bands")
        return self._synthesise((h * self._divisors_of(h)).chunk(self.bands, 1), self.config.levels)

    def encode_noise(self, z: Tensor) -> Tensor:
        """Standard normals of pixels as standard normals of this representation."""
        for axis, dim in zip(self.axes, self._dims, strict=True):
            if z.ndim + dim < 2:
                raise ConfigError(
                    f"representation.axes: images of shape {tuple(z.shape)} have no axis {axis}"
                )
            if z.shape[dim] % self.alignment:
                raise ConfigError(
                    f"representation: haar halves axis {axis} {self.config.levels} times, but its length "
                    f"{z.shape[dim]} is no multiple of {self.alignment}; change the tile, axes or levels"
                )
        return torch.cat(self._analyse(z, self.config.levels), 1) if self.axes else z

    def clamp(self, h: Tensor, low: float, high: float) -> Tensor:
        """Coefficients of the nearest pixels in low..high."""
        return self.encode(self.decode(h).clamp(low, high))

    def divisors(self, channels: int) -> Tensor:
        """What ``encode`` divides each of so many coefficient channels by, float64."""
        stds = self.config.band_std
        if stds is not None:
            if len(stds) != channels:
                raise ConfigError(f"representation.band_std: {len(stds)} values for {channels} channels")
            return torch.tensor(stds, dtype=torch.float64)
        found = torch.ones(channels, dtype=torch.float64)
        if not self.axes:
            return found
        usual = math.sqrt(2.0) ** (len(self._dims) * self.config.levels)
        found[: channels // self.bands] = self.config.ll_scale or usual
        return found

    def _divisors_of(self, h: Tensor) -> Tensor:
        return self.divisors(h.shape[1]).to(h).reshape(-1, *[1] * (h.ndim - 2))

    def _analyse(self, x: Tensor, level: int) -> list[Tensor]:
        low, *details = self._split(x, haar=True)
        if level == 1:
            return [low, *details]
        for _ in range(level - 1):
            details = [phase for band in details for phase in self._split(band, haar=False)]
        return self._analyse(low, level - 1) + details

    def _synthesise(self, bands: Sequence[Tensor], level: int) -> Tensor:
        if level == 1:
            return self._merge(bands, haar=True)
        fan = 2 ** len(self._dims)
        low = self._synthesise(bands[: fan ** (level - 1)], level - 1)
        details = list(bands[fan ** (level - 1) :])
        for _ in range(level - 1):
            groups = [details[i : i + fan] for i in range(0, len(details), fan)]
            details = [self._merge(phases, haar=False) for phases in groups]
        return self._merge([low, *details], haar=True)

    def _split(self, x: Tensor, *, haar: bool) -> list[Tensor]:
        """Halves along all axes: low and high, or even and odd; the last axis changes fastest."""
        parts = [x]
        for dim in self._dims:
            pairs = [part.unflatten(dim, (-1, 2)).unbind(dim) for part in parts]
            parts = [half for even, odd in pairs for half in (_turn(even, odd) if haar else (even, odd))]
        return parts

    def _merge(self, parts: Sequence[Tensor], *, haar: bool) -> Tensor:
        for dim in reversed(self._dims):
            pairs = zip(parts[::2], parts[1::2], strict=True)
            halves = [_turn(first, second) if haar else (first, second) for first, second in pairs]
            parts = [torch.stack(pair, dim).flatten(dim - 1, dim) for pair in halves]
        return parts[0]


def _turn(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The orthonormal 2-point transform, which is its own inverse."""
    return (first + second) * math.sqrt(0.5), (first - second) * math.sqrt(0.5)
