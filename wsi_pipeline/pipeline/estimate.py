"""What a conversion will cost, before it is started: tiles, bytes and time.

A few tiles in the middle of the tissue are read, generated and compressed; the rest is counting.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import imagecodecs

from wsi_pipeline.core.batching import read_batch
from wsi_pipeline.core.geometry import TileIndex
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import Generator, Slide, Tile
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline.planning import Survey
from wsi_pipeline.pipeline.run import checked
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.readers.lattice import SlideView

__all__ = ["Estimate", "estimate"]

SAMPLES = 3
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
    """Predict blocks, bytes and wall time of a conversion from a sample of its tiles."""
    plan = found.plan
    keys = plan.block_keys()
    pixels = sum(plan.shape.region(level, index).area for level, index in keys)
    tiles = plan.tiles_for(plan.blocks())
    view = SlideView(slide, plan.mpp, icc=config.input.icc)
    generator = make_generator(config.generator.name, config.generator.options)
    per_tile, tissue_bytes = _sample(view, generator, plan, config, tiles)
    tissue = min(len(tiles) * plan.grid.stride**2 * 4 / 3, pixels)
    glass_bytes = 0.0
    if plan.background != "white":
        _, glass_bytes = _sample(view, generator, plan, config, _glass(plan))
    lanes = max(1, config.run.workers)
    seconds = (len(tiles) * per_tile + pixels / (WRITE_MPIX_PER_SECOND * 1e6)) / lanes
    return Estimate(
        tiles=len(tiles),
        blocks=len(keys),
        size_bytes=int(tissue * tissue_bytes + (pixels - tissue) * glass_bytes),
        seconds=seconds,
        free_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def _glass(plan: SlidePlan) -> list[Tile]:
    """Tiles of the grid that will not be generated."""
    rows, cols = (~plan.tissue_tiles_HW).nonzero()
    return [plan.grid.tile_at(TileIndex(int(row), int(col))) for row, col in zip(rows, cols, strict=True)]


def _sample(
    view: SlideView, generator: Generator, plan: SlidePlan, config: ConvertConfig, tiles: list[Tile]
) -> tuple[float, float]:
    """Seconds a tile and compressed bytes a pixel, from a few of these tiles."""
    if not tiles:
        return 0.0, 0.0
    picked = [tiles[len(tiles) * (2 * i + 1) // (2 * SAMPLES)] for i in range(SAMPLES)]
    view.read(picked[0].read)  # opens the file; counted once, not for every tile
    started = time.perf_counter()
    batch = read_batch(view, tuple(picked), SAMPLES, plan.seed)
    generated = checked(generator, batch, plan.context)
    seconds = (time.perf_counter() - started) / SAMPLES
    raw = generated.transpose(0, 3, 1, 2).tobytes()
    packed = imagecodecs.blosc_encode(raw, level=config.output.zarr.level, compressor="zstd", shuffle=2)
    return seconds, len(packed) / (len(raw) / 3)
