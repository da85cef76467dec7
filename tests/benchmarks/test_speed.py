"""Ratios of wall times in one run, printed and never asserted: bash scripts/test.sh -m benchmark -s."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openslide
import pytest
import pyvips
import tiffslide

from wsi_pipeline import convert, load_config, open_slide
from wsi_pipeline.core.batching import groups, read_batch
from wsi_pipeline.core.geometry import BlockIndex, Region
from wsi_pipeline.core.pyramid import PyramidBuilder
from wsi_pipeline.core.stitch import Stitcher, blend
from wsi_pipeline.pipeline.planning import survey
from wsi_pipeline.pipeline.prefetch import ordered_map
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.writers.omezarr import OmeZarrWriter

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]

SIDE = 20_000
MEGAPIXELS = SIDE * SIDE / 1e6


@pytest.fixture(scope="module")
def tissue_tiff(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """20,000 x 20,000 px of real tissue, tiled JPEG Q80, 0.5 µm/px, no pyramid."""
    frozen = pyvips.Image.new_from_file(str(data_dir / "ff/her2st/5714_HE_BT_C2.jpg"))
    paraffin = pyvips.Image.new_from_file(
        str(data_dir / "ffpe/pathologyatlas/anthracosis_HE_L15_c72-83_r22-33.jpg")
    )
    a, b = frozen.crop(2500, 4200, 3000, 3000), paraffin.crop(0, 0, 3000, 3000)
    upper = a.join(b, "horizontal").join(b.fliphor(), "horizontal").join(a.flipver(), "horizontal")
    lower = b.flipver().join(a.fliphor(), "horizontal").join(a, "horizontal").join(b, "horizontal")
    image = upper.join(lower, "vertical").replicate(2, 4).crop(0, 0, SIDE, SIDE)
    path = tmp_path_factory.mktemp("bench") / "tissue.tif"
    layout = {"tile": True, "tile_width": 512, "tile_height": 512, "compression": "jpeg", "Q": 80}
    image.tiffsave(str(path), **layout, bigtiff=True, xres=2000.0, yres=2000.0, resunit="cm")
    return path


def timed(work: Callable[[], object], runs: int = 3) -> float:
    """Median wall time in seconds."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def test_conversion_against_libvips(tissue_tiff: Path, tmp_path: Path) -> None:
    settings = load_config(None, ["generator.name=identity", "output.qc=false", "input.mask=whole"])
    count = iter(range(10))

    def vips() -> None:
        image = pyvips.Image.new_from_file(str(tissue_tiff))
        size = {"tile_width": 512, "tile_height": 512}
        image.tiffsave(str(tmp_path / "v.tif"), pyramid=True, tile=True, compression="jpeg", **size)

    def ours() -> None:
        convert(tissue_tiff, tmp_path / f"{next(count)}.ome.zarr", settings)

    ours()  # imports
    baseline, time_ours = timed(vips), timed(ours)
    print(f"\nidentity to OME-Zarr {time_ours:.2f} s, libvips {baseline:.2f} s: {time_ours / baseline:.2f}")


def test_stitch_pyramid_and_encode(tissue_tiff: Path, tmp_path: Path) -> None:
    settings = load_config(None, ["generator.name=identity", "input.mask=whole"])
    slide = open_slide(tissue_tiff)
    plan = survey(slide, settings).plan
    view = SlideView(slide, plan.mpp)
    blocks = {BlockIndex(row, col) for row in range(3) for col in range(4)}
    batches = [read_batch(view, group, 4, 0) for group in groups(plan.tiles_for(blocks), 4)]
    pixels = sum(plan.shape.region(0, index).area for index in blocks) / 1e6
    count = iter(range(10))

    def work() -> None:
        writer = OmeZarrWriter(tmp_path / str(next(count)), plan.shape, plan.mpp, settings.output.zarr)
        stitcher = Stitcher(plan, blocks)
        pyramid = PyramidBuilder(plan.shape, blocks, blocks, (), writer.read)
        gathers = (gather for batch in batches for gather in stitcher.put(batch, batch.pixels_BHWC))
        with ThreadPoolExecutor(2) as pool:
            stitched = ordered_map(pool, lambda gather: blend(gather, None), gathers, 2)
            finished = (block for stitch in stitched for block in pyramid.put(stitch))
            deque(ordered_map(pool, writer.write, finished, 2), maxlen=0)

    print(f"\nstitch + pyramid + encode: {pixels / timed(work):.0f} MPix/s of level 0")


def test_reading_against_openslide_and_tiffslide(tissue_tiff: Path) -> None:
    # More than any tile cache holds, so that every run decodes.
    regions = [(y, x) for y in range(0, 16384, 1024) for x in range(0, 16384, 1024)]
    pixels = len(regions) * 1024 * 1024 / 1e6

    def ours() -> None:
        slide = open_slide(tissue_tiff)
        for y, x in regions:
            slide.read_level(0, Region(y, x, 1024, 1024))
        slide.close()

    def other(opener: Callable[[str], object]) -> Callable[[], None]:
        def work() -> None:
            with opener(str(tissue_tiff)) as slide:  # type: ignore[attr-defined]
                for y, x in regions:
                    slide.read_region((x, y), 0, (1024, 1024))

        return work

    rates = {
        "ours": pixels / timed(ours),
        "OpenSlide": pixels / timed(other(openslide.OpenSlide)),
        "TiffSlide": pixels / timed(other(tiffslide.TiffSlide)),
    }
    print("\n" + ", ".join(f"{name} {rate:.0f} MPix/s" for name, rate in rates.items()))


def test_plan_of_a_large_pyramid() -> None:
    from wsi_pipeline.core.geometry import Size
    from wsi_pipeline.readers.synthetic import SyntheticSlide

    slide = SyntheticSlide(size=Size(120_000, 120_000), mpp=(0.25, 0.25))
    settings = load_config(None, [])
    survey(slide, settings)
    print(f"\nplan of 120,000 x 120,000 px: {timed(lambda: survey(slide, settings)):.2f} s")
