"""Scores of tiles: sharpness belongs to the focus and not to the stain, shares count what they say."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.core.tile_scores import score_tile

HALF = (0.5, 0.5)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """Noise with detail at all scales, [256, 256, 3] uint8."""
    rng = np.random.default_rng(0)
    fields = [rng.random((256 // size, 256 // size)) for size in (1, 2, 4, 8, 16)]
    field = sum(cv2.resize(values, (256, 256), interpolation=cv2.INTER_CUBIC) for values in fields)
    field = (field - field.min()) / np.ptp(field)
    planes = [220 - 180 * field, 200 - 190 * field, 210 - 160 * field]
    return np.rint(np.stack(planes, axis=-1)).astype(np.uint8)


def blurred(pixels: np.ndarray, sigma_um: float, mpp: float = 0.5) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma_um / mpp))


def test_sharpness_falls_with_blur(tissue: np.ndarray) -> None:
    values = [score_tile(blurred(tissue, sigma), HALF).sharpness for sigma in (0.05, 0.25, 0.5, 1.0, 2.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 3 * values[3]


def test_sharpness_does_not_depend_on_stain_or_glass(tissue: np.ndarray) -> None:
    sharp = score_tile(tissue, HALF).sharpness
    pale = np.rint(255 - (255.0 - tissue) / 2).astype(np.uint8)
    half = tissue.copy()
    half[:, 128:] = 240
    assert score_tile(pale, HALF).sharpness == pytest.approx(sharp, rel=0.1)
    assert score_tile(half, HALF).sharpness == pytest.approx(sharp, rel=0.25)


def test_scores_mean_the_same_at_another_pixel_size(tissue: np.ndarray) -> None:
    fine = np.repeat(np.repeat(tissue, 2, axis=0), 2, axis=1)
    np.testing.assert_allclose(
        astuple(score_tile(fine, (0.25, 0.25))), astuple(score_tile(tissue, HALF)), rtol=1e-2, atol=1e-2
    )


def test_shares_and_means_of_plain_colours() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:16] = (240, 230, 235)
    pixels[16:32] = (200, 100, 150)
    pixels[32:48] = (39, 0, 39)
    pixels[48:] = (40, 0, 0)
    scores = score_tile(pixels, (1.0, 1.0), glass_rgb=(240, 230, 235))
    assert (scores.white, scores.black) == (0.25, 0.25)
    assert scores.red == pytest.approx((240 + 200 + 39 + 40) / 4)
    assert scores.green == pytest.approx((230 + 100) / 4)
    assert scores.blue == pytest.approx((235 + 150 + 39) / 4)
    assert scores.saturation == pytest.approx((10 / 240 + 0.5 + 1 + 1) / 4, abs=1e-6)
    assert score_tile(pixels, (1.0, 1.0)).white == 0.25  # within 0.06 of white glass, too
    assert score_tile(pixels - np.minimum(pixels, 30), (1.0, 1.0)).white == 0


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_tile_of_one_colour_has_finite_scores(value: int) -> None:
    scores = score_tile(np.full((7, 9, 3), value, np.uint8), HALF)
    assert np.isfinite(astuple(scores)).all()
    assert scores.sharpness == 0


def test_real_tiles_in_focus_and_out_of_it_do_not_meet(data_dir: Path) -> None:
    names = ["ff/monuseg/TCGA-ZF-A9R5-01A-01-TS1.tif", "ff/monuseg/TCGA-NH-A8F7-01A-01-TS1.tif"]
    names += ["ffpe/monuseg/TCGA-18-5592-01Z-00-DX1.tif", "ffpe/monuseg/TCGA-E2-A1B5-01Z-00-DX1.tif"]
    tiles = [np.asarray(Image.open(data_dir / name).convert("RGB")) for name in names]
    sharp = [score_tile(tile, (0.25, 0.25)).sharpness for tile in tiles]
    dull = [score_tile(blurred(tile, 1.0, 0.25), (0.25, 0.25)).sharpness for tile in tiles]
    assert min(sharp) > 0.3
    assert max(dull) < 0.18
