"""The pyramid: exact 2x2 means, whatever the order of the blocks and wherever a run was interrupted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.geometry import BlockIndex, Region, Size
from wsi_pipeline.core.protocols import Block
from wsi_pipeline.core.pyramid import PyramidBuilder, PyramidShape, halve, morton


@given(st.integers(1, 33), st.integers(1, 33), st.integers(0, 2**32 - 1))
def test_halve_is_the_rounded_integer_mean(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge").astype(int)
    quads = padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]
    np.testing.assert_array_equal(halve(pixels), (quads + 2) >> 2)


def test_halve_agrees_on_every_quad_sum() -> None:
    sums = np.arange(0, 4 * 255 + 1)
    quads = np.zeros((2, 2 * len(sums), 3), np.uint8)
    for i, total in enumerate(sums):
        for j in range(4):
            quads[j // 2, 2 * i + j % 2] = min(255, max(0, total - 255 * j))
    np.testing.assert_array_equal(halve(quads)[0, :, 0], (sums + 2) >> 2)


def test_morton_visits_quads_before_it_moves_on() -> None:
    order = sorted((BlockIndex(r, c) for r in range(4) for c in range(4)), key=morton)
    assert order[:4] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(i.row // 2, i.col // 2) for i in order[4:8]] == [(0, 1)] * 4


def slide_blocks(shape: PyramidShape, pixels: np.ndarray) -> dict[BlockIndex, Block]:
    rows, cols = shape.grid(0)
    blocks = {}
    for row in range(rows):
        for col in range(cols):
            index = BlockIndex(row, col)
            at = shape.region(0, index).slices(Region(0, 0, 0, 0))
            blocks[index] = Block(level=0, index=index, pixels_HWC=pixels[at])
    return blocks


@settings(deadline=None, max_examples=25)
@given(
    st.integers(513, 1500),
    st.integers(1, 1500),
    st.integers(0, 2**32 - 1),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
)
def test_every_level_is_the_halved_one_below_after_any_interruption(
    height: int, width: int, seed: int, survivors: int, random: object
) -> None:
    shape = PyramidShape(Size(height, width), block=256)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    blocks = slide_blocks(shape, pixels)
    store: dict[tuple[int, BlockIndex], np.ndarray] = {}

    def run(stop_after: int) -> None:
        builder = PyramidBuilder(shape, blocks, blocks, set(store), lambda lv, i: store[lv, i])
        todo = [blocks[i] for i in blocks if (0, i) not in store]
        random.shuffle(todo)  # type: ignore[attr-defined]
        stream = (done for block in todo for done in builder.put(block))
        for n, done in enumerate([*builder.resume(), *stream]):
            if n >= stop_after:
                return
            store[done.level, done.index] = done.pixels_HWC

    run(survivors)
    run(10**9)
    expected = pixels
    for level, size in enumerate(shape.levels):
        rebuilt = np.zeros((size.height, size.width, 3), np.uint8)
        rows, cols = shape.grid(level)
        for index in (BlockIndex(r, c) for r in range(rows) for c in range(cols)):
            rebuilt[shape.region(level, index).slices(Region(0, 0, 0, 0))] = store[level, index]
        np.testing.assert_array_equal(rebuilt, expected)
        expected = halve(expected)


def test_a_band_leaves_shared_parents_to_the_final_pass() -> None:
    shape = PyramidShape(Size(1024, 2048), block=256)
    blocks = slide_blocks(shape, np.full((1024, 2048, 3), 7, np.uint8))
    store: dict[tuple[int, BlockIndex], np.ndarray] = {}
    for rows in (range(0, 1), range(1, 4)):
        mine = {i for i in blocks if i.row in rows}
        builder = PyramidBuilder(shape, blocks, mine, (), lambda lv, i: store[lv, i])
        for index in sorted(mine, key=morton):
            for done in builder.put(blocks[index]):
                assert (done.level, done.index) not in store
                store[done.level, done.index] = done.pixels_HWC
    assert (1, BlockIndex(0, 0)) not in store, "its children belong to two bands"
    assert (1, BlockIndex(1, 0)) in store
    final = PyramidBuilder(shape, blocks, blocks, set(store), lambda lv, i: store[lv, i])
    for done in final.resume():
        store[done.level, done.index] = done.pixels_HWC
    assert {level for level, _ in store} == {0, 1, 2}
    assert all((pixels == 7).all() for pixels in store.values())
    assert len(store) == sum(r * c for r, c in map(shape.grid, range(3)))


def test_levels_stop_at_512_and_keep_the_exact_factor() -> None:
    shape = PyramidShape(Size(2967, 2220), block=1024)
    assert shape.levels == (Size(2967, 2220), Size(1484, 1110), Size(742, 555), Size(371, 278))
    assert PyramidShape(Size(1, 1), block=1024).levels == (Size(1, 1),)
    with pytest.raises(IndexError):
        shape.region(0, BlockIndex(3, 0))
