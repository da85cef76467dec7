"""The pyramid, block by block: each level is the 2x2 integer mean of the one below, and nothing is re-read.

A block is reduced into its parent's quadrant as soon as it exists; the parent is complete when its last
planned child has arrived, and is reduced in turn. Odd sides are padded by edge replication, so level n
has exactly 2^n times the pixel size of level 0.

Why Morton order: if level-0 blocks come along a Z curve, one unfinished parent a level is all that is
ever held, whatever the size of the slide; row by row it would be a whole row of parents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from wsi_pipeline.core.geometry import BlockIndex, Region, Size, ceil_div
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Block

__all__ = ["BlockKey", "PyramidBuilder", "PyramidShape", "halve", "morton", "parent_of"]

BlockKey = tuple[int, BlockIndex]
"""Level and index of a block."""

SMALLEST_SIDE = 512


def halve(pixels_HWC: U8_HWC) -> U8_HWC:
    """2x2 mean ``(a + b + c + d + 2) >> 2`` of [H, W, 3] uint8; odd sides repeat their last row or column."""
    bottom, right = pixels_HWC.shape[0] % 2, pixels_HWC.shape[1] % 2
    if bottom or right:
        pixels_HWC = np.pad(pixels_HWC, ((0, bottom), (0, right), (0, 0)), mode="edge")
    size = (pixels_HWC.shape[1] // 2, pixels_HWC.shape[0] // 2)
    # cv2's area interpolation at exactly 1/2 is this integer mean; a unit test holds it to that.
    return np.asarray(cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)


def morton(index: BlockIndex) -> int:
    """Position on the Z curve: the bits of row and column interleaved."""
    code = 0
    for bit in range(max(index.row.bit_length(), index.col.bit_length())):
        code |= ((index.row >> bit & 1) << 1 | (index.col >> bit & 1)) << (2 * bit)
    return code


def parent_of(index: BlockIndex) -> BlockIndex:
    return BlockIndex(index.row // 2, index.col // 2)


def _children_of(index: BlockIndex) -> tuple[BlockIndex, ...]:
    row, col = 2 * index.row, 2 * index.col
    return tuple(BlockIndex(row + dy, col + dx) for dy in (0, 1) for dx in (0, 1))


@dataclass(frozen=True, slots=True)
class PyramidShape:
    """Level sizes and the block grid; all levels share the block side, so four blocks make one parent."""

    size: Size
    block: int

    @property
    def levels(self) -> tuple[Size, ...]:
        """Sizes from level 0 on, halving until the longer side is at most 512 pixels."""
        sizes = [self.size]
        while max(sizes[-1].height, sizes[-1].width) > SMALLEST_SIDE:
            sizes.append(sizes[-1].halved())
        return tuple(sizes)

    def grid(self, level: int) -> tuple[int, int]:
        """Number of block rows and columns of a level."""
        size = self.levels[level]
        return ceil_div(size.height, self.block), ceil_div(size.width, self.block)

    def region(self, level: int, index: BlockIndex) -> Region:
        """Pixels of a block, cropped to the level."""
        full = Region(index.row * self.block, index.col * self.block, self.block, self.block)
        inside = full.intersect(Region.of(self.levels[level]))
        if inside is None:
            raise IndexError(f"block {tuple(index)} lies outside level {level}")
        return inside

    def planned(self, level0: Iterable[BlockIndex]) -> list[set[BlockIndex]]:
        """The blocks that exist on every level when these exist on level 0."""
        planned = [set(level0)]
        for _ in self.levels[1:]:
            planned.append({parent_of(index) for index in planned[-1]})
        return planned


class PyramidBuilder:
    """Collects blocks and gives out each parent once its planned children are complete.

    ``mine``: level-0 blocks that this builder will see (one band); parents that also need blocks of
    others are left for a later builder over the whole plan. ``done``: blocks committed earlier, read
    back through ``restore`` only when a parent needs them.
    """

    def __init__(
        self,
        shape: PyramidShape,
        planned: Iterable[BlockIndex],
        mine: Iterable[BlockIndex],
        done: Iterable[BlockKey],
        restore: Callable[[int, BlockIndex], U8_HWC],
    ) -> None:
        self._shape = shape
        self._planned = shape.planned(planned)
        self._done = frozenset(done)
        self._restore = restore
        self._open: dict[BlockKey, dict[BlockIndex, U8_HWC]] = {}
        self._owned = [set(mine)]
        for level in range(1, len(self._planned)):
            below, owned = self._planned[level - 1], self._owned[level - 1]
            self._owned.append(
                {
                    parent
                    for parent in {parent_of(index) for index in owned}
                    if all(c in owned for c in _children_of(parent) if c in below)
                }
            )

    def resume(self) -> Iterator[Block]:
        """Parents whose children were all committed before, with any parent that they complete in turn."""
        for level in range(1, len(self._planned)):
            for index in sorted(self._owned[level], key=morton):
                children = self._planned_children(level, index)
                if (level, index) not in self._done and all(
                    (level - 1, child) in self._done for child in children
                ):
                    yield from self.put(self._assemble(level, index, self._restored(level, index)))

    def put(self, block: Block) -> Iterator[Block]:
        """The block itself, then each ancestor that it completes, from fine to coarse."""
        current: Block | None = block
        while current is not None:
            yield current
            current = self._completed_by(current)

    def _completed_by(self, block: Block) -> Block | None:
        """The parent of ``block``, if ``block`` was the last that it waited for."""
        level, parent = block.level + 1, parent_of(block.index)
        if level >= len(self._planned) or parent not in self._owned[level]:
            return None
        if (level, parent) in self._done:
            return None
        if (level, parent) not in self._open:
            self._open[level, parent] = self._restored(level, parent)
        quadrants = self._open[level, parent]
        quadrants[block.index] = halve(block.pixels_HWC)
        if len(quadrants) < len(self._planned_children(level, parent)):
            return None
        return self._assemble(level, parent, self._open.pop((level, parent)))

    def _restored(self, level: int, index: BlockIndex) -> dict[BlockIndex, U8_HWC]:
        """Quadrants of a parent from the children that were committed before."""
        return {
            child: halve(self._restore(level - 1, child))
            for child in self._planned_children(level, index)
            if (level - 1, child) in self._done
        }

    def _assemble(self, level: int, index: BlockIndex, quadrants: dict[BlockIndex, U8_HWC]) -> Block:
        """A parent from its quadrants; what is not planned stays white."""
        region = self._shape.region(level, index)
        pixels = np.full((region.height, region.width, 3), WHITE, np.uint8)
        for child, quadrant in quadrants.items():
            below = self._shape.region(level - 1, child)
            y, x = below.y // 2 - region.y, below.x // 2 - region.x
            pixels[y : y + quadrant.shape[0], x : x + quadrant.shape[1]] = quadrant
        return Block(level=level, index=index, pixels_HWC=pixels)

    def _planned_children(self, level: int, index: BlockIndex) -> list[BlockIndex]:
        below = self._planned[level - 1]
        return [child for child in _children_of(index) if child in below]
