"""The exported OME-TIFF in other people's readers: same levels, mpp and pixels; and what failures leave."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide

from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.protocols import U8_HWC, Level, Slide
from wsi_pipeline.errors import (
    ConfigError,
    CorruptRegionError,
    OutputError,
    OutputExistsError,
    UnsupportedSlideError,
)
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.writers.ometiff import SYNTHETIC_MARK, TiffConfig, export_ometiff

pyvips = pytest.importorskip("pyvips")
ROOT = Path(__file__).resolve().parents[2]
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


class FakeSlide:
    """Pyramid in memory whose name, origin and path are canaries that must not reach the output."""

    slide_id = "PATIENT-4711"
    mpp_origin = "vendor ScanScope"
    icc_profile = None
    reader = "fake"

    def __init__(self, level0_HWC: U8_HWC, mpp: Mpp = (0.5, 0.5), *, stop_at: int = 512) -> None:
        self.mpp = mpp
        self.identity = f"{level0_HWC.shape} {int(level0_HWC.sum())}"
        self.pixels = [level0_HWC]
        while max(self.pixels[-1].shape[:2]) > stop_at:
            above = self.pixels[-1]
            even = np.pad(above, ((0, above.shape[0] % 2), (0, above.shape[1] % 2), (0, 0)), mode="edge")
            quads = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, 3).sum(axis=(1, 3), dtype=int)
            self.pixels.append(((quads + 2) >> 2).astype(np.uint8))

    @property
    def levels(self) -> tuple[Level, ...]:
        return tuple(
            Level(size=Size(*pixels.shape[:2]), downsample=(2.0**number, 2.0**number))
            for number, pixels in enumerate(self.pixels)
        )

    def read_level(self, level: int, region: Region) -> U8_HWC:
        return self.pixels[level][region.slices(Region.of(self.levels[level].size))]

    def close(self) -> None:
        pass


def _tissue(height: int, width: int) -> U8_HWC:
    return SyntheticSlide(size=Size(height, width), tissue_share=0.6).read_level(
        0, Region(0, 0, height, width)
    )


def _decoded(path: Path) -> list[U8_HWC]:
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome and len(tiff.series) == 1
        return [level.asarray() for level in tiff.series[0].levels]


def _ome(path: Path) -> ET.Element:
    with tifffile.TiffFile(path) as tiff:
        return ET.fromstring(tiff.ome_metadata or "")  # noqa: S314 - our own file


def _resolutions(path: Path) -> list[tuple[float, float]]:
    """Micrometres per pixel (y, x) that each IFD of the main chain states."""
    with tifffile.TiffFile(path) as tiff:
        found = []
        for page in tiff.pages:
            assert page.tags["ResolutionUnit"].value == 3
            (x, x_unit), (y, y_unit) = page.tags["XResolution"].value, page.tags["YResolution"].value
            found.append((1e4 * y_unit / y, 1e4 * x_unit / x))
        return found


MATRIX = [
    ((1500, 2100), (0.2525, 0.2525), TiffConfig()),
    ((1501, 2003), (0.2525, 0.4997), TiffConfig(subsampling="4:4:4", tile=256)),
    ((1023, 1025), (0.12345678, 0.5), TiffConfig(workers=1)),
    ((100, 70), (0.5, 0.5), TiffConfig()),
    ((513, 1), (0.5, 0.5), TiffConfig()),
    ((3, 1300), (0.5, 0.5), TiffConfig(tile=1024)),
    ((1, 1), (0.5, 0.5), TiffConfig()),
]


@pytest.mark.parametrize(("shape", "mpp", "config"), MATRIX)
def test_readers_agree_on_levels_mpp_and_pixels(
    tmp_path: Path, shape: tuple[int, int], mpp: Mpp, config: TiffConfig
) -> None:
    slide = FakeSlide(_tissue(*shape), mpp)
    path = export_ometiff(slide, tmp_path / "Gewebe_ü_ñ.ome.tif", config)
    levels = _decoded(path)
    assert [level.shape for level in levels] == [pixels.shape for pixels in slide.pixels]
    with openslide.OpenSlide(path) as other:
        assert other.level_count == len(levels)
        assert float(other.properties["openslide.mpp-y"]) == pytest.approx(mpp[0], rel=1e-6)
        assert float(other.properties["openslide.mpp-x"]) == pytest.approx(mpp[1], rel=1e-6)
        for number, pixels in enumerate(levels):
            read = np.asarray(other.read_region((0, 0), number, pixels.shape[1::-1]))
            np.testing.assert_array_equal(read[..., :3], pixels)
    with tiffslide.TiffSlide(path) as other:
        assert other.level_count == len(levels)
        assert other.properties["tiffslide.mpp-y"] == pytest.approx(mpp[0], rel=1e-6)
        assert other.properties["tiffslide.mpp-x"] == pytest.approx(mpp[1], rel=1e-6)
        for number, pixels in enumerate(levels):
            read = np.asarray(other.read_region((0, 0), number, pixels.shape[1::-1]))
            np.testing.assert_array_equal(read[..., :3], pixels)
    for number, pixels in enumerate(levels):
        page = pyvips.Image.new_from_file(str(path), page=number)
        assert (1e3 / page.yres, 1e3 / page.xres) == pytest.approx(
            tuple(m * 2**number for m in mpp), rel=1e-6
        )
        np.testing.assert_array_equal(page.numpy(), pixels)
    stated = [tuple(m * 2**number for m in mpp) for number in range(len(levels))]
    assert [pair for both in _resolutions(path) for pair in both] == pytest.approx(
        [value for both in stated for value in both], rel=1e-6
    )


def test_colours_and_details_survive_the_encoding(tmp_path: Path) -> None:
    slide = FakeSlide(_tissue(700, 900))
    fine = _decoded(export_ometiff(slide, tmp_path / "a.tif", TiffConfig(quality=98, subsampling="4:4:4")))
    usual = _decoded(export_ometiff(slide, tmp_path / "b.tif", TiffConfig()))
    for source, best, normal in zip(slide.pixels, fine, usual, strict=True):
        assert np.abs(best.astype(int) - source).mean() < 1.0
        assert np.abs(normal.astype(int) - source).mean() < 4.5
        assert np.abs(normal.mean(axis=(0, 1)) - source.mean(axis=(0, 1))).max() < 0.6
    flat = FakeSlide(np.full((64, 64, 3), (200, 60, 120), np.uint8))
    (colour,) = _decoded(export_ometiff(flat, tmp_path / "c.tif", TiffConfig()))
    assert np.abs(colour.astype(int) - (200, 60, 120)).max() <= 2


def test_tags_are_those_that_readers_need(tmp_path: Path) -> None:
    profile = bytes(range(256)) * 3
    path = export_ometiff(
        FakeSlide(_tissue(1100, 600)), tmp_path / "x.tif", TiffConfig(), icc_profile=profile
    )
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff and tiff.byteorder == "<"
        pages = list(tiff.pages)
        assert [int(page.subfiletype) for page in pages] == [0, 1, 1]
        assert len(pages[0].tags["SubIFDs"].value) == 2
        for page in pages:
            assert page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression == 7
            assert page.tags["YCbCrSubSampling"].value == (2, 2)
            assert page.tile == (512, 512) and page.planarconfig == 1
            assert page.tags[34675].value == profile
            assert "DateTime" not in page.tags and "HostComputer" not in page.tags


def test_the_ome_layout_keeps_levels_out_of_the_main_chain(tmp_path: Path) -> None:
    slide = FakeSlide(_tissue(1100, 600))
    hybrid = export_ometiff(slide, tmp_path / "hybrid.tif", TiffConfig())
    plain = export_ometiff(slide, tmp_path / "plain.tif", TiffConfig(layout="ome"))
    with tifffile.TiffFile(plain) as tiff:
        assert len(tiff.pages) == 1 and len(tiff.series[0].levels) == 3
    assert hybrid.stat().st_size - plain.stat().st_size < 1500


def test_ome_xml_names_size_mpp_and_the_synthetic_mark_only(tmp_path: Path) -> None:
    slide = FakeSlide(_tissue(300, 700), (0.25, 0.499))
    notes = {"generator": "identity <1> & ünï", "seed": "7"}
    path = export_ometiff(slide, tmp_path / "secret_name.ome.tif", TiffConfig(), description=notes)
    root = _ome(path)
    pixels = root.find(f"{OME}Image/{OME}Pixels")
    assert pixels is not None
    assert (pixels.get("SizeX"), pixels.get("SizeY"), pixels.get("SizeC")) == ("700", "300", "3")
    assert (pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeY")) == ("0.499", "0.25")
    assert pixels.get("PhysicalSizeXUnit") == pixels.get("PhysicalSizeYUnit") == "µm"
    assert pixels.get("Interleaved") == "true" and pixels.get("Type") == "uint8"
    assert root.findtext(f"{OME}Image/{OME}Description") == SYNTHETIC_MARK
    assert {m.get("K"): m.text for m in root.iter(f"{OME}M")} == notes
    content = path.read_bytes()
    for canary in (
        "PATIENT-4711",
        "ScanScope",
        "secret_name",
        str(tmp_path),
        os.environ.get("USER", "ScanScope"),
    ):
        assert canary.encode() not in content


def test_equal_exports_are_equal_files(tmp_path: Path) -> None:
    slide = FakeSlide(_tissue(900, 700))
    one = export_ometiff(slide, tmp_path / "one.tif", TiffConfig(workers=1), description={"k": "v"})
    two = export_ometiff(slide, tmp_path / "two.tif", TiffConfig(workers=3), description={"k": "v"})
    assert one.read_bytes() == two.read_bytes()
    other = export_ometiff(slide, tmp_path / "three.tif", TiffConfig(), description={"k": "w"})
    assert _ome(other).get("UUID") != _ome(one).get("UUID")


def test_white_tiles_are_written_and_small(tmp_path: Path) -> None:
    path = export_ometiff(
        FakeSlide(np.full((4096, 4096, 3), 255, np.uint8)), tmp_path / "w.tif", TiffConfig()
    )
    with tifffile.TiffFile(path) as tiff:
        counts = tiff.pages[0].databytecounts
        assert len(counts) == 64 and min(counts) == max(counts) > 0
        assert (tiff.pages[0].asarray() == 255).all()


def test_progress_counts_every_tile(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    slide = FakeSlide(_tissue(1100, 600))
    export_ometiff(slide, tmp_path / "p.tif", TiffConfig(), progress=lambda done, of: seen.append((done, of)))
    assert seen == [(n, 6 + 2 + 1) for n in range(1, 10)]


def test_sources_without_the_pyramid_are_refused(tmp_path: Path) -> None:
    short = FakeSlide(_tissue(1100, 600), stop_at=600)
    with pytest.raises(UnsupportedSlideError, match="coarsest level"):
        export_ometiff(short, tmp_path / "x.tif", TiffConfig())
    odd = FakeSlide(_tissue(1100, 600))
    odd.pixels[1] = odd.pixels[1][:-1]
    with pytest.raises(UnsupportedSlideError, match="not half"):
        export_ometiff(odd, tmp_path / "x.tif", TiffConfig())
    assert list(tmp_path.iterdir()) == []


def test_existing_output_stays_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    out = tmp_path / "x.tif"
    out.write_bytes(b"mine")
    slide = FakeSlide(_tissue(64, 64))
    with pytest.raises(OutputExistsError, match="exists already"):
        export_ometiff(slide, out, TiffConfig())
    assert out.read_bytes() == b"mine"
    export_ometiff(slide, out, TiffConfig(), overwrite=True)
    assert len(_decoded(out)) == 1
    with pytest.raises(OutputExistsError, match="folder"):
        export_ometiff(slide, tmp_path, TiffConfig(), overwrite=True)


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """A disk that is full after ``size`` bytes, as the kernel tells it: a failing write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_full_disk_leaves_nothing_and_the_old_file_alone(tmp_path: Path, share: float) -> None:
    slide = FakeSlide(_tissue(1100, 600))
    full = export_ometiff(slide, tmp_path / "full.tif", TiffConfig()).read_bytes()
    out = tmp_path / "x.tif"
    out.write_bytes(b"old")
    with (
        _file_size_limit(int(len(full) * share)),
        pytest.raises(OutputError, match=r"x\.tif: cannot be written"),
    ):
        export_ometiff(slide, out, TiffConfig(), overwrite=True)
    assert out.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"full.tif", "x.tif"}
    assert export_ometiff(slide, out, TiffConfig(), overwrite=True).read_bytes() == full


