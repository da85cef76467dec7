"""Tissue detection on made-up slides, where the truth is known, and the arithmetic of the mask."""

from __future__ import annotations

import pickle
import time

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.overlay import CLASS_COLOURS, TISSUE_COLOUR, draw_overlay
from wsi_pipeline.core.tissue import (
    PRESETS,
    THUMBNAIL_MPP,
    TissueConfig,
    TissueMask,
    TissueResult,
    detect_tissue,
    whole_slide,
)
from wsi_pipeline.errors import ConfigError

MPP = (THUMBNAIL_MPP, THUMBNAIL_MPP)
PINK_GLASS = (229, 213, 228)
GREY_GLASS = (172, 176, 174)
WHITE_GLASS = (244, 243, 245)
BLACK = (25, 25, 28)
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def glass(size: int = 400, rgb: tuple[int, int, int] = PINK_GLASS) -> Pixels:
    noise = np.random.default_rng(1).normal(0, 1.5, (size, size, 1))
    return np.clip(np.array(rgb) + noise, 0, 255).astype(np.uint8)


def put_tissue(pixels_HWC: Pixels, inside_HW: Mask, strength: float = 1.0) -> None:
    """H&E by Beer-Lambert over the glass that is there: nuclei in a textured pink ground."""
    rng = np.random.default_rng(2)
    shape = inside_HW.shape
    nuclei = cv2.GaussianBlur((rng.random(shape) < 0.15).astype(np.float32), (0, 0), 0.8)[..., None]
    ground = rng.normal(0.20, 0.05, (*shape, 1))
    od = strength * (ground * np.array([0.3, 0.95, 0.45]) + nuclei * np.array([0.65, 0.70, 0.29]))
    mixed = pixels_HWC * 10.0 ** -np.maximum(od, 0)
    pixels_HWC[inside_HW] = np.clip(mixed, 0, 255).astype(np.uint8)[inside_HW]


def ellipse(size: int, centre: tuple[int, int], axes: tuple[int, int]) -> Mask:
    canvas = np.zeros((size, size), np.uint8)
    cv2.ellipse(canvas, centre, axes, 20, 0, 360, 1, -1)
    return canvas > 0


def iou(one_HW: Mask, other_HW: Mask) -> float:
    return float((one_HW & other_HW).sum() / (one_HW | other_HW).sum())


