"""Is the output free of seams? Five figures of a finished output against its source, for the manifest.

Names and limits are those of ``formats_and_seams`` 5.6. M1, M2 and M5 look at the pixels that were written;
M3 and M7 make some of them again in memory, on grids that start elsewhere and from one block's tiles alone.
M2 catches steps, M5 the blur bands that hide steps, M3 whatever depends on where the grid happens to lie.

Why everything is sampled: a slide has 10^10 pixels, and a few tens of megapixels of tissue give intervals
that are narrower than the limits. The choice is seeded, so a figure can be measured again.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

from wsi_pipeline.core.blend import Taper
from wsi_pipeline.core.geometry import BlockIndex, Region, TileIndex
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import U8_HWC, Context, Generator, View
from wsi_pipeline.evaluation.fields import Axis, lattice_lines, render_field, stained, strips
from wsi_pipeline.evaluation.profiles import (
    StripProfile,
    border_gradient,
    finite,
    line_excess,
    no_figure,
    profile_strip,
    sharpness,
    student,
)

__all__ = ["SeamBudget", "colour_distance", "grid_shift", "line_figures", "roi_equality", "seam_figures"]

_AXES: tuple[Axis, Axis] = ("x", "y")
_SAMPLE = 3  # every third pixel: coprime to JPEG's 8 x 8 blocks and to strides
_FIELD_SIDE = 1024
_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class SeamBudget:
    """How much is looked at. ``strips``: at most so many pieces of lattice lines, both directions together;
    ``megapixels``: at most so many pixels in them; ``shift_fields``: fields that are generated on sixteen
    shifted grids each, about four tiles a grid (0: none); ``seed``: of every choice."""

    strips: int = 128
    megapixels: float = 100.0
    shift_fields: int = 2
    seed: int = 0


def seam_figures(
    source: View,
    output: View,
    plan: SlidePlan,
    generator: Generator,
    *,
    budget: SeamBudget | None = None,
    cell: int | None = None,
) -> dict[str, Any]:
    """Seam figures of a finished, lossless output, as JSON values.

    ``source`` and ``output`` lie on the plan's lattice; ``generator`` is the one that made the output;
    ``cell``: side in pixels of the cells into which it cuts its input, if any, measured apart as
    ``cell_gradient`` and ``cell_excess``. Each figure has ``out``, ``src``, ``ratio`` or ``difference``,
    ``ci95``, ``n`` and ``pass``; what cannot be measured (one tile, no tissue) is None with a ``reason``.
    ``pass`` of the whole is False if one figure failed, and None if one was measured and proves nothing.
    Reads at most ``budget.megapixels`` twice, a field or two, and one block.
    """
    budget = budget or SeamBudget()
    figures: dict[str, Any] = line_figures(source, output, plan, budget=budget, cell=cell)
    figures["grid_shift"] = _plan_grid_shift(source, plan, generator, budget)
    figures["roi_equality"] = roi_equality(source, output, plan, generator, seed=budget.seed)
    verdicts = [item["pass"] for item in figures.values() if item["n"]]
    undecided = None in verdicts or not verdicts
    return {**figures, "pass": False if False in verdicts else None if undecided else True}


def line_figures(
    source: View, output: View, plan: SlidePlan, *, budget: SeamBudget, cell: int | None = None
) -> dict[str, dict[str, Any]]:
    """M1 ``border_gradient``, M2 ``line_excess``, M5 ``sharpness``; with ``cell`` M1 and M2 of cells too.

    Horizontal and vertical lines are pooled.
    """
    names = ["border_gradient", "line_excess", "sharpness"]
    names += ["cell_gradient", "cell_excess"] if cell else []
    if not plan.tissue_tiles_HW.any():
        return {name: no_figure("no tissue") for name in names}
    profiles = [p for axis in _AXES for p in _profiles(source, output, plan, axis, budget, cell)]
    if not profiles:
        reason = "no line between two generated tiles crosses tissue"
        return {name: no_figure(reason) for name in names}
    figures = {
        "border_gradient": border_gradient(profiles),
        "line_excess": line_excess(profiles),
        "sharpness": sharpness(profiles),
    }
    if cell:
        figures["cell_gradient"] = border_gradient(profiles, "cell")
        figures["cell_excess"] = line_excess(profiles, "cell")
    return figures


def _profiles(
    source: View, output: View, plan: SlidePlan, axis: Axis, budget: SeamBudget, cell: int | None
) -> list[StripProfile]:
    """Half the budget for one direction; a strip without tissue costs its pixels, too."""
    rng = np.random.default_rng([budget.seed, _AXES.index(axis)])
    lines = lattice_lines(plan.grid, axis, cell)
    left = budget.megapixels * 1e6 / 2
    found: list[StripProfile] = []
    for strip in strips(plan, axis, rng):
        left -= strip.region.area
        if left < 0 or len(found) >= budget.strips // 2:
            break
        profile = profile_strip(source, output, strip, plan.grid, lines)
        if profile is not None:
            found.append(profile)
    return found


def _plan_grid_shift(
    source: View, plan: SlidePlan, generator: Generator, budget: SeamBudget
) -> dict[str, Any]:
    """M3 on tissue of the plan, every tile generated on every grid."""
    if not plan.tissue_tiles_HW.any():
        return no_figure("no tissue")
    if plan.grid.shape == (1, 1):
        return no_figure("one tile covers the slide: the grid has no line")
    fields = _tissue_fields(source, plan, budget)
    if not fields:
        return no_figure("no field of tissue was found" if budget.shift_fields else "left out")
    return grid_shift(source, fields, plan.grid, generator, plan.context, noise_key=plan.noise_key)


def _tissue_fields(source: View, plan: SlidePlan, budget: SeamBudget) -> list[Region]:
    """Squares of one stride (at most 1024 px) that begin anywhere; half of each is tissue, if possible.

    One period of the grid holds as many lines as the slide does on average, wherever it begins.
    """
    rng = np.random.default_rng([budget.seed, 2])
    stride, side = plan.grid.stride, min(plan.grid.stride, _FIELD_SIDE)
    candidates = np.argwhere(plan.tissue_tiles_HW)
    candidates = candidates[rng.permutation(len(candidates))][: 8 * budget.shift_fields]
    seen: list[tuple[float, Region]] = []
    for row, col in candidates.tolist():
        y, x = (int(v) for v in rng.integers(0, stride, 2))
        field = Region(row * stride + y, col * stride + x, side, side).intersect(Region.of(plan.grid.size))
        if field is None:
            continue
        seen.append((float(stained(source.read(field)).mean()) * field.area, field))
        if sum(share >= side * side / 2 for share, _ in seen) >= budget.shift_fields:
            break
    seen.sort(key=lambda item: -item[0])
    return [field for area, field in seen[: budget.shift_fields] if area > 0]


def grid_shift(
    view: View,
    fields: list[Region],
    grid: TileGrid,
    generator: Generator,
    context: Context,
    *,
    taper: Taper = "sin2",
    noise_key: int = 0,
) -> dict[str, Any]:
    """M3: mean CIEDE2000 between a field and the same field on grids shifted by {0, 8, 64, stride / 2}^2.

    ``src`` is the same distance for a source image that nothing tiled, 0 by definition. Passes where the
    mean is at most ``jpeg_q90``, the distance that a JPEG round trip at quality 90 makes in that field: then
    the choice of the grid's origin costs no more than the usual compression. ``n`` counts fields times grids.
    """
    steps = sorted({0, 8 % grid.stride, 64 % grid.stride, grid.stride // 2})
    shifts = [shift for shift in itertools.product(steps, steps) if shift != (0, 0)]
    if not shifts:
        return no_figure("a stride of one pixel cannot be shifted")
    distances, yardsticks = [], []
    for field in fields:

        def made(shift: tuple[int, int], field: Region = field) -> U8_HWC:
            return render_field(
                view, field, grid, generator, context, shift=shift, taper=taper, noise_key=noise_key
            )

        unshifted_HWC = made((0, 0))
        distances.append([colour_distance(unshifted_HWC, made(shift)) for shift in shifts])
        yardsticks.append(colour_distance(unshifted_HWC, _jpeg(unshifted_HWC)))
    per_field = np.mean(distances, axis=1)
    mean, yardstick = float(per_field.mean()), float(np.mean(yardsticks))
    interval = None
    if len(fields) > 1:
        error = float(per_field.std(ddof=1)) / float(np.sqrt(len(fields)))
        reach = error * student(len(fields))
        interval = [finite(mean - reach), finite(mean + reach)]
    return {
        "out": finite(mean),
        "src": 0.0,
        "difference": finite(mean),
        "largest": finite(float(np.max(distances))),
        "jpeg_q90": finite(yardstick),
        "ci95": interval,
        "n": len(fields) * len(shifts),
        "pass": mean <= yardstick,
        "reason": None,
    }


def colour_distance(a_HWC: U8_HWC, b_HWC: U8_HWC) -> float:
    """Mean CIEDE2000 (Sharma et al. 2005) of two sRGB images over every third pixel along both axes."""
    one, other = (np.ascontiguousarray(image[::_SAMPLE, ::_SAMPLE]) for image in (a_HWC, b_HWC))
    if np.array_equal(one, other):
        return 0.0
    return float(deltaE_ciede2000(rgb2lab(one), rgb2lab(other)).mean())


def _jpeg(pixels_HWC: U8_HWC) -> U8_HWC:
    """Encoded as the OME-TIFF export does by default, and decoded."""
    encoded = imagecodecs.jpeg8_encode(
        np.ascontiguousarray(pixels_HWC),
        level=_JPEG_QUALITY,
        colorspace="RGB",
        outcolorspace="YCBCR",
        subsampling="420",
    )
    return np.asarray(imagecodecs.jpeg8_decode(encoded), np.uint8)


def roi_equality(
    source: View, output: View, plan: SlidePlan, generator: Generator, *, seed: int = 0
) -> dict[str, Any]:
    """M7: a random block with tissue, made again from its own tiles alone, against the block as written.

    ``out`` and ``src`` are the sha256 of the block as written and as made again; passes where they are
    equal. ``difference`` is the largest between the two, in grey levels: 1 is what a generator with ``exact``
    false may show. Why without the Stitcher: a second way to the same pixels tests the first one, too.
    """
    index = _random_block(plan, np.random.default_rng([seed, 3]))
    if index is None:
        return no_figure("no tissue")
    region = plan.shape.region(0, index)
    again_HWC = render_field(
        source,
        region,
        plan.grid,
        generator,
        plan.context,
        tissue_tiles_HW=plan.tissue_tiles_HW,
        background=plan.background,
        noise_key=plan.noise_key,
    )
    written_HWC = output.read(region)
    sums = [hashlib.sha256(np.ascontiguousarray(p).data).hexdigest() for p in (written_HWC, again_HWC)]
    return {
        "out": sums[0],
        "src": sums[1],
        "difference": int((np.maximum(written_HWC, again_HWC) - np.minimum(written_HWC, again_HWC)).max()),
        "block": list(index),
        "ci95": None,
        "n": 1,
        "pass": sums[0] == sums[1],
        "reason": None,
    }


def _random_block(plan: SlidePlan, rng: np.random.Generator) -> BlockIndex | None:
    """A block of the plan into which a random generated tile writes."""
    planned = plan.blocks()
    candidates = np.argwhere(plan.tissue_tiles_HW)
    for row, col in candidates[rng.permutation(len(candidates))].tolist():
        tile = plan.grid.write_region(TileIndex(row, col))
        centre_y = min(tile.y + tile.height // 2, plan.grid.size.height - 1)
        centre_x = min(tile.x + tile.width // 2, plan.grid.size.width - 1)
        index = BlockIndex(centre_y // plan.block, centre_x // plan.block)
        if index in planned:
            return index
    return None
