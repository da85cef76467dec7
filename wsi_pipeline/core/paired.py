"""Figures of pairs of pictures: error and shared information within a mask, MS-SSIM and the diversity of a
set, tissue maps, and whether a translator minds how its input lies. (Masked PSNR and SSIM: ``structure``.)

Masks say where both pictures show tissue: registered pairs have borders that one side has not. Means are over
valid pixels, so that a small mask is no small error.

Sources: C. Studholme et al., 1999 (normalised mutual information), with the bins of J. Honkamaa et al.,
"Deformation equivariant cross-modality image synthesis", MedIA 90, 2023; Z. Wang et al., Asilomar 2003
(MS-SSIM), with the window of P. Friedrich et al., "WDM", 2024, as MONAI computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d
from skimage.metrics import normalized_mutual_information

from wsi_pipeline.core.fid import I64
from wsi_pipeline.errors import ConfigError

__all__ = [
    *("MS_SSIM_SIDE", "TissueF1", "confusion", "diversity", "equivariance_error", "mae", "ms_ssim"),
    *("mutual_information", "placed", "tissue_f1"),
]

MS_SSIM_SIDE = 112
"""Smallest side: at the coarsest of five scales it is one window of seven."""

_SCALES = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
_WINDOW = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
_K1, _K2 = 0.01, 0.03

Pixels = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


def mae(a: Pixels, b: Pixels, valid_HW: Bools) -> float:
    """Mean absolute difference over the valid pixels of [H, W] or [H, W, C]; NaN where none is valid."""
    return float(np.abs(a[valid_HW].astype(np.float64) - b[valid_HW]).mean()) if valid_HW.any() else math.nan


def mutual_information(a: Pixels, b: Pixels, valid_HW: Bools) -> float:
    """Normalised mutual information, (H(a) + H(b)) / H(a, b): 1 nothing shared, 2 each tells the other.

    Over the values of all channels, in ``floor(sqrt(n / 5))`` bins for n valid pixels, at least 2. NaN where
    both are of one value.
    """
    x, y = a[valid_HW].ravel(), b[valid_HW].ravel()
    if x.size == 0 or (np.ptp(x) == 0 and np.ptp(y) == 0):
        return math.nan
    bins = max(math.isqrt(int(valid_HW.sum()) // 5), 2)
    return float(normalized_mutual_information(x, y, bins=bins))


def ms_ssim(a: Pixels, b: Pixels, *, dims: int = 2, peak: float = 1.0) -> float:
    """Similarity at five scales, of pictures whose first ``dims`` axes are space; 1 is equal.

    ``peak``: the range of the values. Gaussian window of 7 with sigma 1.5, whole windows only; each scale
    averages 2 pixels along each axis. Raises ConfigError for different shapes or sides under 112.
    """
    if a.shape != b.shape or min(a.shape[:dims]) < MS_SSIM_SIDE:
        raise ConfigError(
            f"MS-SSIM: pictures {a.shape} and {b.shape}; give two of one shape, {MS_SSIM_SIDE} px or more"
        )
    x, y = (np.asarray(image, np.float32) / np.float32(peak) for image in (a, b))
    score = 1.0
    for scale, power in enumerate(_SCALES.tolist()):
        if scale:
            x, y = _halved(x, dims), _halved(y, dims)
        whole, contrast = _similarity(x, y, dims)
        score *= max(whole if scale == len(_SCALES) - 1 else contrast, 0.0) ** power
    return float(score)


def _similarity(x: Pixels, y: Pixels, dims: int) -> tuple[float, float]:
    """SSIM, and its part that compares contrast and structure only."""
    mean_x, mean_y = _window_mean(x, dims), _window_mean(y, dims)
    spread = _window_mean(x * x + y * y, dims) - mean_x**2 - mean_y**2
    together = _window_mean(x * y, dims) - mean_x * mean_y
    contrast = (2 * together + _K2**2) / (spread + _K2**2)
    light = (2 * mean_x * mean_y + _K1**2) / (mean_x**2 + mean_y**2 + _K1**2)
    return float((light * contrast).mean(dtype=np.float64)), float(contrast.mean(dtype=np.float64))


def _window_mean(x: Pixels, dims: int) -> Pixels:
    for axis in range(dims):
        x = correlate1d(x, _WINDOW / _WINDOW.sum(), axis=axis)
        x = np.moveaxis(np.moveaxis(x, axis, 0)[3:-3], 0, axis)
    return x


def _halved(x: Pixels, dims: int) -> Pixels:
    """Mean of two along each axis of space; what is left over of an odd side falls away."""
    for axis in range(dims):
        x = np.moveaxis(x, axis, 0)[: x.shape[axis] // 2 * 2]
        x = np.moveaxis((x[::2] + x[1::2]) / 2, 0, axis)
    return x


def diversity(
    read: Callable[[int], Pixels], count: int, *, pairs: int, seed: int, dims: int = 2, peak: float = 1.0
) -> float:
    """Mean MS-SSIM of ``pairs`` different pairs of ``count`` pictures, drawn by ``seed`` (all pairs, if they
    are no more): lower is more diverse. Raises ConfigError for fewer than two pictures."""
    total = count * (count - 1) // 2
    if total < 1:
        raise ConfigError(f"diversity: {count} pictures make no pair; give 2 or more")
    draws = np.random.Generator(np.random.Philox(seed))
    numbers = draws.choice(total, pairs, replace=False) if pairs < total else np.arange(total)
    found = []
    for number in np.sort(numbers).tolist():  # pairs (0, 1), (0, 2), (1, 2), (0, 3), ... by number
        later = (1 + math.isqrt(1 + 8 * number)) // 2
        earlier = number - later * (later - 1) // 2
        found.append(ms_ssim(read(earlier), read(later), dims=dims, peak=peak))
    return float(np.mean(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueF1:
    """Agreement of tissue maps: F1 of each class that either map has, without background, and their mean
    ``weighted`` by the pixels that the truth has of each (NaN where it has none)."""

    per_class: dict[int, float]
    weighted: float


def confusion(truth_HW: Pixels, found_HW: Pixels, *, classes: int) -> I64:
    """Pixels [truth, found] by class, [classes, classes]; ConfigError for maps that are not two equal shapes
    of whole numbers from 0 to ``classes`` - 1."""
    for labels in (truth_HW, found_HW):
        fits = labels.dtype.kind in "iub" and labels.shape == truth_HW.shape
        if not fits or labels.min() < 0 or labels.max() >= classes:
            raise ConfigError(
                f"tissue map: {labels.dtype} {labels.shape} up to {labels.max()}; a segmenter has to give "
                f"one whole number from 0 to {classes - 1} for each pixel"
            )
    both = truth_HW.astype(np.int64) * classes + found_HW
    return np.bincount(both.ravel(), minlength=classes**2).reshape(classes, classes)


def tissue_f1(confusion_KK: npt.NDArray[Any], *, background: int = 0) -> TissueF1:
    """F1 = 2 TP / (2 TP + FP + FN) of each class. ``background`` is no class, but tissue that is taken for
    it is missed, and background taken for tissue is a false alarm."""
    true_K, found_K, hit_K = confusion_KK.sum(axis=1), confusion_KK.sum(axis=0), np.diag(confusion_KK)
    tissue_K = np.arange(len(hit_K)) != background
    there = np.flatnonzero(tissue_K & (true_K + found_K > 0))
    f1 = 2.0 * hit_K[there] / (true_K + found_K)[there]
    support = true_K[there].sum()
    weighted = float((f1 * true_K[there]).sum() / support) if support else math.nan
    return TissueF1(per_class=dict(zip(there.tolist(), f1.tolist(), strict=True)), weighted=weighted)


def placed(score: float, *, floor: float, ceiling: float) -> float:
    """Where a score lies between what doing nothing gets (0) and what a true neighbouring section gets (1);
    NaN where the ceiling is not above the floor."""
    return (score - floor) / (ceiling - floor) if ceiling > floor else math.nan


def equivariance_error(translate: Callable[[Pixels], Pixels], pixels_BHWC: Pixels) -> float:
    """Mean of |T(x o g) - T(x) o g| over the eight turns and flips g of the square, in the output's units.

    0 for a translator that treats every pose alike; one that moves or warps its output cannot have 0. Noise
    that belongs to positions counts, too. The pose as it is has error 0 and counts as one of the eight.
    """
    straight_BHWC = translate(pixels_BHWC).astype(np.float64)
    errors = [0.0]
    for flips, turns in [(flips, turns) for flips in (1, -1) for turns in range(4)][1:]:
        given, wanted = (
            np.ascontiguousarray(np.rot90(x, turns, axes=(1, 2))[:, :, ::flips])
            for x in (pixels_BHWC, straight_BHWC)
        )
        errors.append(float(np.abs(translate(given) - wanted).mean()))
    return float(np.mean(errors))
