"""The stain check on images made from published stain vectors; real ones: tests/e2e/test_stain_real.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.stain_check import assess_stain, darkness, hue_shares

HAEMATOXYLIN = (0.65, 0.70, 0.29)  # Ruifrok and Johnston 2001
EOSIN = (0.20, 0.86, 0.46)  # as measured on routine sections
DAB = (0.27, 0.57, 0.78)  # Ruifrok and Johnston 2001
GLASS = (238.0, 236.0, 239.0)


def section(
    first: tuple[float, ...],
    second: tuple[float, ...],
    *,
    share: float = 0.5,
    strength: float = 1.0,
    glass: tuple[float, float, float] = GLASS,
) -> tuple[np.ndarray, np.ndarray]:
    """Half glass, half tissue; ``share`` of the tissue pixels carry the second stain, the rest the first."""
    rng = np.random.default_rng(0)
    mask = np.zeros((90, 90), bool)
    mask[:, :45] = True
    amount = rng.uniform(0.4, 1.2, mask.shape)[..., None] * strength
    od = np.where((rng.random(mask.shape) < share)[..., None], np.array(second), np.array(first)) * amount
    od[~mask] = 0
    pixels = np.array(glass) * np.exp(-od) + rng.normal(0, 1.5, od.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), mask


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("strength", [0.6, 1.0, 3.0])
@pytest.mark.parametrize(
    "glass", [GLASS, (229.0, 213.0, 228.0), (172.0, 176.0, 174.0), (242.0, 241.0, 254.0)]
)
def test_any_mixture_of_haematoxylin_and_eosin_passes(
    share: float, strength: float, glass: tuple[float, float, float]
) -> None:
    pixels, mask = section(HAEMATOXYLIN, EOSIN, share=share, strength=strength, glass=glass)
    assert assess_stain(pixels, mask).kind == "h&e"


@pytest.mark.parametrize("positive", [0.2, 0.5, 0.9])
def test_dab_is_found_even_where_few_cells_are_positive(positive: float) -> None:
    verdict = assess_stain(*section(HAEMATOXYLIN, DAB, share=positive))
    assert verdict.kind == "ihc-dab"
    assert "% brown" in verdict.reason


def test_pigment_beside_eosin_is_not_dab() -> None:
    """Melanin, haemosiderin, carbon: brown, but in pink tissue."""
    pixels, mask = section(EOSIN, HAEMATOXYLIN, share=0.4)
    pixels[:36, :45] = section(DAB, DAB, share=0.4)[0][:36, :45]
    assert assess_stain(pixels, mask).kind == "h&e"


def test_pen_beside_tissue_does_not_refuse_the_slide() -> None:
    pixels, mask = section(HAEMATOXYLIN, EOSIN)
    pixels[:70, :45] = (30, 150, 120)
    assert assess_stain(pixels, mask).kind == "h&e"


def test_grey_and_green_images_are_refused() -> None:
    pixels, mask = section(HAEMATOXYLIN, EOSIN)
    grey = np.repeat(pixels.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    assert assess_stain(grey, mask).kind == "grey"
    green = pixels[..., [0, 2, 1]].copy()
    green[mask] = (60, 170, 110)
    assert assess_stain(green, mask).kind == "other"


@pytest.mark.parametrize("colour", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_light_on_black_is_fluorescence(colour: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    signal = np.where(rng.random((80, 80)) < 0.3, rng.uniform(60, 255, (80, 80)), 4.0)
    pixels = (signal[..., None] * np.array(colour)).astype(np.uint8)
    assert assess_stain(pixels, signal > 50).kind == "fluorescence"


def test_black_padding_round_a_section_is_not_fluorescence() -> None:
    pixels, mask = section(HAEMATOXYLIN, EOSIN)
    padded = np.pad(pixels, ((90, 90), (90, 90), (0, 0)))
    assert darkness(padded)[0] > 0.5
    assert assess_stain(padded, np.pad(mask, 90)).kind == "h&e"


@pytest.mark.parametrize("pixels", [np.full((60, 60, 3), 244, np.uint8), np.zeros((0, 0, 3), np.uint8)])
def test_nothing_stained_is_unknown_not_refused(pixels: np.ndarray) -> None:
    verdict = assess_stain(pixels, np.ones(pixels.shape[:2], bool))
    assert verdict.kind == "unknown"
    assert "needed" in verdict.reason


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1.0, 6.0))
def test_shares_are_shares_and_ignore_the_amount_of_stain(seed: int, scale: float) -> None:
    od = np.random.default_rng(seed).uniform(0.05, 1.0, (200, 3))
    shares = hue_shares(od)
    assert 0 <= shares.pink <= shares.he <= 1
    assert shares.he + shares.brown <= 1 + 1e-9
    assert hue_shares(od * scale).he == pytest.approx(shares.he)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), low=st.integers(0, 254), side=st.integers(1, 30))
def test_every_image_gets_a_verdict(seed: int, low: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(low, 256, (side, side, 3), dtype=np.uint8)
    assert assess_stain(pixels, rng.random((side, side)) < 0.7).reason
