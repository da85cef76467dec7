"""One slide's tiles and their scores, and the part file that keeps them.

The part is a Parquet file of its own, written at once under a name that is the digest of all that decides
its content (the file's identity, pixel size, mask, settings of cutting and tissue). So a run that was stopped
goes on with the slides that are missing, and a change of filters, splits or patients measures nothing again.
Beside the rows it holds the pictures of the quality page: the slide, its tissue, and some of its tiles from
the blurriest to the sharpest.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline._version import __version__
from wsi_pipeline.cohorts.manifest import CohortSlide
from wsi_pipeline.cohorts.parquet import import_parquet
from wsi_pipeline.cohorts.settings import CohortConfig
from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.overlay import draw_overlay
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.core.stain_check import assess_stain
from wsi_pipeline.core.tile_scores import TileScores, score_tile
from wsi_pipeline.core.tissue import TissueMask, TissueResult
from wsi_pipeline.errors import OutputError, SlideError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.readers.masks import find_tissue
from wsi_pipeline.readers.overview import near_own, read_overview, reduce_overview
from wsi_pipeline.readers.warped import WarpedSlide, on_lattice

__all__ = ["Part", "SlideJob", "read_part", "tile_slide"]

VERSION = 1
"""Of the scores: another number measures all slides again."""
KEY = b"wsi_pipeline_part"
PICTURES = {name: f"wsi_pipeline_{name}".encode() for name in ("plain", "tissue", "samples")}
FINEST_UPSAMPLING = 1.02
PICTURE_SIDE = 480
SAMPLE_SIDE, SAMPLE_COUNT = 112, 6
JPEG_QUALITY = 80
_NONE_FITS = ("no whole tile fits on its tissue", "its tissue is not in register with the fixed slide")
ARTEFACTS = ("pen", "coverslip", "border")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideJob:
    """One slide to tile; ``folder``: where its part goes. Picklable."""

    slide: CohortSlide
    config: CohortConfig
    folder: Path

    @property
    def path(self) -> Path:
        """The part file; its name is the digest of all that decides it."""
        slide, config = self.slide, self.config
        decides = {
            "version": VERSION,
            "package": __version__.split(".")[:2],
            "identity": slide.identity,
            "mpp": slide.mpp,
            "mask": slide.mask if slide.mask in ("detect", "whole") else _digest(Path(slide.mask)),
            "tiling": asdict(config.tiling),
            "tissue": asdict(config.frozen if slide.domain == "FF" else config.ffpe),
            "icc": config.icc,
            "stain": config.stain,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a part file says of its slide: ``facts`` are JSON values; ``pictures`` are JPEG files: ``plain``
    the slide, ``tissue`` with the tissue's outline, ``samples`` a row of tiles (empty: there are none)."""

    facts: dict[str, Any]
    pictures: dict[str, bytes]


def tile_slide(job: SlideJob) -> None:
    """Measure all tiles of a slide that touch tissue, and write its part.

    Raises SlideError or ConfigError where this slide is to blame, OutputError where the disk is.
    """
    began = time.monotonic()
    cv2.setNumThreads(0)
    slide = open_slide(job.slide.path, mpp=job.slide.mpp, transform=job.slide.transform or None)
    try:
        mpp = _lattice_mpp(slide, job.config)
        view = SlideView(on_lattice(slide, mpp), mpp, icc=job.config.icc)
        overview_HWC, fine = read_overview(slide, icc=job.config.icc)
        thumbnail_HWC, coarse = reduce_overview(slide, overview_HWC, fine)
        settings = job.config.frozen if job.slide.domain == "FF" else job.config.ffpe
        found = find_tissue(slide, thumbnail_HWC, coarse, mask=job.slide.mask, config=settings)
        _check_stain(slide, thumbnail_HWC, found, job.config)
        regions_N4 = _regions(view.size, job.config)
        shares = _shares(found, regions_N4, mpp)
        touching = shares["tissue"] > 0
        astray = 0
        if isinstance(slide, WarpedSlide):
            told = touching & slide.pair.in_register(regions_N4, mpp)
            astray, touching = int((touching & ~told).sum()), told
        regions_N4 = regions_N4[touching]
        columns: dict[str, Any] = {name: values[touching] for name, values in shares.items()}
        scores = _scores(view, regions_N4, found.background_rgb)
        chosen = _chosen(columns["tissue"], scores["sharpness"])
        overlay_HWC = draw_overlay(thumbnail_HWC, found)
        pictures = {
            "plain": _jpeg(_fitted(thumbnail_HWC, PICTURE_SIDE)),
            "tissue": _jpeg(_fitted(overlay_HWC, PICTURE_SIDE)),
            "samples": _samples(view, regions_N4[chosen]),
        }
        facts = {
            "slide_id": slide.slide_id,
            "mpp": list(mpp),
            "height": view.size.height,
            "width": view.size.width,
            "reason": found.reason or (None if len(regions_N4) else _NONE_FITS[astray > 0]),
            "astray": astray,
            "samples": scores["sharpness"][chosen].round(2).tolist(),
            "tissue_mm2": round(found.tissue.area_mm2, 4),
            "seconds": round(time.monotonic() - began, 2),
        }
    finally:
        slide.close()
    _write(job.path, regions_N4, columns | scores, Part(facts=facts, pictures=pictures))


