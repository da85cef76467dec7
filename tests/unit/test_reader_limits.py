"""What damaged files claim and no slide has: refused in one line, before memory or time are spent on it."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC, Level
from wsi_pipeline.errors import CorruptRegionError, MissingMppError, UnsupportedSlideError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers._base import Facts, Handle, LazySlide
from wsi_pipeline.readers._tiff_structure import _aperio_fields
from wsi_pipeline.readers._zarr_codecs import CheckedBloscCodec, check_frame
from wsi_pipeline.readers._zarr_store import regular_size
from wsi_pipeline.readers.image import picture_size
from wsi_pipeline.readers.mpp import MppClaim, settle_mpp
from wsi_pipeline.readers.overview import LARGEST_FLAT, read_overview

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(UnsupportedSlideError, match=match) as caught:
        open_slide(path, mpp=0.5, **options)
    assert str(caught.value).startswith(path.name) and "\n" not in str(caught.value)


# TIFF


def write_tiff(path: Path, description: str | None = None, pages: int = 1) -> Path:
    with tifffile.TiffWriter(path) as file:
        for _ in range(pages):
            file.write(PIXELS, photometric="rgb", metadata=None, description=description)
    return path


def test_a_chain_of_pages(tmp_path: Path) -> None:
    refused(write_tiff(tmp_path / "a.tif", pages=1001), "more than 1000 pages")


SIZES = 'DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="3" SizeZ="1"'
PLANES = {
    "billion time points": f'<Image><Pixels {SIZES} SizeT="1000000000"><TiffData/></Pixels></Image>',
    "infinite": f'<Image><Pixels {SIZES} SizeT="1e999"><TiffData/></Pixels></Image>',
    "as an entity": f'<Image><Pixels {SIZES} SizeT="&#49;000000000"><TiffData/></Pixels></Image>',
    "plane count": f'<Image><Pixels {SIZES} SizeT="1"><TiffData PlaneCount="99999999"/></Pixels></Image>',
    "images": f'<Image><Pixels {SIZES} SizeT="1"><TiffData/></Pixels></Image>' * 1001,
    "modulo": '<ModuloAlongT Type="lifetime" Start="0" Step="0.001" End="10000000"/>',
}


@pytest.mark.parametrize("name", PLANES)
def test_an_ome_xml_of_absurd_counts(tmp_path: Path, name: str) -> None:
    path = write_tiff(tmp_path / "a.ome.tif", f"<OME>{PLANES[name]}</OME>")
    refused(path, "an OME-XML of .* (planes|images), not one RGB image")


def test_an_honest_ome_xml_is_read(tmp_path: Path) -> None:
    xml = f'<OME><Image><Pixels {SIZES} SizeT="1"><TiffData/></Pixels></Image></OME>'
    slide = open_slide(write_tiff(tmp_path / "a.ome.tif", xml), mpp=0.5)
    np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 64, 64)), PIXELS)


def test_aperio_fields_of_a_long_run_of_spaces() -> None:
    assert _aperio_fields("Aperio |" + " " * 300_000 + "x|MPP = 0.5") == {"MPP": "0.5"}


@given(st.text(alphabet="|= MPa.5\n", max_size=60))
def test_aperio_fields_are_those_of_the_pattern(text: str) -> None:
    """The pattern that stood here before, on what it was good for: keys that are words."""
    before = dict(re.findall(r"\|\s*([\w ]+?)\s*=\s*([^|]*)", text))
    found = _aperio_fields(text)
    for key in ("MPP", "PM", "a"):
        assert found.get(key, "").strip() == before.get(key, "").strip()


def test_a_tiff_that_lacks_nearly_all_tiles(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif")
    with tifffile.TiffFile(path, mode="r+") as file:
        for name, value in (("ImageWidth", 2_000_000), ("StripByteCounts", 0)):
            file.pages.first.tags[name].overwrite(value)
    refused(path, "of 1 tiles for 64 x 2000000 px, 0 hold data")


# Any reader


class Claiming(LazySlide):
    """A slide that claims its sizes."""

    reader = "claiming"
    sizes: tuple[Size, ...] = ()

    def _open(self) -> Handle:
        sizes = self.sizes

        class Opened:
            facts = Facts(sizes=sizes, claims=(), identity="x")

            def read(self, level: int, region: Region) -> U8_HWC:
                raise AssertionError("no pixel is asked for")

        return Opened()


@pytest.mark.parametrize("size", [(2**32 - 2, 50), (50, 2**20 + 1), (2**20, 2**20), (0, 50)])
def test_absurd_extents(size: tuple[int, int]) -> None:
    slide = Claiming("folder/a.svs", mpp=MppClaim("--mpp", (0.5, 0.5)))
    slide.sizes = (Size(100, 100), Size(*size))
    with pytest.raises(UnsupportedSlideError, match=r"^a\.svs: level 1 claims .* as no slide has"):
        _ = slide.levels


def test_the_largest_real_slides_are_not_absurd() -> None:
    slide = Claiming("a.svs", mpp=MppClaim("--mpp", (0.1, 0.1)))
    slide.sizes = (Size(250_000, 760_000),)
    assert slide.levels == (Level(size=Size(250_000, 760_000), downsample=(1.0, 1.0)),)


def test_a_flat_slide_too_large_to_look_at() -> None:
    slide = Claiming("a.svs", mpp=MppClaim("--mpp", (0.5, 0.5)))
    slide.sizes = (Size(2**18, 2**18),)
    assert slide.sizes[0].area > LARGEST_FLAT
    with pytest.raises(UnsupportedSlideError, match=r"^a: .* without a reduced level.*--pyramid"):
        read_overview(slide, icc="ignore")


def test_stretched_pixels_are_not_believed() -> None:
    stretched, square = MppClaim("scale", (0.02, 20.0)), MppClaim("resolution", (0.5, 0.4))
    assert settle_mpp([stretched, square], override=None, slide_id="a") == ((0.5, 0.4), "resolution")
    with pytest.raises(MissingMppError, match="found, but not credible"):
        settle_mpp([stretched], override=None, slide_id="a")


# Pictures


def test_a_picture_that_unpacks_to_much_more_than_any_tissue(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in parts
        )
    )
    refused(path, "20000 x 30000 px are claimed in .* bytes")
    with pytest.raises(UnsupportedSlideError, match="are claimed"):
        picture_size(path)


# OME-Zarr


def write_zarr(path: Path, version: str, sides: tuple[int, ...] = (128, 64), chunk: int = 64) -> Path:
    """Levels of noise, blosc chunks, inside shards where the version has them."""
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    rng = np.random.default_rng(1)
    blosc: Any = {"name": "blosc", "configuration": {"cname": "zstd"}}
    if version == "0.4":
        blosc = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 2}
    for level, side in enumerate(sides):
        array = group.create_array(
            str(level), shape=(3, side, side), chunks=(3, chunk, chunk), dtype="u1", compressors=[blosc],
            shards=(3, 2 * chunk, 2 * chunk) if version == "0.5 sharded" else None,
        )  # fmt: skip
        array[:] = rng.integers(0, 256, (3, side, side), np.uint8) // 2
    multiscales = [
        {
            "axes": ["c", "y", "x"],
            "datasets": [{"path": str(level)} for level in range(len(sides))],
        }
    ]
    group.attrs.update({"multiscales": multiscales})
    return path


VERSIONS = ["0.4", "0.5", "0.5 sharded"]


def chunk_file(store: Path) -> Path:
    return max((p for p in (store / "0").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("version", VERSIONS)
def test_sound_stores_are_read(tmp_path: Path, version: str) -> None:
    slide = open_slide(write_zarr(tmp_path / "a.zarr", version), mpp=0.5)
    assert slide.read_level(0, Region(0, 0, 128, 128)).std() > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_chunk_that_was_cut_off(tmp_path: Path, version: str) -> None:
    """The decoder itself reads behind the end of such a chunk: a crash, or foreign memory as pixels."""
    store = write_zarr(tmp_path / "a.zarr", version)
    chunk = chunk_file(store)
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    slide = open_slide(store, mpp=0.5)
    with pytest.raises(CorruptRegionError, match=r"a\.zarr: level 0.*cannot be decoded"):
        slide.read_level(0, Region(0, 0, 128, 128))


@pytest.mark.parametrize("frame", [b"", bytes(15), struct.pack("<4B3I", 2, 1, 1, 1, 64, 64, 17)])
def test_frames_that_end_too_early(frame: bytes) -> None:
    with pytest.raises(ValueError, match="Blosc frame"):
        check_frame(frame)


def test_a_frame_that_claims_gigabytes() -> None:
    with pytest.raises(ValueError, match="claims"):
        check_frame(struct.pack("<4B3I", 2, 1, 1, 1, 2**32 - 1, 64, 16))


def test_a_frame_inside_a_shard_is_checked_too(tmp_path: Path) -> None:
    """A shard's index is guarded by a checksum, the frames in it are not."""
    store = write_zarr(tmp_path / "a.zarr", "0.5 sharded")
    shard = chunk_file(store)
    data = bytearray(shard.read_bytes())
    struct.pack_into("<I", data, 12, 2**30)
    shard.write_bytes(data)
    with pytest.raises(CorruptRegionError, match="a Blosc frame of 1073741824 bytes ends after"):
        open_slide(store, mpp=0.5).read_level(0, Region(0, 0, 128, 128))


