"""Real and damaged slide files: each is read, or refused with one clear line; two readers agree."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.errors import CorruptRegionError, MissingMppError, SlideError, UnsupportedSlideError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers._cache import TILE_CACHE
from wsi_pipeline.readers.lattice import SlideView

CMU = "slides/CMU-1-Small-Region.svs"


def whole(slide: Slide, level: int = 0) -> U8_HWC:
    return slide.read_level(level, Region.of(slide.levels[level].size))


READABLE = [
    # file, reader, mpp (y, x), origin, number of levels
    (CMU, "tiff", (0.499, 0.499), "aperio.MPP", 1),
    ("slides/small.svs", "tiff", (0.499, 0.499), "aperio.MPP", 1),
    ("slides/OS-1-detail.ome.tif", "tiff", (0.227102, 0.227097), "OME-XML PhysicalSize", 1),
    ("slides/boxes_0.dcm", "openslide", (0.499, 0.499), "openslide.mpp", 1),
    ("slides/boxes_1.dcm", "openslide", (0.499, 0.499), "openslide.mpp", 1),
    ("slides/sm_image.dcm", "openslide", (0.499, 0.499), "openslide.mpp", 1),
    ("slides/test3-DAPI-2-(387).ndpi", "openslide", (0.228175, 0.228175), "openslide.mpp", 7),
]


@pytest.mark.parametrize(("name", "reader", "mpp", "origin", "levels"), READABLE)
def test_read_with_its_own_mpp(
    data_dir: Path, name: str, reader: str, mpp: tuple[float, float], origin: str, levels: int
) -> None:
    slide = open_slide(data_dir / name)
    assert (slide.reader, slide.mpp_origin, len(slide.levels)) == (reader, origin, levels)
    assert slide.mpp == pytest.approx(mpp, rel=1e-5)
    for index in range(levels):
        assert whole(slide, index).std() > 0
    slide.close()


@pytest.mark.parametrize(
    ("name", "levels"),
    [("slides/boxes.tiff", 4), ("slides/test.tif", 3), ("ff/monuseg/*.tif", 1), ("ff/*/*.jpg", 1)],
)
def test_read_once_the_mpp_is_stated(data_dir: Path, name: str, levels: int) -> None:
    files = sorted(data_dir.glob(name))
    assert files
    for file in files:
        with pytest.raises(MissingMppError, match="--mpp"):
            open_slide(file)
        slide = open_slide(file, mpp=0.5)
        assert (slide.mpp, slide.mpp_origin, len(slide.levels)) == ((0.5, 0.5), "--mpp", levels)
        assert slide.read_level(levels - 1, Region(0, 0, 128, 128)).std() > 0
        slide.close()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("slides/test_orient6.tif", "Orientation tag 6.*autorot"),
        ("slides/ome_zarr_simple_0.4", "uint16 with 1 channel"),
        ("broken/lfs_pointer_a.tiff", "git lfs pull"),
        ("broken/unopenable.tiff", "no reader opens it .*52479"),
    ],
)
def test_refused_with_one_line(data_dir: Path, name: str, match: str) -> None:
    for options in ({}, {"mpp": 0.5}):
        with pytest.raises(UnsupportedSlideError, match=match) as caught:
            open_slide(data_dir / name, **options)  # type: ignore[arg-type]
        assert str(caught.value).startswith(Path(name).name) and "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", ["auto", "tiff", "openslide"])
def test_corrupt_tile_names_slide_and_region(data_dir: Path, reader: str) -> None:
    slide = open_slide(data_dir / "broken/unreadable.svs", reader=reader)
    for _ in range(2):  # the second attempt says the same, not "already failed"
        with pytest.raises(CorruptRegionError, match="unreadable.svs: level 0.*Bogus") as caught:
            whole(slide)
        assert caught.value.slide_id == "unreadable" and caught.value.region is not None


def test_every_file_of_the_collection_is_known(data_dir: Path) -> None:
    """A new file in the two folders gets its row above, or is at least read or refused in our own words."""
    for path in sorted([*(data_dir / "slides").iterdir(), *(data_dir / "broken").iterdir()]):
        try:
            slide = open_slide(path, mpp=0.5)
            slide.read_level(0, Region(0, 0, 64, 64))
            slide.close()
        except SlideError as error:
            assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", [CMU, "slides/boxes.tiff", "slides/test.tif", "slides/small.svs"])
def test_two_readers_see_the_same_pixels(data_dir: Path, name: str) -> None:
    ours, theirs = (open_slide(data_dir / name, mpp=0.5, reader=reader) for reader in ("tiff", "openslide"))
    assert ours.levels == theirs.levels and ours.identity == theirs.identity
    for level in range(len(ours.levels)):
        difference = abs(whole(ours, level).astype(int) - whole(theirs, level))
        assert difference.max() <= 2  # the same JPEG, perhaps by another build of the decoder
    size = ours.levels[0].size
    for region in (Region(size.height // 3, size.width // 5, 100, 131), Region(-5, size.width - 9, 40, 50)):
        difference = abs(ours.read_level(0, region).astype(int) - theirs.read_level(0, region))
        assert difference.max() <= 2


def test_two_readers_agree_on_the_profile(data_dir: Path) -> None:
    slides = [
        open_slide(data_dir / "slides/boxes.tiff", mpp=0.5, reader=reader) for reader in ("tiff", "openslide")
    ]
    assert slides[0].icc_profile and slides[0].icc_profile == slides[1].icc_profile
    views = [SlideView(slide, (1.1, 1.3)) for slide in slides]
    np.testing.assert_allclose(*(view.read(Region(0, 0, 90, 100)).astype(int) for view in views), atol=3)


def read_all(path: Path, reader: str) -> str:
    """Digest of level 0, or the name of our error. Anything else is a failure of the test that calls."""
    try:
        slide = open_slide(path, reader=reader)
        digest = hashlib.sha256(whole(slide).tobytes()).hexdigest()
        slide.close()
    except SlideError as error:
        assert "\n" not in str(error) and error.slide_id
        return type(error).__name__
    return digest


@pytest.mark.parametrize("reader", ["auto", "tiff", "openslide"])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.3, 0.7, 0.9, 0.999])
def test_cut_off_slide_is_an_error_never_garbage(
    data_dir: Path, tmp_path: Path, share: float, reader: str
) -> None:
    data = (data_dir / CMU).read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(data[: int(len(data) * share)])
    TILE_CACHE.clear()
    whole_digest = hashlib.sha256(whole(open_slide(data_dir / CMU)).tobytes()).hexdigest()
    found = read_all(path, reader)
    # A cut behind the last tile may leave level 0 intact.
    assert found.endswith("Error") or found == whole_digest


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_end_in_pixels_or_in_our_error(data_dir: Path, tmp_path: Path, seed: int) -> None:
    """Structure (head and last kilobytes) is hit more often than its share of the file."""
    rng = np.random.default_rng(seed)
    data = bytearray((data_dir / CMU).read_bytes())
    spans = [(0, 16), (len(data) - 4000, len(data)), (16, len(data))]
    for _ in range(int(rng.integers(1, 30))):
        low, high = spans[rng.integers(len(spans))]
        data[rng.integers(low, high)] ^= int(rng.integers(1, 256))
    path = tmp_path / "flipped.svs"
    path.write_bytes(data)
    for options in ({}, {"mpp": 0.5}):
        try:
            slide = open_slide(path, **options)  # type: ignore[arg-type]
            for level in range(len(slide.levels)):
                slide.read_level(level, Region(0, 0, 1000, 1000))
        except SlideError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("seed", range(40))
def test_small_slide_with_any_damage(data_dir: Path, tmp_path: Path, seed: int) -> None:
    """Files so small that every flip hits structure; all readers of the chain, and every kind of file."""
    rng = np.random.default_rng(seed)
    for name in ("small.svs", "boxes.tiff", "boxes_0.dcm", "test_orient6.tif"):
        data = bytearray((data_dir / "slides" / name).read_bytes())
        for position in rng.integers(0, len(data), int(rng.integers(1, 12))):
            data[position] = int(rng.integers(0, 256))
        path = tmp_path / name
        path.write_bytes(data)
        for reader in ("auto", "tiff", "openslide", "image"):
            try:
                slide = open_slide(path, mpp=0.5, reader=reader)
                slide.read_level(0, Region(0, 0, 300, 300))
            except SlideError as error:
                assert "\n" not in str(error)


def test_thumbnail_of_a_big_picture(data_dir: Path) -> None:
    """92 megapixels without levels: over PIL's own limit, and the thumbnail looks like the picture."""
    path = data_dir / "ff/her2st/5714_HE_BT_C2.jpg"
    if not path.exists():
        pytest.skip("her2st is not there")
    slide = open_slide(path, mpp=0.687)
    view = SlideView(slide, (22.0, 22.0))
    thumbnail_HWC = view.read(Region.of(view.size))
    sample: Any = whole(slide)[::8, ::8]
    np.testing.assert_allclose(thumbnail_HWC.mean((0, 1)), sample.mean((0, 1)), atol=0.5)
    slide.close()
