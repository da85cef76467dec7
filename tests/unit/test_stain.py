"""Stain science against its own definition: synthetic sections whose stains are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.stain import (
    DEFAULT_WHITE,
    MAX_GAIN,
    STANDARD_HE,
    StainProfile,
    concentrations,
    estimate_profile,
    estimate_white,
    hsd_chroma,
    macenko_stains,
    map_density,
    optical_density,
    transfer_matrix,
)

H = (0.65, 0.68, 0.34)
E = (0.22, 0.87, 0.44)
TARGET = StainProfile(
    stains=((0.51, 0.75, 0.42), (0.26, 0.87, 0.42)), strengths=(1.4, 0.9), white=(243, 241, 242)
)


def unit(vector: tuple[float, ...]) -> np.ndarray:
    return np.array(vector) / np.linalg.norm(vector)


def angle(a: object, b: object) -> float:
    return float(np.degrees(np.arccos(np.clip(np.dot(unit(a), unit(b)), -1, 1))))  # type: ignore[arg-type]


def section(
    *, white: tuple[float, float, float] = (242, 238, 240), seed: int = 0, side: int = 120, h=H, e=E
) -> tuple[np.ndarray, np.ndarray]:
    """Half glass, half tissue of known stains: pure nuclei, pure stroma, and mixtures."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((side, side), bool)
    mask[:, : side // 2] = True
    conc = np.stack([rng.uniform(0, 1.6, mask.shape), rng.uniform(0, 0.9, mask.shape)], axis=-1)
    conc[: side // 4, :, 1] = 0.0
    conc[-side // 4 :, :, 0] = 0.0
    conc[~mask] = 0.0
    od = conc @ np.stack([unit(h), unit(e)])
    noise = rng.normal(0, 0.8, od.shape)
    return np.clip(np.rint(np.array(white) * np.exp(-od) + noise), 0, 255).astype(np.uint8), mask


def test_density_is_natural_log_of_the_ratio_to_glass() -> None:
    od = optical_density(np.array([[200, 100, 0]], np.uint8), (200.0, 200.0, 200.0))
    np.testing.assert_allclose(od, [[0.0, np.log(2.0), np.log(200.0)]])


def test_unmixing_returns_the_concentrations_that_were_mixed() -> None:
    stains = (tuple(unit(H)), tuple(unit(E)))
    wanted = np.array([[0.3, 1.2], [2.0, 0.0], [0.0, 0.7]])
    np.testing.assert_allclose(concentrations(wanted @ np.array(stains), stains), wanted, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_macenko_finds_the_stains_that_were_mixed(seed: int) -> None:
    pixels, mask = section(seed=seed)
    od = optical_density(pixels[mask], (242, 238, 240))
    h, e = macenko_stains(od[od.mean(axis=1) > 0.15])
    assert angle(h, H) < 1.5
    assert angle(e, E) < 1.5


def test_profile_finds_stains_strengths_and_glass() -> None:
    pixels, mask = section(white=(232, 214, 228))
    profile = estimate_profile(pixels, mask)
    assert profile.fallback == ""
    assert angle(profile.stains[0], H) < 1.5
    assert angle(profile.stains[1], E) < 1.5
    np.testing.assert_allclose(profile.white, (232, 214, 228), atol=0.5)
    np.testing.assert_allclose(profile.strengths, (1.58, 0.89), atol=0.06)


def test_profile_survives_pen_holes_and_folds() -> None:
    pixels, mask = section()
    clean = estimate_profile(pixels, mask)
    pixels[40:52, :60] = (20, 150, 110)  # green pen that the mask missed
    pixels[60:64, :60] = (3, 2, 4)  # a fold
    pixels[70:80, :60] = (242, 238, 240)  # a hole
    dirty = estimate_profile(pixels, mask)
    assert angle(clean.stains[0], dirty.stains[0]) < 1.0
    assert angle(clean.stains[1], dirty.stains[1]) < 1.0
    np.testing.assert_allclose(dirty.strengths, clean.strengths, rtol=0.05)


def test_pale_eosin_keeps_its_colour() -> None:
    """Eosin below beta in red only is dropped by the textbook rule; the mean density keeps it."""
    pixels, mask = section(e=(0.10, 0.90, 0.42))
    profile = estimate_profile(pixels, mask)
    assert angle(profile.stains[1], (0.10, 0.90, 0.42)) < 1.5


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no tissue", "0 stained pixels"),
        ("few pixels", "stained pixels"),
        ("one colour", "degrees apart"),
        ("one stain", "apart"),
        ("green", "stained pixels"),
        ("blue and black", "degrees from the standard"),
        ("black", "stained pixels"),
    ],
)
def test_unreliable_estimates_fall_back_with_a_reason(case: str, reason: str) -> None:
    pixels, mask = section()
    if case == "no tissue":
        mask[:] = False
    elif case == "few pixels":
        mask[:, 3:] = False
    elif case == "one colour":
        pixels[mask] = (120, 80, 150)
    elif case == "one stain":
        pixels, mask = section(h=H, e=H)
    elif case == "green":
        pixels[mask] = (60, 180, 120)
    elif case == "blue and black":
        pixels, mask = section(h=(0.95, 0.20, 0.05), e=(0.60, 0.62, 0.51))
    else:
        pixels[mask] = 0
    profile = estimate_profile(pixels, mask)
    assert reason in profile.fallback
    assert profile.stains == STANDARD_HE
    assert np.isfinite([*profile.strengths, *profile.white]).all()
    np.testing.assert_array_equal(transfer_matrix(profile, TARGET), np.eye(3))  # tissue keeps its colours


@settings(max_examples=60, deadline=None)
@given(data=st.data(), side=st.integers(1, 24))
def test_profile_never_fails_and_is_always_finite(data: st.DataObject, side: int) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    span = data.draw(st.integers(1, 256))
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, span, (side * 2, side, 3), dtype=np.uint8)
    mask = rng.random((side * 2, side)) < data.draw(st.floats(0, 1))
    profile = estimate_profile(pixels, mask)
    matrix = transfer_matrix(profile, TARGET)
    assert np.isfinite([*profile.stains[0], *profile.stains[1], *profile.strengths, *profile.white]).all()
    assert np.isfinite(matrix).all()
    assert map_density(pixels, matrix, profile.white, TARGET.white).shape == pixels.shape


def test_profile_survives_json() -> None:
    profile = estimate_profile(*section())
    assert StainProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


def test_glass_is_the_mode_not_padding_halo_or_marks() -> None:
    pixels, mask = section(white=(215, 205, 214))
    pixels[:50, 90:] = 255  # what a reader puts outside the scan
    pixels[60:90, 64:75] = (225, 150, 190)  # eosin that ran
    pixels[100:105, 80:110] = 10  # fiducial mark
    np.testing.assert_allclose(estimate_white(pixels, mask), (215, 205, 214), atol=0.6)


def test_white_glass_is_not_mistaken_for_padding() -> None:
    pixels, mask = section(white=(255, 255, 255))
    pixels[~mask] = 255
    assert estimate_white(pixels, mask) == (255.0, 255.0, 255.0)


def test_tissue_without_glass_uses_its_lumina_or_neutral() -> None:
    pixels, mask = section()
    mask[:] = True
    assert min(estimate_white(pixels, mask)) > 230
    assert estimate_white(pixels[:, :50], mask[:, :50]) != DEFAULT_WHITE
    dark = np.full((50, 50, 3), (120, 60, 140), np.uint8)
    assert estimate_white(dark, np.ones((50, 50), bool)) == DEFAULT_WHITE
    assert estimate_white(np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), bool)) == DEFAULT_WHITE