def detect(pixels_HWC: Pixels, **changes: float) -> TissueResult:
    return detect_tissue(pixels_HWC, MPP, TissueConfig(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("rgb", [PINK_GLASS, GREY_GLASS, WHITE_GLASS])
@pytest.mark.parametrize("strength", [0.35, 1.0])
def test_section_is_found_on_glass_of_any_colour(rgb: tuple[int, int, int], strength: float) -> None:
    truth = ellipse(400, (190, 210), (120, 70))
    pixels = glass(rgb=rgb)
    put_tissue(pixels, truth, strength)
    result = detect(pixels)
    assert iou(result.tissue.mask_HW, truth) > 0.93
    assert result.reason is None
    assert np.abs(np.subtract(result.background_rgb, rgb)).max() <= 3
    assert result.tissue.mpp == MPP


def test_stain_halo_is_glass() -> None:
    pixels = glass(600).astype(np.float64)
    yy, xx = np.mgrid[:600, :600]
    halo = 0.10 * np.exp(-((yy - 300) ** 2 + (xx - 420) ** 2) / (2 * 110.0**2))
    pixels *= 10.0 ** -(halo[..., None] * np.array([0.07, 0.99, 0.30]))
    pixels_HWC = pixels.astype(np.uint8)
    truth = ellipse(600, (280, 300), (120, 80))
    put_tissue(pixels_HWC, truth)
    assert iou(detect(pixels_HWC).tissue.mask_HW, truth) > 0.9


def test_lattice_of_printed_spots_and_dust_is_no_tissue() -> None:
    pixels = glass(rgb=WHITE_GLASS)
    for y in range(10, 400, 25):
        for x in range(10, 400, 25):
            cv2.circle(pixels, (x, y), 5, (214, 214, 218), -1)
    rng = np.random.default_rng(3)
    for y, x in rng.integers(5, 395, (60, 2)):
        pixels[y : y + 2, x : x + 3] = (90, 60, 120)
    result = detect(pixels)
    assert not result.tissue.mask_HW.any()
    assert result.reason is not None


@pytest.mark.parametrize("rgb", [(40, 160, 140), (30, 60, 200), (215, 40, 60), BLACK])
def test_pen_is_excluded_and_tissue_kept(rgb: tuple[int, int, int]) -> None:
    truth = ellipse(400, (220, 220), (110, 80))
    pixels = glass(rgb=WHITE_GLASS)
    put_tissue(pixels, truth)
    pen = np.zeros((400, 400), np.uint8)
    cv2.line(pen, (40, 30), (60, 370), 1, 60 // 4)
    pixels[pen > 0] = rgb
    result = detect(pixels)
    # A long straight black stroke looks like a coverslip edge; either class keeps it out.
    excluded = result.excluded["coverslip" if rgb == BLACK else "pen"]
    assert excluded[pen > 0].mean() > 0.9
    assert result.tissue.mask_HW[pen > 0].mean() < 0.02
    assert result.tissue.mask_HW[truth].mean() > 0.95


def test_black_dot_is_pen() -> None:
    pixels = glass(rgb=WHITE_GLASS)
    dot = ellipse(400, (200, 200), (40, 40))
    pixels[dot] = BLACK
    result = detect(pixels)
    assert result.excluded["pen"][dot].mean() > 0.9
    assert not result.tissue.mask_HW.any()
    assert "pen" in str(result.reason)


def test_green_pen_across_tissue_is_excluded() -> None:
    pixels = glass(rgb=WHITE_GLASS)
    put_tissue(pixels, np.ones((400, 400), np.bool_))
    stroke = np.zeros((400, 400), np.bool_)
    stroke[180:230] = True
    inked = pixels * np.array([0.15, 0.75, 0.65])
    pixels[stroke] = inked[stroke].astype(np.uint8)
    result = detect(pixels)
    assert result.tissue.mask_HW[stroke].mean() < 0.1
    assert result.tissue.mask_HW[~stroke].mean() > 0.95


def test_blood_within_a_section_is_tissue_although_it_has_the_colour_of_red_ink() -> None:
    truth = ellipse(400, (200, 200), (150, 120))
    pixels = glass(rgb=WHITE_GLASS)
    put_tissue(pixels, truth)
    blood = ellipse(400, (200, 200), (40, 30))
    pixels[blood] = (215, 40, 60)
    result = detect(pixels)
    assert result.tissue.mask_HW[blood].all()
    assert "pen" not in result.excluded


def test_coverslip_edge_and_black_scan_border_are_named_and_excluded() -> None:
    truth = ellipse(400, (230, 220), (110, 80))
    pixels = glass(rgb=WHITE_GLASS)
    put_tissue(pixels, truth)
    edge = np.zeros((400, 400), np.uint8)
    cv2.line(edge, (150, 399), (230, 30), 1, 5)
    pixels[edge > 0] = (70, 70, 72)
    pixels[:20] = 4
    result = detect(pixels)
    assert result.excluded["coverslip"][edge > 0].mean() > 0.85
    assert result.excluded["border"][:20].mean() > 0.9
    assert result.tissue.mask_HW[edge > 0].mean() < 0.1
    assert not result.tissue.mask_HW[:20].any()
    assert result.tissue.mask_HW[truth & (edge == 0)].mean() > 0.9


def test_small_holes_are_filled_and_large_ones_kept() -> None:
    truth = ellipse(400, (200, 200), (170, 150))
    large = ellipse(400, (200, 150), (40, 40))  # 0.3 mm²
    small = ellipse(400, (200, 260), (12, 12))  # 0.03 mm²
    pixels = glass()
    put_tissue(pixels, truth & ~large & ~small)
    found = detect(pixels).tissue.mask_HW
    assert found[small].all()
    assert found[large].mean() < 0.15
    unfilled = detect(pixels, closing_um=0, max_hole_um2=0, faint_od=9).tissue.mask_HW
    assert unfilled[small].mean() < 0.5


def test_pieces_below_the_smallest_area_are_dropped_with_a_reason() -> None:
    pixels = glass()
    put_tissue(pixels, ellipse(400, (200, 200), (30, 25)))  # 0.15 mm²
    assert detect(pixels).reason is None
    result = detect(pixels, min_tissue_um2=400_000)
    assert not result.tissue.mask_HW.any()
    assert "400000" in str(result.reason)


def test_picture_full_of_tissue_is_all_tissue() -> None:
    pixels = glass()
    put_tissue(pixels, np.ones((400, 400), np.bool_))
    result = detect(pixels)
    assert result.tissue.mask_HW.mean() > 0.99
    assert result.background_rgb == (255, 255, 255)


def test_unscanned_white_padding_is_not_taken_for_the_glass() -> None:
    truth = ellipse(400, (130, 200), (80, 60))
    pixels = glass()
    put_tissue(pixels, truth)
    pixels[:, 260:] = 255
    result = detect(pixels)
    assert iou(result.tissue.mask_HW, truth) > 0.93
    assert np.abs(np.subtract(result.background_rgb, PINK_GLASS)).max() <= 3


@pytest.mark.parametrize("value", [0, 1, 40, 128, 255])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 5), (300, 200)])
def test_constant_picture_has_no_tissue_and_a_reason(shape: tuple[int, int], value: int) -> None:
    result = detect(np.full((*shape, 3), value, np.uint8))
    assert result.tissue.mask_HW.shape == shape
    assert not result.tissue.mask_HW.any()
    assert result.reason
    assert all(mask.shape == shape for mask in result.excluded.values())


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 2**16), mpp=st.floats(0.2, 90.0)
)
def test_any_picture_gives_a_result_of_its_size(height: int, width: int, seed: int, mpp: float) -> None:
    rng = np.random.default_rng(seed)
    pixels = (rng.integers(0, 256, (height, width, 3)) * rng.random()).astype(np.uint8)
    before = pixels.copy()
    result = detect_tissue(pixels, (mpp, mpp * 1.1), TissueConfig())
    again = detect_tissue(pixels, (mpp, mpp * 1.1), TissueConfig())
    assert result.tissue.mask_HW.shape == (height, width)
    assert (result.reason is None) == bool(result.tissue.mask_HW.any())
    assert result.tissue == again.tissue
    assert np.array_equal(pixels, before)
    for mask in result.excluded.values():
        assert mask.shape == (height, width)


