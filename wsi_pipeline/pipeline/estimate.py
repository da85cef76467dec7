"""What a conversion will cost, before it is started: tiles, bytes and time.

A few tiles of tissue are read, generated and compressed, and a few of glass; the rest is counting.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np

from wsi_pipeline.core.batching import groups, read_batch
from wsi_pipeline.core.geometry import TileIndex
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import U8_HWC, Generator, Slide, Tile
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline.planning import Survey
from wsi_pipeline.pipeline.run import background_reader, checked
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.readers.lattice import SlideView

__all__ = ["Estimate", "estimate"]

SAMPLES = 6
ENOUGH_SECONDS = 2.0
WRITE_MPIX_PER_SECOND = 60.0
"""Blend, pyramid and encode on one thread; measured on 2 cores, cautious."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """``blocks`` counts all levels; ``size_bytes`` is the OME-Zarr; ``free_bytes`` is of this folder."""

    tiles: int
    blocks: int
    size_bytes: int
    seconds: float
    free_bytes: int


def estimate(slide: Slide, found: Survey, config: ConvertConfig) -> Estimate:
    """Predict blocks, bytes and wall time of a conversion from a sample of its tiles.

    Nothing is made of a slide without tissue, so nothing is sampled.
    """
    plan, free_bytes = found.plan, shutil.disk_usage(Path.cwd()).free
    if found.is_empty:
        return Estimate(tiles=0, blocks=0, size_bytes=0, seconds=0.0, free_bytes=free_bytes)
    keys = plan.block_keys()
    pixels = sum(plan.shape.region(level, index).area for level, index in keys)
    tiles = plan.tiles_for(plan.blocks())
    view = SlideView(slide, plan.mpp, icc=config.input.icc)
    generator = make_generator(config.generator.name, config.generator.options)
    per_tile, tissue_bytes = _timed(view, generator, plan, config, tiles)
    tissue = min(len(tiles) * plan.grid.stride**2 * 4 / 3, pixels)
    glass_bytes = 0.0
    if read := background_reader(plan, view, generator):
        glass_bytes = _bytes_a_pixel([read(tile.write) for tile in _spread(_glass(plan), SAMPLES)], config)
    lanes = config.run.workers or 1
    seconds = (len(tiles) * per_tile + pixels / (WRITE_MPIX_PER_SECOND * 1e6)) / lanes
    return Estimate(
        tiles=len(tiles),
        blocks=len(keys),
        size_bytes=int(tissue * tissue_bytes + (pixels - tissue) * glass_bytes),
        seconds=seconds,
        free_bytes=free_bytes,
    )


def _glass(plan: SlidePlan) -> list[Tile]:
    """Tiles of the grid that will not be generated."""
    rows, cols = (~plan.tissue_tiles_HW).nonzero()
    return [plan.grid.tile_at(TileIndex(int(row), int(col))) for row, col in zip(rows, cols, strict=True)]


def _timed(
    view: SlideView, generator: Generator, plan: SlidePlan, config: ConvertConfig, tiles: list[Tile]
) -> tuple[float, float]:
    """Seconds a tile and compressed bytes a pixel, from a few of these tiles.

    The last of at least two calls is timed: the first one may load weights. Two calls have to do where
    they took long.
    """
    picked = _spread(tiles, SAMPLES)
    batch = min(config.run.batch or generator.spec.batch, SAMPLES // 2)
    view.read(picked[0].read)  # opens the file; counted once, not for every tile
    seconds: list[float] = []
    generated: list[U8_HWC] = []
    for group in groups(picked, batch):
        started = time.perf_counter()
        given = read_batch(view, group, batch, plan.noise_key)
        generated += list(checked(generator, given, plan.context))
        seconds.append(time.perf_counter() - started)
        if len(seconds) > 1 and sum(seconds) > ENOUGH_SECONDS:
            break
    return seconds[-1] / batch, _bytes_a_pixel(generated, config)


def _spread(tiles: list[Tile], count: int) -> list[Tile]:
    """``count`` tiles, evenly spread (with repeats where there are fewer); none of none."""
    return [tiles[len(tiles) * (2 * i + 1) // (2 * count)] for i in range(count)] if tiles else []


def _bytes_a_pixel(pixels: list[U8_HWC], config: ConvertConfig) -> float:
    if not pixels:
        return 0.0
    raw = np.stack(pixels).transpose(0, 3, 1, 2).tobytes()
    packed = imagecodecs.blosc_encode(raw, level=config.output.zarr.level, compressor="zstd", shuffle=2)
    return len(packed) / (len(raw) / 3)
