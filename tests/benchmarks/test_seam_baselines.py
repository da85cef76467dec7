"""Seam figures of tiling schemes side by side: the table of formats_and_seams 5.7, on a made-up section.

    pytest tests/benchmarks/test_seam_baselines.py -m benchmark -s

The generator is a toy: 15 % of the tile's mean and 10 % of each 128-px cell's mean leak into its pixels, and
noise of 6 grey levels comes on top. Its amplitudes are invented, so only the order of the schemes counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from wsi_pipeline.core.blend import Taper
from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import GeneratorSpec, TileBatch
from wsi_pipeline.evaluation.fields import OPTICAL_DENSITY, render_field
from wsi_pipeline.evaluation.seams import SeamBudget, grid_shift, line_figures
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.readers.synthetic import SyntheticSlide

SIDE, TILE, CELL = 3072, 512, 128
MPP = (0.5, 0.5)
NOISE_MARGIN = 2 * TILE
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.07, 0.99, 0.11], np.float32)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Leaks the means of its tile and of its cells; ``shared`` noise belongs to the lattice."""

    shared: bool
    halo: int
    noise_HW: np.ndarray = field(repr=False)
    centre: tuple[float, ...] = (190.0, 150.0, 180.0)

    @property
    def spec(self) -> GeneratorSpec:
        return GeneratorSpec(
            kind="toy", tile=TILE, halo=self.halo, align=8, mpp=None, batch=1, digest="toy", exact=True
        )

    def prepare(self, thumbnail_HWC: np.ndarray, tissue_HW: np.ndarray, mpp: Any) -> dict[str, Any]:
        return {}

    def background(self, pixels_HWC: np.ndarray, context: Any) -> np.ndarray:
        return pixels_HWC

    def __call__(self, batch: TileBatch, context: Any) -> np.ndarray:
        out = np.empty_like(batch.pixels_BHWC)
        for i, tile in enumerate(batch.tiles):
            pixels = batch.pixels_BHWC[i].astype(np.float32)
            cells = pixels.reshape(TILE // CELL, CELL, TILE // CELL, CELL, 3)
            mean, means = pixels.mean(axis=(0, 1)), cells.mean(axis=(1, 3), keepdims=True)
            leaked = (cells + 0.10 * (means - mean)).reshape(pixels.shape)
            leaked += 0.15 * (mean - np.array(self.centre, np.float32))
            leaked += 6 * self._noise(tile.read)[..., None]
            out[i] = np.clip(np.rint(leaked), 0, 255)
        return out

    def _noise(self, region: Region) -> np.ndarray:
        if not self.shared:
            rng = np.random.default_rng([region.y + NOISE_MARGIN, region.x + NOISE_MARGIN])
            return rng.standard_normal((region.height, region.width), np.float32)
        y, x = region.y + NOISE_MARGIN, region.x + NOISE_MARGIN
        return self.noise_HW[y : y + region.height, x : x + region.width]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    name: str
    overlap: int
    halo: int = 0
    taper: Taper = "sin2"


SCHEMES = (
    Scheme(name="no overlap S512", overlap=0),
    Scheme(name="centre crop S448, halo 32", overlap=0, halo=32),
    Scheme(name="count average S256", overlap=256, taper="uniform"),
    Scheme(name="ours, sin2 S448", overlap=64),
    Scheme(name="ours, sin2 S384", overlap=128),
    Scheme(name="ours, sin2 S320", overlap=192),
    Scheme(name="ours, sin2 (Hann) S256", overlap=256),
    Scheme(name="ours, sin2 (Hann) S192", overlap=320),
)


def figures(scheme: Scheme, view: SlideView, shared: bool, noise_HW: np.ndarray) -> dict[str, Any]:
    toy = Toy(shared=shared, halo=scheme.halo, noise_HW=noise_HW)
    grid = TileGrid(size=view.size, tile=TILE, halo=scheme.halo, overlap=scheme.overlap)
    plan = SlidePlan(
        slide_id="toy",
        identity="toy",
        mpp=MPP,
        mpp_origin="toy",
        grid=grid,
        tissue_tiles_HW=np.ones(grid.shape, bool),
        block=1024,
        background="source",
        seed=0,
        generator=toy.spec,
    )
    output_HWC = render_field(view, Region.of(view.size), grid, toy, {}, taper=scheme.taper)
    output = SlideView(ArraySlide(output_HWC, mpp=MPP))
    budget = SeamBudget(strips=1000)
    measured = line_figures(view, output, plan, budget=budget, cell=CELL)
    fields = [Region(900, 900, 512, 512), Region(1700, 1500, 512, 512)]
    measured["grid_shift"] = grid_shift(view, fields, grid, toy, {}, taper=scheme.taper)
    return measured


def section() -> SlideView:
    """A synthetic section whose staining varies over a few tiles, so that tile means differ as they do."""
    drawn = SyntheticSlide(size=Size(SIDE, SIDE), mpp=MPP, tissue_share=1.0)
    density_HWC = OPTICAL_DENSITY[drawn.read_level(0, Region(0, 0, SIDE, SIDE))]
    rng = np.random.default_rng(0)
    coarse = ndimage.gaussian_filter(rng.standard_normal((SIDE // 32, SIDE // 32)), 10, mode="wrap")
    strength_HW = np.clip(1 + 0.5 * ndimage.zoom(coarse / coarse.std(), 32, order=3), 0.2, 2.5)
    density_HWC *= strength_HW.astype(np.float32)[..., None]
    return SlideView(ArraySlide(np.clip(256 * 10**-density_HWC - 1, 0, 255).astype(np.uint8), mpp=MPP))


def texture() -> SlideView:
    """Smooth H&E-coloured noise, on which steps stand out: the texture of formats_and_seams 5.7."""
    rng = np.random.default_rng(0)

    def noise(sigma: float) -> np.ndarray:
        coarse = max(1, int(sigma / 4))
        small = ndimage.gaussian_filter(
            rng.standard_normal((SIDE // coarse + 2,) * 2, np.float32), sigma / coarse, mode="wrap"
        )
        wide = ndimage.zoom(small / small.std(), coarse, order=1) if coarse > 1 else small / small.std()
        return np.asarray(wide[:SIDE, :SIDE])

    haematoxylin = np.clip(0.20 + 0.04 * noise(3) + 0.12 * noise(180) + 0.01 * noise(1), 0.02, 1)
    eosin = np.clip(0.16 + 0.03 * noise(5) + 0.10 * noise(240) + 0.01 * noise(1), 0.02, 1)
    density_HWC = haematoxylin[..., None] * HAEMATOXYLIN + eosin[..., None] * EOSIN
    return SlideView(ArraySlide(np.clip(256 * 10**-density_HWC - 1, 0, 255).astype(np.uint8), mpp=MPP))


def rows(view: SlideView) -> Iterator[str]:
    side = SIDE + 2 * NOISE_MARGIN
    noise_HW = np.random.default_rng(1).standard_normal((side, side), np.float32)
    for scheme in SCHEMES:
        shared, fresh = (figures(scheme, view, kind, noise_HW) for kind in (True, False))
        borders, lines, cells = (shared[n] for n in ("border_gradient", "line_excess", "cell_excess"))
        yield (
            f"{scheme.name:26s} | {borders['ratio']:6.3f} {mark(borders)} "
            f"| {lines['difference']:+7.2%} z {lines['z']:6.1f} {mark(lines)} "
            f"| {cells['difference']:+7.2%} z {cells['z']:6.1f} {mark(cells)} "
            f"| {fresh['sharpness']['ratio']:.2f} {mark(fresh['sharpness'])} "
            f"/ {shared['sharpness']['ratio']:.2f} {mark(shared['sharpness'])} "
            f"| {fresh['grid_shift']['out']:.2f} {mark(fresh['grid_shift'])} "
            f"/ {shared['grid_shift']['out']:.2f} {mark(shared['grid_shift'])} "
            f"(JPEG {shared['grid_shift']['jpeg_q90']:.2f})"
        )


def mark(figure: dict[str, Any]) -> str:
    return {True: "pass", False: "FAIL", None: "open"}[figure["pass"]]


@pytest.mark.benchmark
@pytest.mark.parametrize("source", [texture, section])
def test_schemes_side_by_side(source: Callable[[], SlideView]) -> None:
    lines = [
        f"{source.__name__:26s} | M1 ratio    | M2 tile lines          | M2 128-px cells        "
        "| M5 fresh / shared noise | M3 dE00 fresh / shared noise",
        *rows(source()),
    ]
    print("\n" + "\n".join(lines))
    assert len(lines) == 1 + len(SCHEMES)
