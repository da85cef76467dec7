"""Pieces of a slide to measure: where the lattice lines lie, which strips to read, and fields made anew.

A *strip* is one period of the tile grid across a set of parallel lines, ``MARGIN`` pixels wider on both
sides, and a piece of the period along them. Strips never share a line pixel, so each line is counted once.
Strips of horizontal lines are transposed when read: all measuring code knows vertical lines only.

Why strips: memory and time are then bounded whatever the slide, and a strip, which holds its lines and its
control lines side by side in the same tissue, is the natural unit of a bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsi_pipeline.core.batching import groups, read_batch
from wsi_pipeline.core.blend import Placed, Taper, blend_block
from wsi_pipeline.core.geometry import BlockIndex, Region, TileIndex, ceil_div
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.plan import Background, SlidePlan
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Context, Generator, Tile, View

__all__ = [
    "MARGIN",
    "OPTICAL_DENSITY",
    "Axis",
    "Lines",
    "Strip",
    "channel_mean",
    "lattice_lines",
    "render_field",
    "stained",
    "strips",
]

Axis: TypeAlias = Literal["y", "x"]
"""The axis that lines cut: ``x`` means vertical lines."""

MARGIN = 24
"""Pixels beyond a period that a strip reads, so that every line has both its neighbourhoods (6 to 20 px)."""

PIECE = 512
"""Largest length of a strip along its lines."""

OPTICAL_DENSITY: npt.NDArray[np.float32] = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
"""Optical density of a grey level, ``-log10((I + 1) / 256)``."""

_SMOOTH_PX = 33
_MIN_STAIN = 0.03
_MIN_DENSITY = 0.2


def render_field(
    view: View,
    region: Region,
    grid: TileGrid,
    generator: Generator,
    context: Context,
    *,
    tissue_tiles_HW: npt.NDArray[np.bool_] | None = None,
    background: Background = "matched",
    taper: Taper = "sin2",
    shift: tuple[int, int] = (0, 0),
    noise_key: int = 0,
    batch: int | None = None,
) -> U8_HWC:
    """Generate and blend one lattice region in memory, [H, W, 3] uint8, with any scheme of tiling.

    ``grid`` and ``taper`` are the scheme; ``tissue_tiles_HW`` bool [tile rows, tile columns] the tiles that
    are generated, None for all; ``background`` what stands in for the others, as in ``SlidePlan``.
    ``shift`` (dy, dx) in [0, stride) moves the grid up and to the left by so many pixels, while tiles keep
    their true place on the lattice, as a generator with noise anchored to the lattice needs it; with the
    plan's ``noise_key`` it draws the noise of the output. ``batch`` None: the generator's own. All tiles that
    touch the region are held at once.
    """
    dy, dx = shift
    frame = region.shifted(dy, dx)
    if shift != (0, 0):
        size = type(grid.size)(grid.size.height + dy, grid.size.width + dx)
        grid = TileGrid(size=size, tile=grid.tile, halo=grid.halo, overlap=grid.overlap)
    touching = list(grid.touching(frame))
    indices = [i for i in touching if tissue_tiles_HW is None or tissue_tiles_HW[i]]
    placed: dict[TileIndex, Placed] = {}
    count, halo = batch or generator.spec.batch, grid.halo
    for group in groups([_moved(grid.tile_at(index), -dy, -dx) for index in indices], count):
        generated_BHWC = generator(read_batch(view, group, count, noise_key), context)
        for tile, pixels_HWC in zip(group, generated_BHWC, strict=False):
            inner_HWC = pixels_HWC[halo : pixels_HWC.shape[0] - halo, halo : pixels_HWC.shape[1] - halo]
            placed[tile.index] = (grid.write_region(tile.index), inner_HWC.copy())
    behind_HWC = np.broadcast_to(np.uint8(WHITE), (region.height, region.width, 3))
    if background != "white" and len(indices) < len(touching):
        behind_HWC = view.read(region)
        if background == "matched":
            behind_HWC = generator.background(behind_HWC, context)
    return blend_block(frame, grid, placed.get, behind_HWC, taper=taper)[0]


def _moved(tile: Tile, dy: int, dx: int) -> Tile:
    return Tile(index=tile.index, read=tile.read.shifted(dy, dx), write=tile.write.shifted(dy, dx))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Positions of the lattice lines along one axis, ascending; a line at c runs between c - 1 and c.

    ``tile``: starts, ends and ramp ends of write regions; ``cell``: borders of a generator's internal cells
    that are no tile line (empty where it has none).
    """

    tile: npt.NDArray[np.int64]
    cell: npt.NDArray[np.int64]

    def away(self, positions: npt.NDArray[np.int64], distance: int = 2) -> npt.NDArray[np.bool_]:
        """True for positions that are more than ``distance`` pixels from every line of either kind."""
        known = np.concatenate([self.tile, self.cell])
        near = (known[:, None] + np.arange(-distance, distance + 1)).ravel()
        return ~np.isin(positions, near)


