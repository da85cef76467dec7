"""From generated tiles to blocks: collect what each block needs, then blend it in one go.

Why collecting and blending are apart: which block is complete is bookkeeping and must be done in one
place; blending is pure and heavy, so the pipeline runs it on any thread it likes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.core.blend import SAMPLE, Placed, Taper, blend_block
from wsi_pipeline.core.geometry import BlockIndex, Region, TileIndex
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import LABEL_CELL, U8_BHWC, U8_HW, U8_HWC, WHITE, Block, TileBatch

__all__ = ["Gather", "Stitcher", "blend"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Everything that one block is made of: its place, and its share of each generated tile."""

    index: BlockIndex
    region: Region
    tiles: Mapping[TileIndex, Placed]
    grid: TileGrid

    @property
    def needs_background(self) -> bool:
        """True where the plan left out at least one tile of this block."""
        return any(index not in self.tiles for index in self.grid.touching(self.region))


def blend(gather: Gather, read_background: Callable[[Region], U8_HWC] | None, taper: Taper = "sin2") -> Block:
    """Blend one block; ``read_background`` None means white. Pure: any thread, any order."""
    region = gather.region
    if read_background is not None and gather.needs_background:
        background = read_background(region)
    else:
        background = np.broadcast_to(np.uint8(WHITE), (region.height, region.width, 3))
    pixels, samples = blend_block(region, gather.grid, gather.tiles.get, background, taper=taper)
    return Block(level=0, index=gather.index, pixels_HWC=pixels, disagreement_HW=_largest_in_cell(samples))


def _largest_in_cell(samples_HW: U8_HW) -> U8_HW:
    factor = LABEL_CELL // SAMPLE
    height, width = samples_HW.shape
    padded = np.pad(samples_HW, ((0, -height % factor), (0, -width % factor)))
    cells = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor)
    return np.asarray(cells.max(axis=(1, 3)), np.uint8)


class Stitcher:
    """Hands out each block of ``todo`` once all its tiles have arrived, always along the Z curve.

    A tile's pixels are kept only for the blocks that still need them, so memory is bounded by the
    border between finished and unfinished blocks, not by the slide's area.
    """

    def __init__(self, plan: SlidePlan, todo: Collection[BlockIndex]) -> None:
        self._plan = plan
        self._queue = deque(plan.in_order(todo))
        self._regions = {index: plan.shape.region(0, index) for index in self._queue}
        self._waiting = {index: set(plan.tiles_of(index)) for index in self._queue}
        self._users: dict[TileIndex, list[BlockIndex]] = {}
        for index in self._queue:
            for tile in self._waiting[index]:
                self._users.setdefault(tile, []).append(index)
        self._tiles: dict[BlockIndex, dict[TileIndex, Placed]] = {i: {} for i in self._queue}

    def put(self, batch: TileBatch, generated_BHWC: U8_BHWC) -> Iterator[Gather]:
        """Take in one generated batch; yields the blocks that are complete now."""
        halo = self._plan.grid.halo
        for tile, pixels in zip(batch.tiles, generated_BHWC, strict=False):
            inner = pixels[halo : pixels.shape[0] - halo, halo : pixels.shape[1] - halo]
            users = self._users.pop(tile.index, [])
            for index in users:
                share = tile.write.intersect(self._regions[index])
                if share is None:
                    continue
                part = inner[share.slices(tile.write)]
                # A view would keep the whole batch alive until the last of these blocks is done.
                self._tiles[index][tile.index] = (share, part.copy() if len(users) > 1 else part)
                self._waiting[index].discard(tile.index)
        yield from self.ready()

    def ready(self) -> Iterator[Gather]:
        """Blocks at the head of the Z curve that wait for no tile (also those that never had one)."""
        while self._queue and not self._waiting[self._queue[0]]:
            index = self._queue.popleft()
            yield Gather(
                index=index,
                region=self._regions.pop(index),
                tiles=self._tiles.pop(index),
                grid=self._plan.grid,
            )
