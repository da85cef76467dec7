"""The resampler: joins bit for bit, dots stay where they are, flat stays flat, nothing aliases."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageCms

from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.errors import UnsupportedSlideError
from wsi_pipeline.readers._base import native_levels
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.icc import srgb_profile, to_srgb
from wsi_pipeline.readers.lattice import SlideView


def noise(height: int, width: int, seed: int = 0) -> U8_HWC:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


PYRAMID = (noise(211, 307), noise(106, 154, 1), noise(53, 77, 2))
working_mpp = st.floats(0.11, 9.0) | st.sampled_from([0.25, 0.5, 1.0, 0.2525, 0.4999])


@settings(max_examples=150, deadline=None)
@given(mpp=st.tuples(working_mpp, working_mpp), levels=st.integers(1, 3), data=st.data())
def test_any_part_equals_the_same_part_of_the_whole(mpp: Mpp, levels: int, data: st.DataObject) -> None:
    view = SlideView(ArraySlide(PYRAMID[:levels], mpp=0.25), mpp)
    frame = Region(-3, -2, view.size.height + 6, view.size.width + 5)
    whole_HWC = view.read(frame)
    y = data.draw(st.integers(frame.y, frame.bottom - 1))
    x = data.draw(st.integers(frame.x, frame.right - 1))
    part = Region(
        y, x, data.draw(st.integers(1, frame.bottom - y)), data.draw(st.integers(1, frame.right - x))
    )
    np.testing.assert_array_equal(view.read(part), whole_HWC[part.slices(frame)])


@pytest.mark.parametrize("mpp", [(0.61, 0.37), (7.3, 9.1)])
def test_strips_are_invisible(mpp: Mpp, monkeypatch: pytest.MonkeyPatch) -> None:
    view = SlideView(ArraySlide(noise(400, 300), mpp=0.25), mpp)
    whole_HWC = view.read(Region.of(view.size))
    monkeypatch.setattr("wsi_pipeline.readers.lattice._STRIP_PIXELS", 1000)
    np.testing.assert_array_equal(view.read(Region.of(view.size)), whole_HWC)


@settings(max_examples=60, deadline=None)
@given(
    mpp=st.tuples(st.floats(0.2, 6.0), st.floats(0.2, 6.0)), y=st.integers(20, 180), x=st.integers(20, 280)
)
def test_a_dot_comes_back_where_it_was_drawn(mpp: Mpp, y: int, x: int) -> None:
    base_HWC = np.full((200, 300, 3), 255, np.uint8)
    base_HWC[y - 3 : y + 3, x - 3 : x + 3] = 0  # a 6 px dot whose centre is the corner (y, x)
    levels = [base_HWC]
    while min(levels[-1].shape[:2]) > 60:
        last = levels[-1][: levels[-1].shape[0] // 2 * 2, : levels[-1].shape[1] // 2 * 2].astype(np.uint16)
        levels.append(
            ((last[::2, ::2] + last[1::2, ::2] + last[::2, 1::2] + last[1::2, 1::2] + 2) >> 2).astype(
                np.uint8
            )
        )
    view = SlideView(ArraySlide(levels, mpp=0.25), mpp)
    darkness = 255.0 - view.read(Region.of(view.size))[..., 0]
    rows, columns = (np.arange(side) + 0.5 for side in darkness.shape)
    assert darkness.sum() > 0
    found = ((darkness.sum(1) @ rows) / darkness.sum(), (darkness.sum(0) @ columns) / darkness.sum())
    assert abs(found[0] - y * 0.25 / mpp[0]) < 0.5
    assert abs(found[1] - x * 0.25 / mpp[1]) < 0.5


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.3, 2.0, 3.7, 4.0, 11.0, 57.3])
def test_flat_stays_flat_to_the_edge(ratio: float) -> None:
    slide = ArraySlide(np.full((120, 130, 3), (37, 128, 254), np.uint8), mpp=0.5)
    view = SlideView(slide, (0.5 * ratio, 0.5 * ratio))
    assert (view.read(Region.of(view.size)) == (37, 128, 254)).all()


@pytest.mark.parametrize("ratio", [2.5, 4.0, 9.3])
def test_fine_stripes_become_grey_and_do_not_alias(ratio: float) -> None:
    stripes_HWC = np.zeros((240, 240, 3), np.uint8)
    stripes_HWC[::2] = 255
    view = SlideView(ArraySlide(stripes_HWC, mpp=0.25), (0.25 * ratio, 0.25 * ratio))
    inner = view.read(Region.of(view.size).grown(-3)).astype(int)
    assert abs(inner - 128).max() <= 8


def test_native_mpp_is_a_plain_copy() -> None:
    slide = ArraySlide(PYRAMID, mpp=(0.25, 0.5))
    view = SlideView(slide)
    assert (view.mpp, view.size) == ((0.25, 0.5), Size(211, 307))
    np.testing.assert_array_equal(view.read(Region(5, 7, 50, 60)), PYRAMID[0][5:55, 7:67])
    half = SlideView(slide, (0.5, 1.0))
    np.testing.assert_array_equal(half.read(Region(5, 7, 50, 60)), PYRAMID[1][5:55, 7:67])


def test_outside_the_slide_is_white() -> None:
    view = SlideView(ArraySlide(np.zeros((40, 50, 3), np.uint8), mpp=0.25), (0.6, 0.6))
    pixels_HWC = view.read(Region(-4, -5, 100, 100))
    assert (pixels_HWC[4 : 4 + view.size.height, 5 : 5 + view.size.width] == 0).all()
    assert (pixels_HWC == 0).all(-1).sum() == view.size.area
    assert (view.read(Region(1000, 0, 3, 4)) == 255).all()


def test_size_counts_the_centres_on_the_slide() -> None:
    slide = ArraySlide(noise(10, 11), mpp=1.0)
    assert SlideView(slide, (2.0, 2.0)).size == Size(5, 5)  # the sixth centre lies on the edge: outside
    assert SlideView(slide, (3.0, 3.0)).size == Size(3, 4)
    assert SlideView(slide, (100.0, 100.0)).size == Size(1, 1)
    assert SlideView(slide, (100.0, 100.0)).read(Region(0, 0, 1, 1)).shape == (1, 1, 3)


class CountingSlide(ArraySlide):
    """Records which levels are read."""

    def __init__(self, *levels: U8_HWC) -> None:
        super().__init__(levels, mpp=0.25)
        self.read_levels: set[int] = set()

    def read_level(self, level: int, region: Region) -> U8_HWC:
        self.read_levels.add(level)
        return super().read_level(level, region)


@pytest.mark.parametrize(("mpp", "level"), [(0.25, 0), (0.49, 0), (0.4999, 1), (0.9, 1), (1.0, 2), (8.0, 2)])
def test_coarsest_level_that_is_fine_enough(mpp: float, level: int) -> None:
    slide = CountingSlide(*PYRAMID)
    SlideView(slide, (mpp, mpp)).read(Region(0, 0, 5, 5))
    assert slide.read_levels == {level}


def test_anisotropic_level_choice_serves_the_finer_axis() -> None:
    slide = CountingSlide(*PYRAMID)
    SlideView(slide, (0.25, 4.0)).read(Region(0, 0, 5, 5))
    assert slide.read_levels == {0}


def test_matches_a_high_precision_reference() -> None:
    """Against the same kernel in float64 without any rounding in between: within one grey level."""
    source = noise(60, 60).astype(float)
    view = SlideView(ArraySlide(source.astype(np.uint8), mpp=1.0), (2.3, 2.3))
    size = view.size.height
    matrix = np.zeros((size, 60))
    for row in range(size):
        centre = (row + 0.5) * 2.3
        for tap in range(int(np.floor(centre - 4.6)), int(np.ceil(centre + 4.6)) + 1):
            x = abs(tap + 0.5 - centre) / 2.3
            weight = 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            matrix[row, min(max(tap, 0), 59)] += weight if x < 2 else 0
        matrix[row] /= matrix[row].sum()
    expected = np.einsum("ai,bj,ijc->abc", matrix, matrix, source)
    difference = abs(view.read(Region.of(view.size)) - np.clip(expected, 0, 255))
    assert difference.max() <= 1.0 and difference.mean() < 0.3


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size(742, 555), (4.0, 4.0)),  # ceil
        (Size(741, 555), (4.0, 4.0)),  # floor
        (Size(1484, 1110), (2.0, 2.0)),
        (Size(700, 555), (2967 / 700, 4.0)),  # no integer explains both: the true ratios
        (Size(989, 740), (3.0, 3.0)),
        (Size(1, 1), (4096.0, 4096.0)),  # twelve halvings, rounded up
    ],
)
def test_downsamples_come_from_the_sizes(size: Size, expected: tuple[float, float]) -> None:
    levels = native_levels([Size(2967, 2220), size])
    assert levels[0].downsample == (1.0, 1.0)
    assert levels[1].downsample == pytest.approx(expected)


@pytest.mark.parametrize("mpp", [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_impossible_mpp(mpp: Mpp) -> None:
    with pytest.raises(ValueError, match="positive"):
        SlideView(ArraySlide(noise(4, 4), mpp=0.25), mpp)


def test_view_pickles() -> None:
    view = SlideView(ArraySlide(PYRAMID, mpp=0.25), (0.6, 0.7))
    twin = pickle.loads(pickle.dumps(view))  # noqa: S301
    np.testing.assert_array_equal(twin.read(Region(3, 4, 20, 30)), view.read(Region(3, 4, 20, 30)))


def test_big_thumbnail_of_a_slide_without_levels_is_quick() -> None:
    slide = ArraySlide(np.zeros((6000, 6000, 3), np.uint8), mpp=0.25)
    view = SlideView(slide, (8.0, 8.0))
    start = time.perf_counter()
    view.read(Region.of(view.size))
    assert time.perf_counter() - start < 3.0  # measured 0.1 to 0.2 s; the slow way takes ten


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and blue exchanged: surely not sRGB."""
    profile = bytearray(srgb_profile())
    red, blue = (profile.index(tag, 128) for tag in (b"rXYZ", b"bXYZ"))
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def test_icc_converts_only_when_asked() -> None:
    pixels_HWC = noise(30, 40)
    slide = ArraySlide(pixels_HWC, mpp=0.25, icc_profile=swapped_profile())
    region = Region(0, 0, 30, 40)
    np.testing.assert_array_equal(SlideView(slide, icc="keep").read(region), pixels_HWC)
    np.testing.assert_array_equal(SlideView(slide, icc="ignore").read(region), pixels_HWC)
    converted = SlideView(slide).read(region)
    assert abs(converted[..., ::-1].astype(int) - pixels_HWC).max() <= 2  # red and blue change places
    np.testing.assert_array_equal(SlideView(slide).read(Region(7, 9, 5, 6)), converted[7:12, 9:15])


def test_srgb_profile_is_itself_and_reproducible() -> None:
    pixels_HWC = noise(16, 16)
    assert abs(to_srgb(pixels_HWC, srgb_profile()).astype(int) - pixels_HWC).max() <= 1
    srgb_profile.cache_clear()
    first = srgb_profile()
    srgb_profile.cache_clear()
    assert srgb_profile() == first and len(first) > 128


@pytest.mark.parametrize("profile", [b"nonsense", b"\0" * 200])
def test_damaged_profile_is_our_error(profile: bytes) -> None:
    slide: Slide = ArraySlide(noise(4, 4), mpp=0.25, slide_id="damaged", icc_profile=profile)
    with pytest.raises(UnsupportedSlideError, match="damaged: the embedded ICC profile"):
        SlideView(slide).read(Region(0, 0, 4, 4))


def test_grey_profile_is_our_error() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with pytest.raises(UnsupportedSlideError, match="ICC"):
        to_srgb(noise(4, 4), lab)
