"""What lies on a slide beside tissue and glass: ink, coverslip edges, hairs, the black rim of a scan.

All rules look at optical density relative to the glass (r, g, b). Haematoxylin and eosin both absorb green
most (Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 23, 291, 2001: H 0.65/0.70/0.29, E 0.07/0.99/0.11),
so green and blue inks (red absorbed most), and objects that absorb all colours alike (glass edges, hairs,
soot, shadow) stand apart. Red ink has the colours of blood and needs its surroundings to tell.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.core.glass import F32_HWC, extremes
from wsi_pipeline.core.protocols import U8_HW

__all__ = [
    "BOOL_HW",
    "disc",
    "find_border",
    "find_coverslip",
    "find_pen",
    "keep_components",
    "morph",
    "touching",
]

BOOL_HW = npt.NDArray[np.bool_]

_VOID_OD = 1.0  # a scan's black rim transmits less than a tenth in every channel
_MIN_BORDER_UM2 = 40_000.0
_PEN_RIM_UM = 250.0  # ink thins out at the rim of a stroke
_NEUTRAL = 0.25  # spread of the channels relative to their mean, below which a colour is grey


def disc(radius_um: float, mpp: Mpp) -> U8_HW:
    """Elliptic structuring element with this radius, at least one pixel."""
    size = [2 * round(radius_um / step) + 1 for step in mpp]
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size[1], size[0])), np.uint8)


def keep_components(mask_HW: BOOL_HW, min_area_px: float) -> BOOL_HW:
    """The 8-connected components with at least this area."""
    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(mask_HW.view(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False
    return np.asarray(keep[labels_HW], np.bool_)


def touching(mask_HW: BOOL_HW, seeds_HW: BOOL_HW) -> BOOL_HW:
    """The 8-connected components of ``mask_HW`` that hold a pixel of ``seeds_HW``."""
    count, labels_HW = cv2.connectedComponents(mask_HW.view(np.uint8), connectivity=8)
    keep = np.zeros(count, np.bool_)
    keep[labels_HW[seeds_HW & mask_HW]] = True
    keep[0] = False
    return np.asarray(keep[labels_HW], np.bool_)


def morph(mask_HW: BOOL_HW, operation: int, element: U8_HW) -> BOOL_HW:
    """OpenCV's morphology on a bool mask; nothing lies beyond the picture, and its edge erodes nothing."""
    if operation != cv2.MORPH_CLOSE:
        result = cv2.morphologyEx(mask_HW.view(np.uint8), operation, element)
        return np.asarray(result, np.uint8).view(np.bool_)
    # Room for the dilated mask: a closing then contains the mask and bridges no gap to the edge.
    rows, cols = element.shape[0] // 2, element.shape[1] // 2
    padded_HW = np.pad(mask_HW.view(np.uint8), ((rows, rows), (cols, cols)))
    closed_HW = cv2.morphologyEx(padded_HW, operation, element)
    height, width = mask_HW.shape
    return np.ascontiguousarray(closed_HW[rows : rows + height, cols : cols + width]).view(np.bool_)


def find_border(od_HWC: F32_HWC, mpp: Mpp) -> BOOL_HW:
    """Black areas that reach the picture's edge: scan borders, unscanned parts; od relative to *white*."""
    void_HW = np.asarray(extremes(od_HWC)[0] > _VOID_OD)
    if not void_HW.any():
        return void_HW
    rim_HW = np.zeros(void_HW.shape, np.bool_)
    rim_HW[[0, -1], :] = True
    rim_HW[:, [0, -1]] = True
    void_HW = touching(morph(void_HW, cv2.MORPH_CLOSE, disc(32.0, mpp)), rim_HW & void_HW)
    return keep_components(void_HW, _MIN_BORDER_UM2 / (mpp[0] * mpp[1]))


