"""How far parts of an image moved: phase correlation of windows, to fractions of a pixel.

The cross-power spectrum keeps phases only, so that neither contrast nor blur (which is symmetric) counts as
movement. Its high frequencies are noise and compression: they are taken down by a Gaussian, which also makes
the peak of a perfect match a Gaussian, whose position between pixels is known exactly.

Source: C. Kuglin and D. Hines, "The phase correlation image alignment method", 1975.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import fft

__all__ = ["MIN_PEAK", "Displacement", "Shifts", "displacement", "phase_shifts"]

F32_HW: TypeAlias = npt.NDArray[np.float32]
F32_NHW: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]
I64: TypeAlias = npt.NDArray[np.int64]

MIN_PEAK = 0.25
"""Height, relative to a perfect match, below which a window was not found again."""

_WINDOW = 128  # px; shifts up to a quarter of it are found
_BAND = 0.12  # cycles per px
_MIN_CONTRAST = 0.04  # standard deviation; an empty window has no position


class Shifts(NamedTuple):
    """Movement of each window: ``dy`` and ``dx`` [N] in px, and ``peaks`` [N], 1 = a perfect match."""

    dy: F64
    dx: F64
    peaks: F64


class Displacement(NamedTuple):
    """Movement of an image: px of the median and of the 95th percentile of its windows, and the share of the
    windows that was found again. NaN where nothing can be told."""

    median: float
    p95: float
    matched: float


def displacement(source_HW: F32_HW, output_HW: F32_HW) -> Displacement:
    """How far windows of 128 px (of the image's side where that is less) moved from source to output.

    Both are scaled to a contrast of about 1. A window without contrast has no position; one whose peak is
    weak counts in ``matched`` only. Shifts over 10 px come out a few per cent wrong, as the windows share
    less.
    """
    side = min(_WINDOW, *source_HW.shape)
    tops, lefts = (_starts(extent, side) for extent in source_HW.shape)
    windows = [
        np.stack([plane[y : y + side, x : x + side] for y in tops for x in lefts])
        for plane in (source_HW, output_HW)
    ]
    has_contrast = windows[0].std(axis=(1, 2)) > _MIN_CONTRAST
    if not has_contrast.any():
        return Displacement(math.nan, math.nan, math.nan)
    shifts = phase_shifts(windows[0][has_contrast], windows[1][has_contrast])
    found = np.hypot(shifts.dy, shifts.dx)[shifts.peaks >= MIN_PEAK]
    if len(found) == 0:
        return Displacement(math.nan, math.nan, 0.0)
    median, p95 = np.percentile(found, [50.0, 95.0])
    return Displacement(float(median), float(p95), len(found) / len(shifts.dy))


def _starts(extent: int, side: int) -> list[int]:
    """Starts of windows that cover the extent evenly, overlapping by about a quarter."""
    count = max(1, math.ceil((extent - side) / (side * 0.75)) + 1)
    return [round(start) for start in np.linspace(0, extent - side, count)]


def phase_shifts(a_NHW: F32_NHW, b_NHW: F32_NHW) -> Shifts:
    """Movement of square windows from ``a`` to ``b``."""
    side = a_NHW.shape[1]
    taper = np.hanning(side).astype(np.float32)
    window_HW = taper[:, None] * taper[None]
    spectra = [
        fft.rfft2((block - block.mean(axis=(1, 2), keepdims=True)) * window_HW) for block in (a_NHW, b_NHW)
    ]
    cross = np.conj(spectra[0]) * spectra[1]
    cross /= np.abs(cross) + 1e-12
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    band = np.exp(-0.5 * (frequency / _BAND) ** 2).astype(np.float32)
    band[0, 0] = 0.0
    surface = fft.irfft2(cross * band, s=(side, side))
    perfect = float(fft.irfft2(band, s=(side, side)).max())
    flat = surface.reshape(len(surface), -1)
    best = flat.argmax(axis=1)
    rows, cols = np.divmod(best, side)
    peaks = flat[np.arange(len(flat)), best].astype(np.float64)
    dy = _refined(surface, rows, cols, side, axis=0)
    dx = _refined(surface, rows, cols, side, axis=1)
    return Shifts(dy, dx, peaks / perfect)


def _refined(surface: F32_NHW, rows: I64, cols: I64, side: int, axis: int) -> F64:
    """Signed position of the peaks along one axis: the vertex of the parabola through the logarithms.

    Exact for a Gaussian peak, which the band makes of a perfect match.
    """
    index = np.arange(len(surface))
    position = (rows, cols)[axis]
    near = []
    for step in (-1, 0, 1):
        moved = (position + step) % side
        at = (moved, cols) if axis == 0 else (rows, moved)
        near.append(np.log(np.maximum(surface[index, at[0], at[1]].astype(np.float64), 1e-12)))
    curve = near[0] - 2 * near[1] + near[2]
    offset = np.where(np.abs(curve) > 1e-9, 0.5 * (near[0] - near[2]) / np.where(curve == 0, 1.0, curve), 0.0)
    signed = np.where(position > side // 2, position - side, position)
    return np.asarray(signed + np.clip(offset, -0.5, 0.5), np.float64)
