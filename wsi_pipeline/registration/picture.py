"""The picture on which a person judges a registration: both sections, before, after, and every landmark."""

from __future__ import annotations

import cv2
import numpy as np

from wsi_pipeline.core.protocols import U8_HWC, WHITE
from wsi_pipeline.core.stain import F64
from wsi_pipeline.core.transform import SlideTransform
from wsi_pipeline.readers.warped import ASTRAY
from wsi_pipeline.registration.estimate import Section
from wsi_pipeline.registration.gate import tissue_that_is
from wsi_pipeline.registration.refine import AGREE_PX, Fitted

__all__ = ["draw_registration"]

SIDE, SQUARE = 900, 48
GREEN, RED, BLACK = (0, 150, 40), (220, 0, 0), (0, 0, 0)


def draw_registration(fixed: Section, moving: Section, fitted: Fitted | None) -> U8_HWC:
    """RGB picture of six panels around the fixed tissue: fixed, moving before and after, both chequered with
    the fixed one, and the held-out blocks.

    There, tissue that is not in register is red.

    Such a block is a circle, green where the transform puts it within 3 working pixels of where it was found,
    red where not, with a line from the one to the other, four times as long; a fitted block is a dot.
    """
    white_HWC, laid = np.full_like(fixed.rgb_HWC, WHITE), []
    for transform in (SlideTransform(affine_23=np.eye(2, 3)), fitted and fitted.transform):
        at_2HW = transform.grid(fixed.frame, (fixed.mpp, fixed.mpp)) if transform else None
        laid.append(white_HWC if at_2HW is None else moving.warped(moving.rgb_HWC, at_2HW, fill=WHITE))
    odd_HW1 = (np.indices(fixed.tissue_HW.shape) // SQUARE).sum(axis=0)[..., None] % 2 == 1
    mixed = [np.where(odd_HW1, picture, fixed.rgb_HWC) for picture in laid]
    places = np.argwhere(fixed.tissue_HW if fixed.tissue_HW.any() else ~fixed.tissue_HW)
    top, left = np.maximum(places.min(axis=0) - SQUARE, 0)
    bottom, right = places.max(axis=0) + SQUARE
    scale = SIDE / max(fixed.tissue_HW[top:bottom, left:right].shape)
    finest = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    titles = ("fixed", "moving, before", "moving, after", "chequered before", "chequered after", "blocks")
    told_HWC, panels = fixed.rgb_HWC.copy(), []
    if fitted:
        told_HWC[tissue_that_is(ASTRAY, fixed, fitted)] //= 2
        told_HWC[tissue_that_is(ASTRAY, fixed, fitted), 0] += 110
    for title, picture in zip(titles, (fixed.rgb_HWC, *laid, *mixed, told_HWC), strict=True):
        cut = np.ascontiguousarray(picture[top:bottom, left:right])
        panel = cv2.resize(cut, None, fx=scale, fy=scale, interpolation=finest)
        if title == "blocks" and fitted:
            _mark(panel, fitted, np.array([top, left]) * fixed.mpp, scale / fixed.mpp, fixed.mpp)
        cv2.putText(panel, title, (12, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.9, BLACK, 2, cv2.LINE_AA)
        panels.append(cv2.copyMakeBorder(panel, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=BLACK))
    return np.asarray(np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])]), np.uint8)


def _mark(panel: U8_HWC, fitted: Fitted, origin_um: F64, scale: float, mpp: float) -> None:
    """Draw the blocks; ``scale``: picture pixels in a µm."""
    for point in (fitted.used.fixed_N2 - origin_um) * scale:
        cv2.circle(panel, _xy(point), 3, BLACK, -1, cv2.LINE_AA)
    off_N2 = fitted.tested.moving_N2 - fitted.transform.points(fitted.tested.fixed_N2)
    for point, off in zip(fitted.tested.fixed_N2 - origin_um, off_N2, strict=True):
        colour = GREEN if np.hypot(*off) <= AGREE_PX * mpp else RED
        cv2.circle(panel, _xy(point * scale), 8, colour, 2, cv2.LINE_AA)
        cv2.line(panel, _xy(point * scale), _xy((point + 4 * off) * scale), colour, 2, cv2.LINE_AA)


def _xy(point: F64) -> tuple[int, int]:
    return round(float(point[1])), round(float(point[0]))
