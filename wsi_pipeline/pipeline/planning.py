"""Before the first pixel is made: open, look, detect, decide. A dry run stops here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline._version import __version__
from wsi_pipeline.core.geometry import Mpp, Region, Size, TileIndex, ceil_div
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import LABEL_CELL, U8_HWC, Generator, GeneratorSpec, Slide
from wsi_pipeline.core.stain_check import StainVerdict, assess_stain
from wsi_pipeline.core.tissue import THUMBNAIL_MPP, TissueMask, TissueResult
from wsi_pipeline.errors import ConfigError, GeneratorContractError, UnsupportedSlideError
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.readers.masks import find_tissue, mask_at_pixels, read_geojson
from wsi_pipeline.readers.mpp import plausible
from wsi_pipeline.readers.overview import near_own, read_overview, reduce_overview

__all__ = ["Survey", "label_mask", "open_configured", "survey"]

STAIN_PIXELS = 1e6
FINEST_UPSAMPLING = 4
"""A user may ask for pixels this many times smaller than the slide's."""
MADE_FOR_UPSAMPLING = 2.02
"""A generator may ask for twice, and a hundredth for rounded pixel sizes."""
LARGEST = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A plan and what was seen on the way to it.

    ``thumbnail_HWC`` [H, W, 3] uint8 at ``thumbnail_mpp`` is the source as the generator will see it.
    """

    plan: SlidePlan
    thumbnail_HWC: U8_HWC
    thumbnail_mpp: Mpp
    tissue: TissueResult
    verdict: StainVerdict

    @property
    def is_empty(self) -> bool:
        """True where there is no tissue to translate; ``tissue.reason`` says why."""
        return self.plan.tile_count == 0

    @property
    def excluded_mm2(self) -> dict[str, float]:
        """Area of each excluded class (pen, coverslip, ...)."""
        pixel = self.thumbnail_mpp[0] * self.thumbnail_mpp[1] / 1e6
        return {name: round(float(m.sum()) * pixel, 4) for name, m in self.tissue.excluded.items()}


def open_configured(path: str | Path, config: ConvertConfig) -> Slide:
    """Open a slide with the reader and the mpp overrides of the configuration."""
    table = Path(config.input.mpp_table) if config.input.mpp_table else None
    return open_slide(path, mpp=config.input.mpp, mpp_table=table, reader=config.input.reader)


def survey(slide: Slide, config: ConvertConfig) -> Survey:
    """Detect tissue and lay out the plan; reads a thumbnail and nothing else.

    Raises ConfigError for settings that do not fit, UnsupportedSlideError where the staining is not
    what the pipeline is made for.
    """
    generator = make_generator(config.generator.name, config.generator.options)
    spec = generator.spec
    mpp = _working_mpp(slide, config, spec)
    grid = _grid(SlideView(slide, mpp, icc=config.input.icc).size, config, spec)
    fine, fine_mpp = read_overview(slide, icc=config.input.icc, threads=config.run.threads)
    thumbnail, coarse = reduce_overview(slide, fine, fine_mpp)
    tissue = find_tissue(slide, thumbnail, coarse, mask=config.input.mask, config=config.tissue)
    step = math.ceil(math.sqrt(thumbnail.shape[0] * thumbnail.shape[1] / STAIN_PIXELS))
    verdict = assess_stain(thumbnail[::step, ::step], tissue.tissue.mask_HW[::step, ::step])
    _check_stain(slide, verdict, spec, config)
    mask = mask_at_pixels(tissue.tissue, Size(*fine.shape[:2]), fine_mpp, 1)
    tissue_tiles = _tissue_tiles(grid, tissue.tissue, mpp)
    # Preparing may load weights: not for a slide of which nothing will be made.
    context = _context(generator, fine, mask, fine_mpp) if tissue_tiles.any() else {}
    plan = SlidePlan(
        slide_id=slide.slide_id,
        identity=slide.identity,
        mpp=mpp,
        mpp_origin=slide.mpp_origin,
        grid=grid,
        tissue_tiles_HW=tissue_tiles,
        block=config.output.zarr.block,
        background=config.output.background,
        seed=config.tiling.seed,
        generator=spec,
        context=context,
        roi=_roi(slide, grid.size, mpp, config.input.roi),
        settings={
            "icc": config.input.icc,
            "zarr": asdict(config.output.zarr),
            "version": __version__,
        },
    )
    return Survey(plan=plan, thumbnail_HWC=thumbnail, thumbnail_mpp=coarse, tissue=tissue, verdict=verdict)


def _working_mpp(slide: Slide, config: ConvertConfig, spec: GeneratorSpec) -> Mpp:
    wanted = config.tiling.mpp
    if wanted is not None:
        if not plausible((wanted, wanted)) or wanted < min(slide.mpp) / FINEST_UPSAMPLING:
            raise ConfigError(
                f"tiling.mpp: {wanted} µm per pixel makes no sense for a slide of {min(slide.mpp):.4g}; "
                f"give at least {min(slide.mpp) / FINEST_UPSAMPLING:.4g} and at most 20"
            )
        return (wanted, wanted)
    return slide.mpp if spec.mpp is None else _near_own(slide, spec.kind, spec.mpp)


def _near_own(slide: Slide, kind: str, made_for: Mpp) -> Mpp:
    """The slide's own pixel size, doubled some times, where it lies near what a generator was made for."""
    own = near_own(slide.mpp, made_for)
    if own is not None:
        return own
    enlarged = max(a / b for a, b in zip(slide.mpp, made_for, strict=True))
    if enlarged > MADE_FOR_UPSAMPLING:
        raise ConfigError(
            f"{slide.slide_id}: {max(slide.mpp):.4g} µm per pixel is too coarse for generator {kind}, made "
            f"for {min(made_for):.4g}: it would have to be enlarged {enlarged:.3g} times; give a finer scan, "
            f"or try --set tiling.mpp={max(slide.mpp):.4g} and look at the result with care"
        )
    return made_for


