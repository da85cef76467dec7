"""Did a translated tile keep the tissue? Figures that need no network: what changed beside the staining.

A translator may recolour; it may not move, invent or remove nuclei. So everything is measured on the density
of haematoxylin, which is what nuclei are made of, and the two sides are brought to one scale first.

Why the output's stain vectors are not estimated from the output alone: two estimates of their own disagree,
and on 68 recoloured real tiles the similarity then fell to 0.35 although not a nucleus had changed. Here the
output's vectors are those that carry the source's concentrations best (least squares of the output's density
on them, both smoothed and aligned, so that shifts and blur do not count). Recolouring alone then scores
0.999 on average and never under 0.95, and an output that has lost the nuclei has nothing to carry them.

Sources: Z. Wang et al., "Image quality assessment", IEEE TIP 13, 2004 (SSIM: Gaussian window of 11 px with
sigma 1.5, K 0.01 and 0.03).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.core.shifts import MIN_PEAK, displacement, phase_shifts
from wsi_pipeline.core.stain import BETA, F64, StainProfile, concentrations, estimate_profile
from wsi_pipeline.errors import ConfigError

__all__ = ["F32_HW", "Structure", "compare_structure", "haematoxylin_pair", "psnr", "ssim"]

F32_HW: TypeAlias = npt.NDArray[np.float32]
Pixels: TypeAlias = npt.NDArray[Any]
Bools: TypeAlias = npt.NDArray[np.bool_]

MIN_STAINED = 0.02
"""Share of stained source pixels below which a tile is glass: it holds no structure that could be kept."""

_MIN_RANGE = 0.3  # OD; less contrast than this is noise, and is not stretched to full contrast
_FIT_STEP = 4  # px; shifts and blur of this size do not disturb the fit
_FIT_SIGMA = 1.0  # steps
_PLANE_SIGMA = 1.0  # px: most slides store colour at half their resolution, finer density is compression
_RIDGE = 1e-3  # of the mean variance: where a tile holds one stain only, the other gets no wild vector
_CLIP = (-0.5, 2.0)

_SSIM_WINDOW, _SSIM_SIGMA = (11, 11), 1.5
_K1, _K2 = 0.01, 0.03

_EDGE_SIGMA = 1.0
_EDGE_SHARE = 0.8  # quantile of the gradient above which a pixel is an edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What became of a tile. NaN where there was nothing to measure (glass).

    ``ssim``: structural similarity of haematoxylin, 1 = kept; ``shift_median``, ``shift_p95``: how far local
    windows moved, px; ``matched``: share of the windows with structure that were found again; ``edges_lost``
    and ``edges_added``: share of edge strength of the source that is gone, and of the output that is new.
    """

    ssim: float
    shift_median: float
    shift_p95: float
    matched: float
    edges_lost: float
    edges_added: float


def compare_structure(
    source_HWC: U8_HWC, output_HWC: U8_HWC, stains: StainProfile | None = None
) -> Structure:
    """Structure figures of an output against its source, two uint8 tiles of one size on one lattice.

    ``stains``: the source's, where they are known better than one tile shows them. Raises ConfigError for
    tiles of different sizes.
    """
    pair = haematoxylin_pair(source_HWC, output_HWC, stains)
    if pair is None:
        return Structure(**dict.fromkeys(Structure.__slots__, math.nan))
    source_HW, output_HW = pair
    moved = displacement(source_HW, output_HW)
    edges = [_gradient(plane_HW) for plane_HW in pair]
    return Structure(
        ssim=ssim(source_HW, output_HW, peak=1.0),
        shift_median=moved.median,
        shift_p95=moved.p95,
        matched=moved.matched,
        edges_lost=_edges_lost(*edges),
        edges_added=_edges_lost(*edges[::-1]),
    )