def test_transfer_moves_stains_glass_and_strengths_onto_the_target() -> None:
    source = StainProfile(
        stains=(tuple(unit(H)), tuple(unit(E))), strengths=(0.9, 0.7), white=(230, 214, 228)
    )
    matrix = transfer_matrix(source, TARGET)
    np.testing.assert_allclose(matrix @ unit(H) * 0.9, np.array(TARGET.stains[0]) * 1.4, atol=1e-9)
    np.testing.assert_allclose(matrix @ unit(E) * 0.7, np.array(TARGET.stains[1]) * 0.9, atol=1e-9)
    glass = np.array([[source.white]], dtype=np.uint8)
    np.testing.assert_array_equal(map_density(glass, matrix, source.white, TARGET.white), [[TARGET.white]])


def test_transfer_onto_itself_changes_nothing() -> None:
    pixels, mask = section()
    profile = estimate_profile(pixels, mask)
    matrix = transfer_matrix(profile, profile)
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-9)
    mapped = map_density(pixels, matrix, profile.white, profile.white)
    np.testing.assert_array_equal(mapped, np.maximum(pixels, 1))


def test_a_stain_that_is_hardly_there_is_not_amplified_without_limit() -> None:
    weak = StainProfile(stains=(tuple(unit(H)), tuple(unit(E))), strengths=(0.01, 0.9), white=DEFAULT_WHITE)
    assert np.linalg.norm(transfer_matrix(weak, TARGET) @ unit(H)) == pytest.approx(
        MAX_GAIN * np.linalg.norm(TARGET.stains[0]), rel=1e-9
    )


