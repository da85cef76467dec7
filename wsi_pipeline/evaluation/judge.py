"""Which of two generators comes closer to the truth on simulated frozen sections, where the truth is known.

A slide is an FFPE picture that the simulation froze as a whole, with one draw of its parameters
(``core.frozen``). Each generator gets it as the pipeline would give it: prepared on the slide's own overview
and tissue, tiled with its own grid, blended. Nothing is fitted on a crop.

Figures are taken from the output against the FFPE truth in windows on tissue. Some colours cannot be known
(which hue and strength the laboratory's paraffin protocol has), so some figures are blind to colour: PSNR
after the best affine map of the output's RGB to the truth's, one for the whole field, and the structure
figures of haematoxylin (``core.structure``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsi_pipeline.core.bootstrap import I64, Interval, bootstrap_by_group
from wsi_pipeline.core.frozen import FrozenModel, simulate_frozen
from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.protocols import U8_HWC, Context, Generator, Slide
from wsi_pipeline.core.stain import optical_density
from wsi_pipeline.core.structure import compare_structure, psnr, ssim
from wsi_pipeline.core.tissue import TissueConfig
from wsi_pipeline.evaluation.fields import render_field
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.readers.masks import find_tissue, mask_at_pixels
from wsi_pipeline.readers.overview import read_overview, reduce_overview

__all__ = [
    "Closeness",
    "Field",
    "Summary",
    "closeness",
    "freeze_slide",
    "prepare_slide",
    "summarise",
    "tissue_field",
    "translate_field",
]

WINDOW = 256
"""Side in pixels of a window that is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """How close a window of an output is to the truth; NaN where the truth shows no structure.

    ``psnr``: dB, ``psnr_recoloured``: after the best affine colour map; ``ssim``: of RGB; ``structure_ssim``:
    of haematoxylin; ``shift_p95``: px that parts moved; ``edges_lost``, ``edges_added``: shares of edge
    strength; ``sharpness``: fine by coarse contrast, by the same of the truth: below 1 is blurred.
    """

    psnr: float
    psnr_recoloured: float
    ssim: float
    structure_ssim: float
    shift_p95: float
    edges_lost: float
    edges_added: float
    sharpness: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Field:
    """A region of a slide with known truth. ``group``: what is drawn as one when confidence is estimated."""

    group: str
    slide: Slide
    region: Region
    truth_HWC: U8_HWC


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Mean of a figure over windows, and where it may lie; ``interval`` None with fewer than two groups."""

    value: float
    interval: Interval | None
    windows: int


def freeze_slide(truth_HWC: U8_HWC, mpp: float, model: FrozenModel, seed: int, slide_id: str) -> ArraySlide:
    """The FFPE picture as one simulated frozen slide."""
    frozen_HWC = simulate_frozen(truth_HWC, mpp, model, np.random.default_rng(seed))
    return ArraySlide(frozen_HWC, mpp=mpp, slide_id=slide_id)


def prepare_slide(slide: Slide, generator: Generator) -> Context:
    """The context of a slide, from its own overview and tissue as a conversion takes it, through JSON."""
    fine_HWC, fine_mpp = read_overview(slide, icc="srgb")
    coarse_HWC, coarse_mpp = reduce_overview(slide, fine_HWC, fine_mpp)
    found = find_tissue(slide, coarse_HWC, coarse_mpp, mask="detect", config=TissueConfig())
    tissue_HW = mask_at_pixels(found.tissue, Size(*fine_HWC.shape[:2]), fine_mpp, 1)
    prepared = dict(generator.prepare(fine_HWC, tissue_HW, fine_mpp))
    return dict(json.loads(json.dumps(prepared, allow_nan=False)))


def translate_field(slide: Slide, mpp: Mpp, region: Region, generator: Generator, context: Context) -> U8_HWC:
    """The generator's picture of a region of the slide's lattice at ``mpp``, tiled as a conversion tiles."""
    view, spec = SlideView(slide, mpp), generator.spec
    grid = TileGrid(size=view.size, tile=spec.tile, halo=spec.halo, overlap=spec.overlap)
    return render_field(view, region, grid, generator, context)


def tissue_field(truth_HWC: U8_HWC, side: int, seed: int) -> Region:
    """A square of at most ``side`` px with much stain: one of the better ones, chosen by ``seed``.

    By density, not by a threshold, because glass may be as pink as pale tissue; windows of ``WINDOW`` fit it.
    """
    height, width = truth_HWC.shape[:2]
    side = min(side, height, width) // WINDOW * WINDOW or min(side, height, width)
    density_HW = 255.0 - truth_HWC.min(axis=2).astype(np.float64)
    step = max(1, side // 16)
    rows, cols = np.arange(0, height - side + 1, step), np.arange(0, width - side + 1, step)
    total_HW = np.pad(density_HW.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    corners = [total_HW[np.ix_(rows + dy, cols + dx)] for dy in (0, side) for dx in (0, side)]
    density = corners[3] - corners[1] - corners[2] + corners[0]
    good = np.argwhere(density >= 0.8 * density.max())
    row, col = good[np.random.default_rng(seed).integers(len(good))]
    return Region(int(rows[row]), int(cols[col]), side, side)


def closeness(truth_HWC: U8_HWC, output_HWC: U8_HWC) -> list[Closeness]:
    """Figures of every window of an output against the truth, uint8 pictures of one size."""
    recoloured_HWC = _recoloured(truth_HWC, output_HWC)
    height, width = truth_HWC.shape[:2]
    side = min(WINDOW, height, width)
    found = []
    for y in range(0, height - side + 1, side):
        for x in range(0, width - side + 1, side):
            at = (slice(y, y + side), slice(x, x + side))
            found.append(_window(truth_HWC[at], output_HWC[at], recoloured_HWC[at]))
    return found


def _window(truth_HWC: U8_HWC, output_HWC: U8_HWC, recoloured_HWC: U8_HWC) -> Closeness:
    structure = compare_structure(truth_HWC, output_HWC)
    return Closeness(
        psnr=psnr(truth_HWC, output_HWC),
        psnr_recoloured=psnr(truth_HWC, recoloured_HWC),
        ssim=ssim(truth_HWC, output_HWC),
        structure_ssim=structure.ssim,
        shift_p95=structure.shift_p95,
        edges_lost=structure.edges_lost,
        edges_added=structure.edges_added,
        sharpness=_sharpness(output_HWC) / _sharpness(truth_HWC),
    )


def _recoloured(truth_HWC: U8_HWC, output_HWC: U8_HWC) -> U8_HWC:
    """The output with the affine map of its colours that brings it closest to the truth."""
    colours_N4 = np.column_stack([output_HWC.reshape(-1, 3), np.ones(output_HWC.size // 3)]).astype(
        np.float64
    )
    # A little towards the identity, so that one even colour has a solution, too.
    ridge, same = 1e-3 * len(colours_N4), np.vstack([np.eye(3), np.zeros(3)])
    normal_44 = colours_N4.T @ colours_N4 + ridge * np.eye(4)
    map_43 = np.linalg.solve(normal_44, colours_N4.T @ truth_HWC.reshape(-1, 3) + ridge * same)
    mapped = np.clip(np.rint(colours_N4 @ map_43), 0, 255).astype(np.uint8)
    return np.asarray(mapped.reshape(output_HWC.shape), np.uint8)


def _sharpness(pixels_HWC: U8_HWC) -> float:
    """Contrast of density between 0.7 and 1.4 px by that between 2.8 and 5.6: blind to strength of stain."""
    density_HW = optical_density(pixels_HWC, 255.0).mean(axis=2)
    levels = [ndimage.gaussian_filter(density_HW, sigma) for sigma in (0.7, 1.4, 2.8, 5.6)]
    fine, coarse = float((levels[0] - levels[1]).std()), float((levels[2] - levels[3]).std())
    return fine / coarse if coarse > 1e-6 else math.nan


def summarise(
    rows: Sequence[Closeness],
    groups: Sequence[str],
    *,
    against: Sequence[Closeness] | None = None,
    draws: int = 2000,
) -> Mapping[str, Summary]:
    """Mean and 95 % interval of each figure by its name; with ``against`` of the paired differences."""
    found: dict[str, Summary] = {}
    for name in (field.name for field in fields(Closeness)):
        values = np.array([getattr(row, name) for row in rows], np.float64)
        if against is not None:
            values = values - np.array([getattr(row, name) for row in against], np.float64)
        known = np.isfinite(values)
        kept, labels = values[known], [g for g, k in zip(groups, known, strict=True) if k]

        def mean(counts: Sequence[I64], kept: npt.NDArray[Any] = kept) -> float:
            return float((counts[0] * kept).sum() / max(counts[0].sum(), 1))

        interval = bootstrap_by_group([labels], mean, draws=draws, seed=0) if len(kept) else None
        value = float(kept.mean()) if len(kept) else math.nan
        found[name] = Summary(value=value, interval=interval, windows=len(kept))
    return found