def test_resolution_changes_the_outline_only_at_the_rim() -> None:
    truth = ellipse(400, (190, 210), (120, 70))
    pixels = glass()
    put_tissue(pixels, truth)
    coarse = detect_tissue(pixels, MPP, TissueConfig()).tissue
    doubled = cv2.resize(pixels, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    fine = detect_tissue(doubled, (4.0, 4.0), TissueConfig()).tissue
    assert abs(fine.area_mm2 / coarse.area_mm2 - 1) < 0.02


def test_wrong_input_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        detect(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="empty"):
        detect(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ConfigError, match="mpp"):
        detect_tissue(np.zeros((4, 4, 3), np.uint8), (0.0, 8.0), TissueConfig())


def test_presets_and_explicit_values_combine() -> None:
    assert TissueConfig().settings == PRESETS["frozen"]
    ffpe = TissueConfig(preset="ffpe", closing_um=0.0).settings
    assert ffpe.closing_um == 0.0
    assert ffpe.high_od == PRESETS["ffpe"].high_od != PRESETS["frozen"].high_od
    with pytest.raises(ConfigError, match="preset"):
        TissueConfig(preset="fresh")
    with pytest.raises(ConfigError, match="closing_um"):
        TissueConfig(closing_um=-1.0)
    with pytest.raises(ConfigError, match="high_od"):
        TissueConfig(high_od=0.001)


@pytest.mark.parametrize("mpp", [(0.25, 0.25), (0.687, 0.7), (12.0, 12.0)])
def test_whole_slide_covers_every_region_of_the_slide(mpp: tuple[float, float]) -> None:
    size = Size(4001, 3003)
    result = whole_slide(size, mpp)
    assert result.reason is None
    assert result.tissue.covers(Region.of(size), mpp) == 1.0
    assert result.tissue.covers(Region(4000, 3002, 1, 1), mpp) == 1.0
    assert result.tissue.covers(Region(9000, 9000, 50, 50), mpp) == 0.0


def test_covers_is_exact_on_a_known_mask() -> None:
    mask = TissueMask(mask_HW=np.array([[True, False], [False, False]]), mpp=MPP)
    lattice = (0.5, 0.5)  # one mask pixel is 16 lattice pixels
    assert mask.covers(Region(0, 0, 16, 16), lattice) == 1.0
    assert mask.covers(Region(0, 0, 32, 32), lattice) == 0.25
    assert mask.covers(Region(16, 16, 16, 16), lattice) == 0.0
    assert mask.covers(Region(15, 15, 16, 16), lattice) == pytest.approx(1 / 256)
    assert mask.covers(Region(-16, 0, 32, 16), lattice) == 0.5
    assert mask.covers(Region(-8, -8, 8, 8), lattice) == 0.0
    assert mask.covers(Region(0, 0, 0, 5), lattice) == 0.0
    assert mask.area_mm2 == pytest.approx(64e-6)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_covers_equals_the_area_sum_and_never_loses_a_touched_pixel(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    bits = data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    mask = TissueMask(mask_HW=np.array(bits, np.bool_).reshape(shape), mpp=(8.0, 4.0))
    lattice = data.draw(st.sampled_from([(0.5, 0.5), (1.0, 2.0), (3.0, 3.0), (0.687, 0.31), (9.0, 20.0)]))
    side = st.integers(1, 60)
    corner = st.integers(-30, 90)
    region = Region(data.draw(corner), data.draw(corner), data.draw(side), data.draw(side))

    def overlap(start: int, length: int, step: float, pixel: float, count: int) -> npt.NDArray[np.float64]:
        low, high = start * step / pixel, (start + length) * step / pixel
        index = np.arange(count)
        shared = np.maximum(np.minimum(index + 1, high) - np.maximum(index, low), 0.0)
        return np.where(shared > 1e-5, shared, 0.0)

    rows = overlap(region.y, region.height, lattice[0], 8.0, shape[0])
    cols = overlap(region.x, region.width, lattice[1], 4.0, shape[1])
    area = region.height * lattice[0] / 8.0 * region.width * lattice[1] / 4.0
    expected = float((rows[:, None] * cols * mask.mask_HW).sum() / area)
    share = mask.covers(region, lattice)
    assert share == pytest.approx(expected, abs=1e-6)
    assert 0.0 <= share <= 1.0
    assert (share > 0) == bool(((rows[:, None] * cols > 0) & mask.mask_HW).any())
    assert mask.covers_many([region, region], lattice).tolist() == pytest.approx([share, share], abs=1e-12)


def test_mask_is_a_value() -> None:
    bits = np.random.default_rng(5).random((7, 11)) > 0.5
    mask = TissueMask(mask_HW=bits, mpp=MPP)
    copy = pickle.loads(pickle.dumps(mask))  # noqa: S301
    assert copy == mask and hash(copy) == hash(mask)
    assert mask != TissueMask(mask_HW=~bits, mpp=MPP)
    assert mask != TissueMask(mask_HW=bits, mpp=(8.0, 8.5))
    bits[:] = False
    assert mask == copy
    with pytest.raises(ValueError, match="read-only"):
        mask.mask_HW[0, 0] = True
    with pytest.raises(ConfigError, match="bool"):
        TissueMask(mask_HW=np.zeros((2, 2), np.uint8), mpp=MPP)  # type: ignore[arg-type]


def test_large_table_is_not_pickled() -> None:
    mask = TissueMask(mask_HW=np.ones((1000, 1000), np.bool_), mpp=MPP)
    mask.covers(Region(0, 0, 5, 5), MPP)
    assert len(pickle.dumps(mask)) < 200_000


@pytest.mark.slow
def test_speed_of_detection_and_coverage() -> None:
    tile = glass(750)
    put_tissue(tile, ellipse(750, (370, 370), (250, 200)))
    big = np.tile(tile, (5, 5, 1))
    detect(tile)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        seconds = min(_seconds(lambda: detect(big)) for _ in range(3))
    finally:
        cv2.setNumThreads(threads)
    mask = detect(big).tissue
    regions = [Region(137 * k % 59000, 61 * k % 59000, 512, 512) for k in range(100_000)]
    assert seconds < 1.0
    assert _seconds(lambda: [mask.covers(region, (0.5, 0.5)) for region in regions]) < 1.0


def _seconds(action: object) -> float:
    start = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - start


def test_overlay_outlines_tissue_and_tints_what_is_excluded() -> None:
    pixels = np.full((100, 120, 3), 230, np.uint8)
    tissue, pen = np.zeros((100, 120), np.bool_), np.zeros((100, 120), np.bool_)
    tissue[20:60, 30:90] = True
    pen[80:90, 10:50] = True
    mask = TissueMask(mask_HW=tissue, mpp=MPP)
    result = TissueResult(tissue=mask, excluded={"pen": pen}, reason=None, background_rgb=(9, 9, 9))
    drawn = draw_overlay(pixels, result)
    assert drawn.shape == pixels.shape and drawn.dtype == np.uint8
    assert (pixels == 230).all()
    assert tuple(drawn[19, 50]) == TISSUE_COLOUR
    assert (drawn[21:59, 31:89] == 230).all()
    assert tuple(drawn[79, 20]) == CLASS_COLOURS["pen"]
    assert 0 < np.abs(drawn[85, 30].astype(int) - 230).max() < 200
    larger = draw_overlay(np.full((200, 240, 3), 230, np.uint8), result)
    assert larger.shape == (200, 240, 3)
    assert tuple(larger[38, 100]) == TISSUE_COLOUR or tuple(larger[39, 100]) == TISSUE_COLOUR


def test_overlay_closes_the_outline_at_the_edge_of_the_picture() -> None:
    everything = whole_slide(Size(50, 50), MPP)
    drawn = draw_overlay(np.full((50, 50, 3), 200, np.uint8), everything)
    assert tuple(drawn[0, 25]) == TISSUE_COLOUR
    assert tuple(drawn[25, 25]) == (200, 200, 200)