def lattice_lines(grid: TileGrid, axis: Axis, cell: int | None = None) -> Lines:
    """Lines of a whole slide along an axis; the slide's own edges are none.

    ``cell``: side in pixels of the cells into which a generator cuts its input from the tile's corner.
    """
    extent = grid.size.width if axis == "x" else grid.size.height
    count, side, stride = grid.count(extent), grid.write_side, grid.stride
    width = min(grid.overlap, side - side // 2)  # as in core.blend: a ramp is at most half a tile
    first = np.arange(count, dtype=np.int64) * stride
    tile = np.unique(
        np.concatenate([first[1:], first[1:] + width, first[:-1] + side, first[:-1] + side - width])
    )
    inner = np.arange(cell, grid.tile, cell) - grid.halo if cell else np.zeros(0, np.int64)
    inner = inner[(inner > 0) & (inner < side)]
    cells = np.setdiff1d((first[:, None] + inner).ravel(), tile)
    return Lines(tile=tile[tile < extent], cell=cells[cells < extent])


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One piece of the tile grid to measure; ``origin``: lattice coordinate where its period begins."""

    axis: Axis
    region: Region
    origin: int

    def read(self, view: View) -> U8_HWC:
        """Pixels with the lines vertical: [along, across, 3] uint8."""
        pixels_HWC = view.read(self.region)
        return pixels_HWC if self.axis == "x" else np.ascontiguousarray(pixels_HWC.swapaxes(0, 1))

    def inside(self, grid: TileGrid) -> npt.NDArray[np.bool_]:
        """Bool [across]: which columns of ``read`` lie on the slide."""
        extent = grid.size.width if self.axis == "x" else grid.size.height
        columns = self.origin - MARGIN + np.arange(grid.stride + 2 * MARGIN)
        return np.asarray((columns >= 0) & (columns < extent))


def strips(plan: SlidePlan, axis: Axis, rng: np.random.Generator) -> Iterator[Strip]:
    """Strips between two generated tiles, in random order; only where the plan makes every block."""
    tissue_HW, stride = plan.tissue_tiles_HW, plan.grid.stride
    both = tissue_HW[:, 1:] & tissue_HW[:, :-1] if axis == "x" else tissue_HW[1:] & tissue_HW[:-1]
    pieces = ceil_div(stride, PIECE)
    length = ceil_div(stride, pieces)
    candidates = np.argwhere(both)
    if not len(candidates):
        return
    planned = plan.blocks()
    for number in rng.permutation(len(candidates) * pieces).tolist():
        row, col = candidates[number // pieces].tolist()
        start = (number % pieces) * length
        along = min(length, stride - start)
        if axis == "x":
            origin = (col + 1) * stride
            region = Region(row * stride + start, origin - MARGIN, along, stride + 2 * MARGIN)
        else:
            origin = (row + 1) * stride
            region = Region(origin - MARGIN, col * stride + start, stride + 2 * MARGIN, along)
        cut = _on_slide(region, axis, plan.grid)
        if cut is not None and is_made(plan, cut, planned):
            yield Strip(axis=axis, region=cut, origin=origin)


def _on_slide(region: Region, axis: Axis, grid: TileGrid) -> Region | None:
    """The strip without what lies beyond the slide *along* its lines; across it keeps its width."""
    if axis == "x":
        return region.intersect(Region(0, region.x, grid.size.height, region.width))
    return region.intersect(Region(region.y, 0, region.height, grid.size.width))


def is_made(plan: SlidePlan, region: Region, planned: frozenset[BlockIndex]) -> bool:
    """True where every block that the region touches on the slide belongs to the output."""
    inside = region.intersect(Region.of(plan.grid.size))
    if inside is None:
        return False
    rows = range(inside.y // plan.block, ceil_div(inside.bottom, plan.block))
    cols = range(inside.x // plan.block, ceil_div(inside.right, plan.block))
    return all(BlockIndex(row, col) in planned for row in rows for col in cols)


def stained(pixels_HWC: U8_HWC) -> npt.NDArray[np.bool_]:
    """Tissue of a source field, bool [H, W]: stained, or dark, on an average over 33 x 33 pixels.

    Stain is green density minus the lesser of red and blue (as in ``core.tissue``), which is zero for glass
    of any grey. The average keeps small holes in tissue, whose borders are texture like any other.
    """
    od_HWC = OPTICAL_DENSITY[pixels_HWC]
    stain = od_HWC[..., 1] - np.minimum(od_HWC[..., 0], od_HWC[..., 2])
    smooth = ndimage.uniform_filter(stain, _SMOOTH_PX, mode="nearest")
    dark = ndimage.uniform_filter(channel_mean(od_HWC), _SMOOTH_PX, mode="nearest")
    return np.asarray((smooth > _MIN_STAIN) | (dark > _MIN_DENSITY))


def channel_mean(values_HWC: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean over R, G, B; channel by channel, which is several times faster than numpy's mean over three."""
    total = values_HWC[..., 0] + values_HWC[..., 1] + values_HWC[..., 2]
    return np.asarray(total / np.float32(3), np.float32)
