"""The plan: everything that decides the output's pixels, computed before the first of them is made.

Every output block is a function of (slide, plan, generator). Batches, threads, processes, order and
resume choose only when that function is evaluated.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import BlockIndex, Mpp, Region, TileIndex, ceil_div
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.noise import noise_key
from wsi_pipeline.core.protocols import Context, GeneratorSpec, Tile
from wsi_pipeline.core.pyramid import BlockKey, PyramidShape, morton

__all__ = ["Background", "Band", "SlidePlan"]

Background: TypeAlias = Literal["matched", "source", "white"]
"""What no tissue tile covers: the source in the generator's colours, the source as it is, or white."""

Band: TypeAlias = tuple[int, int]
"""First and one-past-last block row of level 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlidePlan:
    """What shall be made of one slide.

    ``tissue_tiles_HW``: bool [tile rows, tile columns], the tiles that are generated; ``block``: side
    of a block in pixels; ``roi``: lattice regions to which the output is limited (whole blocks; empty
    means everything); ``context``: what the generator prepared; ``settings``: further choices that
    change bytes (colour management, codec), kept for the fingerprint and the manifest.
    """

    slide_id: str
    identity: str
    mpp: Mpp
    mpp_origin: str
    grid: TileGrid
    tissue_tiles_HW: npt.NDArray[np.bool_]
    block: int
    background: Background
    seed: int
    generator: GeneratorSpec
    context: Context = field(default_factory=dict)
    roi: tuple[Region, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> PyramidShape:
        return PyramidShape(self.grid.size, self.block)

    @property
    def noise_key(self) -> int:
        """Key of this slide's noise: the content of the file and the seed decide it, its name does not."""
        return noise_key(self.seed, self.identity)

    @property
    def tile_count(self) -> int:
        """Number of tiles that are generated, counting only those that the blocks need."""
        return len(self.tiles_for(self.blocks()))

    def blocks(self, band: Band | None = None) -> frozenset[BlockIndex]:
        """Level-0 blocks to make, of one band or of the whole slide.

        With a white background only blocks that a tissue tile touches exist; what is missing reads
        as white. A region of interest keeps the blocks that it touches, whole.
        """
        rows, cols = self.shape.grid(0)
        first, stop = band if band is not None else (0, rows)
        inside = (BlockIndex(row, col) for row in range(first, stop) for col in range(cols))
        return frozenset(index for index in inside if self._wanted(index))

    def block_keys(self, band: Band | None = None) -> list[BlockKey]:
        """Level and index of every block of every level that the level-0 blocks of ``blocks(band)`` make."""
        levels = self.shape.planned(self.blocks(band))
        return [(level, index) for level, indices in enumerate(levels) for index in indices]

    def _wanted(self, index: BlockIndex) -> bool:
        region = self.shape.region(0, index)
        if self.roi and not any(region.intersect(part) for part in self.roi):
            return False
        return self.background != "white" or self._any_tissue(region)

    def _any_tissue(self, region: Region) -> bool:
        rows = self.grid.rows_touching(region.y, region.bottom)
        cols = self.grid.cols_touching(region.x, region.right)
        return bool(self.tissue_tiles_HW[rows.start : rows.stop, cols.start : cols.stop].any())

    def tiles_of(self, index: BlockIndex) -> list[TileIndex]:
        """Generated tiles that write into one block, row-major."""
        touching = self.grid.touching(self.shape.region(0, index))
        return [tile for tile in touching if self.tissue_tiles_HW[tile]]

    def tiles_for(self, blocks: Collection[BlockIndex]) -> list[Tile]:
        """Tiles that these blocks need, each once, in the order in which the blocks are finished."""
        indices = (tile for block in self.in_order(blocks) for tile in self.tiles_of(block))
        return [self.grid.tile_at(tile) for tile in dict.fromkeys(indices)]

    @staticmethod
    def in_order(blocks: Iterable[BlockIndex]) -> list[BlockIndex]:
        """Blocks along the Z curve, which keeps the unfinished part of the pyramid small."""
        return sorted(blocks, key=morton)

    def bands(self, count: int) -> tuple[Band, ...]:
        """At most ``count`` runs of whole block rows, cut at multiples of a power of two.

        The cut lets each band finish as many pyramid levels as possible on its own.
        """
        rows = self.shape.grid(0)[0]
        height = 1
        while ceil_div(rows, height) > count:
            height *= 2
        return tuple((row, min(row + height, rows)) for row in range(0, rows, height))

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides the bytes; outputs mix only if it is equal."""
        plan = self.to_json()
        # What the file is called, and these wishes of a generator, decide no byte (the grid does).
        del plan["slide_id"], plan["mpp_origin"]
        for wish in ("batch", "overlap", "cell"):
            del plan["generator"][wish]
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; the tile map is bit-packed and base64-coded."""
        plan = asdict(self)
        packed = np.packbits(self.tissue_tiles_HW, axis=None).tobytes()
        plan["tissue_tiles_HW"] = {
            "shape": list(self.tissue_tiles_HW.shape),
            "packed": base64.b64encode(packed).decode(),
        }
        plan["context"], plan["settings"] = dict(self.context), dict(self.settings)
        return plan
