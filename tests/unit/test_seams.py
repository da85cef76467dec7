"""Seam figures: each must see its own kind of seam, and none where there is none."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from wsi_pipeline.core.blend import Taper
from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import GeneratorSpec, TileBatch
from wsi_pipeline.evaluation.fields import (
    MARGIN,
    OPTICAL_DENSITY,
    lattice_lines,
    render_field,
    stained,
    strips,
)
from wsi_pipeline.evaluation.seams import (
    SeamBudget,
    colour_distance,
    line_figures,
    roi_equality,
    seam_figures,
)

TILE = 128
SIDE = 1100
HAEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


class ArrayView:
    """Pixels in memory as a view; outside is white."""

    mpp = (0.5, 0.5)

    def __init__(self, pixels_HWC: np.ndarray) -> None:
        self.pixels_HWC = pixels_HWC
        self.size = Size(*pixels_HWC.shape[:2])

    def read(self, region: Region) -> np.ndarray:
        canvas = np.full((region.height, region.width, 3), 255, np.uint8)
        inside = region.intersect(Region.of(self.size))
        if inside is not None:
            canvas[inside.slices(region)] = self.pixels_HWC[inside.slices(Region.of(self.size))]
        return canvas


def texture(side: int, seed: int = 0) -> np.ndarray:
    """H&E-coloured noise with structure from pixels to tiles, all tissue."""
    rng = np.random.default_rng(seed)

    def field(sigma: float) -> np.ndarray:
        coarse = max(1, int(sigma / 4))
        small = ndimage.gaussian_filter(
            rng.standard_normal((side // coarse + 9,) * 2), sigma / coarse, mode="wrap"
        )
        wide = ndimage.zoom(small, coarse, order=1)[:side, :side] if coarse > 1 else small[:side, :side]
        return (wide - wide.mean()) / wide.std()

    haematoxylin = 0.25 + 0.04 * field(3) + 0.08 * field(60) + 0.01 * field(0.7)
    eosin = 0.25 + 0.03 * field(5) + 0.08 * field(90) + 0.01 * field(1)
    od = np.clip(haematoxylin, 0.01, 1)[..., None] * HAEMATOXYLIN
    od += np.clip(eosin, 0.03, 1)[..., None] * EOSIN
    return np.clip(256 * 10**-od - 1, 0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Leaky:
    """The toy of formats_and_seams 5.7: lets the tile's mean leak into its pixels, and adds noise.

    ``shared``: noise belongs to the lattice; otherwise every tile draws its own.
    """

    tile: int = TILE
    halo: int = 0
    leak: float = 0.15
    sigma: float = 2.0
    shared: bool = True
    noise_side: int = SIDE + 2 * TILE

    @property
    def spec(self) -> GeneratorSpec:
        return GeneratorSpec(
            kind="leaky",
            tile=self.tile,
            halo=self.halo,
            align=1,
            mpp=None,
            batch=4,
            digest="toy",
            exact=True,
        )

    def prepare(self, thumbnail_HWC: np.ndarray, tissue_HW: np.ndarray, mpp: Any) -> dict[str, Any]:
        return {}

    def background(self, pixels_HWC: np.ndarray, context: Any) -> np.ndarray:
        return np.asarray(pixels_HWC // 2 + 100, np.uint8)

    def __call__(self, batch: TileBatch, context: Any) -> np.ndarray:
        out = batch.pixels_BHWC.astype(np.float32)
        out += self.leak * (out.mean(axis=(1, 2), keepdims=True) - 150)
        for i, tile in enumerate(batch.tiles):
            out[i] += self.sigma * self._noise(tile.read)
        return np.clip(np.rint(out), 0, 255).astype(np.uint8)

    def _noise(self, region: Region) -> np.ndarray:
        if self.sigma == 0:
            return np.zeros((region.height, region.width, 1), np.float32)
        if self.shared:
            field = lattice_noise(self.noise_side)
            at = Region(region.y + self.tile, region.x + self.tile, region.height, region.width)
            return field[at.slices(Region(0, 0, *field.shape[:2]))]
        rng = np.random.default_rng([region.y + 10_000, region.x + 10_000])
        return rng.standard_normal((region.height, region.width, 1), np.float32)


def lattice_noise(side: int, _made: dict[int, np.ndarray] = {}) -> np.ndarray:  # noqa: B006 (a cache)
    if side not in _made:
        _made[side] = np.random.default_rng(7).standard_normal((side, side, 1), np.float32)
    return _made[side]


SOURCE = ArrayView(texture(SIDE))


def plan_of(
    generator: Any, *, view: ArrayView = SOURCE, overlap: int = 64, halo: int = 0, **changes: Any
) -> SlidePlan:
    grid = TileGrid(size=view.size, tile=generator.spec.tile, halo=halo, overlap=overlap)
    plan = SlidePlan(
        slide_id="toy",
        identity="toy",
        mpp=view.mpp,
        mpp_origin="toy",
        grid=grid,
        tissue_tiles_HW=np.ones(grid.shape, bool),
        block=256,
        background="source",
        seed=0,
        generator=generator.spec,
    )
    return replace(plan, **changes)


def rendered(
    plan: SlidePlan, generator: Any, *, view: ArrayView = SOURCE, taper: Taper = "sin2"
) -> ArrayView:
    return ArrayView(
        render_field(
            view,
            Region.of(view.size),
            plan.grid,
            generator,
            {},
            tissue_tiles_HW=plan.tissue_tiles_HW,
            background=plan.background,
            taper=taper,
        )
    )


@functools.cache
def lines_of(
    generator: Any, *, overlap: int, taper: Taper = "sin2", cell: int | None = None
) -> dict[str, Any]:
    plan = plan_of(generator, overlap=overlap)
    output = rendered(plan, generator, taper=taper)
    return line_figures(SOURCE, output, plan, budget=SeamBudget(strips=1000), cell=cell)


def no_numbers_missing(value: Any) -> bool:
    """True where a JSON document holds no NaN or infinity."""
    json.dumps(value, allow_nan=False)
    return True


def test_the_source_itself_has_no_seam() -> None:
    identity = Leaky(leak=0, sigma=0)
    plan = plan_of(identity)
    figures = seam_figures(SOURCE, SOURCE, plan, identity, budget=SeamBudget(shift_fields=1), cell=32)
    for name in ("border_gradient", "cell_gradient", "sharpness"):
        assert figures[name]["ratio"] == 1.0
        assert figures[name]["ci95"] == [1.0, 1.0]
    for name in ("line_excess", "cell_excess"):
        assert figures[name]["difference"] == 0.0
        assert figures[name]["z"] == 0.0
    assert figures["border_gradient"]["n"] > 100
    # A texture without a grid looks alike at all phases; what lies beyond the slide's edge must not count.
    for name in ("border_gradient", "cell_gradient", "sharpness"):
        assert figures[name]["src"] == pytest.approx(1, abs=0.1)
    assert figures["grid_shift"]["out"] == 0.0
    assert figures["roi_equality"]["difference"] == 0
    assert figures["pass"] is True
    assert all(figure["pass"] for name, figure in figures.items() if name != "pass")
    assert no_numbers_missing(figures)


@pytest.mark.parametrize("overlap", [0, 30, 48])
def test_the_edge_of_the_slide_is_no_texture(overlap: int) -> None:
    budget = SeamBudget(strips=1000)
    for view in (SOURCE, ArrayView(SOURCE.pixels_HWC[:501, :333])):
        plan = plan_of(Leaky(leak=0, sigma=0), view=view, overlap=overlap)
        for name, figure in line_figures(view, view, plan, budget=budget).items():
            assert figure["src"] == pytest.approx(0 if name == "line_excess" else 1, abs=0.15), name


def test_steps_between_tiles_are_seen_and_blending_removes_them() -> None:
    naive = lines_of(Leaky(), overlap=0)
    ours = lines_of(Leaky(), overlap=64)
    assert naive["border_gradient"]["ratio"] > 1.2
    assert naive["border_gradient"]["pass"] is False
    assert naive["line_excess"]["difference"] > 0.2
    assert naive["line_excess"]["z"] > 5
    assert naive["line_excess"]["pass"] is False
    assert abs(ours["border_gradient"]["ratio"] - 1) < 0.02
    assert abs(ours["line_excess"]["difference"]) < 0.005
    assert ours["border_gradient"]["pass"] and ours["line_excess"]["pass"] and ours["sharpness"]["pass"]


def test_the_count_average_keeps_half_of_each_step() -> None:
    naive = lines_of(Leaky(), overlap=0)["line_excess"]["difference"]
    average = lines_of(Leaky(), overlap=64, taper="uniform")["line_excess"]["difference"]
    ours = lines_of(Leaky(), overlap=64)["line_excess"]["difference"]
    assert naive > average > 0.01 > abs(ours)


def test_a_halo_alone_does_not_remove_steps() -> None:
    generator = Leaky(tile=TILE + 32, halo=16)
    plan = plan_of(generator, overlap=0, halo=16)
    figures = line_figures(SOURCE, rendered(plan, generator), plan, budget=SeamBudget())
    assert figures["line_excess"]["difference"] > 0.05


def test_blur_bands_are_seen_by_sharpness_and_praised_by_the_mean_gradient() -> None:
    def mean_gradient(generator: Leaky) -> float:
        output = rendered(plan_of(generator, overlap=48), generator)
        return float(np.abs(np.diff(OPTICAL_DENSITY[output.pixels_HWC], axis=1)).mean())

    fresh, shared = Leaky(leak=0, sigma=5, shared=False), Leaky(leak=0, sigma=5, shared=True)
    assert mean_gradient(fresh) < 0.95 * mean_gradient(shared)
    banded, plain = (lines_of(g, overlap=48)["sharpness"] for g in (fresh, shared))
    assert banded["ratio"] < 0.8
    assert banded["pass"] is False
    assert plain["ratio"] == pytest.approx(1, abs=0.03)


def test_undecided_is_neither_passed_nor_failed() -> None:
    generator = Leaky(leak=0, sigma=12)
    plan = plan_of(generator)
    few = line_figures(SOURCE, rendered(plan, generator), plan, budget=SeamBudget(strips=8))[
        "border_gradient"
    ]
    low, high = few["ci95"]
    assert low < 1 < high and high - low > 0.04
    assert few["pass"] is None and few["reason"]


def test_internal_cells_are_measured_apart() -> None:
    class Celled(Leaky):
        def __call__(self, batch: TileBatch, context: Any) -> np.ndarray:
            pixels = batch.pixels_BHWC.astype(np.float32)
            cells = pixels.reshape(len(pixels), 2, TILE // 2, 2, TILE // 2, 3)
            leaked = cells + 0.15 * (cells.mean(axis=(2, 4), keepdims=True) - 150)
            return np.clip(np.rint(leaked.reshape(pixels.shape)), 0, 255).astype(np.uint8)

    figures = lines_of(Celled(), overlap=32, cell=TILE // 2)
    assert figures["cell_excess"]["difference"] > 0.03
    assert figures["cell_excess"]["pass"] is False
    assert figures["cell_gradient"]["ratio"] > 1.02
    assert figures["line_excess"]["difference"] < figures["cell_excess"]["difference"] / 3


def test_grid_shift_orders_the_schemes() -> None:
    def distance(generator: Leaky, overlap: int) -> float:
        plan = plan_of(generator, overlap=overlap)
        budget = SeamBudget(shift_fields=2, strips=4)
        figure = seam_figures(SOURCE, SOURCE, plan, generator, budget=budget)["grid_shift"]
        assert figure["jpeg_q90"] > 0.2
        assert figure["pass"] == (figure["out"] <= figure["jpeg_q90"])
        return float(figure["out"])

    pointwise = distance(Leaky(leak=0), 64)
    ours, naive = distance(Leaky(), 64), distance(Leaky(), 0)
    independent = distance(Leaky(shared=False), 64)
    assert pointwise == 0.0
    assert 0 < ours < naive < independent


def test_one_block_made_again_equals_the_output_until_a_pixel_is_wrong() -> None:
    generator = Leaky()
    rng = np.random.default_rng(3)
    grid = plan_of(generator).grid
    tissue_tiles_HW = rng.random(grid.shape) < 0.5
    outputs = []
    for background in ("matched", "source", "white"):
        plan = plan_of(generator, background=background, tissue_tiles_HW=tissue_tiles_HW)
        output = rendered(plan, generator)
        outputs.append(output.pixels_HWC.copy())
        figure = roi_equality(SOURCE, output, plan, generator)
        assert figure["pass"] is True and figure["out"] == figure["src"] and figure["difference"] == 0
        row, col = figure["block"]
        output.pixels_HWC[row * plan.block + 5, col * plan.block + 7, 1] ^= 4
        planted = roi_equality(SOURCE, output, plan, generator)
        assert planted["pass"] is False and planted["difference"] == 4
        assert planted["block"] == figure["block"]
    assert len({image.tobytes() for image in outputs}) == 3


@pytest.mark.parametrize("shape", [(1, 1), (100, 60), (128, 128)])
def test_a_slide_of_one_tile_has_no_line_and_says_so(shape: tuple[int, int]) -> None:
    view = ArrayView(SOURCE.pixels_HWC[: shape[0], : shape[1]])
    generator = Leaky(leak=0, sigma=0)
    plan = plan_of(generator, view=view)
    figures = seam_figures(view, view, plan, generator)
    for name in ("border_gradient", "line_excess", "sharpness", "grid_shift"):
        assert figures[name]["pass"] is None and figures[name]["reason"]
    assert figures["roi_equality"]["pass"] is True
    assert no_numbers_missing(figures)


def test_two_tiles_give_a_figure_or_a_reason() -> None:
    view = ArrayView(SOURCE.pixels_HWC[:40, :150])
    generator = Leaky()
    plan = plan_of(generator, view=view, overlap=16)
    figures = seam_figures(view, rendered(plan, generator, view=view), plan, generator, cell=64)
    assert no_numbers_missing(figures)
    assert all(f["pass"] is not None or f["reason"] for n, f in figures.items() if n != "pass")


def test_a_slide_without_tissue_gives_nothing_but_reasons() -> None:
    generator = Leaky()
    glass = ArrayView(np.full((600, 600, 3), 235, np.uint8))
    none = plan_of(generator, view=glass)
    figures = seam_figures(glass, glass, none, generator)
    assert figures["border_gradient"]["pass"] is None
    assert figures["grid_shift"]["pass"] is None
    empty = plan_of(generator, view=glass, tissue_tiles_HW=np.zeros(none.grid.shape, bool))
    figures = seam_figures(glass, glass, empty, generator)
    assert figures["pass"] is None
    assert all(f["reason"] == "no tissue" for n, f in figures.items() if n != "pass")


def test_figures_are_repeatable_and_respect_the_budget() -> None:
    generator = Leaky()
    plan = plan_of(generator)
    output = rendered(plan, generator)
    budget = SeamBudget(strips=20, megapixels=0.2, shift_fields=1, seed=5)
    pixels = 0

    class Counting(ArrayView):
        def read(self, region: Region) -> np.ndarray:
            nonlocal pixels
            pixels += region.area
            return super().read(region)

    first = seam_figures(SOURCE, output, plan, generator, budget=budget)
    assert first == seam_figures(SOURCE, output, plan, generator, budget=budget)
    line_figures(Counting(SOURCE.pixels_HWC), output, plan, budget=budget)
    assert 0 < pixels <= 200_000
    other = seam_figures(SOURCE, output, plan, generator, budget=replace(budget, seed=6))
    assert other["border_gradient"]["ratio"] != first["border_gradient"]["ratio"]


def test_only_blocks_that_were_made_are_measured() -> None:
    generator = Leaky(leak=0, sigma=0)
    plan = plan_of(generator, roi=(Region(300, 300, 400, 300),))
    made = plan.blocks()
    blank = ArrayView(np.full_like(SOURCE.pixels_HWC, 255))
    for index in made:
        at = plan.shape.region(0, index).slices(Region.of(plan.grid.size))
        blank.pixels_HWC[at] = SOURCE.pixels_HWC[at]
    figures = seam_figures(SOURCE, blank, plan, generator, budget=SeamBudget(shift_fields=0))
    assert figures["border_gradient"]["ratio"] == 1.0
    assert figures["border_gradient"]["n"] > 0
    assert figures["roi_equality"]["pass"] is True
    assert figures["grid_shift"]["reason"] == "left out"


def test_lines_are_the_starts_ends_and_ramp_ends_of_write_regions() -> None:
    size = Size(100, 400)
    plain = lattice_lines(TileGrid(size=size, tile=100, overlap=20), "x")
    assert plain.tile.tolist() == [80, 100, 160, 180, 240, 260, 320, 340]
    naive = lattice_lines(TileGrid(size=size, tile=120, halo=10, overlap=0), "x", cell=60)
    assert naive.tile.tolist() == [100, 200, 300]
    assert naive.cell.tolist() == [50, 150, 250, 350]
    deep = lattice_lines(TileGrid(size=size, tile=100, overlap=75), "x")
    assert {25, 50, 75, 100, 125, 150} <= set(deep.tile.tolist())
    assert lattice_lines(TileGrid(size=size, tile=100, overlap=20), "y").tile.tolist() == []


@pytest.mark.parametrize("axis", ["x", "y"])
def test_strips_hold_every_line_pixel_once(axis: Any) -> None:
    plan = plan_of(Leaky(tile=700), overlap=100)
    lines = lattice_lines(plan.grid, axis).tile
    seen: dict[tuple[int, int], int] = {}
    for strip in strips(plan, axis, np.random.default_rng(0)):
        first, along = (strip.region.x, strip.region.y) if axis == "x" else (strip.region.y, strip.region.x)
        length = strip.region.height if axis == "x" else strip.region.width
        assert first == strip.origin - MARGIN
        assert strip.read(SOURCE).shape == (length, plan.grid.stride + 2 * MARGIN, 3)
        for line in lines[(lines >= strip.origin) & (lines < strip.origin + plan.grid.stride)]:
            for pixel in range(along, along + length):
                seen[int(line), pixel] = seen.get((int(line), pixel), 0) + 1
    assert set(seen.values()) == {1}
    assert len(seen) == len(lines) * SIDE


def test_density_and_colour_distance_follow_their_definitions() -> None:
    assert OPTICAL_DENSITY[255] == 0.0
    assert OPTICAL_DENSITY[0] == pytest.approx(np.log10(256))
    image = SOURCE.pixels_HWC[:90, :90]
    assert colour_distance(image, image) == 0.0
    brighter = np.clip(image.astype(int) + 5, 0, 255).astype(np.uint8)
    assert 1.0 < colour_distance(image, brighter) < 3.0
    assert not stained(np.full((64, 64, 3), 210, np.uint8)).any()
    assert stained(image).all()


def test_a_shifted_grid_is_the_same_slide_seen_from_another_origin() -> None:
    generator = Leaky(shared=True)
    grid = plan_of(generator).grid
    dy, dx = 24, 40
    moved = ArrayView(np.pad(SOURCE.pixels_HWC, ((dy, 0), (dx, 0), (0, 0)), constant_values=255))

    class Unanchored(Leaky):
        def __call__(self, batch: TileBatch, context: Any) -> np.ndarray:
            return np.asarray(replace(generator, sigma=0.0)(batch, context))

    field = Region(300, 310, 200, 220)
    shifted = render_field(SOURCE, field, grid, Unanchored(), {}, shift=(dy, dx))
    wide = TileGrid(size=moved.size, tile=grid.tile, overlap=grid.overlap)
    expected = render_field(moved, field.shifted(dy, dx), wide, Unanchored(), {})
    assert np.array_equal(shifted, expected)
    assert not np.array_equal(shifted, render_field(SOURCE, field, grid, Unanchored(), {}))
