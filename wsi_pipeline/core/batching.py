"""Tiles in batches of constant size, read from a view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from wsi_pipeline.core.protocols import Tile, TileBatch, View

__all__ = ["groups", "read_batch"]


def groups(tiles: Sequence[Tile], batch: int) -> Iterator[tuple[Tile, ...]]:
    """Consecutive groups of at most ``batch`` tiles."""
    for start in range(0, len(tiles), batch):
        yield tuple(tiles[start : start + batch])


def read_batch(view: View, tiles: tuple[Tile, ...], batch: int, noise_key: int) -> TileBatch:
    """Read a group; the tail is padded by repeating its last tile, so that B never changes.

    Why: a matrix product over 3 rows gives other bits than the same rows among 64; a constant batch
    shape keeps results independent of where the slide ends. ``noise_key`` is the plan's.
    """
    side = tiles[0].read.height
    pixels = np.empty((batch, side, side, 3), np.uint8)
    for i, tile in enumerate(tiles):
        pixels[i] = view.read(tile.read)
    pixels[len(tiles) :] = pixels[len(tiles) - 1]
    return TileBatch(tiles=tiles, pixels_BHWC=pixels, noise_key=noise_key)
