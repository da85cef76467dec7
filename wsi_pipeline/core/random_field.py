"""Smooth Gaussian random fields over a picture: zero mean, unit variance, lengths in micrometres.

White noise on a coarse grid is made smooth there and interpolated up, so a field costs a few operations a
pixel whatever its length. The grid is laid out in micrometres from the picture's corner: the same random
numbers give the same field at any resolution.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["F32_HW", "oriented_field", "slow_field"]

F32_HW = npt.NDArray[np.float32]

CELLS = 2.5  # grid cells a length: fewer would show the grid, more would cost time
SMOOTHING = 1.0  # cells; standard deviation of the filter on the grid of an oriented field
GAIN = np.float32(2.0 * np.sqrt(np.pi) * SMOOTHING)  # that filter divides the deviation of white noise by it
BORDER = 5  # cells beyond the picture, for the filter and the interpolation
MIN_STEP_PX = 0.5  # grains of less than a pixel cannot be seen; they end as noise from pixel to pixel


def oriented_field(
    shape: tuple[int, int],
    mpp: float,
    length_um: float,
    rng: np.random.Generator,
    *,
    stretch: float = 1.0,
    angle: float = 0.0,
) -> F32_HW:
    """Field [H, W] with grains of ``length_um``, ``stretch`` times as long along ``angle`` (radians from x).

    For grains of up to 40 px or so: ``cv2.warpAffine`` knows 32 places between two samples, which shows as
    steps in longer ones (``slow_field`` makes those).
    """
    height, width = shape
    step = max(length_um / CELLS / mpp, MIN_STEP_PX)
    along = np.array([np.cos(angle), np.sin(angle)]) / (step * stretch)
    across = np.array([-np.sin(angle), np.cos(angle)]) / step
    corners_42 = np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64)
    u_4, v_4 = corners_42 @ along, corners_42 @ across
    rows, cols = (int(np.ceil(np.ptp(w_4) - 1e-6)) + 2 * BORDER for w_4 in (v_4, u_4))
    grid = rng.standard_normal((rows, cols), dtype=np.float32)
    grid = np.asarray(cv2.GaussianBlur(grid, (0, 0), SMOOTHING)) * GAIN
    to_grid_23 = np.array([[*along, BORDER - u_4.min()], [*across, BORDER - v_4.min()]])
    to_grid_23[:, 2] += 0.5 * to_grid_23[:, :2].sum(axis=1)  # pixels are squares, their middle is at 1/2
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(grid, to_grid_23, (width, height), flags=flags), dtype=np.float32)


def slow_field(shape: tuple[int, int], mpp: float, length_um: float, rng: np.random.Generator) -> F32_HW:
    """Field [H, W] with grains of ``length_um`` without direction, long ones; a cubic spline of the grid."""
    rows_HK, cols_WK = (_spline(side, length_um / CELLS / mpp) for side in shape)
    grid = rng.standard_normal((rows_HK.shape[1], cols_WK.shape[1]), dtype=np.float32)
    return np.asarray(rows_HK @ grid @ cols_WK.T, dtype=np.float32)


def _spline(side: int, step: float) -> npt.NDArray[np.float32]:
    """Weights [side, K] of the uniform cubic B-spline's coefficients, scaled to unit sum of squares."""
    place = (np.arange(side) + 0.5) / step
    cell = np.floor(place).astype(np.int64)
    t = place - cell
    weights = np.stack([(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * (t + t**2 - t**3), t**3], axis=1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    matrix = np.zeros((side, int(np.ceil(side / step - 1e-6)) + 3), dtype=np.float32)
    matrix[np.arange(side)[:, None], cell[:, None] + np.arange(4)] = weights
    return matrix
