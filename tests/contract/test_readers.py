"""Every reader against the contract, and the promises of single formats, on files made here."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import slide_contract as contract
import tifffile
import zarr
from PIL import Image

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.core.transform import SlideTransform
from wsi_pipeline.errors import (
    ConfigError,
    CorruptRegionError,
    MissingMppError,
    MppConflictError,
    UnsupportedSlideError,
)
from wsi_pipeline.readers import READERS, open_slide
from wsi_pipeline.readers._cache import TILE_CACHE, TileCache
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.mpp import MppClaim
from wsi_pipeline.readers.openslide import OpenSlideSlide
from wsi_pipeline.readers.tiff import TiffSlide
from wsi_pipeline.readers.warped import SectionPair, WarpedSlide

WHOLE = Region(0, 0, 611, 775)


def write_tiff(path: Path, levels_HWC: Sequence[U8_HWC], *, subifds: bool = False, **options: Any) -> Path:
    """Pyramidal TIFF at 0.25 um (y) x 0.5 um (x); further levels in SubIFDs or in the main chain."""
    settings: dict[str, Any] = {"photometric": "rgb", "tile": (128, 112), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, ome=subifds) as tiff:
        for index, level_HWC in enumerate(levels_HWC):
            scale = 2**index
            chosen = settings | {"resolution": (20000 / scale, 40000 / scale)} | options
            if index == 0 and subifds:
                chosen |= {
                    "subifds": len(levels_HWC) - 1,
                    "metadata": {
                        "axes": "YXS",
                        "PhysicalSizeX": 500.0,
                        "PhysicalSizeXUnit": "nm",
                        "PhysicalSizeY": 0.25,
                        "PhysicalSizeYUnit": "\u00b5m",
                    },
                }
            elif not subifds:
                chosen["metadata"] = None
            tiff.write(level_HWC, subfiletype=1 if index else 0, **chosen)
    return path


def write_zarr(
    path: Path | str, levels_HWC: Sequence[U8_HWC], version: str = "0.5", axes: str = "cyx"
) -> str:
    """OME-Zarr at 0.25 um (y) x 0.5 um (x); 0.5 sharded, 0.4 with a scale in nanometer."""
    v3 = version == "0.5"
    nested: dict[str, Any] = {} if v3 else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    group = zarr.open_group(str(path), mode="w", zarr_format=3 if v3 else 2)
    unit, factor = ("micrometer", 1.0) if v3 else ("nanometer", 1000.0)
    datasets = []
    for index, level_HWC in enumerate(levels_HWC):
        values = np.moveaxis(level_HWC, 2, 0).reshape(*(1,) * (len(axes) - 3), 3, *level_HWC.shape[:2])
        lead = values.shape[:-2]
        array = group.create_array(
            str(index),
            shape=values.shape,
            dtype="uint8",
            chunks=(*lead, 96, 128),
            shards=(*lead, 384, 256) if v3 else None,
            fill_value=255,
            dimension_names=tuple(axes) if v3 else None,
            **nested,
        )
        array[...] = values
        scale = [1.0] * len(lead) + [0.25 * factor * 2**index, 0.5 * factor * 2**index]
        datasets.append(
            {"path": str(index), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        )
    kinds = {"t": "time", "c": "channel"}
    described = [
        {"name": name, "type": kinds.get(name, "space")} | ({"unit": unit} if name in "yx" else {})
        for name in axes
    ]
    multiscales = [{"version": version, "axes": described, "datasets": datasets}]
    group.attrs.update(
        {"ome": {"version": version, "multiscales": multiscales}} if v3 else {"multiscales": multiscales}
    )
    return str(path)


class TestArraySlide(contract.SlideContract):
    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        return ArraySlide(levels_HWC, mpp=(0.25, 0.5))

    @pytest.mark.parametrize(
        "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
    )
    def test_refuses_other_arrays(self, wrong: np.ndarray) -> None:
        with pytest.raises(ValueError, match="uint8"):
            ArraySlide(wrong, mpp=0.5)


class TestWarpedSlide(contract.SlideContract):
    """Through a transform that changes nothing, a slide is what it was: every level is read from its like."""

    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        slide = ArraySlide(levels_HWC, mpp=(0.25, 0.5))
        pair = SectionPair(
            path=folder / "pair.json",
            transform=SlideTransform(affine_23=np.eye(2, 3)),
            names=("fixed", "moving"),
            identities=("0" * 64, slide.identity),
            from_size=slide.levels[0].size,
            from_mpp=slide.mpp,
            to_mpp=slide.mpp,
        )
        return WarpedSlide(slide, pair)

    def test_pixels_are_the_levels_pixels(self, slide: Slide, levels_HWC: list[U8_HWC]) -> None:
        """Up to the last row and column of reduced levels, half of which lie beyond the slide."""
        for index, expected in enumerate(levels_HWC):
            region = Region(0, 0, expected.shape[0] - (index > 0), expected.shape[1] - (index > 0))
            inside = expected[: region.height, : region.width]
            np.testing.assert_array_equal(slide.read_level(index, region), inside)


class TestTiffDeflatePyramid(contract.SlideContract):
    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        return TiffSlide(write_tiff(folder / "slide.tif", levels_HWC, compression="zlib", predictor=True))


class TestTiffJpegSubIfds(contract.SlideContract):
    tolerance = 6
    reproducible = False

    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        options: dict[str, Any] = {
            "compression": "jpeg",
            "compressionargs": {"level": 98},
            "subsampling": (1, 1),
        }
        return TiffSlide(write_tiff(folder / "slide.ome.tif", levels_HWC, subifds=True, **options))


class TestTiffStripsOnly(contract.SlideContract):
    single_level = True

    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        options: dict[str, Any] = {"tile": None, "rowsperstrip": 37, "compression": "lzw"}
        return TiffSlide(write_tiff(folder / "strips.tif", levels_HWC, **options))


class TestTiffOneStripSeparatePlanes(contract.SlideContract):
    single_level = True

    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        planes = [np.ascontiguousarray(np.moveaxis(level, 2, 0)) for level in levels_HWC]
        options: dict[str, Any] = {"tile": None, "rowsperstrip": 10**6, "planarconfig": "separate"}
        return TiffSlide(write_tiff(folder / "planes.tif", planes, **options))


class TestTiffRemote(contract.SlideContract):
    anisotropic = True

    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        # A file:// URL takes the fsspec path and, unlike memory://, exists in a spawned process too.
        return TiffSlide(write_tiff(folder / "remote.tif", levels_HWC, compression="zlib").as_uri())


class TestOpenSlide(contract.SlideContract):
    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        return OpenSlideSlide(
            write_tiff(folder / "slide.tif", levels_HWC, compression="lzw", tile=(128, 128))
        )


class TestOmeZarr05(contract.SlideContract):
    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        return open_slide(write_zarr(folder / "slide.ome.zarr", levels_HWC))


class TestOmeZarr04FiveAxes(contract.SlideContract):
    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        return open_slide(write_zarr(folder / "slide.ome.zarr", levels_HWC, version="0.4", axes="tzcyx"))


class TestImage(contract.SlideContract):
    single_level = True
    anisotropic = False

    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        Image.fromarray(levels_HWC[0]).save(folder / "slide.png", dpi=(72, 72))
        return open_slide(folder / "slide.png", mpp=0.25)


@pytest.fixture
def picture_HWC() -> U8_HWC:
    return np.random.default_rng(3).integers(0, 256, (611, 775, 3), np.uint8)


# ---- which reader, which mpp ----


def test_registry_names_what_exists() -> None:
    for name, home in READERS.items():
        module, _, kind = home.partition(":")
        assert getattr(__import__(module, fromlist=[kind]), kind).reader == name


def test_ome_claim_comes_before_the_resolution_tag(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    slide = open_slide(write_tiff(tmp_path / "a.ome.tif", [picture_HWC], subifds=True))
    assert (slide.reader, slide.slide_id, slide.mpp_origin) == ("tiff", "a", "OME-XML PhysicalSize")


@pytest.mark.parametrize(("mpp", "expected"), [(0.3, (0.3, 0.3)), ((0.3, 0.4), (0.3, 0.4))])
def test_override_wins(picture_HWC: U8_HWC, tmp_path: Path, mpp: Any, expected: Any) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp,mpp_y\na,0.7,0.6\n")
    path = write_tiff(tmp_path / "a.tif", [picture_HWC])
    listed = open_slide(path, mpp_table=table)
    contradicted = "(the file says TIFF resolution = 0.25 (y) x 0.5 (x) um/px)"
    assert (listed.mpp, listed.mpp_origin) == ((0.6, 0.7), f"mpp table mpp.csv {contradicted}")
    stated = open_slide(path, mpp=mpp, mpp_table=table)
    assert (stated.mpp, stated.mpp_origin) == (expected, f"--mpp {contradicted}")
    other = open_slide(shutil.copy(path, tmp_path / "b.tif"), mpp_table=table)
    assert other.mpp_origin == "TIFF resolution"


def test_conflict_and_absence_stop_at_the_door(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    conflict = write_tiff(tmp_path / "c.ome.tif", [picture_HWC], subifds=True, resolution=(10000, 10000))
    with pytest.raises(MppConflictError, match="OME-XML.*TIFF resolution"):
        open_slide(conflict)
    absent = write_tiff(tmp_path / "d.tif", [picture_HWC], resolution=(72, 72), resolutionunit="INCH")
    with pytest.raises(MissingMppError, match="352.778"):
        open_slide(absent)
    assert open_slide(absent, mpp=0.5).mpp == (0.5, 0.5)


@pytest.mark.parametrize("mpp", [0, -1.0, float("nan"), (0.5, 0.0)])
def test_impossible_override(tmp_path: Path, mpp: Any) -> None:
    with pytest.raises(ConfigError, match="positive"):
        open_slide(tmp_path / "any.tif", mpp=mpp)


def test_readers_by_name(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture_HWC], tile=(128, 128))
    assert open_slide(path, reader="openslide").reader == "openslide"
    assert open_slide(path, reader="wsi_pipeline.readers.tiff:TiffSlide").reader == "tiff"
    for name in ("nonsense", "no.such.module:Slide", "wsi_pipeline.readers.tiff:Nothing"):
        with pytest.raises(ConfigError, match="reader"):
            open_slide(path, reader=name)


def test_content_decides_not_the_suffix(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    tiff = write_tiff(tmp_path / "a.tif", [picture_HWC])
    assert open_slide(shutil.copy(tiff, tmp_path / "tiff.jpg")).reader == "tiff"
    Image.fromarray(picture_HWC).save(tmp_path / "b.png")
    assert open_slide(shutil.copy(tmp_path / "b.png", tmp_path / "png.svs"), mpp=1.0).reader == "image"


def test_names_outside_ascii_and_with_spaces(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "Probe \u00e4\u00df (1) \u65e5.ome.tif", [picture_HWC], tile=(128, 128))
    for reader in ("tiff", "openslide"):
        assert open_slide(path, reader=reader).slide_id == "Probe \u00e4\u00df (1) \u65e5"


# ---- refusals ----


def refuse(path: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(UnsupportedSlideError, match=match) as caught:
        open_slide(path, **options)
    assert "\n" not in str(caught.value)


def test_missing_empty_pointer_and_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.svs", "absent.svs: no such file")
    (tmp_path / "empty.svs").touch()
    refuse(tmp_path / "empty.svs", "the file is empty")
    (tmp_path / "pointer.svs").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    refuse(tmp_path / "pointer.svs", "git lfs pull")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "folder.*mrxs")
    (tmp_path / "x.ome.zarr.partial").mkdir()
    refuse(tmp_path / "x.ome.zarr.partial", "unfinished")
    (tmp_path / "text.svs").write_text("hello")
    refuse(tmp_path / "text.svs", "no reader opens it .OpenSlide")
    refuse("nosuchprotocol://bucket/a.tif", "cannot be opened|nosuchprotocol")
    refuse("memory://absent.tif", "no such file")


@pytest.mark.parametrize(
    ("pixels", "options", "match"),
    [
        (np.zeros((300, 300, 3), np.uint16), {}, "16-bit"),
        (np.zeros((300, 300, 3), np.float32), {}, "float32"),
        (np.zeros((300, 300, 4), np.uint8), {"photometric": "separated"}, "CMYK"),
        (np.zeros((300, 300, 7), np.uint8), {"planarconfig": "contig"}, "7 channels"),
        (np.zeros((300, 300, 3), np.uint8), {"extratags": [(274, 3, 1, 6, True)]}, "Orientation tag 6"),
        (np.zeros((5, 300, 300, 3), np.uint8), {}, "stack of 5"),
    ],
)
def test_pixels_that_nobody_should_convert(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, Any], match: str
) -> None:
    settings: dict[str, Any] = {"photometric": "rgb", "tile": (128, 128)} | options
    tifffile.imwrite(tmp_path / "odd.tif", pixels, **settings)
    refuse(tmp_path / "odd.tif", match, mpp=0.5)


@pytest.mark.parametrize("rgba", [True, False])
def test_grey_and_alpha_become_rgb(tmp_path: Path, rgba: bool) -> None:
    source = np.random.default_rng(0).integers(0, 256, (300, 200, 4 if rgba else 1), np.uint8)
    settings: dict[str, Any] = (
        {"photometric": "rgb", "extrasamples": ["unassalpha"]} if rgba else {"photometric": "minisblack"}
    )
    tifffile.imwrite(tmp_path / "a.tif", source if rgba else source[..., 0], tile=(128, 128), **settings)
    pixels_HWC = open_slide(tmp_path / "a.tif", mpp=0.5).read_level(0, Region(0, 0, 300, 200))
    alpha = source[..., 3:].astype(float) / 255 if rgba else 1.0
    expected = source[..., :3] * alpha + 255 * (1 - alpha)
    assert abs(pixels_HWC - expected).max() <= 0.51


def patched(path: Path, tag: int, value: Any) -> Path:
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.first.tags[tag].overwrite(value)
    return path


def test_dimension_bomb_does_not_allocate(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "bomb.tif", [picture_HWC], compression="zlib")
    patched(patched(path, 256, 60000), 257, 60000)
    refuse(path, "bomb.tif: .* tiles expected .*listed", mpp=0.5)


def test_strip_bomb_names_the_remedy(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tile": None, "rowsperstrip": 10**6, "compression": "zlib"}
    path = write_tiff(tmp_path / "plane.tif", [picture_HWC], **options)
    for tag in (256, 257, 278):
        patched(path, tag, 60000)
    refuse(path, "vips tiffsave", mpp=0.5)


def test_jpeg_tile_that_claims_more_pixels_is_corrupt(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "jpeg.tif", [picture_HWC], compression="jpeg")
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        frame = data.index(b"\xff\xc0", tiff.pages.first.dataoffsets[0])
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    slide = open_slide(path)
    with pytest.raises(CorruptRegionError, match="65535") as caught:
        slide.read_level(0, WHOLE)
    assert caught.value.slide_id == "jpeg" and caught.value.region == Region(0, 0, 128, 112)
    assert slide.read_level(0, Region(200, 200, 50, 50)).shape == (50, 50, 3)  # the rest is read


def test_missing_tile_is_white_and_a_cut_one_corrupt(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "sparse.tif", [picture_HWC], compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        counts = list(tiff.pages.first.databytecounts)
    slide = open_slide(patched(path, 325, [0, *counts[1:]]))
    assert (slide.read_level(0, Region(0, 0, 128, 112)) == 255).all()
    np.testing.assert_array_equal(slide.read_level(0, Region(0, 112, 50, 50)), picture_HWC[:50, 112:162])
    cut = open_slide(patched(path, 325, [counts[0] // 2, *counts[1:]]), mpp=0.5)
    with pytest.raises(CorruptRegionError, match="y=0 x=0"):
        cut.read_level(0, Region(0, 0, 10, 10))
    beyond = open_slide(patched(path, 325, [counts[0], 1 << 30, *counts[2:]]), mpp=0.5)
    with pytest.raises(CorruptRegionError, match="the file ends"):
        beyond.read_level(0, Region(0, 112, 10, 10))


def test_jpeg_tile_without_its_end_is_corrupt(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    """A download that stopped inside a file of full size leaves zeros; libjpeg would paint them grey."""
    path = write_tiff(tmp_path / "stopped.tif", [picture_HWC], compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        offset, count = (
            values[0] for values in (tiff.pages.first.dataoffsets, tiff.pages.first.databytecounts)
        )
    data = bytearray(path.read_bytes())
    data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(data)
    with pytest.raises(CorruptRegionError, match="no end"):
        open_slide(path).read_level(0, Region(0, 0, 10, 10))


def test_other_images_in_the_file_are_no_levels(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = tmp_path / "extra.tif"
    with tifffile.TiffWriter(path) as tiff:
        for pixels, kind in (
            (picture_HWC, 0),
            (picture_HWC[:200, :100], 1),
            (picture_HWC[::2, ::2][:305, :387], 1),
        ):
            tiff.write(pixels, photometric="rgb", tile=(128, 128), metadata=None, subfiletype=kind)
    sizes = [level.size.height for level in open_slide(path, mpp=0.5).levels]
    assert 200 not in sizes and sizes[0] == 611


# ---- OME-Zarr ----


def test_zarr_refusals(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "bare.zarr"), mode="w")
    refuse(tmp_path / "bare.zarr", "without OME multiscales")
    group.attrs["ome"] = {"multiscales": [{"axes": [], "datasets": [{"path": "0"}]}]}
    refuse(tmp_path / "bare.zarr", "no reader opens it")
    grey = write_zarr(tmp_path / "axes.zarr", [picture_HWC])
    attributes = zarr.open_group(grey, mode="r+")
    ome = dict(attributes.attrs["ome"])
    ome["multiscales"][0]["axes"][0] = {"name": "z", "type": "space"}
    attributes.attrs["ome"] = ome
    refuse(grey, "1 channel|stack")


def test_zarr_without_unit_has_no_mpp(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", [picture_HWC])
    group = zarr.open_group(path, mode="r+")
    ome = dict(group.attrs["ome"])
    for axis in ome["multiscales"][0]["axes"]:
        axis.pop("unit", None)
    group.attrs["ome"] = ome
    with pytest.raises(MissingMppError, match="without unit"):
        open_slide(path)


def test_damaged_zarr_shard_is_corrupt_and_a_missing_one_white(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = Path(write_zarr(tmp_path / "a.zarr", [picture_HWC]))
    shards = sorted(file for file in (path / "0" / "c").rglob("*") if file.is_file())
    shards[0].write_bytes(shards[0].read_bytes()[:-500])
    shards[1].unlink()
    TILE_CACHE.clear()
    slide = open_slide(path)
    with pytest.raises(CorruptRegionError, match="a.zarr: level 0"):
        slide.read_level(0, Region(0, 0, 10, 10))
    assert (slide.read_level(0, Region(0, 256, 300, 200)) == 255).all()


def test_zarr_carries_the_profile_of_our_outputs(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    path = Path(write_zarr(tmp_path / "a.zarr", [picture_HWC]))
    (path / "profile.icc").write_bytes(b"profile")
    assert open_slide(path).icc_profile == b"profile"


# ---- remote ----


def test_tiff_and_zarr_from_memory(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.tif", write_tiff(tmp_path / "a.tif", [picture_HWC]).read_bytes())
    local = write_zarr(tmp_path / "a.ome.zarr", [picture_HWC])
    memory.put(local, "/bucket/a.ome.zarr", recursive=True)
    for url in ("memory://bucket/a.tif", "memory://bucket/a.ome.zarr"):
        slide = open_slide(url)
        assert slide.slide_id == "a"
        np.testing.assert_array_equal(slide.read_level(0, WHOLE), picture_HWC)
    memory.rm("/bucket", recursive=True)


# ---- plain pictures ----


def test_picture_without_mpp_is_refused(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    Image.fromarray(picture_HWC).save(tmp_path / "a.png", dpi=(25400, 25400))
    with pytest.raises(MissingMppError, match="--mpp"):
        open_slide(tmp_path / "a.png")


def test_exif_orientation_is_applied(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture_HWC).save(tmp_path / "a.png", exif=exif)
    pixels_HWC = open_slide(tmp_path / "a.png", mpp=0.5).read_level(0, Region(0, 0, 775, 611))
    np.testing.assert_array_equal(pixels_HWC, np.rot90(picture_HWC, -1))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA"])
def test_picture_modes_become_rgb(picture_HWC: U8_HWC, tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(picture_HWC).convert(mode)
    picture.save(tmp_path / "a.png")
    pixels_HWC = open_slide(tmp_path / "a.png", mpp=0.5).read_level(0, WHOLE)
    np.testing.assert_array_equal(pixels_HWC, np.asarray(picture.convert("RGB")))


def test_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 30), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert (open_slide(tmp_path / "a.png", mpp=0.5).read_level(0, Region(0, 0, 30, 20)) == 255).all()


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("I;16", "png")])
def test_picture_modes_that_are_refused(tmp_path: Path, mode: str, suffix: str) -> None:
    Image.new(mode, (20, 30)).save(tmp_path / f"a.{suffix}")
    refuse(tmp_path / f"a.{suffix}", mode.split(";")[0], mpp=0.5)


def test_picture_over_the_limit_and_cut_off(
    picture_HWC: U8_HWC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture_HWC).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptRegionError, match="cut.jpg"):
        open_slide(tmp_path / "cut.jpg", mpp=0.5)
    monkeypatch.setattr("wsi_pipeline.readers.image.MAX_PIXELS", 1000)
    refuse(tmp_path / "a.jpg", "611 x 775 px is over the limit.*vips", mpp=0.5)


# ---- OpenSlide ----


def test_openslide_level_with_an_odd_downsample_has_one_phase(
    picture_HWC: U8_HWC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced = np.asarray(Image.fromarray(picture_HWC).resize((180, 142)))  # downsample 4.3
    path = write_tiff(tmp_path / "odd.tif", [picture_HWC, reduced], tile=(64, 64))
    monkeypatch.setattr("wsi_pipeline.readers.openslide._CELL", 50)
    for whole_level in (1 << 30, 0):  # read as one cell, and in cells
        TILE_CACHE.clear()
        monkeypatch.setattr("wsi_pipeline.readers.openslide._WHOLE_LEVEL", whole_level)
        slide = OpenSlideSlide(path)
        whole_HWC = slide.read_level(1, Region(0, 0, 142, 180))
        for y, x in ((0, 0), (13, 29), (77, 101)):
            part_HWC = slide.read_level(1, Region(y, x, 41, 63))
            np.testing.assert_array_equal(part_HWC, whole_HWC[y : y + 41, x : x + 63])
        if whole_level:
            np.testing.assert_array_equal(whole_HWC, reduced)


# ---- the cache ----


def test_cache_keeps_its_cap_and_the_newest_entry() -> None:
    cache = TileCache(1000)
    for key in range(50):
        cache.get(key, lambda: np.zeros((10, 10, 3), np.uint8))
        assert cache.nbytes <= 1000
    assert cache.peek(0) is None and cache.peek(49) is not None
    cache.put("huge", np.zeros((50, 50, 3), np.uint8))
    assert cache.peek("huge") is not None and cache.peek(49) is None


def test_cache_makes_an_entry_once_and_passes_errors_on() -> None:
    cache = TileCache(10**6)
    started, release = threading.Event(), threading.Event()
    made: list[int] = []

    def make() -> U8_HWC:
        started.set()
        release.wait(5)
        made.append(1)
        return np.zeros((1, 1, 3), np.uint8)

    threads = [threading.Thread(target=cache.get, args=("key", make)) for _ in range(5)]
    for thread in threads:
        thread.start()
    started.wait(5)
    release.set()
    for thread in threads:
        thread.join()
    assert made == [1]

    def fail() -> U8_HWC:
        raise EOFError("cut")

    for _ in range(2):  # an error is not remembered as an entry
        with pytest.raises(EOFError):
            cache.get("other", fail)


def test_handles_are_released(picture_HWC: U8_HWC, tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts descriptors in /proc")
    path = write_tiff(tmp_path / "a.tif", [picture_HWC], tile=(128, 128))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        for kind in (TiffSlide, OpenSlideSlide):
            slide = kind(path, mpp=MppClaim("--mpp", (0.5, 0.5)))
            slide.read_level(0, Region(0, 0, 300, 300))
            slide.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
