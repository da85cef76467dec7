"""Tiles of a slide for a comparison: whole tiles of a lattice-anchored grid that lie on tissue.

Why the tissue label where there is one: an output carries the mask on which it was made, and an evaluation
should look at what was translated, not at what another detection calls tissue.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsi_pipeline.cohorts.tiles import IndexedSlide, TileIndex
from wsi_pipeline.core.geometry import Mpp, Size
from wsi_pipeline.core.mask import TissueMask
from wsi_pipeline.core.protocols import LABEL_CELL, Slide
from wsi_pipeline.core.tissue import TissueConfig
from wsi_pipeline.errors import ConfigError, MissingMppError, OutputError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.readers.masks import find_tissue
from wsi_pipeline.readers.overview import read_overview, reduce_overview
from wsi_pipeline.writers.omezarr import read_label

__all__ = ["is_slide", "slide_index"]

_TABLES = (".parquet", ".npz")
_EXTENT_TOLERANCE = 0.02
_PAIR = "slide"
"""What tiles of two slides of one tissue are matched by, beside their positions."""


def is_slide(path: str) -> bool:
    """Whether a path means one slide: an OME-Zarr folder, or a file that is no table."""
    if os.path.isdir(path):
        return path.rstrip("/").endswith(".zarr") or any(
            os.path.exists(os.path.join(path, name)) for name in ("zarr.json", ".zgroup", ".zattrs")
        )
    return os.path.isfile(path) and not path.lower().endswith(_TABLES)


def slide_index(
    path: str,
    *,
    tile: int,
    mpp: Mpp | None,
    stated: float | None,
    min_tissue: float,
    positions: npt.NDArray[np.int64] | None = None,
) -> TileIndex:
    """Tiles of ``tile`` px at ``mpp`` (None: the slide's own) of which ``min_tissue`` is tissue.

    ``stated``: µm per pixel of a slide that states none.
    ``positions`` [N, 4] are taken in place of tissue: those of another slide of the same extent. Raises
    ConfigError where no tile is left, or the extents differ; SlideError where the slide cannot be read.
    """
    try:
        slide, override = open_slide(path), None
    except MissingMppError:
        if stated is None:
            raise
        slide, override = open_slide(path, mpp=stated), (stated, stated)
    try:
        view = SlideView(slide, mpp)
        if positions is None:
            positions = _on_tissue(slide, Path(path), view, tile, min_tissue)
        elif len(positions) and _outside(positions, view.size):
            raise ConfigError(
                f"{path}: its {view.size.height} x {view.size.width} px at {view.mpp[1]:.4g} µm do not cover "
                "the tiles of the other slide; name the slide that it was made from"
            )
        entry = IndexedSlide(
            path=path,
            name=slide.slide_id,
            identity=slide.identity,
            mpp=override,
            lattice=view.mpp,
            pair=_PAIR,
        )
    finally:
        slide.close()
    return TileIndex(
        origin=path,
        slides=(entry,),
        slide_N=np.zeros(len(positions), np.int32),
        region_N4=positions,
        mpp=view.mpp,
        tile=tile,
        icc="srgb",
    )


def _outside(positions: npt.NDArray[np.int64], size: Size) -> bool:
    bottom = int((positions[:, 0] + positions[:, 2]).max())
    right = int((positions[:, 1] + positions[:, 3]).max())
    limit = 1.0 + _EXTENT_TOLERANCE
    return bottom > size.height * limit or right > size.width * limit


def _on_tissue(
    slide: Slide, path: Path, view: SlideView, tile: int, min_tissue: float
) -> npt.NDArray[np.int64]:
    rows, cols = view.size.height // tile, view.size.width // tile
    if rows == 0 or cols == 0:
        raise ConfigError(
            f"{path}: its {view.size.height} x {view.size.width} px hold no tile of {tile} px; "
            f"give --tile {max(min(view.size.height, view.size.width), 1)} or less"
        )
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1).reshape(-1, 2)
    regions = np.hstack([grid * tile, np.full_like(grid, tile)]).astype(np.int64)
    share_N = _tissue(slide, path).covers_many(regions, view.mpp)
    kept = regions[share_N >= max(min_tissue, 1e-9)]
    if len(kept) == 0:
        raise ConfigError(
            f"{path}: no tile of {tile} px is at least {min_tissue:.0%} tissue; "
            "lower --tile, or that share with --set min_tissue=0.2"
        )
    return kept


def _tissue(slide: Slide, path: Path) -> TissueMask:
    """The tissue label of an output of this program, or what detection finds."""
    if (path / "labels" / "tissue").is_dir():
        try:
            label_HW = read_label(path, "tissue")
        except OutputError:
            label_HW = None
        if label_HW is not None and label_HW.ndim == 2:
            steps = (slide.mpp[0] * LABEL_CELL, slide.mpp[1] * LABEL_CELL)
            return TissueMask(mask_HW=label_HW > 0, mpp=steps)
    overview_HWC, mpp = read_overview(slide, icc="srgb")
    thumbnail_HWC, coarse = reduce_overview(slide, overview_HWC, mpp)
    return find_tissue(slide, thumbnail_HWC, coarse, mask="detect", config=TissueConfig()).tissue
