"""The made-up slide: pixels are a function of the coordinate, levels fit, tissue covers its share."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.readers.synthetic_texture import PERIOD, build_textures, halve

SLIDE = SyntheticSlide(size=Size(1501, 2203))


def _whole(slide: SyntheticSlide, level: int) -> U8_HWC:
    return slide.read_level(level, Region.of(slide.levels[level].size))


def _tissue_share(pixels_HWC: U8_HWC) -> float:
    """Part that is darker or more coloured than glass, after a mean over cells of 16 pixels."""
    height, width = (side // 16 * 16 for side in pixels_HWC.shape[:2])
    cells = pixels_HWC[:height, :width].reshape(height // 16, 16, width // 16, 16, 3).mean(axis=(1, 3))
    return float(((cells.max(axis=-1) - cells.min(axis=-1)) > 12).mean())


def test_is_a_slide() -> None:
    assert isinstance(SLIDE, Slide)
    assert [level.size for level in SLIDE.levels] == [
        Size(1501, 2203),
        Size(751, 1102),
        Size(376, 551),
        Size(188, 276),
    ]
    assert [level.downsample[0] for level in SLIDE.levels] == [1, 2, 4, 8]
    assert len(SyntheticSlide(size=Size(1501, 2203), level_count=1).levels) == 1
    assert len(SyntheticSlide(size=Size(100, 90)).levels) == 1


@settings(max_examples=25, deadline=None)
@given(data=st.data(), level=st.integers(0, 3))
def test_any_split_of_a_region_gives_the_same_bytes(data: st.DataObject, level: int) -> None:
    y, x = data.draw(st.integers(-300, 1500)), data.draw(st.integers(-300, 2200))
    height, width = data.draw(st.integers(2, 400)), data.draw(st.integers(2, 400))
    cut_y, cut_x = data.draw(st.integers(1, height - 1)), data.draw(st.integers(1, width - 1))
    whole = SLIDE.read_level(level, Region(y, x, height, width))
    top = SLIDE.read_level(level, Region(y, x, cut_y, width))
    left = SLIDE.read_level(level, Region(y + cut_y, x, height - cut_y, cut_x))
    right = SLIDE.read_level(level, Region(y + cut_y, x + cut_x, height - cut_y, width - cut_x))
    np.testing.assert_array_equal(whole, np.vstack([top, np.hstack([left, right])]))


def test_outside_is_white_and_the_border_is_not() -> None:
    pixels = SLIDE.read_level(0, Region(-5, -7, 1501 + 10, 2203 + 14))
    assert (pixels[:5] == 255).all() and (pixels[-5:] == 255).all()
    assert (pixels[:, :7] == 255).all() and (pixels[:, -7:] == 255).all()
    assert pixels[5:-5, 7:-7].min(axis=(0, 2)).max() < 255
    assert (SLIDE.read_level(0, Region(5000, 5000, 4, 6)) == 255).all()


def test_a_level_is_nearly_the_mean_of_the_one_above() -> None:
    above = _whole(SLIDE, 0)
    for level in (1, 2, 3):
        below = _whole(SLIDE, level)
        height, width = (side // 2 for side in above.shape[:2])
        quads = above[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
        difference = np.abs(below[:height, :width] - quads)
        assert difference.mean() < 2.5
        assert np.abs(below[:height, :width].mean(axis=(0, 1)) - quads.mean(axis=(0, 1))).max() < 1.5
        above = below


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_tissue_covers_the_share_asked_for(share: float) -> None:
    slide = SyntheticSlide(size=Size(12000, 16000), tissue_share=share)
    found = _tissue_share(_whole(slide, 3))
    assert found == pytest.approx(share, abs=0.035)


def test_looks_like_haematoxylin_and_eosin_on_pale_glass() -> None:
    pixels = _whole(SyntheticSlide(size=Size(2048, 3072), tissue_share=0.5), 0).reshape(-1, 3).astype(int)
    red, green, blue = pixels.T
    assert ((blue > red + 25) & (red < 130)).mean() > 0.02  # nuclei
    assert ((red > blue + 8) & (red > green + 25) & (red > 150)).mean() > 0.03  # eosin
    glass = pixels[pixels.min(axis=1) > 228].mean(axis=0)
    assert 235 < glass[1] < glass[0] < 250


def test_seed_and_parameters_make_the_identity() -> None:
    other = SyntheticSlide(size=SLIDE.size, seed=1)
    assert other.identity != SLIDE.identity
    assert not np.array_equal(_whole(other, 2), _whole(SLIDE, 2))
    again = pickle.loads(pickle.dumps(SLIDE))  # noqa: S301 - our own bytes
    assert again.identity == SLIDE.identity
    np.testing.assert_array_equal(_whole(again, 2), _whole(SLIDE, 2))


def test_threads_read_the_same_bytes() -> None:
    slide = SyntheticSlide(size=Size(700, 900), seed=5, mpp=(0.25, 0.25))
    regions = [Region(y, 0, 100, 900) for y in range(0, 700, 100)]
    with ThreadPoolExecutor(4) as pool:  # also the first use of this scene
        parts = list(pool.map(lambda region: slide.read_level(0, region), regions))
    np.testing.assert_array_equal(np.vstack(parts), _whole(slide, 0))


def test_a_giant_slide_costs_no_more_than_a_small_one() -> None:
    giant = SyntheticSlide(size=Size(120_000, 120_000))
    assert max(giant.levels[-1].size.height, giant.levels[-1].size.width) <= 512
    assert giant.read_level(0, Region(60_000, 80_000, 300, 300)).shape == (300, 300, 3)
    assert _tissue_share(_whole(giant, 7)) == pytest.approx(0.3, abs=0.03)


def test_textures_wrap_without_a_seam() -> None:
    textures = build_textures(3, 0.5)
    for name in ("glass", "cellular", "stroma", "bundle", "oedema"):
        pixels = getattr(textures, name).astype(int)
        for axis in (0, 1):
            steps = np.abs(np.diff(pixels, axis=axis)).mean(axis=(1 - axis, 2))
            seam = np.abs(pixels.take(0, axis) - pixels.take(-1, axis)).mean()
            assert seam < 1.5 * steps.max(), (name, axis)


def test_halving_rounds_half_up_and_ends_at_one_pixel() -> None:
    assert halve(np.array([[0, 1], [0, 1]], np.uint8)).tolist() == [[1]]
    assert halve(np.array([[0, 0], [0, 1]], np.uint8)).tolist() == [[0]]
    single = np.array([[7]], np.uint8)
    assert halve(single) is single
    texture = build_textures(3, 0.5).rag
    assert abs(float(halve(texture).mean()) - float(texture.mean())) < 1e-5
    assert texture.shape == (PERIOD, PERIOD) and np.abs(texture).max() <= 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"size": Size(0, 5)}, "size"),
        ({"mpp": (0.5, -1.0)}, "mpp"),
        ({"tissue_share": 1.5}, "share"),
        ({"seed": -1}, "seed"),
        ({"level_count": 0}, "level"),
    ],
)
def test_bad_parameters_are_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        SyntheticSlide(**({"size": Size(10, 10)} | changes))  # type: ignore[arg-type]
