"""A stand-in for a learned generator: context in a halo, noise of a latent lattice, internal cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.noise import lattice_normal
from wsi_pipeline.core.protocols import GeneratorSpec, TileBatch

LATENT = 8
HALO = 16
CALLS: list[int] = []
"""Batch size of every call in this process."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Blurs over 9 x 9 pixels, less than its halo, and adds noise that is constant on 8 x 8 pixels.

    Nothing of that depends on where a tile begins, so neither must the output.
    """

    batch: int = 4

    @property
    def spec(self) -> GeneratorSpec:
        return GeneratorSpec(
            kind="toy",
            tile=256,
            halo=HALO,
            align=64,
            mpp=(0.5, 0.5),
            batch=self.batch,
            digest="0" * 64,
            exact=True,
            overlap=32,
            cell=64,
        )

    def prepare(self, thumbnail_HWC: np.ndarray, tissue_HW: np.ndarray, mpp: Mpp) -> dict[str, Any]:
        return {"weights": "none", "latent": "noise"}

    def background(self, pixels_HWC: np.ndarray, context: Any) -> np.ndarray:
        return pixels_HWC

    def __call__(self, batch: TileBatch, context: Any) -> np.ndarray:
        CALLS.append(len(batch.pixels_BHWC))
        out_BHWC = batch.pixels_BHWC.copy()
        for i, tile in enumerate(batch.tiles):
            read = tile.read
            cells = Region(read.y // LATENT, read.x // LATENT, read.height // LATENT, read.width // LATENT)
            noise_CHW = np.rint(6 * lattice_normal(cells, key=batch.noise_key, channels=3)).astype(np.int32)
            noise_HWC = noise_CHW.transpose(1, 2, 0).repeat(LATENT, axis=0).repeat(LATENT, axis=1)
            blurred_HWC = ndimage.uniform_filter(batch.pixels_BHWC[i].astype(np.int32), (9, 9, 1))
            out_BHWC[i] = np.clip(blurred_HWC + noise_HWC, 0, 255)
        return out_BHWC
