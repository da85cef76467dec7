"""What a tile may be turned into and still be a tile of the same tissue: eight symmetries, a mild stain.

Histology has no up and no left, so the dihedral group of the square (D4) changes no label. Colour: per
channel a gain and an offset of optical density, as between two days of the same stainer; more would teach
the network a stain that neither domain has.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.protocols import U8_HWC

__all__ = ["SYMMETRIES", "jitter_stain", "turn"]

SYMMETRIES = 8
GAIN = 0.05
OFFSET = 0.01
"""Largest relative change of the density of a channel, and largest change in density units (base 10)."""


def turn(pixels_HWC: U8_HWC, symmetry: int) -> U8_HWC:
    """One of the 8 symmetries of the square, 0 the identity; bit 2 mirrors, bits 0-1 are quarter turns."""
    if symmetry & 4:
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels_HWC, symmetry & 3))


def jitter_stain(pixels_HWC: U8_HWC, rng: np.random.Generator) -> U8_HWC:
    """Every channel's optical density times 1 +- ``GAIN``, plus +- ``OFFSET``; [H, W, 3] uint8."""
    gain_C = 1 + GAIN * (2 * rng.random(3) - 1)
    offset_C = OFFSET * (2 * rng.random(3) - 1)
    density = -np.log10((np.arange(256) + 1) / 256)
    table_CV: npt.NDArray[np.float64] = 256 * 10 ** -(density * gain_C[:, None] + offset_C[:, None]) - 1
    levels_CV = np.rint(np.clip(table_CV, 0, 255)).astype(np.uint8)
    return np.stack([levels_CV[channel][pixels_HWC[..., channel]] for channel in range(3)], axis=-1)