def haematoxylin_pair(
    source_HWC: U8_HWC, output_HWC: U8_HWC, stains: StainProfile | None = None
) -> tuple[F32_HW, F32_HW] | None:
    """Haematoxylin of both, float32 [H, W], on one scale: 1st to 99th percentile of the source are 0 to 1.

    None where the source is glass.
    """
    _same_shape(source_HWC, output_HWC)
    stains = stains or _tile_stains(source_HWC)
    source_od, output_od = _density(source_HWC, stains.white), _density(output_HWC, stains.white)
    if float((source_od.mean(axis=2) > BETA).mean()) < MIN_STAINED:
        return None
    small = [_smooth(od_HWC) for od_HWC in (source_od, output_od)]
    stain_HW2 = concentrations(small[0].reshape(-1, 3), stains.stains).reshape(*small[0].shape[:2], 2)
    source_HW = _carried(stain_HW2, small[0], source_od)
    output_HW = _carried(*_overlap(stain_HW2, small[1], _steps_moved(*small)), output_od)
    low, high = np.percentile(source_HW[::2, ::2], [1.0, 99.0])
    scale = np.float32(1.0 / max(float(high - low), _MIN_RANGE))
    scaled = [np.clip((plane - np.float32(low)) * scale, *_CLIP) for plane in (source_HW, output_HW)]
    return np.asarray(scaled[0], np.float32), np.asarray(scaled[1], np.float32)


def _tile_stains(pixels_HWC: U8_HWC) -> StainProfile:
    sample_HWC = pixels_HWC[::_FIT_STEP, ::_FIT_STEP]
    return estimate_profile(sample_HWC, np.ones(sample_HWC.shape[:2], np.bool_))


def _density(pixels_HWC: U8_HWC, white: tuple[float, float, float]) -> npt.NDArray[np.float32]:
    """``optical_density`` by table, float32."""
    grey = np.maximum(np.arange(256.0), 1.0)[:, None]
    table = (np.log(np.array(white)) - np.log(grey)).astype(np.float32).reshape(256, 1, 3)
    return np.asarray(cv2.LUT(np.ascontiguousarray(pixels_HWC), table), np.float32)


def _smooth(od_HWC: npt.NDArray[np.float32]) -> F64:
    """Densities [h, w, 3] of the smoothed tile, one for every 4 x 4 pixels."""
    height, width = (math.ceil(extent / _FIT_STEP) for extent in od_HWC.shape[:2])
    small_HWC = cv2.resize(od_HWC, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.GaussianBlur(small_HWC, (0, 0), _FIT_SIGMA), np.float64)


def _steps_moved(source_HWC: F64, output_HWC: F64) -> tuple[int, int]:
    """By how much the whole output lies elsewhere, in steps; (0, 0) where it does not match at any shift."""
    side = min(source_HWC.shape[:2])
    grey = [
        image_HWC[:side, :side].mean(axis=2).astype(np.float32)[None]
        for image_HWC in (source_HWC, output_HWC)
    ]
    shifts = phase_shifts(grey[0], grey[1])
    dy, dx = round(float(shifts.dy[0])), round(float(shifts.dx[0]))
    is_known = shifts.peaks[0] >= MIN_PEAK and max(abs(dy), abs(dx)) <= side // 4
    return (dy, dx) if is_known else (0, 0)


def _overlap(source_HWC: F64, output_HWC: F64, moved: tuple[int, int]) -> tuple[F64, F64]:
    """What both show, if the output shows ``moved`` steps further down and right what the source shows."""
    cut = []
    for image, sign in ((source_HWC, 1), (output_HWC, -1)):
        at = [
            slice(max(-sign * step, 0), extent - max(sign * step, 0))
            for step, extent in zip(moved, image.shape[:2], strict=True)
        ]
        cut.append(image[at[0], at[1]])
    return cut[0], cut[1]


