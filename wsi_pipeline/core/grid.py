"""The tile grid: where tiles lie on the lattice, and which of them touch a region.

Why the grid starts at the slide's (0, 0) and not at the tissue: a tile's content depends on where its
border falls (normalisation, attention, padding), so only a grid that never moves lets a region of
interest, a resumed run and a whole-slide run produce the same pixels (formats_and_seams 5.4, row 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wsi_pipeline.core.geometry import Region, Size, TileIndex, ceil_div
from wsi_pipeline.core.protocols import Tile
from wsi_pipeline.errors import ConfigError

__all__ = ["TileGrid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGrid:
    """Square tiles of side ``tile`` on a lattice of ``size``; ``stride = tile - 2 * halo - overlap``.

    ``halo`` is read and thrown away, ``overlap`` is written by both neighbours and blended. Tile
    ``(0, 0)`` writes from lattice pixel (0, 0); the last tiles may reach beyond the slide.
    """

    size: Size
    tile: int
    halo: int = 0
    overlap: int = 64

    def __post_init__(self) -> None:
        if self.halo < 0 or self.overlap < 0 or self.stride < 1:
            raise ConfigError(
                f"tiling: tile {self.tile} px leaves no stride with halo {self.halo} and overlap "
                f"{self.overlap}; lower them so that tile - 2*halo - overlap is at least 1"
            )
        if self.size.height < 1 or self.size.width < 1:
            raise ConfigError(f"tiling: the slide has no pixels at this resolution ({self.size})")

    @property
    def write_side(self) -> int:
        return self.tile - 2 * self.halo

    @property
    def stride(self) -> int:
        return self.write_side - self.overlap

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tile rows and columns that cover the slide."""
        return self.count(self.size.height), self.count(self.size.width)

    def count(self, extent: int) -> int:
        """Number of tiles that cover ``extent`` pixels along one axis."""
        return max(1, ceil_div(extent - self.overlap, self.stride))

    def tile_at(self, index: TileIndex) -> Tile:
        write = self.write_region(index)
        return Tile(index=index, read=write.grown(self.halo), write=write)

    def write_region(self, index: TileIndex) -> Region:
        side = self.write_side
        return Region(index.row * self.stride, index.col * self.stride, side, side)

    def rows_touching(self, start: int, stop: int) -> range:
        """Tile rows whose write regions share a pixel with lattice rows [start, stop)."""
        return self._touching(start, stop, self.shape[0])

    def cols_touching(self, start: int, stop: int) -> range:
        """Tile columns whose write regions share a pixel with lattice columns [start, stop)."""
        return self._touching(start, stop, self.shape[1])

    def touching(self, region: Region) -> Iterator[TileIndex]:
        """Tiles whose write regions share a pixel with ``region``, row-major."""
        for row in self.rows_touching(region.y, region.bottom):
            for col in self.cols_touching(region.x, region.right):
                yield TileIndex(row, col)

    def _touching(self, start: int, stop: int, count: int) -> range:
        first = ceil_div(start - self.write_side + 1, self.stride)
        last = (stop - 1) // self.stride
        return range(max(first, 0), min(last, count - 1) + 1)
