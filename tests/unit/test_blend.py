"""Blending: an integer partition of unity, independent of how the slide is cut into blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.blend import AXIS_UNIT, axis_weights, blend_block
from wsi_pipeline.core.geometry import Region, Size, TileIndex
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.errors import ConfigError

grids = st.builds(
    lambda tile, share, height, width: TileGrid(
        size=Size(height, width), tile=tile, overlap=int(share * (tile - 1))
    ),
    st.integers(4, 40),
    st.floats(0, 0.85),
    st.integers(1, 120),
    st.integers(1, 120),
)


def random_tiles(grid: TileGrid, seed: int, share: float = 1.0) -> dict[TileIndex, np.ndarray]:
    rng = np.random.default_rng(seed)
    tiles = {}
    for index in grid.touching(Region.of(grid.size)):
        pixels = rng.integers(0, 256, (grid.write_side, grid.write_side, 3), dtype=np.uint8)
        if rng.random() < share:
            tiles[index] = (grid.write_region(index), pixels)
    return tiles


@given(grids, st.sampled_from(["sin2", "uniform"]))
def test_weights_are_an_integer_partition_of_unity(grid: TileGrid, taper: str) -> None:
    for extent in (grid.size.height, grid.size.width):
        count = grid.count(extent)
        total = np.zeros((count - 1) * grid.stride + grid.write_side, np.int64)
        for i, weight in enumerate(axis_weights(count, grid.write_side, grid.stride, taper)):
            total[i * grid.stride : i * grid.stride + grid.write_side] += weight
        assert len(total) >= extent
        assert (total == AXIS_UNIT).all()


@settings(deadline=None, max_examples=60)
@given(grids, st.integers(0, 2**32 - 1), st.floats(0, 1), st.data())
def test_any_cut_into_regions_gives_the_same_bytes(
    grid: TileGrid, seed: int, share: float, data: st.DataObject
) -> None:
    tiles = random_tiles(grid, seed, share)
    background = np.random.default_rng(seed + 1).integers(
        0, 256, (grid.size.height, grid.size.width, 3), dtype=np.uint8
    )
    whole, _ = blend_block(Region.of(grid.size), grid, tiles.get, background)
    y = data.draw(st.integers(0, grid.size.height - 1))
    x = data.draw(st.integers(0, grid.size.width - 1))
    part = Region(
        y,
        x,
        data.draw(st.integers(1, grid.size.height - y)),
        data.draw(st.integers(1, grid.size.width - x)),
    )
    at = part.slices(Region.of(grid.size))
    cut, _ = blend_block(part, grid, tiles.get, background[at])
    np.testing.assert_array_equal(cut, whole[at])


@settings(deadline=None, max_examples=60)
@given(grids, st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_blend_equals_the_plain_weighted_sum(grid: TileGrid, seed: int, share: float) -> None:
    tiles = random_tiles(grid, seed, share)
    size = grid.size
    background = np.full((size.height, size.width, 3), 200, np.uint8)
    rows, cols = grid.shape
    wy = axis_weights(rows, grid.write_side, grid.stride)
    wx = axis_weights(cols, grid.write_side, grid.stride)
    frame = Region(0, 0, (rows - 1) * grid.stride + grid.tile, (cols - 1) * grid.stride + grid.tile)
    total = np.zeros((frame.height, frame.width, 3), np.int64)
    padded = np.full_like(total, 200)
    for row in range(rows):
        for col in range(cols):
            index = TileIndex(row, col)
            at = grid.write_region(index).slices(frame)
            pixels = tiles[index][1] if index in tiles else padded[at]
            total[at] += np.outer(wy[row], wx[col])[:, :, None].astype(np.int64) * pixels
    expected = (total + (1 << 13)) >> 14
    blended, _ = blend_block(Region.of(size), grid, tiles.get, background)
    np.testing.assert_array_equal(blended, expected[: size.height, : size.width])


def test_equal_tiles_leave_no_trace_and_differing_ones_are_measured() -> None:
    grid = TileGrid(size=Size(64, 64), tile=40, overlap=16)
    flat = {
        index: (grid.write_region(index), np.full((40, 40, 3), 90, np.uint8))
        for index in grid.touching(Region.of(grid.size))
    }
    white = np.full((64, 64, 3), 255, np.uint8)
    pixels, differs = blend_block(Region.of(grid.size), grid, flat.get, white)
    assert (pixels == 90).all()
    assert not differs.any()

    region, _ = flat[TileIndex(0, 1)]
    flat[TileIndex(0, 1)] = (region, np.full((40, 40, 3), 120, np.uint8))
    pixels, differs = blend_block(Region.of(grid.size), grid, flat.get, white)
    assert differs.max() == 30
    assert not differs[:, : 24 // 4].any(), "no overlap there, no disagreement"
    ramp = pixels[0, 24:40, 0].astype(int)
    assert ramp[0] == 90
    assert ramp[-1] == 120
    assert (np.diff(ramp) >= 0).all()


def test_a_tile_without_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stride"):
        TileGrid(size=Size(10, 10), tile=64, halo=16, overlap=32)


def test_the_weights_of_a_giant_axis_cost_no_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    weights = axis_weights(20_000, 512, 448)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    np.testing.assert_array_equal(weights[1], weights[19_000])
    np.testing.assert_array_equal(weights[0], axis_weights(9, 512, 448)[0])
    np.testing.assert_array_equal(weights[-1], axis_weights(9, 512, 448)[-1])
