"""A slide in memory: the fake that the tests of this package use, shipped for the tests of its users."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.protocols import U8_HWC, Level
from wsi_pipeline.readers._base import Facts, native_levels, read_clipped

__all__ = ["ArraySlide"]


class ArraySlide:
    """Slide over one array or a list of pyramid levels, large to small, each [H, W, 3] uint8.

    ``mpp`` is (y, x) micrometres per level-0 pixel, one number for both axes, and never guessed. Raises
    ValueError for arrays of another shape or dtype.
    """

    reader = "array"

    def __init__(
        self,
        pixels: U8_HWC | Sequence[U8_HWC],
        *,
        mpp: Mpp | float,
        slide_id: str = "array",
        mpp_origin: str = "given",
        icc_profile: bytes | None = None,
    ) -> None:
        self._levels_HWC = (pixels,) if isinstance(pixels, np.ndarray) else tuple(pixels)
        for level_HWC in self._levels_HWC:
            if (
                level_HWC.ndim != 3
                or level_HWC.shape[2] != 3
                or level_HWC.dtype != np.uint8
                or not level_HWC.size
            ):
                raise ValueError(f"a level is [H, W, 3] uint8, got {level_HWC.shape} {level_HWC.dtype}")
        digest = hashlib.sha256()
        for level_HWC in self._levels_HWC:
            digest.update(str(level_HWC.shape).encode())
            digest.update(np.ascontiguousarray(level_HWC).data)
        self.slide_id = slide_id
        self.mpp: Mpp = (float(mpp), float(mpp)) if isinstance(mpp, int | float) else mpp
        self.mpp_origin = mpp_origin
        self.icc_profile = icc_profile
        self.facts = Facts(
            sizes=tuple(Size(*level_HWC.shape[:2]) for level_HWC in self._levels_HWC),
            claims=(),
            identity=digest.hexdigest(),
            icc_profile=icc_profile,
        )

    @property
    def identity(self) -> str:
        return self.facts.identity

    @property
    def levels(self) -> tuple[Level, ...]:
        return native_levels(self.facts.sizes)

    def read(self, level: int, region: Region) -> U8_HWC:
        """Pixels of a region inside the level, as a copy."""
        return self._levels_HWC[level][region.slices(Region.of(self.facts.sizes[level]))].copy()

    def read_level(self, level: int, region: Region) -> U8_HWC:
        """Native pixels of ``region``, [H, W, 3] uint8; outside is white."""
        return read_clipped(self, level, region)

    def close(self) -> None:
        """Nothing to release."""
