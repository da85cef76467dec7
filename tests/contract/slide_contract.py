"""What every member of the readers family promises; a reader's test class inherits and supplies the slide."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC, Slide


class SlideContract:
    """Override ``make`` (a slide with the given levels) and, for lossy formats, ``tolerance``.

    ``make`` writes ``levels_HWC`` where the format stores them and returns an unopened slide at 0.25 um (y),
    0.5 um (x), or at 0.25 um where ``anisotropic`` is False.
    """

    tolerance = 0
    single_level = False
    anisotropic = True
    reproducible = True

    def make(self, levels_HWC: Sequence[U8_HWC], folder: Path) -> Slide:
        raise NotImplementedError

    @pytest.fixture
    def levels_HWC(self) -> list[U8_HWC]:
        """A smooth random picture (JPEG keeps it) of odd size, and its halvings."""
        rng = np.random.default_rng(7)
        coarse = rng.integers(60, 250, (12, 15, 3)).astype(float)
        rows, columns = np.linspace(0, 11, 611), np.linspace(0, 14, 775)
        y, x = rows.astype(int).clip(0, 10), columns.astype(int).clip(0, 13)
        fy, fx = (rows - y)[:, None, None], (columns - x)[None, :, None]
        top = coarse[y][:, x] * (1 - fx) + coarse[y][:, x + 1] * fx
        low = coarse[y + 1][:, x] * (1 - fx) + coarse[y + 1][:, x + 1] * fx
        levels = [np.rint(top * (1 - fy) + low * fy).astype(np.uint8)]
        for _ in range(0 if self.single_level else 2):
            wide = np.pad(levels[-1], ((0, 1), (0, 1), (0, 0)), mode="edge")
            height, width = ((side + 1) // 2 for side in levels[-1].shape[:2])
            quad = wide[: height * 2, : width * 2].reshape(height, 2, width, 2, 3).astype(np.uint16)
            levels.append(((quad.sum((1, 3)) + 2) >> 2).astype(np.uint8))
        return levels

    @pytest.fixture
    def slide(self, levels_HWC: list[U8_HWC], tmp_path: Path) -> Slide:
        (tmp_path / "slide").mkdir()
        return self.make(levels_HWC, tmp_path / "slide")

    def test_states_what_the_protocol_asks(self, slide: Slide, levels_HWC: list[U8_HWC]) -> None:
        assert isinstance(slide, Slide)
        assert slide.slide_id and slide.reader and slide.mpp_origin
        assert len(slide.identity) == 64
        assert slide.mpp == pytest.approx((0.25, 0.5 if self.anisotropic else 0.25))
        sizes = [(level.size.height, level.size.width) for level in slide.levels]
        assert sizes == [level.shape[:2] for level in levels_HWC]
        assert [level.downsample for level in slide.levels] == [(2.0**n, 2.0**n) for n in range(len(sizes))]
        assert slide.icc_profile is None or isinstance(slide.icc_profile, bytes)

    def test_pixels_are_the_levels_pixels(self, slide: Slide, levels_HWC: list[U8_HWC]) -> None:
        for index, expected in enumerate(levels_HWC):
            pixels_HWC = slide.read_level(index, Region(0, 0, *expected.shape[:2]))
            assert (pixels_HWC.dtype, pixels_HWC.shape) == (np.uint8, expected.shape)
            assert abs(pixels_HWC.astype(int) - expected).max() <= self.tolerance

    @pytest.mark.parametrize("corner", [(0, 0), (-17, -3), (301, 255), (-1, 90), (140, -1)])
    def test_any_region_is_cut_from_the_same_pixels(self, slide: Slide, corner: tuple[int, int]) -> None:
        for index, level in enumerate(slide.levels):
            frame = Region(-20, -20, level.size.height + 50, level.size.width + 50)
            whole_HWC = slide.read_level(index, frame)
            part = Region(*corner, 67, 131).intersect(frame)
            if part is None:
                continue
            np.testing.assert_array_equal(slide.read_level(index, part), whole_HWC[part.slices(frame)])

    def test_outside_is_white(self, slide: Slide) -> None:
        size = slide.levels[0].size
        pixels_HWC = slide.read_level(0, Region(-9, -8, size.height + 20, size.width + 20))
        inside = (slice(9, 9 + size.height), slice(8, 8 + size.width))
        outside = np.ones(pixels_HWC.shape[:2], bool)
        outside[inside] = False
        assert (pixels_HWC[outside] == 255).all()
        assert (slide.read_level(0, Region(10**7, -(10**7), 5, 6)) == 255).all()

    def test_empty_region(self, slide: Slide) -> None:
        assert slide.read_level(0, Region(3, 3, 0, 5)).shape == (0, 5, 3)

    @pytest.mark.parametrize("level", [-1, 99])
    def test_no_such_level(self, slide: Slide, level: int) -> None:
        with pytest.raises(ValueError, match="level"):
            slide.read_level(level, Region(0, 0, 4, 4))

    def test_results_belong_to_the_caller(self, slide: Slide) -> None:
        region = Region(0, 0, 40, 50)
        first = slide.read_level(0, region)
        kept = first.copy()
        first[:] = 0
        np.testing.assert_array_equal(slide.read_level(0, region), kept)

    def test_survives_pickling(self, slide: Slide) -> None:
        twin = pickle.loads(pickle.dumps(slide))  # noqa: S301
        assert (twin.identity, twin.mpp, twin.mpp_origin, twin.levels) == (
            slide.identity,
            slide.mpp,
            slide.mpp_origin,
            slide.levels,
        )
        region = Region(5, 6, 90, 80)
        np.testing.assert_array_equal(twin.read_level(0, region), slide.read_level(0, region))
        twin.close()

    def test_reads_in_a_spawned_process(self, slide: Slide) -> None:
        region = Region(33, 44, 90, 80)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            elsewhere = pool.submit(slide.read_level, 0, region).result(timeout=60)
        np.testing.assert_array_equal(elsewhere, slide.read_level(0, region))

    def test_reads_from_threads_while_one_closes(self, slide: Slide) -> None:
        regions = [Region(y, x, 150, 150) for y in range(0, 600, 100) for x in range(0, 700, 100)]
        expected = [slide.read_level(0, region) for region in regions]

        def read(at: int) -> U8_HWC:
            if at % 7 == 0:
                slide.close()
            return slide.read_level(0, regions[at])

        with ThreadPoolExecutor(8) as pool:
            for found, wanted in zip(pool.map(read, range(len(regions))), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)

    def test_reopens_after_close(self, slide: Slide) -> None:
        before = slide.read_level(0, Region(0, 0, 50, 50))
        slide.close()
        slide.close()
        np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 50, 50)), before)

    def test_identity_is_of_the_content(self, slide: Slide, levels_HWC: list[U8_HWC], tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        if self.reproducible:  # some writers put a random number into every file
            assert self.make(levels_HWC, tmp_path / "a").identity == slide.identity
        other = [level[::-1, ::-1].copy() for level in levels_HWC]
        other[0][0, 0] = 0
        other[0] = np.ascontiguousarray(other[0][:-1])
        if not self.single_level:
            other = other[:1]
        assert self.make(other, tmp_path / "b").identity != slide.identity