def test_checked_codecs_are_described_as_the_plain_ones() -> None:
    """Else the identity of every store would change."""
    assert CheckedBloscCodec(cname="zstd").to_dict() == zarr.codecs.BloscCodec(cname="zstd").to_dict()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", ["pipe", "endless", "giant"])
def test_a_chunk_that_is_no_file_of_a_sane_size(tmp_path: Path, version: str, what: str) -> None:
    if what == "giant" and version == "0.5 sharded":
        pytest.skip("of a shard, only parts are read")
    store = write_zarr(tmp_path / "a.zarr", version)
    chunk = chunk_file(store)
    chunk.unlink()
    if what == "pipe":
        os.mkfifo(chunk)
    elif what == "endless":
        chunk.symlink_to("/dev/zero")
    else:
        with open(chunk, "wb") as file:
            file.truncate(8 << 30)
    match = "bytes, more than" if what == "giant" else "is no regular file"
    with pytest.raises((UnsupportedSlideError, CorruptRegionError), match=match):
        open_slide(store, mpp=0.5).read_level(0, Region(0, 0, 128, 128))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_endless_document(tmp_path: Path, version: str) -> None:
    store = write_zarr(tmp_path / "a.zarr", version)
    document = store / (".zattrs" if version == "0.4" else "zarr.json")
    document.unlink()
    document.symlink_to("/dev/zero")
    refused(store, "is no regular file")


