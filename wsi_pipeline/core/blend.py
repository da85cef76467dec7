"""Blending by gather with integer weights: a block is a sum over its tiles that no order can change.

Along each axis the tapers of all tiles of the *grid* are integers that sum to 2^7 at every pixel, so
their products sum to exactly 2^14 (a partition of unity). A grid position that the plan left out
contributes the background instead of a tile: tissue borders are therefore feathered with the same
weights, and who is missing is decided by the plan, never by arrival. uint8 times 2^14 fits int32, and
integer addition is associative, so batch order, worker count and resume cannot alter a bit.

Why zones: along each axis a block falls into stretches covered by one tile and stretches covered by
several. Where one tile is alone, its weight is 2^14 and the sum is a copy; most of the area is such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Region, TileIndex
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.protocols import U8_HW, U8_HWC

__all__ = ["AXIS_UNIT", "SAMPLE", "Placed", "Taper", "axis_weights", "blend_block"]

AXIS_UNIT = 128
"""Sum of the weights along one axis; the two-dimensional sum is its square, 2^14."""

SAMPLE = 4
"""Disagreement is measured at every fourth lattice pixel along both axes."""

Taper: TypeAlias = Literal["sin2", "uniform"]
Placed: TypeAlias = tuple[Region, U8_HWC]
"""Generated pixels and the lattice region that they cover."""
Tiles: TypeAlias = Callable[[TileIndex], Placed | None]


@lru_cache(maxsize=64)
def axis_weights(
    count: int, side: int, stride: int, taper: Taper = "sin2"
) -> tuple[npt.NDArray[np.uint16], ...]:
    """Integer weights of ``count`` tiles of ``side`` pixels at ``stride``, one [side] array a tile.

    At every pixel that the tiles cover the weights sum to ``AXIS_UNIT``. ``sin2`` is the flat-top
    cosine taper ``sin^2(pi (t + 1/2) / 2v)`` over the overlap v (Hann where v is half the side);
    ``uniform`` is the count average. Beyond the first and last tile the missing neighbour's share
    goes to the outermost tile.
    """
    reach = side // stride + 1
    few = min(count, 2 * reach + 1)
    weights = _dense_weights(few, side, stride, taper)
    # Only tiles within reach of an end differ from the others: one array serves the whole middle.
    return (*weights[:reach], *weights[reach : reach + 1] * (count - few), *weights[reach:])


def _dense_weights(count: int, side: int, stride: int, taper: Taper) -> list[npt.NDArray[np.uint16]]:
    ramp = np.ones(side)
    overlap = side - stride
    if taper == "sin2" and overlap:
        width = min(overlap, side - side // 2)
        rise = np.sin(np.pi * (np.arange(width) + 0.5) / (2 * width)) ** 2
        ramp[:width] = rise
        ramp[side - width :] = np.minimum(ramp[side - width :], rise[::-1])
    extent = (count - 1) * stride + side
    shares = np.zeros((count, extent))
    for position in range(-(side // stride) - 1, count + side // stride + 1):
        start = position * stride
        lo, hi = max(start, 0), min(start + side, extent)
        if lo < hi:
            shares[min(max(position, 0), count - 1), lo:hi] += ramp[lo - start : hi - start]
    integers = _largest_remainder(shares / shares.sum(axis=0), AXIS_UNIT)
    return [integers[i, i * stride : i * stride + side].copy() for i in range(count)]


def _largest_remainder(shares: npt.NDArray[np.float64], unit: int) -> npt.NDArray[np.uint16]:
    """Integers that sum to ``unit`` along axis 0; the rounding remainder goes to the largest share."""
    rounded = np.floor(shares * unit + 0.5).astype(np.int64)
    columns = np.arange(shares.shape[1])
    rounded[shares.argmax(axis=0), columns] += unit - rounded.sum(axis=0)
    return rounded.astype(np.uint16)


def blend_block(
    region: Region,
    grid: TileGrid,
    tiles: Tiles,
    background: U8_HWC,
    *,
    taper: Taper = "sin2",
) -> tuple[U8_HWC, U8_HW]:
    """Blend the tiles of ``grid`` over the lattice ``region``.

    ``tiles(index)`` is the generated part of a tile that covers at least ``region``'s share of it, or
    None where the plan has no tile; ``background`` [H, W, 3] uint8 covers ``region`` and stands in for
    the missing ones. Returns the pixels [H, W, 3] and the disagreement [ceil(H / 4), ceil(W / 4)] uint8:
    at every fourth pixel the mean over R, G, B of (largest - smallest) among the generated tiles, 0
    where fewer than two meet.
    """
    out = np.empty((region.height, region.width, 3), np.uint8)
    differs = np.zeros((-(-region.height // SAMPLE), -(-region.width // SAMPLE)), np.uint8)
    rows, cols = grid.shape
    side, stride = grid.write_side, grid.stride
    wy = axis_weights(rows, side, stride, taper)
    wx = axis_weights(cols, side, stride, taper)
    for y0, y1, tile_rows in _stretches(region.y, region.bottom, side, stride, rows):
        for x0, x1, tile_cols in _stretches(region.x, region.right, side, stride, cols):
            zone = Region(y0, x0, y1 - y0, x1 - x0)
            at = zone.slices(region)
            parts = [[_part(tiles(TileIndex(row, col)), zone) for col in tile_cols] for row in tile_rows]
            generated = [part for line in parts for part in line if part is not None]
            if not generated:
                out[at] = background[at]
                continue
            filled = [[background[at] if p is None else p for p in line] for line in parts]
            weights_y = [wy[row][y0 - row * stride : y1 - row * stride] for row in tile_rows]
            weights_x = [wx[col][x0 - col * stride : x1 - col * stride] for col in tile_cols]
            _weighted_sum(filled, weights_y, weights_x, out[at])
            if len(generated) > 1:
                _spread(generated, zone, region, differs)
    return out, differs


def _stretches(start: int, stop: int, side: int, stride: int, count: int) -> Iterator[tuple[int, int, range]]:
    """Cut [start, stop) where the set of covering tiles changes; the last tile covers what is left."""
    cuts = {start, stop}
    for tile in range(max(0, start // stride - side // stride - 1), min(count, stop // stride + 1)):
        cuts.update(c for c in (tile * stride, tile * stride + side) if start < c < stop)
    ordered = sorted(cuts)
    for lo, hi in zip(ordered[:-1], ordered[1:], strict=True):
        first = max(0, -(-(lo - side + 1) // stride))
        last = min(count - 1, lo // stride)
        yield lo, hi, range(first, last + 1)


def _part(placed: Placed | None, zone: Region) -> U8_HWC | None:
    return None if placed is None else placed[1][zone.slices(placed[0])]


def _weighted_sum(
    parts: list[list[U8_HWC]],
    weights_y: list[npt.NDArray[np.uint16]],
    weights_x: list[npt.NDArray[np.uint16]],
    out: U8_HWC,
) -> None:
    """Sum of weight times pixel over a zone, rounded half up, into ``out``."""
    if len(weights_y) == 1 and len(weights_x) == 1:
        out[...] = parts[0][0]
        return
    if len(weights_y) == 1:
        total = _weigh(parts[0], weights_x, axis=1)
    elif len(weights_x) == 1:
        total = _weigh([line[0] for line in parts], weights_y, axis=0)
    else:
        sums = np.full((out.shape[0], out.shape[1] * 3), 1 << 13, np.int32)
        for line, weight in zip(parts, weights_y, strict=True):
            sums += _weigh(line, weights_x, axis=1) * weight.astype(np.int32)[:, None]
        out[...] = (sums >> 14).reshape(out.shape)
        return
    total += AXIS_UNIT // 2
    total >>= 7
    out[...] = total.reshape(out.shape)


def _weigh(parts: list[U8_HWC], weights: list[npt.NDArray[np.uint16]], axis: int) -> npt.NDArray[np.uint16]:
    """One axis of the sum as [H, 3 W]; at most 255 * 128, so uint16 is exact.

    Cast first, then multiply in place over long rows: four times as fast as one mixed-type product.
    """
    height, width, _ = parts[0].shape
    total = np.zeros((height, 3 * width), np.uint16)
    for part, weight in zip(parts, weights, strict=True):
        product = part.astype(np.uint16, order="C").reshape(height, 3 * width)
        product *= weight[:, None] if axis == 0 else np.repeat(weight, 3)
        total += product
    return total


def _spread(generated: list[U8_HWC], zone: Region, region: Region, differs: U8_HW) -> None:
    """Record how far the generated tiles differ, at the lattice-anchored sample points of the zone."""
    dy, dx = (region.y - zone.y) % SAMPLE, (region.x - zone.x) % SAMPLE
    samples = [part[dy::SAMPLE, dx::SAMPLE] for part in generated]
    high, low = samples[0], samples[0]
    for sample in samples[1:]:
        high, low = np.maximum(high, sample), np.minimum(low, sample)
    if high.size == 0:
        return
    mean = (high - low).sum(axis=2, dtype=np.uint16) // 3
    y, x = (zone.y + dy - region.y) // SAMPLE, (zone.x + dx - region.x) // SAMPLE
    differs[y : y + mean.shape[0], x : x + mean.shape[1]] = mean
