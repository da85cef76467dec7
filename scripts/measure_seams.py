"""Seam figures of the LoRA generator with random weights on tile grids side by side, one JSON line each:

    python scripts/measure_seams.py SECTION.jpg --at 6440 7079 --out figures.jsonl
    python scripts/measure_seams.py TILE.jpg --against OUTPUT.jpg

Grids are moved so that tiles of all halos begin at the same pixels, and a tile is generated once for its
pixels: a run that was stopped goes on. What came of it: tests/benchmarks/lora_turbo_seams.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from wsi_pipeline.core.geometry import Region, Size, TileIndex
from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC, Context, GeneratorSpec, TileBatch, View
from wsi_pipeline.evaluation.fields import MARGIN, OPTICAL_DENSITY, Strip, lattice_lines, render_field
from wsi_pipeline.evaluation.profiles import border_gradient, line_excess, profile_strip
from wsi_pipeline.evaluation.seams import SeamBudget, colour_distance, line_figures
from wsi_pipeline.generators._torch import from_uint8, to_uint8
from wsi_pipeline.models.assemble import assemble
from wsi_pipeline.models.layout import SD_TURBO_UNET, SD_TURBO_VAE
from wsi_pipeline.models.random_weights import random_weights
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.lattice import SlideView

TILE, CELL = 512, 128
MPP = (0.5, 0.5)
BEFORE = AFTER = TILE + 64  # shifted grids read so far around the field
DISTANCES = (0, 8, 16, 32, 64, 128)

Network = Callable[[U8_HWC], U8_HWC]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A tile grid; several ``offsets`` (in pixels along both axes): the average over so many moved grids."""

    stride: int
    halo: int = 0
    offsets: tuple[tuple[int, int], ...] = ((0, 0),)

    @property
    def overlap(self) -> int:
        return TILE - 2 * self.halo - self.stride

    def grid(self, side: int) -> TileGrid:
        """The grid of as many whole periods as fit into ``side``; at least three tiles."""
        extent = max(3, (side - TILE) // self.stride + 1) * self.stride + max(self.overlap, 0)
        return TileGrid(size=Size(extent, extent), tile=TILE, halo=self.halo, overlap=self.overlap)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The lattice from ``origin`` (y, x) on; unlike a slide it has pixels beyond its edge."""

    pixels_HWC: U8_HWC
    origin: tuple[int, int]
    size: Size
    mpp: tuple[float, float] = MPP

    def read(self, region: Region) -> U8_HWC:
        y, x = region.y + self.origin[0], region.x + self.origin[1]
        return self.pixels_HWC[y : y + region.height, x : x + region.width]


@dataclass(frozen=True, kw_only=True)
class Cached:
    """``x + strength (y - x)`` of a network's tiles y, which are kept in a folder by their input's digest."""

    network: Network
    folder: Path
    pause: Path
    strength: float = 1.0
    halo: int = 0

    @property
    def spec(self) -> GeneratorSpec:
        return GeneratorSpec(
            kind="random", tile=TILE, halo=self.halo, align=8, mpp=None, batch=1, digest="", exact=True
        )

    def prepare(self, thumbnail_HWC: U8_HWC, tissue_HW: Any, mpp: Any) -> Context:
        return {}

    def background(self, pixels_HWC: U8_HWC, context: Context) -> U8_HWC:
        return pixels_HWC

    def __call__(self, batch: TileBatch, context: Context) -> U8_BHWC:
        made = np.stack([self._tile(pixels_HWC) for pixels_HWC in batch.pixels_BHWC])
        if self.strength == 1.0:
            return made
        mixed = batch.pixels_BHWC + self.strength * (made.astype(np.float32) - batch.pixels_BHWC)
        return np.rint(mixed).astype(np.uint8)

    def _tile(self, pixels_HWC: U8_HWC) -> U8_HWC:
        path = self.folder / f"{hashlib.sha256(np.ascontiguousarray(pixels_HWC)).hexdigest()[:24]}.npy"
        if not path.exists():
            while self.pause.exists():
                time.sleep(5)
            unfinished = path.with_suffix(".part.npy")
            np.save(unfinished, self.network(pixels_HWC))
            unfinished.rename(path)
        return np.load(path)


def random_network(model: str, seed: int) -> Network:
    """Tile in, tile out, with random weights; built when the first tile asks for it."""

    @functools.cache
    def net() -> Any:
        if model == "tiny":
            return assemble(random_weights(seed=seed), "a2b")
        weights = random_weights(
            unet_config=SD_TURBO_UNET, vae_config=SD_TURBO_VAE, rank_unet=128, rank_vae=4, seed=seed
        )
        return assemble(weights, "a2b", dtype=torch.bfloat16)

    def translate(pixels_HWC: U8_HWC) -> U8_HWC:
        with torch.inference_mode():
            x = from_uint8(torch.from_numpy(np.ascontiguousarray(pixels_HWC))[None])
            return to_uint8(net()(x), "round")[0].numpy()

    return translate


def render(
    view: View, region: Region, scheme: Scheme, grid: TileGrid, generator: Cached, moved: int
) -> U8_HWC:
    """A region by a scheme whose lattice is moved by ``moved`` pixels along both axes."""
    total = np.zeros((region.height, region.width, 3))
    for dy, dx in scheme.offsets:
        shift = ((dy + moved) % scheme.stride, (dx + moved) % scheme.stride)
        total += render_field(view, region, grid, generator, {}, shift=shift)
    return np.rint(total / len(scheme.offsets)).astype(np.uint8)


def lines(window: Window, scheme: Scheme, grid: TileGrid, generator: Cached) -> dict[str, Any]:
    """M1, M2, M5; ``excess_a_tile``: M2 summed over all lines in 512 px, tiles' and cells'."""
    region = Region.of(grid.size)
    made_HWC = render(window, region, scheme, grid, generator, 0)
    output = Window(
        pixels_HWC=np.pad(made_HWC, ((64, 64), (64, 64), (0, 0))), origin=(64, 64), size=grid.size
    )
    plan = SlidePlan(
        slide_id="field",
        identity="field",
        mpp=MPP,
        mpp_origin="given",
        grid=grid,
        tissue_tiles_HW=np.ones(grid.shape, bool),
        block=1024,
        background="source",
        seed=0,
        generator=generator.spec,
    )
    figures = line_figures(window, output, plan, budget=SeamBudget(strips=10_000, megapixels=1e4), cell=CELL)
    kinds = lattice_lines(grid, "x", CELL)
    period = range(scheme.stride, 2 * scheme.stride)
    phases = len({offset for offset, _ in scheme.offsets})
    summed = 0.0
    for name, positions in (("line_excess", kinds.tile), ("cell_excess", kinds.cell)):
        count = phases * sum(int(c) in period for c in positions) * TILE / scheme.stride
        figures[name]["lines_a_tile"] = count
        summed += count * (figures[name].get("difference") or 0.0)
    return figures | {"excess_a_tile": summed, "detail": detail(made_HWC)}


def detail(pixels_HWC: U8_HWC) -> float:
    """Variance of the grey image's five-point Laplacian: what averaging of disagreeing tiles takes away."""
    return float(ndimage.laplace(pixels_HWC.mean(axis=2)).var())


def shifts(
    window: Window, scheme: Scheme, grid: TileGrid, generator: Cached, fields: int
) -> Iterator[tuple[int, float]]:
    """M3: (shift, CIEDE2000) of fields of one period for lattices moved by 8, 64 and half a stride."""
    for field in range(fields):
        at = TILE + field * (TILE + 64)
        region = Region(at, at, scheme.stride, scheme.stride)
        still_HWC = render(window, region, scheme, grid, generator, 0)
        for moved in (8, 64, scheme.stride // 2):
            yield moved, colour_distance(still_HWC, render(window, region, scheme, grid, generator, moved))


def disagreement(window: Window, grid: TileGrid, generator: Cached) -> list[float]:
    """M4: mean |OD difference| of horizontal neighbours by distance to the nearer border (``DISTANCES``)."""
    sums, overlap = np.zeros((len(DISTANCES), 2)), TILE - grid.stride
    distance = np.minimum(np.arange(overlap), np.arange(overlap)[::-1])
    group = np.searchsorted(DISTANCES, distance, side="right") - 1
    for row, col in itertools.product(range(grid.shape[0]), range(grid.shape[1] - 1)):
        pair = [grid.tile_at(TileIndex(row, c)) for c in (col, col + 1)]
        made = [
            generator(TileBatch(tiles=(t,), pixels_BHWC=window.read(t.read)[None], noise_key=0), {})[0]
            for t in pair
        ]
        left, right = OPTICAL_DENSITY[made[0][:, grid.stride :]], OPTICAL_DENSITY[made[1][:, :overlap]]
        columns = np.abs(left - right).mean(axis=(0, 2))
        np.add.at(sums, group, np.stack([columns, np.ones(overlap)], axis=1))
    return [float(total / count) for total, count in sums if count]


def inner_lines(source_HWC: U8_HWC, output_HWC: U8_HWC) -> dict[str, Any]:
    """M1 and M2 of the cell lines inside one tile that somebody's trained weights made."""
    view, made = (SlideView(ArraySlide(pixels, mpp=MPP)) for pixels in (source_HWC, output_HWC))
    grid = TileGrid(size=view.size, tile=TILE, overlap=0)
    profiles = []
    for axis, start in itertools.product(("x", "y"), range(0, TILE, 64)):
        across = Region(start, -MARGIN, 64, TILE + 2 * MARGIN)
        along = Region(-MARGIN, start, TILE + 2 * MARGIN, 64)
        strip = Strip(axis=axis, region=across if axis == "x" else along, origin=0)
        profiles.append(profile_strip(view, made, strip, grid, lattice_lines(grid, axis, CELL)))
    found = [profile for profile in profiles if profile]
    return {"cell_gradient": border_gradient(found, "cell"), "cell_excess": line_excess(found, "cell")}


def schemes(stage: str, strides: list[int]) -> list[Scheme]:
    """Grids of each stride with each halo that leaves an overlap, or averages over two or four grids."""
    if not stage.startswith("cycle"):
        found = [Scheme(stride=s, halo=h) for s in strides for h in (0, 16, 32)]
        return [scheme for scheme in found if scheme.overlap >= 0]
    two = [Scheme(stride=s, offsets=((0, 0), (s // 2, s // 2))) for s in strides if s >= 384]
    four = tuple(itertools.product((0, TILE // 2), repeat=2))
    return two + [Scheme(stride=s, offsets=four) for s in strides if s == TILE]


def main(args: argparse.Namespace) -> None:
    slide = open_slide(args.section, mpp=args.mpp)
    if args.against:
        other = open_slide(args.against, mpp=args.mpp)
        pair = [s.read_level(0, Region.of(s.levels[0].size)) for s in (slide, other)]
        sys.stdout.write(json.dumps(inner_lines(*pair), indent=1) + "\n")
        return
    whole = Region(
        args.at[0] - BEFORE, args.at[1] - BEFORE, args.side + BEFORE + AFTER, args.side + BEFORE + AFTER
    )
    pixels_HWC = SlideView(slide, MPP).read(whole)
    name = f"{args.model}-{args.seed}"
    args.cache.joinpath(name).mkdir(parents=True, exist_ok=True)
    network = random_network(args.model, args.seed)
    done = args.out.read_text().splitlines() if args.out.exists() else []
    seen = {json.dumps(json.loads(line)["key"]) for line in done}
    for stage, strength in itertools.product(args.stages, args.strengths):
        for scheme in schemes(stage, args.strides):
            key = [
                stage,
                name,
                args.section.stem,
                strength,
                scheme.stride,
                scheme.halo,
                list(map(list, scheme.offsets)),
            ]
            if json.dumps(key) in seen:
                continue
            grid = scheme.grid(args.side)
            window = Window(pixels_HWC=pixels_HWC, origin=(BEFORE + scheme.halo,) * 2, size=grid.size)
            generator = Cached(
                network=network,
                folder=args.cache / name,
                pause=args.pause,
                strength=strength,
                halo=scheme.halo,
            )
            if stage in ("lines", "cycle"):
                value: Any = lines(window, scheme, grid, generator)
            elif stage in ("shifts", "cycle-shifts"):
                value = list(shifts(window, scheme, grid, generator, args.fields))
            else:
                value = disagreement(window, grid, generator) if not scheme.halo and scheme.overlap else []
            with args.out.open("a") as out:
                out.write(json.dumps({"key": key, "value": value}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", type=Path, help="frozen section, any format that the program reads")
    parser.add_argument("--against", type=Path, help="what trained weights made of it, where it is one tile")
    parser.add_argument("--mpp", type=float, default=0.687, help="its µm per pixel")
    parser.add_argument(
        "--at", type=int, nargs=2, default=(TILE, TILE), help="y x of the field at 0.5 µm per pixel"
    )
    parser.add_argument("--side", type=int, default=2560, help="of the field, about")
    parser.add_argument("--model", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strides", type=int, nargs="+", default=[512, 448, 384, 320, 256])
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--fields", type=int, default=2, help="of the grid shift")
    parser.add_argument(
        "--stages", nargs="+", default=["lines", "disagreement", "shifts", "cycle", "cycle-shifts"]
    )
    parser.add_argument("--cache", type=Path, default=Path("seam_tiles"))
    parser.add_argument("--out", type=Path, default=Path("seams.jsonl"))
    parser.add_argument("--pause", type=Path, default=Path("pause"), help="wait while this file exists")
    main(parser.parse_args())