def _lattice_mpp(slide: Slide, config: CohortConfig) -> Mpp:
    wanted = (config.tiling.mpp, config.tiling.mpp)
    own = near_own(slide.mpp, wanted, config.tiling.tolerance)
    if own is not None:
        return own
    if max(slide.mpp) > FINEST_UPSAMPLING * config.tiling.mpp:
        raise SlideError(
            f"{slide.slide_id}: {max(slide.mpp):.4g} µm per pixel is too coarse for tiles of "
            f"{config.tiling.mpp:.4g}; take it out of the table, or tile the cohort at a coarser tiling.mpp",
            slide_id=slide.slide_id,
        )
    return wanted


def _check_stain(slide: Slide, thumbnail_HWC: U8_HWC, found: TissueResult, config: CohortConfig) -> None:
    if config.stain == "any":
        return
    verdict = assess_stain(thumbnail_HWC, found.tissue.mask_HW)
    if verdict.kind not in ("h&e", "unknown"):
        raise SlideError(
            f"{slide.slide_id}: does not look like H&E in brightfield but like {verdict.kind} "
            f"({verdict.reason}); take it out of the table, or use --set 'stain=any'",
            slide_id=slide.slide_id,
        )


def _regions(size: Size, config: CohortConfig) -> npt.NDArray[np.int64]:
    """All whole tiles of the lattice, row by row, [N, 4] (y, x, height, width)."""
    tile, step = config.tiling.tile, config.tiling.step
    y, x = (np.arange(0, max(side - tile + 1, 0), step) for side in (size.height, size.width))
    corners_N2 = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.concatenate([corners_N2, np.full_like(corners_N2, tile)], axis=1).astype(np.int64)


def _shares(
    found: TissueResult, regions_N4: npt.NDArray[np.int64], mpp: Mpp
) -> dict[str, npt.NDArray[np.float64]]:
    """Share of each tile that is tissue, and each kind of artefact."""
    shares = {"tissue": found.tissue.covers_many(regions_N4, mpp)}
    for name in ARTEFACTS:
        mask_HW = found.excluded.get(name)
        if mask_HW is None:
            shares[name] = np.zeros(len(regions_N4))
        else:
            shares[name] = TissueMask(mask_HW=mask_HW, mpp=found.tissue.mpp).covers_many(regions_N4, mpp)
    return shares


def _scores(
    view: SlideView, regions_N4: npt.NDArray[np.int64], glass_rgb: tuple[int, int, int]
) -> dict[str, npt.NDArray[np.float64]]:
    """Scores of every tile, by column."""
    names = [item.name for item in fields(TileScores)]
    values_NS = np.zeros((len(regions_N4), len(names)))
    for row, region in enumerate(regions_N4.tolist()):
        scores = score_tile(view.read(Region(*region)), view.mpp, glass_rgb)
        values_NS[row] = [getattr(scores, name) for name in names]
    return dict(zip(names, values_NS.T, strict=True))


def _chosen(tissue_N: npt.NDArray[np.float64], sharpness_N: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rows of some tiles from the blurriest to the sharpest, mostly tissue where there are such."""
    full_N = tissue_N >= min(0.5, float(tissue_N.max(initial=0.0)))
    order = np.flatnonzero(full_N)[np.argsort(sharpness_N[full_N], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(SAMPLE_COUNT, len(order))).round().astype(int)
    return np.asarray(order[places], np.int64)


def _samples(view: SlideView, regions_N4: npt.NDArray[np.int64]) -> bytes:
    """Tiles, small, side by side; empty where there is none."""
    tiles = [view.read(Region(*region)) for region in regions_N4.tolist()]
    size = (SAMPLE_SIDE, SAMPLE_SIDE)
    small = [np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA), np.uint8) for tile in tiles]
    return _jpeg(np.concatenate(small, axis=1)) if small else b""


def _fitted(pixels_HWC: U8_HWC, side: int) -> U8_HWC:
    height, width = pixels_HWC.shape[:2]
    scale = min(side / max(height, width), 1.0)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)


def _jpeg(pixels_HWC: U8_HWC) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels_HWC), level=JPEG_QUALITY))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, regions_N4: npt.NDArray[np.int64], columns: dict[str, Any], part: Part) -> None:
    pyarrow, parquet = import_parquet()
    places = dict(zip(("y", "x", "height", "width"), regions_N4.T.astype(np.int32), strict=True))
    values = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    table = pyarrow.table(places | values)
    metadata = {KEY: json.dumps(part.facts).encode()}
    metadata |= {key: part.pictures[name] for name, key in PICTURES.items()}
    fresh = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        parquet.write_table(table.replace_schema_metadata(metadata), fresh, compression="zstd")
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})", path=path) from error
    finally:
        fresh.unlink(missing_ok=True)


def read_part(path: Path) -> tuple[Any, Part] | None:
    """The table (pyarrow) and the facts of a finished part; None where there is none that can be read."""
    pyarrow, parquet = import_parquet()
    try:
        table = parquet.read_table(path)
        metadata = table.schema.metadata or {}
        pictures = {name: metadata[key] for name, key in PICTURES.items()}
        return table, Part(facts=json.loads(metadata[KEY]), pictures=pictures)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException):
        return None
