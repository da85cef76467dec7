"""Damaged slides through ``plan``: each a clean error or a clean plan, in time and in bounded memory.

Both the sample and all 500 of them, the issue's figure, are marked slow. ``-s`` prints the table.
``WSI_PIPELINE_FUZZ`` = ``FIRST:COUNT`` chooses other seeds for the long run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tifffile
from fuzz_harness import BYTES_LIMIT, Base, Verdict, fuzz, judge, table
from mutate import Mutant, mutate
from PIL import Image

from wsi_pipeline.api import plan
from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.pyramid import halve
from wsi_pipeline.pipeline.convert import convert_slide
from wsi_pipeline.pipeline.settings import ConvertConfig, GeneratorConfig, InputConfig, OutputConfig
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.writers.ometiff import TiffConfig, export_ometiff
from wsi_pipeline.writers.omezarr import OmeZarrConfig

SAMPLE = 48
ALL = 500
# File, and the pixel size to give where the file states none.
REAL: tuple[tuple[str, float | None], ...] = (
    ("CMU-1-Small-Region.svs", None),
    ("small.svs", None),
    ("OS-1-detail.ome.tif", None),
    ("boxes.tiff", 0.5),
    ("test.tif", 0.5),
    ("test_orient6.tif", 0.5),
    ("test3-DAPI-2-(387).ndpi", None),
    ("boxes_0.dcm", None),
    ("sm_image.dcm", None),
    ("ome_zarr_simple_0.4", None),
)
SLIDE = SyntheticSlide(size=Size(1400, 1300), tissue_share=0.4, seed=5)


def made(folder: Path) -> list[Base]:
    """Sound slides of every kind that we write ourselves."""
    export_ometiff(SLIDE, folder / "hybrid.ome.tif", TiffConfig(tile=256, workers=1))
    for ngff in ("0.4", "0.5"):
        config = ConvertConfig(
            generator=GeneratorConfig(name="identity"),
            output=OutputConfig(qc=False, zarr=OmeZarrConfig(block=1024, ngff=ngff)),  # type: ignore[arg-type]
        )
        convert_slide(SLIDE, folder / f"v{ngff}.ome.zarr", config)
    pixels_HWC = SLIDE.read_level(0, Region.of(SLIDE.levels[0].size))
    half_HWC = halve(pixels_HWC)
    with tifffile.TiffWriter(folder / "big.tif", bigtiff=True) as file:
        kind = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate", "metadata": None}
        file.write(pixels_HWC, subifds=1, resolution=(20_000, 20_000), resolutionunit=3, **kind)
        file.write(half_HWC, subfiletype=1, **kind)
    plain = {"photometric": "rgb", "rowsperstrip": 64, "compression": "lzw", "metadata": None}
    tifffile.imwrite(folder / "strips.tif", half_HWC, byteorder=">", **plain)
    Image.fromarray(half_HWC).save(folder / "picture.png")
    Image.fromarray(half_HWC).save(folder / "picture.jpg", quality=85)
    stated = ("hybrid.ome.tif", "v0.4.ome.zarr", "v0.5.ome.zarr", "big.tif")
    unstated = ("strips.tif", "picture.png", "picture.jpg")
    return [
        *(Base(path=folder / name) for name in stated),
        *(Base(path=folder / name, mpp=0.5) for name in unstated),
    ]


@pytest.fixture(scope="module")
def bases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """Real slides where they are at hand, and our own."""
    try:
        slides = request.getfixturevalue("data_dir") / "slides"
    except pytest.skip.Exception:
        slides = Path("absent")
    real = [Base(path=slides / name, mpp=mpp) for name, mpp in REAL]
    return [*(base for base in real if base.path.exists()), *made(tmp_path_factory.mktemp("sound"))]


def report(verdicts: list[Verdict]) -> None:
    found = [f"{v.mutant.key}: {v.mutant.what}: {v.outcome}: {v.message}" for v in verdicts if v.is_finding]
    print("\n" + table(verdicts))
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_sound_slides_are_planned(bases: list[Base]) -> None:
    """Else the fuzz would only see the first refusal."""
    refused = {"test_orient6.tif", "ome_zarr_simple_0.4"}
    for base in bases:
        if base.path.name not in refused:
            found = plan(base.path, ConvertConfig(input=InputConfig(mpp=base.mpp, stain="any")))
            assert found.survey.plan.grid.size.area > 0
            found.slide.close()


def test_a_seed_makes_the_same_mutant(bases: list[Base], tmp_path: Path) -> None:
    for number, base in enumerate(bases):
        one, two = (mutate(base.path, tmp_path / f"{number}{part}", 7) for part in "ab")
        assert (one.key, one.kind, one.what) == (two.key, two.kind, two.what)
        if one.path.is_file():
            assert one.path.read_bytes() == two.path.read_bytes() != base.path.read_bytes()


CLEAN = {
    "outcome": "UnsupportedSlideError",
    "message": "a.svs: broken",
    "seconds": 1.0,
    "peak": 9,
    "noise": "",
}


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, None),
        ({"outcome": "plan", "message": "3 tiles"}, None),
        ({"noise": "TIFFFetchNormalTag: Incorrect count.\n"}, None),
        ({"message": "a.svs: broken\nin two lines"}, "of several lines"),
        ({"message": "broken"}, "names no file"),
        ({"outcome": "raised"}, "raised"),
        ({"outcome": "died"}, "died"),
        ({"outcome": "plan", "peak": BYTES_LIMIT + 1}, "large"),
        ({"outcome": "plan", "noise": "UserWarning: x"}, "noisy"),
    ],
)
def test_what_counts_as_a_finding(change: dict[str, Any], outcome: str | None) -> None:
    mutant = Mutant(path=Path("x/a.svs"), key="a.svs:0", kind="cut", what="cut at 1")
    verdict = judge(mutant, CLEAN | change)
    assert verdict.is_finding == (outcome is not None) and (outcome or "") in verdict.outcome


@pytest.mark.slow
def test_a_sample_of_damaged_slides(bases: list[Base], tmp_path: Path) -> None:
    report(list(fuzz(bases, range(SAMPLE), tmp_path)))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_damaged_slides(bases: list[Base], tmp_path: Path) -> None:
    first, count = map(int, os.environ.get("WSI_PIPELINE_FUZZ", f"0:{ALL}").split(":"))
    verdicts = []
    for verdict in fuzz(bases, range(first, first + count), tmp_path):
        verdicts.append(verdict)
        if verdict.is_finding:
            print(f"FINDING {verdict.mutant.key}", flush=True)
    report(verdicts)
    assert any(v.outcome == "plan" for v in verdicts), "some damage is harmless"