def _carried(stain_HW2: F64, small_HWC: F64, od_HWC: npt.NDArray[np.float32]) -> F32_HW:
    """Haematoxylin [H, W] of densities, unmixed with the vectors that carry the source's concentrations.

    ``stain_HW2``: those, and ``small_HWC``: the densities at the same places. The source itself goes the same
    way, so that a tile compared with itself scores exactly 1.
    """
    stain_N2, od_N3 = stain_HW2.reshape(-1, 2), small_HWC.reshape(-1, 3)
    centred_N2 = stain_N2 - stain_N2.mean(axis=0)
    spread_22 = centred_N2.T @ centred_N2
    spread_22 += np.eye(2) * (_RIDGE * float(np.trace(spread_22)) / 2.0 + 1e-9)
    vectors_32 = np.linalg.solve(spread_22, centred_N2.T @ (od_N3 - od_N3.mean(axis=0))).T
    offset_3 = od_N3.mean(axis=0) - vectors_32 @ stain_N2.mean(axis=0)
    haematoxylin_3 = np.linalg.pinv(vectors_32)[0]
    plane_HW = cv2.transform(od_HWC, haematoxylin_3.astype(np.float32)[None])
    plane_HW = cv2.GaussianBlur(plane_HW, (0, 0), _PLANE_SIGMA)
    return np.asarray(plane_HW - np.float32(haematoxylin_3 @ offset_3), np.float32)


def ssim(a: Pixels, b: Pixels, *, peak: float = 255.0, valid_HW: Bools | None = None) -> float:
    """Mean structural similarity of two images [H, W] or [H, W, C] (mean over channels); see the module.

    ``peak``: the range of the values. Borders of 5 px, where the window is cut, do not count, nor windows
    that reach out of ``valid_HW``; NaN where none is left. Raises ConfigError for different sizes or images
    under 11 px.
    """
    _same_shape(a, b)
    if min(a.shape[:2]) < _SSIM_WINDOW[0]:
        raise ConfigError(f"SSIM: images of {a.shape[:2]} px; its window needs {_SSIM_WINDOW[0]} px")
    x, y = (np.ascontiguousarray(image, np.float32) / np.float32(peak) for image in (a, b))
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    square_x, square_y, product = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    spread = _window_mean(x * x + y * y) - square_x - square_y
    together = _window_mean(x * y) - product
    score = (2 * product + _K1**2) * (2 * together + _K2**2)
    score /= (square_x + square_y + _K1**2) * (spread + _K2**2)
    border = _SSIM_WINDOW[0] // 2
    inner = score[border:-border, border:-border]
    if valid_HW is not None:
        whole_HW = cv2.erode(valid_HW.astype(np.uint8), np.ones(_SSIM_WINDOW, np.uint8))
        inner = inner[whole_HW[border:-border, border:-border] > 0]
    return float(inner.mean(dtype=np.float64)) if inner.size else math.nan


def _window_mean(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image, _SSIM_WINDOW, _SSIM_SIGMA), np.float32)


def psnr(a: U8_HWC, b: U8_HWC, *, valid_HW: Bools | None = None) -> float:
    """Peak signal to noise ratio of two uint8 images, dB; infinite where they are equal.

    ``valid_HW``: pixels that count; NaN where none does.
    """
    _same_shape(a, b)
    square = np.square(a.astype(np.float32) - b.astype(np.float32))
    square = square if valid_HW is None else square[valid_HW]
    error = float(square.mean(dtype=np.float64)) if square.size else math.nan
    return 10.0 * math.log10(255.0**2 / error) if error else math.inf


def _gradient(plane_HW: F32_HW) -> F32_HW:
    smooth = cv2.GaussianBlur(plane_HW, (0, 0), _EDGE_SIGMA)
    dy, dx = (cv2.Sobel(smooth, cv2.CV_32F, *order, ksize=3, scale=0.125) for order in ((0, 1), (1, 0)))
    return np.asarray(cv2.magnitude(dx, dy), np.float32)


def _edges_lost(before_HW: F32_HW, after_HW: F32_HW) -> float:
    """Share of the strength of the strongest fifth of edges that is not there afterwards, within a pixel."""
    nearby_HW = cv2.dilate(after_HW, np.ones((3, 3), np.uint8))
    edge_HW = before_HW > np.quantile(before_HW[::2, ::2], _EDGE_SHARE)
    strength = float(before_HW[edge_HW].sum(dtype=np.float64))
    if strength <= 0.0:
        return math.nan
    lost = np.maximum(before_HW - nearby_HW, 0.0)[edge_HW]
    return float(lost.sum(dtype=np.float64)) / strength


def _same_shape(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
    if a.shape != b.shape:
        raise ConfigError(
            f"tiles of {a.shape[:2]} and {b.shape[:2]} px do not compare; give pairs of one size"
        )