def test_a_missing_folder_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"create the folder first") as caught:
        export_ometiff(FakeSlide(_tissue(64, 64)), tmp_path / "no" / "x.tif", TiffConfig())
    assert caught.value.path == tmp_path / "no" / "x.tif"


def test_a_read_error_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    class Broken(FakeSlide):
        def read_level(self, level: int, region: Region) -> U8_HWC:
            if level == 1:
                raise CorruptRegionError("x: tile cannot be decoded", slide_id="x", region=region)
            return super().read_level(level, region)

    with pytest.raises(CorruptRegionError):
        export_ometiff(Broken(_tissue(1100, 600)), tmp_path / "x.tif", TiffConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_of_the_same_file_wins_and_the_first_says_so(tmp_path: Path) -> None:
    out = tmp_path / "x.tif"
    slide = FakeSlide(_tissue(700, 600))

    def interfere(done: int, of: int) -> None:
        if done == 1:
            export_ometiff(slide, out, TiffConfig())

    with pytest.raises(OutputError, match="another process"):
        export_ometiff(slide, out, TiffConfig(), progress=interfere)
    assert len(_decoded(out)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.tif"]


def test_a_killed_export_leaves_no_finished_looking_file(tmp_path: Path) -> None:
    out = tmp_path / "big.ome.tif"
    command = [sys.executable, str(ROOT / "scripts/make_slide.py"), str(out), "--size", "30000", "30000"]
    child = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    partial = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 100_000):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    export_ometiff(FakeSlide(_tissue(64, 64)), out, TiffConfig())  # the leftover is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_script_makes_a_slide_that_openslide_reads(tmp_path: Path) -> None:
    out = tmp_path / "demo.tif"
    command = [sys.executable, str(ROOT / "scripts/make_slide.py"), str(out), "--size", "1200", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--mpp", "0.4"], check=True, env=environment)
    with openslide.OpenSlide(out) as slide:
        assert slide.level_dimensions == ((1000, 1200), (500, 600), (250, 300))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.4, rel=1e-6)
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == OutputExistsError.exit_code and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quality": 0}, "quality"),
        ({"subsampling": "4:2:2"}, "subsampling"),
        ({"tile": 500}, "tile"),
        ({"layout": "svs"}, "layout"),
        ({"workers": -1}, "workers"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=rf"tiff\.{word}"):
        TiffConfig(**changes)  # type: ignore[arg-type]


def test_text_that_xml_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="control characters"):
        export_ometiff(
            FakeSlide(_tissue(64, 64)), tmp_path / "x.tif", TiffConfig(), description={"a": "\x00"}
        )


def test_the_fake_is_a_slide() -> None:
    assert isinstance(FakeSlide(_tissue(16, 16)), Slide)
