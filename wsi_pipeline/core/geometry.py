"""Integer geometry on the lattice: sizes, regions and indices, y before x everywhere.

The *lattice* is the integer pixel grid at the working resolution whose origin is the slide's (0, 0).
Pixel ``i`` covers the half-open interval [i, i + 1); its centre lies at ``i + 0.5``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["BlockIndex", "Mpp", "Region", "Size", "TileIndex", "ceil_div"]

Mpp = tuple[float, float]
"""Micrometres per pixel as (y, x)."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer that is not less than the quotient; exact for integers of any size."""
    return -(-numerator // denominator)


class TileIndex(NamedTuple):
    """Position of a tile on the tile grid, in row-major order."""

    row: int
    col: int


class BlockIndex(NamedTuple):
    """Position of a block on the block grid of one pyramid level, in row-major order."""

    row: int
    col: int


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Extent in pixels."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width

    def halved(self) -> Size:
        """Extent of the next pyramid level; odd sides are padded, so the factor is exactly 2."""
        return Size(ceil_div(self.height, 2), ceil_div(self.width, 2))


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """Axis-parallel rectangle ``[y, y + height) x [x, x + width)``; may reach outside the slide."""

    y: int
    x: int
    height: int
    width: int

    @classmethod
    def of(cls, size: Size) -> Region:
        """The whole of an image of this size."""
        return cls(0, 0, size.height, size.width)

    @property
    def bottom(self) -> int:
        return self.y + self.height

    @property
    def right(self) -> int:
        return self.x + self.width

    @property
    def size(self) -> Size:
        return Size(self.height, self.width)

    @property
    def area(self) -> int:
        return max(self.height, 0) * max(self.width, 0)

    def intersect(self, other: Region) -> Region | None:
        """Common part, or None where the two do not share a pixel."""
        y, x = max(self.y, other.y), max(self.x, other.x)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        if bottom <= y or right <= x:
            return None
        return Region(y, x, bottom - y, right - x)

    def shifted(self, dy: int, dx: int) -> Region:
        return Region(self.y + dy, self.x + dx, self.height, self.width)

    def grown(self, margin: int) -> Region:
        """Larger by ``margin`` pixels on all four sides (smaller if negative)."""
        return Region(self.y - margin, self.x - margin, self.height + 2 * margin, self.width + 2 * margin)

    def slices(self, frame: Region) -> tuple[slice, slice]:
        """Row and column slices of this region inside an array that covers ``frame``."""
        y, x = self.y - frame.y, self.x - frame.x
        return slice(y, y + self.height), slice(x, x + self.width)