def test_a_profile_that_is_a_pipe(tmp_path: Path) -> None:
    store = write_zarr(tmp_path / "a.zarr", "0.5")
    os.mkfifo(store / "profile.icc")
    refused(store, r"profile\.icc: is no regular file")
    assert regular_size(store / "none") == 0


@pytest.mark.parametrize("sides", [(128, 128), (64, 128)])
def test_levels_that_do_not_shrink(tmp_path: Path, sides: tuple[int, ...]) -> None:
    refused(write_zarr(tmp_path / "a.zarr", "0.5", sides), "does not follow one of")


def edit(store: Path, document: str, **values: Any) -> None:
    path = store / "0" / document
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_chunks_without_extent(tmp_path: Path) -> None:
    store = write_zarr(tmp_path / "a.zarr", "0.4")
    edit(store, ".zarray", chunks=[0, 0, 0])
    refused(store, r"chunks \(0, 0, 0\) without extent")


def test_a_shape_that_is_not_that_of_the_other_levels(tmp_path: Path) -> None:
    store = write_zarr(tmp_path / "a.zarr", "0.5")
    edit(store, "zarr.json", shape=[3, 128, 4096])
    refused(store, "a level of 64 x 64 px does not follow one of 128 x 4096")


def test_a_shape_of_which_nearly_nothing_is_there(tmp_path: Path) -> None:
    store = write_zarr(tmp_path / "a.zarr", "0.5", (128,))
    edit(store, "zarr.json", shape=[3, 60_000, 50_000])
    refused(store, "733516 chunks are claimed, 5 files are there")
