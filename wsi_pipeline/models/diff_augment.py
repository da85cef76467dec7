"""DiffAugment: what a discriminator sees is augmented, real or made, so that few images last for longer.

Source: Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020; the ranges
are those of Diffusion-FFPE. With r uniform in [0, 1), m_c the mean of a pixel's channels, m that of an image:

    color        x + (r - 1/2);   (x - m_c) 2r + m_c;   (x - m)(r + 1/2) + m
    translation  out[i, j] = x[i + rows, j + cols], 0 outside;   |rows| <= int(height / 8 + 1/2), cols alike
    cutout       0 in a window of half the image's height and width, limited to the image

Why draws are values and not made inside: a sample's draws come from its own generator, so they do not depend
on the batch, the rank or the device, and a resumed run repeats them. All seven are always drawn: which parts
of the policy are applied does not move the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wsi_pipeline.errors import ConfigError

__all__ = ["POLICY", "Draws", "augment", "check_policy", "draw"]

POLICY = ("color", "translation", "cutout")
"""The published policy, in its order."""


class Draws(NamedTuple):
    """Raw draws of a batch, each [B]: three uniform in [0, 1) (float32), four of pixels (int64).

    Cut-out windows begin at the draw minus half the window's side, rounded down.
    """

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    translation_rows: Tensor
    translation_cols: Tensor
    cutout_rows: Tensor
    cutout_cols: Tensor


def draw(rngs: Sequence[np.random.Generator], height: int, width: int) -> Draws:
    """Draws for images of a size, sample b's from ``rngs[b]`` alone; on the CPU."""
    samples = [_draw_one(rng, height, width) for rng in rngs]
    uniform = np.array([first for first, _ in samples], dtype=np.float32).reshape(-1, 3)
    pixels = np.array([second for _, second in samples], dtype=np.int64).reshape(-1, 4)
    return Draws(*torch.from_numpy(uniform).unbind(1), *torch.from_numpy(pixels).unbind(1))


def _draw_one(rng: np.random.Generator, height: int, width: int) -> tuple[list[float], list[int]]:
    uniform = rng.random(3).tolist()
    shifts = [int(rng.integers(-_reach(side), _reach(side) + 1)) for side in (height, width)]
    # One place more for an even window, whose middle lies between two pixels.
    middles = [int(rng.integers(0, side + 1 - _window(side) % 2)) for side in (height, width)]
    return uniform, shifts + middles


def augment(x: Tensor, draws: Draws, policy: Sequence[str] = POLICY) -> Tensor:
    """Augmented images of the same shape [B, 3, H, W]; differentiable, not clamped to [-1, 1] again."""
    check_policy(policy)
    for part in policy:
        x = _PARTS[part](x, draws)
    return x


def check_policy(policy: Sequence[str]) -> None:
    """Raise ConfigError for a part that there is not."""
    if unknown := [part for part in policy if part not in _PARTS]:
        raise ConfigError(f"augment: there is no {', '.join(unknown)}; choose from {', '.join(_PARTS)}")


def _color(x: Tensor, draws: Draws) -> Tensor:
    brightness, saturation, contrast = (r.to(x)[:, None, None, None] for r in draws[:3])
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2.0 * saturation) + grey
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - level) * (contrast + 0.5) + level


def _translation(x: Tensor, draws: Draws) -> Tensor:
    shifts = zip(draws.translation_rows.tolist(), draws.translation_cols.tolist(), strict=True)
    # A negative pad crops, so that a pair of opposite pads is a shift.
    moved = [F.pad(image, (-c, c, -r, r)) for image, (r, c) in zip(x, shifts, strict=True)]
    return torch.stack(moved)


def _cutout(x: Tensor, draws: Draws) -> Tensor:
    rows = _inside(draws.cutout_rows.to(x.device), x.shape[-2])
    cols = _inside(draws.cutout_cols.to(x.device), x.shape[-1])
    return x.masked_fill((rows[:, :, None] & cols[:, None, :])[:, None], 0.0)


def _inside(middle: Tensor, side: int) -> Tensor:
    """Which pixels of an axis a window covers: bool [B, side]."""
    size = _window(side)
    begin = (middle - size // 2)[:, None]
    place = torch.arange(side, device=middle.device)[None]
    return (place >= begin) & (place < begin + size)


def _reach(side: int) -> int:
    return int(side * 0.125 + 0.5)


def _window(side: int) -> int:
    return int(side * 0.5 + 0.5)


_PARTS: Mapping[str, Callable[[Tensor, Draws], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