def find_coverslip(od_HWC: F32_HWC, mpp: Mpp, *, min_length_um: float) -> BOOL_HW:
    """Grey to black objects that are long and thin: coverslip edges, cracks, hairs, fibres.

    ``min_length_um``: longest side of the bounding box. Compact grey objects (folds, pigment, soot) are left
    alone, for inside a section they are tissue and outside it they are too grey to be taken for tissue.
    """
    mean_HW = (od_HWC[..., 0] + od_HWC[..., 1] + od_HWC[..., 2]) / 3
    least_HW, most_HW = extremes(od_HWC)
    grey_HW = (mean_HW > 0.10) & (most_HW - least_HW < _NEUTRAL * mean_HW)
    count, labels_HW, stats, _ = cv2.connectedComponentsWithStats(grey_HW.view(np.uint8), connectivity=8)
    sides = stats[:, [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]] * np.asarray(mpp)
    length = np.hypot(sides[:, 0], sides[:, 1])
    area = stats[:, cv2.CC_STAT_AREA] * mpp[0] * mpp[1]
    keep = (length >= min_length_um) & (area < length * length / 12)
    keep[0] = False
    return np.asarray(keep[labels_HW], np.bool_)


def find_pen(od_HWC: F32_HWC, mpp: Mpp, *, edges_HW: BOOL_HW, min_area_um2: float) -> BOOL_HW:
    """Strokes and dots of green, blue, red and black ink, on glass and across tissue.

    ``edges_HW``: coverslip edges, which are black as well; ``min_area_um2``: smallest mark. Red and black
    count as ink only where at least a quarter of the mark's rim is bare glass: inside a section they are
    blood and pigment. A long, thin black stroke cannot be told from a coverslip edge, and need not be.
    """
    min_px = min_area_um2 / (mpp[0] * mpp[1])
    red, green, blue = od_HWC[..., 0], od_HWC[..., 1], od_HWC[..., 2]
    bare_HW = green < 0.05
    cool_HW = (red > 0.08) & (red > 1.10 * green + 0.03)
    core_HW = keep_components(cool_HW & (red > 1.35 * green + 0.05), min_px / 4)
    cool_HW = keep_components(touching(cool_HW, core_HW), min_px)
    warm_HW = (green > 0.10) & (blue > 0.63 * green) & (red < 0.30 * green)
    core_HW = warm_HW & (green > 0.25) & (blue > 0.69 * green) & (red < 0.22 * green)
    warm_HW = _on_glass(warm_HW, core_HW, bare_HW, min_px, mpp)
    black_HW = (extremes(od_HWC)[0] > 0.6) & (red > 0.85 * green) & ~edges_HW
    black_HW = morph(black_HW, cv2.MORPH_OPEN, disc(60.0, mpp))
    black_HW = _on_glass(black_HW, black_HW, bare_HW, min_px, mpp)
    if cool_HW.any():
        cool_HW |= _near(cool_HW, mpp) & (red > green + 0.02)
    if warm_HW.any():
        warm_HW |= _near(warm_HW, mpp) & (green > 0.03) & (blue > 0.62 * green) & (red < 0.35 * green)
    pen_HW = cool_HW | warm_HW | black_HW
    return morph(pen_HW, cv2.MORPH_CLOSE, disc(80.0, mpp)) if pen_HW.any() else pen_HW


def _near(mask_HW: BOOL_HW, mpp: Mpp) -> BOOL_HW:
    return morph(mask_HW, cv2.MORPH_DILATE, disc(_PEN_RIM_UM, mpp))


def _on_glass(mask_HW: BOOL_HW, core_HW: BOOL_HW, glass_HW: BOOL_HW, min_px: float, mpp: Mpp) -> BOOL_HW:
    """Marks of some size, an eighth of whose area is core and a quarter of whose rim is glass.

    Parts up to 150 µm apart are one mark, for a dry pen skips.
    """
    if not core_HW.any():
        return core_HW
    joined_HW = cv2.dilate(mask_HW.view(np.uint8), disc(75.0, mpp))
    count, labels_HW = cv2.connectedComponents(joined_HW, connectivity=8)
    rim_HW = cv2.dilate(joined_HW, np.ones((3, 3), np.uint8)).view(np.bool_) & (joined_HW == 0)
    owner_HW = cv2.dilate(labels_HW.astype(np.float32), np.ones((3, 3), np.uint8)).astype(np.int64)
    rim = np.bincount(owner_HW[rim_HW], minlength=count)
    clear = np.bincount(owner_HW[rim_HW & glass_HW], minlength=count)
    area = np.bincount(labels_HW[mask_HW], minlength=count)
    core = np.bincount(labels_HW[core_HW], minlength=count)
    keep = (area >= min_px) & (core >= area / 8) & (clear >= rim / 4)
    keep[0] = False
    return np.asarray(mask_HW & keep[labels_HW], np.bool_)
