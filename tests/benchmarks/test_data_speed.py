"""How fast tiles reach training, printed and never asserted: bash scripts/test.sh -m benchmark -s.

Wall time says what this machine did, whatever else it was doing; CPU time of the reading processes says what
it costs, and two cores of their own would give two thousand over it in tiles a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import pyvips
import tifffile

from wsi_pipeline.cohorts.index import make_index
from wsi_pipeline.cohorts.settings import CohortConfig, FilterConfig, LatticeConfig
from wsi_pipeline.training.data import DataConfig, batches

SIDE = 20_000
SECONDS = 15


def write_tissue(data_dir: Path, path: Path, tile: int) -> None:
    """Real tissue, frozen and FFPE, tiled JPEG Q80, 0.5 µm/px; decoded it is several times the tile cache."""
    frozen = pyvips.Image.new_from_file(str(data_dir / "ff/her2st/5714_HE_BT_C2.jpg"))
    paraffin = pyvips.Image.new_from_file(
        str(data_dir / "ffpe/pathologyatlas/anthracosis_HE_L15_c72-83_r22-33.jpg")
    )
    a, b = frozen.crop(2500, 4200, 3000, 3000), paraffin.crop(0, 0, 3000, 3000)
    upper, lower = a.join(b, "horizontal"), b.fliphor().join(a.flipver(), "horizontal")
    image = upper.join(lower, "vertical").replicate(4, 4).crop(0, 0, SIDE, SIDE)
    layout = {"tile": True, "tile_width": tile, "tile_height": tile, "compression": "jpeg", "Q": 80}
    image.tiffsave(str(path), **layout, bigtiff=True, xres=2000.0, yres=2000.0, resunit="cm")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """Slides of 256-px (FF) and 512-px JPEG tiles (FFPE); indices on their grid and beside it."""
    root = tmp_path_factory.mktemp("speed")
    for tile in (256, 512):
        write_tissue(data_dir, root / f"s{tile}.tif", tile)
    lines = ["slide,domain,split,mask", "s256.tif,FF,train,whole", "s512.tif,FFPE,train,whole"]
    (root / "cohort.csv").write_text("\n".join(lines))
    everything = FilterConfig(min_tissue=0, max_white=1, min_sharpness=0)
    for name, stride in (("on", 512), ("beside", 500)):
        began = time.perf_counter()
        config = CohortConfig(tiling=LatticeConfig(stride=stride), filters=everything, stain="any")
        result = make_index(root / "cohort.csv", root / f"{name}.parquet", config, workers=2)
        seconds = time.perf_counter() - began
        print(f"\ntile: {result.tiles} tiles of 2 slides scored in {seconds:.0f} s by 2 processes")
    return root


def worker_seconds() -> float:
    """CPU seconds of all processes below this one."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("augment", ["none", "d4+colour"])
@pytest.mark.parametrize("domain", ["FF", "FFPE"], ids=["256-px JPEG", "512-px JPEG"])
@pytest.mark.parametrize("place", ["on", "beside"])
def test_tiles_a_second(study: Path, place: str, domain: str, augment: str) -> None:
    """Issue: 200 tiles of 512 px a second with 2 workers on 2 cores, from a tiled JPEG slide."""
    index = str(study / f"{place}.parquet")
    sides = {"source": index, "target": index, "source_domain": domain, "target_domain": domain}
    config = DataConfig(**sides, augment=augment, workers=2)  # type: ignore[arg-type]
    stream = batches(config, seed=0, batch=8, start=0, stop=100_000)
    for _ in range(8):
        next(stream)
    count, before, began = 0, worker_seconds(), time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        count += 2 * len(next(stream).numbers)
    seconds, cpu = time.perf_counter() - began, worker_seconds() - before
    stream.close()  # type: ignore[attr-defined]
    print(
        f"\n{place} the grid, {domain}, {augment}: {count / seconds:.0f} tiles/s of 512 px with 2 workers "
        f"({1000 * cpu / count:.2f} ms of CPU a tile, load {os.getloadavg()[0]:.1f})"
    )


CHILD = """
import json, os, random, sys
from pathlib import Path
from wsi_pipeline.cohorts.tiles import TileReader, load_tiles
from wsi_pipeline.core.geometry import Region

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

reader = TileReader(load_tiles(sys.argv[1], mpp=0.5), open_slides=8)
draw = random.Random(0)
found = []
for number in range(1, 10_001):
    y, x = draw.randrange(512), draw.randrange(512)
    reader.read(draw.randrange(50), Region(y, x, 512, 512))
    if number in (2_000, 10_000):
        files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd != "x"
                 and os.path.exists(f"/proc/self/fd/{fd}")]
        found.append([rss(), sum(name.endswith(".tif") for name in files)])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_and_open_files_stay_flat_over_many_reads_of_many_slides(tmp_path: Path) -> None:
    """10,000 reads of 512 px across 50 slides, 8 of which may be open."""
    field = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    for number in range(50):
        tifffile.imwrite(
            tmp_path / f"{number:02}.tif",
            np.roll(field, 7 * number, axis=0),
            tile=(256, 256),
            compression="jpeg",
            photometric="ycbcr",
        )
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    (early, _), (late, files) = json.loads(done.stdout)
    print(f"\nRSS {early:.0f} MiB after 2,000 reads, {late:.0f} MiB after 10,000; {files} slides open")
    assert late < 1.05 * early
    assert 0 < files <= 8
