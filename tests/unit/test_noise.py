"""Noise of the lattice: a part of it is that part, it is white, and it is the same tomorrow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.noise import NOISE_BLOCK, lattice_normal, noise_key

KEY = noise_key(0, "slide")
WIDE = Region(-300, -200, 512, 512)


@pytest.fixture(scope="module")
def wide() -> np.ndarray:
    """[512, 512] of one channel; 262,144 values, whose correlation has a standard error of 0.002."""
    return lattice_normal(WIDE, key=KEY, channels=1)[0]


@given(
    y=st.integers(0, 512),
    x=st.integers(0, 512),
    height=st.integers(0, 200),
    width=st.integers(0, 200),
    channels=st.integers(1, 2),
)
def test_the_noise_of_a_part_is_the_part_of_the_noise(
    wide: np.ndarray, y: int, x: int, height: int, width: int, channels: int
) -> None:
    part = Region(WIDE.y + y, WIDE.x + x, min(height, 512 - y), min(width, 512 - x))
    drawn = lattice_normal(part, key=KEY, channels=channels)
    assert drawn.shape == (channels, part.height, part.width)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn[0], wide[part.slices(WIDE)])


def test_mean_and_deviation_are_those_of_a_standard_normal(wide: np.ndarray) -> None:
    count = wide.size
    assert abs(wide.mean(dtype=np.float64)) < 4 / np.sqrt(count)
    assert abs(wide.std(dtype=np.float64) - 1) < 4 / np.sqrt(2 * count)
    within = [np.mean(np.abs(wide) < sigma) for sigma in (1, 2, 3)]
    np.testing.assert_allclose(within, [0.6827, 0.9545, 0.9973], atol=0.004)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return abs(float(np.corrcoef(one.ravel(), other.ravel())[0, 1]))


def test_neighbouring_cells_and_blocks_do_not_know_each_other(wide: np.ndarray) -> None:
    assert correlation(wide[:, 1:], wide[:, :-1]) < 0.01
    assert correlation(wide[1:], wide[:-1]) < 0.01
    assert correlation(wide[:, NOISE_BLOCK:], wide[:, :-NOISE_BLOCK]) < 0.01
    assert correlation(wide[NOISE_BLOCK:], wide[:-NOISE_BLOCK]) < 0.01
    aligned = lattice_normal(Region(0, 0, 2048, 4 * NOISE_BLOCK), key=KEY, channels=1)[0]
    edges = [c for c in range(aligned.shape[1]) if c % NOISE_BLOCK in (0, NOISE_BLOCK - 1)][1:-1]
    assert correlation(aligned[:, edges[::2]], aligned[:, edges[1::2]]) < 0.05, "6144 pairs across a border"


@pytest.mark.parametrize(
    "other",
    [
        {"step": 1},
        {"level": 1},
        {"z": 1},
        {"key": noise_key(1, "slide")},
        {"key": noise_key(0, "another slide")},
    ],
    ids=["step", "level", "z", "seed", "slide"],
)
def test_each_step_level_plane_seed_and_slide_has_its_own(wide: np.ndarray, other: dict[str, int]) -> None:
    drawn = lattice_normal(WIDE, **({"key": KEY, "channels": 1} | other))[0]  # type: ignore[arg-type]
    assert correlation(wide, drawn) < 0.01


def test_channels_are_independent_and_the_first_ones_stay(wide: np.ndarray) -> None:
    many = lattice_normal(WIDE, key=KEY, channels=3)
    np.testing.assert_array_equal(many[0], wide)
    assert max(correlation(many[a], many[b]) for a, b in ((0, 1), (1, 2), (0, 2))) < 0.01


def test_far_blocks_of_either_sign_differ() -> None:
    places = [Region(y, x, 8, 8) for y in (-(10**9), -64, 0, 10**9) for x in (-64, 0, 10**9)]
    drawn = {lattice_normal(place, key=KEY, channels=1).tobytes() for place in places}
    assert len(drawn) == len(places)


def test_the_numbers_are_those_of_the_first_day() -> None:
    """Other numbers are other pixels: whoever changes them has to raise the generators' versions."""
    assert KEY == 134584105118948173798246404379035659408
    drawn = lattice_normal(Region(-64, -3, 1, 5), key=KEY, channels=2, step=3)
    expected = [
        [[1.2019584, 0.1071837, -0.15241265, 1.7057674, 0.36457586]],
        [[0.09776511, 1.3394907, 0.10950040, 0.19135296, -1.1250023]],
    ]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
