"""What a tile may be turned into and still be a tile of the same tissue: eight symmetries, a mild stain.

Histology has no up and no left, so the dihedral group of the square (D4) changes no label. Colour: per
channel a gain and an offset of optical density, as between two days of the same stainer; more would teach
the network a stain that neither domain has.
"""

from __future__ import annotations

import cv2
import numpy as np

from wsi_pipeline.core.protocols import U8_HWC

__all__ = ["SYMMETRIES", "jitter_stain", "turn"]

SYMMETRIES = 8
GAIN = 0.05
OFFSET = 0.01
"""Largest relative change of the density of a channel, and largest change in density units (base 10)."""
_TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


def turn(pixels_HWC: U8_HWC, symmetry: int) -> U8_HWC:
    """One of the 8 symmetries of the square, 0 the identity; bit 2 mirrors, bits 0-1 are quarter turns.

    The turns are anticlockwise and come after the mirror, as in ``numpy.rot90``, whose copy takes 15 times
    as long.
    """
    if symmetry & 4:
        pixels_HWC = np.asarray(cv2.flip(pixels_HWC, 1), np.uint8)
    quarter = _TURNS[symmetry & 3]
    return pixels_HWC if quarter is None else np.asarray(cv2.rotate(pixels_HWC, quarter), np.uint8)


def jitter_stain(pixels_HWC: U8_HWC, rng: np.random.Generator) -> U8_HWC:
    """Every channel's optical density times 1 +- ``GAIN``, plus +- ``OFFSET``; [H, W, 3] uint8."""
    gain_C = 1 + GAIN * (2 * rng.random(3) - 1)
    offset_C = OFFSET * (2 * rng.random(3) - 1)
    density_V = -np.log10((np.arange(256) + 1) / 256)
    table_VC = 256 * 10 ** -(density_V[:, None] * gain_C + offset_C) - 1
    levels_VC = np.rint(np.clip(table_VC, 0, 255)).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels_HWC, levels_VC.reshape(1, 256, 3)), np.uint8)
