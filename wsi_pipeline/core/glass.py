"""The colour of bare glass, estimated cell by cell over a slide's thumbnail.

Why an estimate. Frozen sections lie on grey, bluish or pink glass: the scanner's white point, eosin that
bled out of the section, mounting medium. Optical density relative to *white* takes all of these for pale
tissue; relative to the *local glass* they vanish. The method is that of a sky background in astronomy
(Bertin and Arnouts, SExtractor, Astron. Astrophys. Suppl. Ser. 117, 393, 1996, section 4): a mesh of
cells, those that hold an object are rejected, the rest is interpolated smoothly, and the rejection is
repeated with the better estimate until it no longer changes. A stain halo changes by little from one cell
to the next and is followed; the edge of a section is a step and stops the growth.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.core.protocols import U8_HWC

__all__ = ["F32_HW", "F32_HWC", "Glass", "estimate_glass", "extremes", "optical_density"]

F32_HW = npt.NDArray[np.float32]
F32_HWC = npt.NDArray[np.float32]

# od = -log10(intensity / 255); half a grey level keeps black finite (od 2.7).
_OD_LUT = (-np.log10((np.arange(256) + 0.5) / 255.5)).astype(np.float32)

_MIN_CELL_PX = 4
_ROUNDS = 12
_SMOOTH_RANGE = (0.012, 0.02)  # od: quietest glass is above camera noise, roughest below the palest tissue
_GLASS_MAX_OD = 0.40  # darker than 40 % transmission is no glass
_SEED_MAX_CAST = 0.05  # od between the channels: the scanner's white point, but no pale tissue
_GLASS_MAX_CAST = 0.12  # the same in a stain halo that begins on plain glass
_STEP_OD = 0.03  # how much glass may differ from its neighbourhood


@dataclass(frozen=True, slots=True, kw_only=True)
class Glass:
    """``od_HWC``: od of the glass on the mesh (float32); ``seen_HW``: cells that are bare glass (bool).

    ``rgb`` is the glass's typical colour. Where no cell shows glass, it is white and ``seen_HW`` is empty.
    """

    od_HWC: F32_HWC
    seen_HW: npt.NDArray[np.bool_]
    rgb: tuple[int, int, int]


def optical_density(pixels_HWC: U8_HWC) -> F32_HWC:
    """Optical density relative to white, ``-log10(I / I0)`` (Beer-Lambert); [H, W, 3] uint8 -> float32."""
    return np.asarray(cv2.LUT(np.ascontiguousarray(pixels_HWC), _OD_LUT), dtype=np.float32)


def estimate_glass(od_HWC: F32_HWC, mpp: Mpp, *, cell_um: float, reach_um: float) -> Glass:
    """Colour of the glass on a mesh of cells.

    ``od_HWC``: optical density relative to white; ``cell_um``: side of a cell of the mesh; ``reach_um``:
    sigma of the Gaussian that carries the colour of bare cells to their neighbours.
    """
    height, width = od_HWC.shape[:2]
    cell_px = [max(_MIN_CELL_PX, round(cell_um / step)) for step in mpp]
    rows, cols = max(1, round(height / cell_px[0])), max(1, round(width / cell_px[1]))
    mean_HWC = _cells(od_HWC, rows, cols)
    green_HW = od_HWC[..., 1]
    rough_HW = np.sqrt(np.maximum(_cells(green_HW * green_HW, rows, cols) - mean_HWC[..., 1] ** 2, 0))
    plausible_HW = _plausible(mean_HWC, rough_HW)
    seed = _brightest_mode(mean_HWC[plausible_HW], total=rows * cols)
    if seed is None:
        return Glass(
            od_HWC=np.zeros((rows, cols, 3), np.float32),
            seen_HW=np.zeros((rows, cols), np.bool_),
            rgb=(255, 255, 255),
        )
    sigma = tuple(max(1.0, reach_um / (step * px)) for step, px in zip(mpp, cell_px, strict=True))
    field_HWC, seen_HW = _grow(mean_HWC, plausible_HW, seed, sigma)
    typical = np.median(field_HWC[seen_HW], axis=0) if seen_HW.any() else seed
    red, green, blue = (int(np.clip(round(255.5 * 10.0 ** -float(od) - 0.5), 0, 255)) for od in typical)
    return Glass(od_HWC=field_HWC, seen_HW=seen_HW, rgb=(red, green, blue))


def extremes(od_HWC: F32_HWC) -> tuple[F32_HW, F32_HW]:
    """Least and greatest of the three channels (several times faster than a reduction over a short axis)."""
    red, green, blue = od_HWC[..., 0], od_HWC[..., 1], od_HWC[..., 2]
    return np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)


def _cells(values: npt.NDArray[np.float32], rows: int, cols: int) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.resize(values, (cols, rows), interpolation=cv2.INTER_AREA), np.float32)


def _plausible(mean_HWC: F32_HWC, rough_HW: F32_HW) -> npt.NDArray[np.bool_]:
    """Cells that are quiet, bright and nearly grey; those of unscanned padding (pure white) are left out."""
    least_HW, most_HW = extremes(mean_HWC)
    padding_HW = (rough_HW < 1e-4) & (most_HW < 1e-3)
    low, high = _SMOOTH_RANGE
    scanned = rough_HW[~padding_HW]
    limit = float(np.clip(2.5 * np.quantile(scanned, 0.1), low, high)) if scanned.size else low
    near_grey_HW = most_HW - least_HW < _GLASS_MAX_CAST
    return np.asarray((rough_HW < limit) & (most_HW < _GLASS_MAX_OD) & near_grey_HW & ~padding_HW)


def _brightest_mode(od_NC: npt.NDArray[np.float32], total: int) -> npt.NDArray[np.float32] | None:
    """Median colour of the brightest of the frequent glass-like colours, or None where there is none.

    The brightest one, because whatever lies on the slide can only absorb.
    """
    od_NC = od_NC[np.ptp(od_NC, axis=1) < _SEED_MAX_CAST]
    if len(od_NC) < max(1.0, 0.005 * total):
        return None
    bins = np.floor(od_NC[:, 1] / 0.02).astype(np.int64)
    counts = np.bincount(bins)
    counts = counts + np.append(counts[1:], 0)
    first = int(np.argmax(counts >= 0.25 * counts.max()))
    chosen = od_NC[(bins == first) | (bins == first + 1)]
    return np.asarray(np.median(chosen, axis=0), np.float32)


def _grow(
    mean_HWC: F32_HWC,
    plausible_HW: npt.NDArray[np.bool_],
    seed: npt.NDArray[np.float32],
    sigma: tuple[float, ...],
) -> tuple[F32_HWC, npt.NDArray[np.bool_]]:
    """Accept cells close to the field, smooth the accepted ones into a new field, repeat until stable."""
    field_HWC = np.broadcast_to(seed, mean_HWC.shape).astype(np.float32)
    seen_HW = np.zeros(plausible_HW.shape, np.bool_)
    for _ in range(_ROUNDS):
        close_HW = plausible_HW & (np.abs(mean_HWC - field_HWC).max(axis=2) < _STEP_OD)
        if np.array_equal(close_HW, seen_HW):
            break
        seen_HW = close_HW
        weight_HW = _blur(seen_HW.astype(np.float32), sigma) + np.float32(1e-4)
        total_HWC = _blur(mean_HWC * seen_HW[..., None], sigma) + np.float32(1e-4) * seed
        field_HWC = (total_HWC / weight_HW[..., None]).astype(np.float32)
    # Next to bare cells the glass is known better than by the wide average: halos are steep near a section.
    weight_HW = _blur(seen_HW.astype(np.float32), (1.0, 1.0)) + np.float32(0.02)
    total_HWC = _blur(mean_HWC * seen_HW[..., None], (1.0, 1.0)) + np.float32(0.02) * field_HWC
    return np.asarray(total_HWC / weight_HW[..., None], np.float32), seen_HW


def _blur(values: npt.NDArray[np.float32], sigma: tuple[float, ...]) -> npt.NDArray[np.float32]:
    return np.asarray(
        cv2.GaussianBlur(values, (0, 0), sigmaX=sigma[1], sigmaY=sigma[0], borderType=cv2.BORDER_REPLICATE),
        np.float32,
    )
