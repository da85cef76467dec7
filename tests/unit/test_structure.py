"""Structure figures: blind to colour, not to what happened to the nuclei."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wsi_pipeline.core.stain import STANDARD_HE, StainProfile, estimate_profile, map_density, transfer_matrix
from wsi_pipeline.core.structure import compare_structure, haematoxylin_pair, psnr, ssim
from wsi_pipeline.errors import ConfigError

SIDE = 320
MARGIN = 32


def tissue(seed: int = 0) -> np.ndarray:
    """Nuclei of haematoxylin on fibres of eosin, with a lumen of glass; float density, then uint8."""
    rng = np.random.default_rng(seed)
    side = SIDE + 2 * MARGIN
    fibres = cv2.GaussianBlur(rng.standard_normal((side, side)).astype(np.float32), (0, 0), 9, sigmaY=2)
    eosin = np.clip(0.5 + 3 * fibres, 0.05, 1.2)
    haem = np.full((side, side), 0.08, np.float32)
    for _ in range(260):
        y, x = rng.integers(0, side, 2).tolist()
        axes = (int(rng.integers(3, 8)), int(rng.integers(3, 6)))
        cv2.ellipse(haem, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(0.6, 1.4)), -1)
    haem = cv2.GaussianBlur(haem, (0, 0), 0.8) + 0.05 * rng.standard_normal((side, side)).astype(np.float32)
    cv2.circle(eosin, (60, 60), 40, 0.0, -1)
    cv2.circle(haem, (60, 60), 40, 0.0, -1)
    od = haem[..., None] * np.array(STANDARD_HE[0]) + eosin[..., None] * np.array(STANDARD_HE[1])
    return np.clip(np.rint(240 * np.exp(-od)), 0, 255).astype(np.uint8)


def inner(pixels_HWC: np.ndarray, dy: int = 0, dx: int = 0) -> np.ndarray:
    at = slice(MARGIN + dy, MARGIN + dy + SIDE), slice(MARGIN + dx, MARGIN + dx + SIDE)
    return np.ascontiguousarray(pixels_HWC[at])


LARGE = tissue()
TILE = inner(LARGE)


def unit(*vector: float) -> tuple[float, float, float]:
    r, g, b = np.array(vector) / np.linalg.norm(vector)
    return float(r), float(g), float(b)


def recoloured(pixels_HWC: np.ndarray, gains: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """The same concentrations in other stains, strengths and glass."""
    before = StainProfile(stains=STANDARD_HE, strengths=(1.0, 1.0), white=(240.0, 240.0, 240.0))
    after = StainProfile(
        stains=(unit(0.5, 0.75, 0.43), unit(0.2, 0.85, 0.48)), strengths=gains, white=(228.0, 233.0, 244.0)
    )
    return map_density(pixels_HWC, transfer_matrix(before, after), before.white, after.white)


def test_a_tile_against_itself_is_perfect() -> None:
    found = compare_structure(TILE, TILE)
    assert found.ssim == pytest.approx(1.0, abs=1e-6)
    assert (found.matched, found.edges_lost, found.edges_added) == (1.0, 0.0, 0.0)
    assert found.shift_p95 < 1e-3


@pytest.mark.parametrize("gains", [(1.0, 1.0), (0.6, 0.9), (1.5, 1.1), (0.8, 1.4)])
def test_recolouring_is_no_change(gains: tuple[float, float]) -> None:
    found = compare_structure(TILE, recoloured(TILE, gains))
    assert found.ssim > 0.98
    assert found.shift_p95 < 0.1
    assert max(found.edges_lost, found.edges_added) < 0.03


@settings(max_examples=12, deadline=None)
@given(st.integers(-20, 20), st.integers(-20, 20))
def test_a_shift_is_measured_in_pixels(dy: int, dx: int) -> None:
    found = compare_structure(TILE, recoloured(inner(LARGE, dy, dx)))
    length = math.hypot(dy, dx)
    assert found.shift_median == pytest.approx(length, abs=0.2 + 0.03 * length)
    assert found.shift_p95 == pytest.approx(length, abs=0.3 + 0.06 * length)
    assert found.matched > 0.9


def test_parts_of_pixels_are_measured_too() -> None:
    moved = cv2.warpAffine(
        LARGE, np.array([[1, 0, 0.4], [0, 1, 0.3]]), LARGE.shape[1::-1], flags=cv2.INTER_CUBIC
    )
    assert compare_structure(TILE, inner(moved)).shift_median == pytest.approx(0.5, abs=0.06)


def test_a_local_fold_shows_in_the_percentile_not_in_the_median() -> None:
    output = TILE.copy()
    output[:130, :130] = inner(LARGE, 6, 8)[:130, :130]
    found = compare_structure(TILE, output)
    assert found.shift_median < 0.3
    assert found.shift_p95 > 3.0


def test_blur_lowers_similarity_and_loses_edges_step_by_step() -> None:
    found = [
        compare_structure(TILE, cv2.GaussianBlur(TILE, (0, 0), s)) for s in (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
    ]
    scores = [f.ssim for f in found]
    lost = [f.edges_lost for f in found]
    assert scores == sorted(scores, reverse=True)
    assert lost == sorted(lost)
    assert scores[0] > 0.97
    assert scores[-1] < 0.6
    assert all(f.edges_added < 0.05 for f in found)
    assert found[2].shift_median < 0.3, "blur moves nothing"


def test_removed_and_invented_nuclei_show() -> None:
    without = cv2.medianBlur(TILE, 21)
    mixed = TILE.copy()
    mixed[:, SIDE // 2 :] = without[:, SIDE // 2 :]
    lost, added = compare_structure(TILE, mixed), compare_structure(mixed, TILE)
    assert lost.ssim < 0.75
    assert lost.edges_lost > 0.3 > lost.edges_added
    assert added.edges_added > 0.3


def test_another_tile_is_no_match() -> None:
    found = compare_structure(TILE, inner(tissue(seed=1)))
    assert found.ssim < 0.2
    assert found.matched < 0.2


def test_glass_has_no_figures() -> None:
    glass = np.full((64, 64, 3), 240, np.uint8)
    found = compare_structure(glass, glass)
    assert all(math.isnan(getattr(found, name)) for name in found.__slots__)
    assert haematoxylin_pair(glass, glass) is None


def test_an_output_without_anything_scores_nothing() -> None:
    found = compare_structure(TILE, np.full_like(TILE, 235))
    assert found.ssim < 0.3
    assert found.edges_lost > 0.9
    assert found.matched == 0.0
    assert math.isnan(found.shift_median)


@settings(max_examples=20, deadline=None)
@given(st.integers(11, 40), st.integers(11, 40), st.integers(0, 10**6))
def test_small_tiles_of_any_shape_are_compared(height: int, width: int, seed: int) -> None:
    y, x = np.random.default_rng(seed).integers(0, SIDE - 40, 2)
    tile = np.ascontiguousarray(TILE[y : y + height, x : x + width])
    found = compare_structure(tile, tile)
    assert math.isnan(found.ssim) or found.ssim == pytest.approx(1.0, abs=1e-5)


def test_ssim_and_psnr_are_the_usual_ones() -> None:
    other = cv2.GaussianBlur(TILE, (0, 0), 1.2)
    wanted = structural_similarity(
        TILE,
        other,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2,
    )
    assert ssim(TILE, other) == pytest.approx(wanted, abs=1e-5)
    assert psnr(TILE, other) == pytest.approx(peak_signal_noise_ratio(TILE, other), abs=1e-4)
    assert psnr(TILE, TILE) == math.inf


def test_different_sizes_are_an_error() -> None:
    for call in (compare_structure, ssim, psnr):
        with pytest.raises(ConfigError, match="pairs of one size"):
            call(TILE, TILE[:-1])
    with pytest.raises(ConfigError, match="11 px"):
        ssim(TILE[:5, :5], TILE[:5, :5])


@pytest.fixture(scope="module")
def real_tiles(data_dir: Path) -> dict[str, np.ndarray]:
    files = sorted((data_dir / "ff" / "monuseg").glob("*.tif"))[:6]
    if not files:
        pytest.skip("no real tiles")
    return {path.name[:12]: np.asarray(Image.open(path).convert("RGB")) for path in files}


def test_real_tiles_recoloured_by_each_other(real_tiles: dict[str, np.ndarray]) -> None:
    profiles = {
        name: estimate_profile(t[::4, ::4], np.ones(t[::4, ::4].shape[:2], bool))
        for name, t in real_tiles.items()
    }
    names = list(real_tiles)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        before, after = profiles[name], profiles[other]
        tile = np.ascontiguousarray(real_tiles[name][:512, :512])
        output = map_density(tile, transfer_matrix(before, after), before.white, after.white)
        found = compare_structure(tile, output)
        assert found.ssim > 0.95, (name, other)
        assert found.shift_p95 < 0.2, (name, other)


def test_real_tiles_shifted_and_compressed(real_tiles: dict[str, np.ndarray]) -> None:
    for name, large in real_tiles.items():
        tile = np.ascontiguousarray(large[100:612, 100:612])
        moved = compare_structure(tile, np.ascontiguousarray(large[103:615, 104:616]))
        assert moved.shift_median == pytest.approx(5.0, abs=0.2), name
        encoded = io.BytesIO()
        Image.fromarray(tile).save(encoded, "JPEG", quality=95)
        assert compare_structure(tile, np.asarray(Image.open(encoded))).ssim > 0.85, name


@pytest.mark.benchmark
def test_time_of_a_tile(real_tiles: dict[str, np.ndarray]) -> None:
    tile = np.ascontiguousarray(next(iter(real_tiles.values()))[:512, :512])
    cv2.setNumThreads(1)
    before = time.process_time()
    for _ in range(10):
        compare_structure(tile, tile)
    print(f"structure of a 512 px tile: {(time.process_time() - before) * 100:.0f} ms of one core")