def _grid(size: Size, config: ConvertConfig, spec: GeneratorSpec) -> TileGrid:
    """The grid with the overlap that the user or else the generator asks for."""
    overlap = spec.overlap if config.tiling.overlap is None else config.tiling.overlap
    written = spec.tile - 2 * spec.halo
    fitting = range(written % spec.align, written - spec.align + 1, spec.align)
    if not fitting:
        raise ConfigError(
            f"generator {spec.kind}: a halo of {spec.halo} px leaves {written} px of a tile of {spec.tile}, "
            f"but it needs at least {spec.align}; give it larger tiles or a smaller halo"
        )
    if overlap not in fitting:
        nearest = sorted(sorted(fitting, key=lambda fit: abs(fit - overlap))[:2])
        raise ConfigError(
            f"tiling.overlap: {overlap} leaves a stride of {written - overlap} px (tile {spec.tile}, halo "
            f"{spec.halo}), but generator {spec.kind} needs an overlap of 0 or more and a stride that is a "
            f"positive multiple of {spec.align}; the nearest that fit: {' and '.join(map(str, nearest))}"
        )
    return TileGrid(size=size, tile=spec.tile, halo=spec.halo, overlap=overlap)


def _context(
    generator: Generator, overview_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], mpp: Mpp
) -> dict[str, Any]:
    """What the generator prepares, as the manifest gives it back; raises GeneratorContractError."""
    prepared = dict(generator.prepare(overview_HWC, tissue_HW, mpp))
    try:
        return dict(json.loads(json.dumps(prepared, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise GeneratorContractError(
            f"generator {generator.spec.kind}: prepared a context that is no JSON ({error}); the generator "
            "has to be corrected",
            spec=generator.spec,
        ) from error


def _check_stain(slide: Slide, verdict: StainVerdict, spec: GeneratorSpec, config: ConvertConfig) -> None:
    """Tissue detection needs a bright background whatever the generator; the stain is the generator's."""
    if config.input.stain == "any" or verdict.kind in ("h&e", "unknown"):
        return
    if spec.stain == "any" and verdict.kind != "fluorescence":
        return
    raise UnsupportedSlideError(
        f"{slide.slide_id}: does not look like H&E in brightfield but like {verdict.kind} "
        f"({verdict.reason}); use --set 'input.stain=any' to convert it all the same",
        slide_id=slide.slide_id,
    )


def _tissue_tiles(grid: TileGrid, tissue: TissueMask, mpp: Mpp) -> npt.NDArray[np.bool_]:
    """A tile is generated as soon as its write region touches one pixel of tissue: nothing is lost."""
    rows, cols = grid.shape
    tissue = TissueMask(mask_HW=tissue.mask_HW, mpp=tissue.mpp)  # its summed-area table goes with it
    regions = [grid.write_region(TileIndex(row, col)) for row in range(rows) for col in range(cols)]
    return np.asarray(tissue.covers_many(regions, mpp).reshape(rows, cols) > 0)


def _roi(slide: Slide, size: Size, mpp: Mpp, roi: str | None) -> tuple[Region, ...]:
    """The region of interest on the lattice: one rectangle, or the bounding boxes of GeoJSON shapes."""
    if roi is None:
        return ()
    if Path(roi).suffix.lower() in (".geojson", ".json"):
        coarse = (THUMBNAIL_MPP, THUMBNAIL_MPP)
        return _boxes(read_geojson(roi, slide, coarse), mpp)
    try:
        y, x, height, width = (int(part) for part in roi.split(","))
        y, x, height, width = (min(max(v, -LARGEST), LARGEST) for v in (y, x, height, width))
    except ValueError:
        raise ConfigError(
            f"input.roi: '{roi}' is neither a GeoJSON file nor Y,X,HEIGHT,WIDTH in level-0 pixels"
        ) from None
    fy, fx = slide.mpp[0] / mpp[0], slide.mpp[1] / mpp[1]
    top, left = int(y * fy), int(x * fx)
    bottom, right = (
        ceil_div(int((y + height) * fy * 1024), 1024),
        ceil_div(int((x + width) * fx * 1024), 1024),
    )
    region = Region(top, left, bottom - top, right - left)
    if region.intersect(Region.of(size)) is None:
        raise ConfigError(f"input.roi: '{roi}' does not touch the slide ({slide.slide_id})")
    return (region,)


def _boxes(mask: TissueMask, mpp: Mpp) -> tuple[Region, ...]:
    from scipy import ndimage

    labelled, _ = ndimage.label(mask.mask_HW)
    boxes = []
    for rows, cols in ndimage.find_objects(labelled):
        y, bottom = int(rows.start * mask.mpp[0] / mpp[0]), math.ceil(rows.stop * mask.mpp[0] / mpp[0])
        x, right = int(cols.start * mask.mpp[1] / mpp[1]), math.ceil(cols.stop * mask.mpp[1] / mpp[1])
        boxes.append(Region(y, x, bottom - y, right - x))
    if not boxes:
        raise ConfigError("input.roi: the GeoJSON file contains no area")
    return tuple(boxes)


def label_mask(tissue: TissueMask, size: Size, mpp: Mpp) -> npt.NDArray[np.bool_]:
    """The tissue mask on the label grid of a lattice of ``size``."""
    return mask_at_pixels(tissue, size, mpp, LABEL_CELL)
