"""A thumbnail with the tissue outlined and the excluded classes tinted: the picture that a person checks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.protocols import U8_HW, U8_HWC
from wsi_pipeline.core.tissue import TissueResult

__all__ = ["CLASS_COLOURS", "TISSUE_COLOUR", "draw_overlay"]

# Hues that H&E does not have.
TISSUE_COLOUR = (0, 170, 60)
CLASS_COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"pen": (255, 140, 0), "coverslip": (0, 190, 255), "border": (255, 225, 0)}
)
_OTHER = (120, 120, 120)
_TINT = 0.45
_LINE = 1 / 500  # of the longer side


def draw_overlay(thumbnail_HWC: U8_HWC, result: TissueResult) -> U8_HWC:
    """Outlines over the thumbnail, [H, W, 3] uint8 RGB, same size: tissue green, pen orange, coverslip cyan,
    border yellow, other classes grey; excluded classes are tinted as well.

    The result's masks may have another size; they are stretched over the thumbnail.
    """
    canvas_HWC = np.array(thumbnail_HWC, np.uint8, copy=True)
    thickness = max(1, round(max(canvas_HWC.shape[:2]) * _LINE))
    for name, mask_HW in result.excluded.items():
        colour = CLASS_COLOURS.get(name, _OTHER)
        fitted_HW = _fit(mask_HW, canvas_HWC)
        inside = fitted_HW > 0
        canvas_HWC[inside] = (
            canvas_HWC[inside] * (1 - _TINT) + np.asarray(colour, np.float32) * _TINT
        ).astype(np.uint8)
        canvas_HWC[_outline(fitted_HW, 1)] = colour
    canvas_HWC[_outline(_fit(result.tissue.mask_HW, canvas_HWC), thickness)] = TISSUE_COLOUR
    return canvas_HWC


def _fit(mask_HW: npt.NDArray[np.bool_], like_HWC: U8_HWC) -> U8_HW:
    height, width = like_HWC.shape[:2]
    size = (width, height)
    return np.asarray(cv2.resize(mask_HW.view(np.uint8), size, interpolation=cv2.INTER_NEAREST), np.uint8)


def _outline(mask_HW: U8_HW, thickness: int) -> npt.NDArray[np.bool_]:
    """Pixels just outside the mask, so that the tissue itself stays to be seen; picture edges are closed."""
    grown_HW = cv2.dilate(mask_HW, np.ones((2 * thickness + 1,) * 2, np.uint8))
    cut_HW = cv2.erode(mask_HW, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    edge_HW = np.zeros(mask_HW.shape, np.bool_)
    edge_HW[[0, -1], :] = True
    edge_HW[:, [0, -1]] = True
    return np.asarray(((grown_HW > 0) & (mask_HW == 0)) | (edge_HW & (mask_HW > 0) & (cut_HW == 0)))
