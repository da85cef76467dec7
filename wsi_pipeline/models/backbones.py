"""Frozen networks whose features a discriminator judges: two maps and a vector from three depths.

The vector is the class token of the deepest tap, or its first patch (``first_patch``), which is what
Diffusion-FFPE's published program reads in its place. Towers, their taps and their files: ``vit_towers``.

Nothing is ever downloaded: weights are a file of the user's, read without running anything in it. ``tiny``
needs none: convolutions with fixed random filters, for tests and for training on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.vit_towers import (
    CLIP_MEAN,
    CLIP_STD,
    Features,
    Level2,
    Tower,
    conch_tower,
    open_clip_tower,
    timm_tower,
)

__all__ = ["Backbone", "BackboneConfig", "build_backbone", "make_backbone"]

Kind: TypeAlias = Literal["conch", "timm", "open_clip", "tiny"]
DType: TypeAlias = Literal["float32", "bfloat16"]

SIDE = 224
TINY_SIDE = 64
_TINY_WIDTH = 32
_TINY_SEED = 2024


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig:
    """Which frozen network a discriminator sees through.

    ``weights``: the user's file (all kinds but ``tiny``); ``model``: name in timm or open_clip; ``level2``:
    where the vector comes from; ``input``: side in px that images are brought to, None for 224 (``tiny``:
    64); ``dtype``: of its weights, features are float32 all the same.
    """

    kind: Kind = "conch"
    weights: str | None = None
    model: str | None = None
    level2: Level2 = "cls"
    input: int | None = None
    dtype: DType = "float32"


class Backbone(nn.Module):
    """A frozen network: images in, features of three depths out; gradients reach the images alone.

    ``network``: normalised images [B, 3, side, side] -> the three levels; ``widths``: their channels.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        widths: tuple[int, int, int],
        side: int,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.side = side
        self.dtype = dtype
        self.network = network.to(dtype)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Features:
        """Images [B, 3, H, W] in [-1, 1] -> maps [B, C, h, w] of two depths and a vector [B, C], float32."""
        map0, map1, vector = self.network(self.prepare(x).to(self.dtype))
        return map0.float(), map1.float(), vector.float()

    def prepare(self, x: Tensor) -> Tensor:
        """What the network sees: averaged down to a square of ``side``, normalised, not clamped; float32."""
        x = F.interpolate(x.float() * 0.5 + 0.5, size=(self.side, self.side), mode="area")
        return (x - self.mean) / self.std

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode."""
        super().train(False)
        return self


def build_backbone(config: BackboneConfig) -> Backbone:
    """The backbone that a configuration names; errors as of ``make_backbone``."""
    return make_backbone(
        config.kind,
        weights=None if config.weights is None else Path(config.weights),
        model=config.model,
        level2=config.level2,
        input=config.input,
        dtype=config.dtype,
    )


def make_backbone(
    kind: Kind,
    *,
    weights: Path | None = None,
    model: str | None = None,
    level2: Level2 = "cls",
    input: int | None = None,
    dtype: DType = "float32",
) -> Backbone:
    """A frozen backbone on the CPU; parameters are the fields of ``BackboneConfig``.

    Raises ConfigError for a kind, model or option that there is not, CheckpointError for weights that are
    missing, damaged or of another network.
    """
    for name, value, known in (
        ("kind", kind, tuple(_TOWERS)),
        ("level2", level2, ("cls", "first_patch")),
        ("dtype", dtype, ("float32", "bfloat16")),
    ):
        if value not in known:
            raise ConfigError(f"backbone.{name}: there is no {value!r}; choose from {', '.join(known)}")
    if input is not None and input < TINY_SIDE:
        raise ConfigError(f"backbone.input: {input} px is too small; choose {SIDE}, or {TINY_SIDE} for tiny")
    if (kind in ("timm", "open_clip")) != (model is not None):
        raise ConfigError(f"backbone.model: kind {kind} {'takes no' if model else 'needs a'} model name")
    if kind == "tiny" and weights is not None:
        raise ConfigError("objective.adversarial.backbone.weights: kind tiny takes no weights; leave it out")
    side = input or (TINY_SIDE if kind == "tiny" else SIDE)
    tower = _TOWERS[kind](weights, model or "", side, level2)
    widths = (tower.width,) * 3
    return Backbone(
        tower.network, widths=widths, side=side, mean=tower.mean, std=tower.std, dtype=getattr(torch, dtype)
    )


class _TinyNetwork(nn.Module):
    """Four convolutions with fixed random filters: a map after the third (side / 8) and after the fourth.

    The same on every machine and whatever the state of torch's generator, which it does not move.
    """

    _STAGES = (
        (3, 16, 5, 2),
        (16, _TINY_WIDTH, 3, 2),
        (_TINY_WIDTH, _TINY_WIDTH, 3, 2),
        (_TINY_WIDTH,) * 2 + (3, 1),
    )
    _SLOPE = 0.2

    def __init__(self, level2: Level2) -> None:
        super().__init__()
        rng = np.random.default_rng(_TINY_SEED)
        self.level2 = level2
        self.filters = nn.ParameterList()
        for inputs, outputs, size, _ in self._STAGES:
            # Of the variance that keeps the activations' size.
            limit = (6.0 / (1.0 + self._SLOPE**2) / (inputs * size**2)) ** 0.5
            kernel = rng.uniform(-limit, limit, (outputs, inputs, size, size))
            self.filters.append(torch.from_numpy(kernel.astype(np.float32)))

    def forward(self, x: Tensor) -> Features:
        maps = []
        for kernel, (_, _, size, stride) in zip(self.filters, self._STAGES, strict=True):
            x = F.leaky_relu(F.conv2d(x, kernel, stride=stride, padding=size // 2), self._SLOPE)
            maps.append(x)
        vector = x.mean(dim=(2, 3)) if self.level2 == "cls" else x[:, :, 0, 0]
        return maps[2], maps[3], vector


def _tiny_tower(weights: Path | None, model: str, side: int, level2: Level2) -> Tower:
    return Tower(_TinyNetwork(level2), _TINY_WIDTH)


_TOWERS: dict[str, Callable[[Path | None, str, int, Level2], Tower]] = {
    "conch": conch_tower,
    "timm": timm_tower,
    "open_clip": open_clip_tower,
    "tiny": _tiny_tower,
}