def test_glass_noise_stays_neutral_and_smooth() -> None:
    """Grey ramp around the glass colour: output is monotone, and never far from grey."""
    source = StainProfile(
        stains=(tuple(unit(H)), tuple(unit(E))), strengths=(2.4, 1.0), white=(240, 240, 240)
    )
    ramp = np.repeat(np.arange(215, 256, dtype=np.uint8)[:, None], 3, axis=1)
    target = StainProfile(stains=TARGET.stains, strengths=TARGET.strengths, white=(242, 242, 242))
    mapped = map_density(ramp, transfer_matrix(source, target), source.white, target.white).astype(int)
    assert (np.diff(mapped, axis=0) >= 0).all()
    assert (np.diff(mapped, axis=0) <= 3).all()
    assert np.ptp(mapped, axis=1).max() <= 12


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1, 1), (2, 7, 5), (1, 255, 257), (3, 64, 33), (1, 300, 301)]),
)
def test_map_is_pointwise_bit_for_bit(seed: int, shape: tuple[int, int, int]) -> None:
    """A pixel's result is the same alone, in any place, and in any shape of array."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(0, 1, (3, 3)) + np.eye(3)
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    whole = map_density(pixels, matrix, (240, 230, 238), (243, 241, 242)).reshape(-1, 3)
    order = rng.permutation(len(whole))
    shuffled = map_density(pixels.reshape(-1, 3)[order], matrix, (240, 230, 238), (243, 241, 242))
    np.testing.assert_array_equal(shuffled, whole[order])
    for index in order[:3]:
        alone = map_density(
            pixels.reshape(-1, 3)[index : index + 1], matrix, (240, 230, 238), (243, 241, 242)
        )
        np.testing.assert_array_equal(alone[0], whole[index])


def test_map_equals_its_definition_in_double_precision() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
    matrix = np.array([[0.8, 0.1, 0.0], [-0.3, 1.1, 0.1], [0.1, 0.0, 0.9]])
    od = optical_density(pixels, (240, 230, 238))
    wanted = np.clip(np.array((243, 241, 242)) * np.exp(-(od @ matrix.T)), 0, 255)
    mapped = map_density(pixels, matrix, (240, 230, 238), (243, 241, 242))
    assert np.abs(mapped - wanted).max() <= 0.501


def test_map_does_not_overflow_on_hostile_matrices() -> None:
    pixels = np.array([[0, 255, 0], [255, 0, 255], [1, 1, 1]], np.uint8)
    mapped = map_density(pixels, np.full((3, 3), -40.0), DEFAULT_WHITE, DEFAULT_WHITE)
    np.testing.assert_array_equal(mapped[2], [255, 255, 255])


def test_chroma_does_not_depend_on_density() -> None:
    rng = np.random.default_rng(0)
    od = rng.uniform(0.05, 1.0, (100, 3))
    np.testing.assert_allclose(hsd_chroma(od), hsd_chroma(od * 2.5), atol=1e-12)
    np.testing.assert_allclose(hsd_chroma(np.full((1, 3), 0.4)), [[0.0], [0.0]], atol=1e-12)
