"""The tissue mask: a boolean image with a pixel size, and exact answers on how much of a region it covers.

Why a summed-area table (Crow, SIGGRAPH 1984): every tile of a slide asks for its share of tissue, and the
answer must not depend on the size of the tile. The table is built on first use and is not pickled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.errors import ConfigError

__all__ = ["TissueMask"]

_SNAP = 1e-6  # mask pixels: float noise below this does not make a region touch another pixel
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TissueMask:
    """Tissue (True) on a slide. ``mask_HW``: bool, read-only; its corner is the slide's; ``mpp``: (y, x).

    Equal by content. Raises ConfigError for an array of another kind, or an mpp that is not positive.
    """

    mask_HW: npt.NDArray[np.bool_]
    mpp: Mpp
    _table: npt.NDArray[np.int32] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        mask_HW = np.array(self.mask_HW, order="C", copy=True)
        if mask_HW.ndim != 2 or mask_HW.dtype != np.bool_:
            raise ConfigError(f"tissue mask: expected a 2-D bool array, got {mask_HW.dtype} {mask_HW.shape}")
        if not all(math.isfinite(step) and step > 0 for step in self.mpp):
            raise ConfigError(
                f"tissue mask: mpp must be positive, got {self.mpp}; state the slide's µm per pixel"
            )
        mask_HW.setflags(write=False)
        object.__setattr__(self, "mask_HW", mask_HW)
        object.__setattr__(self, "mpp", (float(self.mpp[0]), float(self.mpp[1])))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TissueMask):
            return NotImplemented
        return self.mpp == other.mpp and np.array_equal(self.mask_HW, other.mask_HW)

    def __hash__(self) -> int:
        return hash((self.mpp, self.mask_HW.shape, np.packbits(self.mask_HW).tobytes()))

    def __reduce__(self) -> tuple[object, ...]:
        return (_unpack, (np.packbits(self.mask_HW), self.mask_HW.shape, self.mpp))

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in mm²."""
        return float(np.count_nonzero(self.mask_HW)) * self.mpp[0] * self.mpp[1] / 1e6

    def covers(self, region: Region, mpp: Mpp) -> float:
        """Share in [0, 1] of a lattice region that is tissue; the lattice has ``mpp`` µm per pixel.

        Mask pixels count by the area that they share with the region; what lies outside the mask is no
        tissue. Zero exactly if no mask pixel that shares area with the region is tissue.
        """
        top, bottom = self._edges(region.y, region.height, mpp[0] / self.mpp[0])
        left, right = self._edges(region.x, region.width, mpp[1] / self.mpp[1])
        if bottom <= top or right <= left:
            return 0.0
        area = (bottom - top) * (right - left)
        height, width = self.mask_HW.shape
        top, bottom = max(top, 0.0), min(bottom, float(height))
        left, right = max(left, 0.0), min(right, float(width))
        if bottom <= top or right <= left:
            return 0.0
        at = self._sums().item
        y0, x0, y1, x1 = int(top), int(left), math.ceil(bottom), math.ceil(right)
        touched = at(y1, x1) - at(y0, x1) - at(y1, x0) + at(y0, x0)
        if touched == 0:
            return 0.0
        if touched == (y1 - y0) * (x1 - x0):
            return min((bottom - top) * (right - left) / area, 1.0)

        def integral(y: float, x: float) -> float:
            row, col = int(y), int(x)
            dy, dx = y - row, x - col
            upper = at(row, col) * (1 - dx) + at(row, col + 1) * dx
            lower = at(row + 1, col) * (1 - dx) + at(row + 1, col + 1) * dx
            return float(upper * (1 - dy) + lower * dy)

        tissue = integral(bottom, right) - integral(top, right) - integral(bottom, left) + integral(top, left)
        return min(max(tissue / area, _TINY), 1.0)

    def covers_many(
        self, regions: Sequence[Region] | npt.NDArray[np.int64], mpp: Mpp
    ) -> npt.NDArray[np.float64]:
        """``covers`` for many regions, or for an int array [N, 4] of (y, x, height, width)."""
        if not isinstance(regions, np.ndarray):
            regions = np.array([(r.y, r.x, r.height, r.width) for r in regions], np.int64).reshape(-1, 4)
        height, width = self.mask_HW.shape
        top, bottom = self._many_edges(regions[:, 0], regions[:, 2], mpp[0] / self.mpp[0])
        left, right = self._many_edges(regions[:, 1], regions[:, 3], mpp[1] / self.mpp[1])
        area = np.maximum(bottom - top, 0.0) * np.maximum(right - left, 0.0)
        top, bottom = np.clip(top, 0, height), np.clip(bottom, 0, height)
        left, right = np.clip(left, 0, width), np.clip(right, 0, width)
        inside = (bottom > top) & (right > left)
        tissue = self._integrals(bottom, right) - self._integrals(top, right)
        tissue += self._integrals(top, left) - self._integrals(bottom, left)
        y0, x0 = np.floor(top).astype(np.int64), np.floor(left).astype(np.int64)
        y1, x1 = np.ceil(bottom).astype(np.int64), np.ceil(right).astype(np.int64)
        table = self._sums()
        touched = table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
        full = touched == (y1 - y0) * (x1 - x0)
        tissue = np.where(full, (bottom - top) * (right - left), tissue)
        share = np.clip(tissue / np.where(inside, area, 1.0), _TINY, 1.0)
        return np.asarray(np.where(inside & (touched > 0), share, 0.0), np.float64)

    def _sums(self) -> npt.NDArray[np.int32]:
        """``sums[y, x]``: tissue pixels above y and left of x; the last row and column stand twice."""
        if self._table is None:
            height, width = self.mask_HW.shape
            table = np.zeros((height + 2, width + 2), np.int32)
            np.cumsum(self.mask_HW, axis=0, dtype=np.int32, out=table[1:-1, 1:-1])
            np.cumsum(table[1:-1, 1:-1], axis=1, out=table[1:-1, 1:-1])
            table[-1], table[:, -1] = table[-2], table[:, -2]
            table[-1, -1] = table[-2, -2]
            object.__setattr__(self, "_table", table)
            return table
        return self._table

    @staticmethod
    def _edges(start: int, length: int, scale: float) -> tuple[float, float]:
        low, high = start * scale, (start + length) * scale
        low_px, high_px = round(low), round(high)
        return (
            float(low_px) if abs(low - low_px) < _SNAP else low,
            float(high_px) if abs(high - high_px) < _SNAP else high,
        )

    @staticmethod
    def _many_edges(
        start: npt.NDArray[np.int64], length: npt.NDArray[np.int64], scale: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        low, high = start * scale, (start + length) * scale
        low_px, high_px = np.rint(low), np.rint(high)
        return (
            np.where(np.abs(low - low_px) < _SNAP, low_px, low),
            np.where(np.abs(high - high_px) < _SNAP, high_px, high),
        )

    def _integrals(self, y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        table = self._sums()
        row, col = y.astype(np.int64), x.astype(np.int64)
        dy, dx = y - row, x - col
        upper = table[row, col] * (1 - dx) + table[row, col + 1] * dx
        lower = table[row + 1, col] * (1 - dx) + table[row + 1, col + 1] * dx
        return np.asarray(upper * (1 - dy) + lower * dy, np.float64)


def _unpack(bits: npt.NDArray[np.uint8], shape: tuple[int, int], mpp: Mpp) -> TissueMask:
    flat = np.unpackbits(bits, count=shape[0] * shape[1])
    return TissueMask(mask_HW=flat.view(np.bool_).reshape(shape), mpp=mpp)
