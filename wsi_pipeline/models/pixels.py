"""Between pixels and networks: uint8 [B, H, W, 3] and float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

__all__ = ["Rounding", "from_uint8", "to_uint8"]

Rounding: TypeAlias = Literal["round", "truncate"]


def from_uint8(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [-1, 1], contiguous: (v / 255 - 0.5) / 0.5."""
    return (pixels_BHWC.permute(0, 3, 1, 2).contiguous().float() / 255.0 - 0.5) / 0.5


def to_uint8(y: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, H, W, 3] uint8; ``truncate`` as the published code, half a level
    darker."""
    levels = (y * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0
    return (levels.round() if rounding == "round" else levels).to(torch.uint8).permute(0, 2, 3, 1)
