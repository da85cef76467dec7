"""Where a point of one slide lies on another: an affine map and, on top of it, a field of displacements.

Points are (y, x) in µm from a slide's corner; the centre of pixel i is (i + 0.5) * mpp. A transform maps a
point of the *fixed* slide, on whose lattice tiles are drawn, to the point of the *moving* slide where the
pixel is read: pull-back, so nothing is ever inverted. Field node (i, j) stands at (i + 0.5, j + 0.5) *
``field_um_per_px`` on the fixed slide; between nodes the field is bilinear, beyond them it keeps its edge.

Why no resampled slide is kept: a copy would be resampled twice, cost gigabytes, and hide the error of the
registration from whoever reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.stain import F64
from wsi_pipeline.errors import ConfigError

__all__ = ["SlideTransform", "fit_affine", "plausible", "pull_back"]

_STEPS = 32
"""Positions are rounded to this part of a pixel: the grid on which OpenCV interpolates."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlideTransform:
    """``affine_23``: float64 [2, 3], ``to = A[:, :2] @ (y, x) + A[:, 2]``; ``field_2HW``: float32 [2, H, W],
    displacement (dy, dx) in µm that is added after the affine map, None = none.

    Raises ConfigError for numbers that are no such map (shape, not finite, not invertible).
    """

    affine_23: F64
    field_2HW: npt.NDArray[np.float32] | None = None
    field_um_per_px: float = 16.0

    def __post_init__(self) -> None:
        affine, field = self.affine_23, self.field_2HW
        if affine.shape != (2, 3) or not np.isfinite(affine).all():
            raise ConfigError("affine: is no 2 x 3 matrix of finite numbers; register the slides again")
        if abs(np.linalg.det(affine[:, :2])) < 1e-3:
            raise ConfigError("affine: flattens the slide to a line; register the slides again")
        if field is not None and (field.ndim != 3 or field.shape[0] != 2 or not np.isfinite(field).all()):
            raise ConfigError("field: is no [2, y, x] array of finite µm; register the slides again")
        if not 0 < self.field_um_per_px < np.inf:
            raise ConfigError(f"field_um_per_px: {self.field_um_per_px} is no distance; give it in µm")

    def at(self, y_um: F64, x_um: F64) -> F64:
        """Points on the moving slide, float64 [2, ...], of points on the fixed one (arrays that broadcast).

        Elementwise: a point's result does not depend on what else is in the array.
        """
        a = self.affine_23
        to_2 = np.stack([a[row, 0] * y_um + a[row, 1] * x_um + a[row, 2] for row in (0, 1)])
        if self.field_2HW is not None:
            size = self.field_2HW.shape[1:]
            (top, low, v), (left, right, u) = (
                _between(um / self.field_um_per_px - 0.5, side)
                for um, side in zip((y_um, x_um), size, strict=True)
            )
            for to, plane in zip(to_2, self.field_2HW, strict=True):
                to += (plane[top, left] * (1 - u) + plane[top, right] * u) * (1 - v)
                to += (plane[low, left] * (1 - u) + plane[low, right] * u) * v
        return np.asarray(to_2, np.float64)

    def points(self, points_N2: F64) -> F64:
        """Points [N, 2] (y, x) in µm on the moving slide."""
        return self.at(points_N2[:, 0], points_N2[:, 1]).T

    def grid(self, region: Region, mpp: Mpp) -> F64:
        """Where the pixel centres of a region of the fixed slide's lattice lie, float64 [2, H, W] in µm."""
        y = np.arange(region.y, region.bottom, dtype=np.float64)[:, None]
        x = np.arange(region.x, region.right, dtype=np.float64)[None, :]
        return self.at((y + 0.5) * mpp[0], (x + 0.5) * mpp[1])


def plausible(affine_23: F64) -> bool:
    """Whether sections of one block may lie like this: no mirror, 0.8 to 1.25 each way, within 10 m."""
    large, small = np.linalg.svd(affine_23[:, :2], compute_uv=False)
    straight = large < 1.25 and small > 0.8 and np.linalg.det(affine_23[:, :2]) > 0
    return bool(straight and np.abs(affine_23[:, 2]).max() < 1e7)


def _between(node: F64, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], F64]:
    """The two nodes that a position lies between, clamped to the edge, and the weight of the second."""
    node = np.clip(node, 0, side - 1)
    first = node.astype(np.int64)
    return first, np.minimum(first + 1, side - 1), node - first


def fit_affine(from_N2: F64, to_N2: F64) -> F64:
    """Affine map [2, 3] of least squares between points (y, x); at least three, not on a line."""
    ones_N3 = np.column_stack([from_N2, np.ones(len(from_N2))])
    return np.asarray(np.linalg.lstsq(ones_N3, to_N2, rcond=None)[0].T, np.float64)


def pull_back(
    pixels: npt.NDArray[Any], at_2HW: F64, mpp: Mpp, *, origin: tuple[int, int] = (0, 0), fill: float = 0.0
) -> npt.NDArray[Any]:
    """An image ([h, w] or [h, w, C], uint8 or float32, ``mpp`` µm a pixel) at ``at_2HW`` µm; one resampling.

    ``origin``: (y, x) of the image's first pixel in the level that it is part of; ``fill``: what is outside.
    Positions are rounded to 1/32 px of the level, then counted from ``origin``, which is exact: so the same
    pixels come out of whichever part of the level was read.
    """
    y_HW, x_HW = (
        (np.rint((at_2HW[axis] / mpp[axis] - 0.5) * _STEPS) / _STEPS - origin[axis]).astype(np.float32)
        for axis in (0, 1)
    )
    outside = (fill,) * 4
    return np.asarray(cv2.remap(pixels, x_HW, y_HW, cv2.INTER_CUBIC, None, cv2.BORDER_CONSTANT, outside))
