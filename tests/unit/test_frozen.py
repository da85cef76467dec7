"""The frozen-section model: what must hold whatever is drawn, on synthetic tissue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.frozen import FrozenModel, simulate_frozen, simulate_pair
from wsi_pipeline.core.frozen_model import Chromatin, Ice, Light, Section, Stain
from wsi_pipeline.core.random_field import oriented_field, slow_field
from wsi_pipeline.errors import ConfigError

GLASS = np.array([243.0, 241.0, 242.0])
H, E = np.array([0.562, 0.705, 0.432]), np.array([0.211, 0.890, 0.403])

OFF = FrozenModel(
    chromatin=Chromatin(probability=0.0),
    ice=Ice(probability=0.0),
    section=Section(probability=0.0),
    stain=Stain(probability=0.0),
    light=Light(probability=0.0),
)
HOLES = replace(OFF, ice=Ice(probability=1.0, share=(0.3, 0.3), rim=(0.0, 0.0)))


def tissue(height: int = 96, width: int = 96, mpp: float = 0.5) -> npt.NDArray[np.uint8]:
    """Round nuclei of 8 um on a lattice of 16 um in pink cytoplasm, and a lumen of glass."""
    y, x = (np.arange(n)[:, None] * mpp for n in (height, width))
    far = np.hypot((y % 16 - 8), (x.T % 16 - 8))
    nuclei = 1.0 / (1.0 + np.exp((far - 4.0) / 0.5))
    grain = 1.0 + 0.3 * np.sin(y * 2.1) * np.sin(x.T * 1.7)
    od = (0.15 + 1.4 * nuclei * grain)[..., None] * H + (0.5 - 0.3 * nuclei)[..., None] * E
    od[np.hypot(y - 30, x.T - 30) < 8] = 0.0
    return np.clip(np.rint(GLASS * np.exp(-od)), 0, 255).astype(np.uint8)


def frozen(
    pixels: npt.NDArray[np.uint8], model: FrozenModel, seed: int = 0, mpp: float = 0.5
) -> npt.NDArray[np.uint8]:
    return simulate_frozen(pixels, mpp, model, np.random.default_rng(seed))


def grey_difference(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(float) - b).mean())


# The whole model


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    mpp=st.floats(0.1, 4.0),
    severity=st.floats(0.0, 2.0),
    seed=st.integers(0, 1000),
)
def test_size_and_type_are_kept(height: int, width: int, mpp: float, severity: float, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = pixels.copy()
    made = frozen(pixels, FrozenModel(severity=severity), seed, mpp)
    assert (made.shape, made.dtype) == (pixels.shape, np.uint8)
    np.testing.assert_array_equal(pixels, before)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_severity_zero_is_the_identity(seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    made = frozen(pixels, FrozenModel(severity=0.0), seed)
    np.testing.assert_array_equal(made, pixels)
    assert not np.shares_memory(made, pixels)


def test_nothing_happens_where_no_artefact_is_drawn() -> None:
    """Unmixing, mixing and light alone round to the same grey levels, whatever the colour."""
    pixels = np.random.default_rng(0).integers(1, 256, (40, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(frozen(pixels, OFF), pixels)


def test_the_generator_decides_everything() -> None:
    pixels = tissue()
    first = frozen(pixels, FrozenModel(), 3)
    np.testing.assert_array_equal(frozen(pixels, FrozenModel(), 3), first)
    assert grey_difference(frozen(pixels, FrozenModel(), 4), first) > 1.0
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(simulate_frozen(pixels, 0.5, FrozenModel(), rng), first)
    assert grey_difference(simulate_frozen(pixels, 0.5, FrozenModel(), rng), first) > 1.0, "it moves on"


def test_the_generator_moves_on_by_the_same_step_whatever_the_picture_and_model() -> None:
    ends = []
    for pixels, model in (
        (tissue(), FrozenModel()),
        (tissue(32, 32), OFF),
        (tissue(), FrozenModel(severity=0.0)),
    ):
        rng = np.random.default_rng(5)
        simulate_frozen(pixels, 0.5, model, rng)
        ends.append(rng.random())
    assert len(set(ends)) == 1


@pytest.mark.parametrize("seed", range(6))
def test_severity_takes_a_picture_further_from_paraffin(seed: int) -> None:
    pixels = tissue()
    far = [
        grey_difference(frozen(pixels, FrozenModel(severity=s), seed), pixels) for s in (0.0, 0.1, 0.3, 1.0)
    ]
    assert far == sorted(far) and far[0] == 0.0 and far[-1] > 2.0


@pytest.mark.parametrize("part", ["chromatin", "ice", "section", "stain", "light"])
def test_each_artefact_does_something_of_its_own(part: str) -> None:
    alone = {
        "chromatin": Chromatin(),
        "ice": Ice(probability=1.0, share=(0.2, 0.3)),
        "section": Section(gain=(1.2, 1.2)),
        "stain": Stain(),
        "light": Light(blur_um=(0.5, 0.5)),
    }
    pixels = tissue()
    made = frozen(pixels, replace(OFF, **{part: alone[part]}))
    assert grey_difference(made, pixels) > 0.5


@pytest.mark.parametrize("wrong", ["float", "grey", "mpp", "nan"])
def test_other_arrays_are_refused(wrong: str) -> None:
    pixels = tissue(32, 32)
    given_ = {"float": pixels.astype(np.float32), "grey": pixels[..., 0]}.get(wrong, pixels)
    mpp = {"mpp": 0.0, "nan": float("nan")}.get(wrong, 0.5)
    with pytest.raises(ValueError, match="need"):
        simulate_frozen(given_, mpp, FrozenModel(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrozenModel(severity=-0.1), r"frozen.severity: -0.1 is not between 0 and 2"),
        (lambda: FrozenModel(severity=float("nan")), "frozen.severity: nan"),
        (lambda: FrozenModel(ice=Ice(share=(0.3, 0.1))), r"frozen.ice.share: \(0.3, 0.1\) is no range"),
        (lambda: FrozenModel(ice=Ice(size_um=(0.0, 3.0))), "frozen.ice.size_um.*no length"),
        (lambda: FrozenModel(section=Section(uneven_um=0.0)), "frozen.section.uneven_um.*no length"),
        (lambda: FrozenModel(light=Light(blur_um=(-1.0, 1.0))), "frozen.light.blur_um.*negative"),
        (lambda: FrozenModel(stain=Stain(wash_out=1.5)), "frozen.stain.wash_out: 1.5 is no probability"),
        (
            lambda: FrozenModel(chromatin=Chromatin(swell_um=(0.0, float("inf")))),
            "chromatin.swell_um.*no range",
        ),
    ],
)
def test_a_model_that_makes_no_sense_is_named(make: Callable[[], FrozenModel], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# Ice


@pytest.mark.parametrize("seed", range(5))
def test_holes_only_lighten_and_are_glass_inside(seed: int) -> None:
    pixels = tissue()
    made = frozen(pixels, replace(HOLES, ice=replace(HOLES.ice, depth=(1.0, 1.0), spare=(0.0, 0.0))), seed)
    assert (made.astype(int) >= pixels).all()
    holes = (made >= GLASS - 1.5).all(axis=2) & (pixels < GLASS - 20).any(axis=2)
    assert holes.mean() > 0.03


def test_a_generator_is_not_asked_to_fill_large_holes() -> None:
    pixels = tissue(256, 256)
    ice = replace(HOLES.ice, depth=(1.0, 1.0), fine_share=(0.0, 0.0))
    made, wanted = simulate_pair(pixels, 0.5, replace(HOLES, ice=ice), np.random.default_rng(1))
    assert (wanted != pixels).any()
    assert np.abs(wanted.astype(int) - made).max() <= 1, "ice alone: both show the same holes"
    foam = replace(HOLES.ice, share=(0.0, 0.0), fine_share=(0.3, 0.3))
    made, wanted = simulate_pair(pixels, 0.5, replace(HOLES, ice=foam), np.random.default_rng(1))
    assert (made != pixels).any()
    np.testing.assert_array_equal(wanted, pixels)


def test_what_is_wanted_is_paraffin_beside_the_holes() -> None:
    pixels = tissue(128, 128)
    for seed in range(4):
        made, wanted = simulate_pair(pixels, 0.5, FrozenModel(), np.random.default_rng(seed))
        np.testing.assert_array_equal(made, frozen(pixels, FrozenModel(), seed))
        same = (wanted == pixels).all(axis=2)
        assert same.mean() > 0.4
        assert (wanted[~same].astype(int) >= pixels[~same]).all()


def test_more_ice_holds_all_the_holes_of_less_ice() -> None:
    pixels = tissue()
    pictures = [frozen(pixels, replace(HOLES, severity=s), 1).astype(int) for s in (0.2, 0.5, 1.0)]
    for less, more in zip(pictures, pictures[1:], strict=False):
        assert (more >= less).all() and (more > less + 20).any()


def test_ice_spares_nuclei() -> None:
    pixels = tissue(256, 256)
    bare = replace(HOLES.ice, spare=(3.0, 3.0), cluster=(0.0, 0.0), fine_share=(0.0, 0.0))
    lighter = (
        frozen(pixels, replace(HOLES, ice=bare)).astype(int).sum(axis=2) - pixels.astype(int).sum(axis=2) > 60
    )
    nuclei = pixels[..., 0] < 130
    cytoplasm = ~nuclei & (pixels[..., 1] < 200)
    assert lighter[cytoplasm].mean() > 4 * lighter[nuclei].mean()


def test_the_share_of_holes_is_what_was_asked_for() -> None:
    pink = np.rint(GLASS * np.exp(-0.5 * E)).astype(np.uint8)[None, None].repeat(512, 0).repeat(512, 1)
    for share in (0.1, 0.3):
        ice = replace(HOLES.ice, share=(share, share), fine_share=(0.0, 0.0), cluster=(0.0, 0.0))
        holes = frozen(pink, replace(HOLES, ice=ice))[..., 1] > 0.5 * (pink[0, 0, 1] + GLASS[1])
        assert holes.mean() == pytest.approx(share, abs=0.04)


def test_holes_have_the_width_that_was_asked_for() -> None:
    pink = np.rint(GLASS * np.exp(-0.5 * E)).astype(np.uint8)[None, None].repeat(512, 0).repeat(512, 1)
    widths = []
    for size in (4.0, 12.0):
        ice = replace(
            HOLES.ice,
            size_um=(size, size),
            stretch=(1.0, 1.0),
            fine_share=(0.0, 0.0),
            fine_size_um=(size, size),
        )
        holes = (frozen(pink, replace(HOLES, ice=ice))[..., 1] > 220).astype(np.uint8)
        # Mean chord: area by half the number of borders along rows.
        widths.append(holes.sum() / (np.abs(np.diff(holes.astype(int), axis=1)).sum() / 2) * 0.5)
    assert widths[1] / widths[0] == pytest.approx(3.0, rel=0.3)
    assert 1.0 < widths[0] < 8.0


# Micrometres


@pytest.mark.parametrize("seed", range(4))
def test_a_picture_looks_the_same_at_any_resolution(seed: int) -> None:
    """The same random numbers at half the pixel size give the same section; only noise and JPEG differ."""
    model = FrozenModel(light=Light(shot=(0.0, 0.0), read=(0.0, 0.0), jpeg_probability=0.0))
    coarse, fine = tissue(128, 128, 0.5), tissue(256, 256, 0.25)
    same = cv2.resize(frozen(fine, model, seed, 0.25), (128, 128), interpolation=cv2.INTER_AREA)
    made = frozen(coarse, model, seed, 0.5)
    other = frozen(coarse, model, seed + 100, 0.5)
    assert grey_difference(same, made) < 9.0
    assert grey_difference(same, made) < 0.35 * grey_difference(same, other)


def test_a_blur_of_a_micrometre_is_two_pixels_at_half_a_micrometre() -> None:
    edge = np.full((64, 64, 3), 240, np.uint8)
    edge[:, 32:] = 80
    still = Light(
        blur_um=(1.0, 1.0),
        blur_least=(1.0, 1.0),
        haze=(0.0, 0.0),
        shot=(0.0, 0.0),
        read=(0.0, 0.0),
        jpeg_probability=0.0,
    )
    for mpp in (0.25, 0.5, 1.0):
        row = frozen(edge, replace(OFF, light=still), mpp=mpp)[32, :, 0].astype(float)
        slope = -np.diff(row) / 160.0
        place = np.arange(63) * mpp
        mean = (slope * place).sum()
        assert np.sqrt((slope * (place - mean) ** 2).sum()) == pytest.approx(1.0, rel=0.1)


# Fields


@pytest.mark.parametrize("angle", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("length", [2.0, 6.0, 15.0])
def test_oriented_fields_are_standard_normal(length: float, angle: float) -> None:
    rng = np.random.default_rng(0)
    values = np.stack(
        [oriented_field((300, 260), 0.5, length, rng, stretch=2.0, angle=angle) for _ in range(8)]
    )
    assert values.shape == (8, 300, 260) and values.dtype == np.float32
    assert abs(values.mean()) < 0.12
    assert values.std() == pytest.approx(1.0, abs=0.12)
    assert np.abs(values.std(axis=(0, 2)) - 1.0).max() < 0.6, "borders too"


def test_grains_are_longer_along_their_angle() -> None:
    rng = np.random.default_rng(0)
    field = oriented_field((400, 400), 0.5, 6.0, rng, stretch=3.0, angle=0.0)
    along, across = np.abs(np.diff(field, axis=1)).mean(), np.abs(np.diff(field, axis=0)).mean()
    assert across / along == pytest.approx(3.0, rel=0.25)


def test_slow_fields_are_standard_normal_and_slow() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([slow_field((90, 120), 0.5, 40.0, rng) for _ in range(300)])
    assert values.shape == (300, 90, 120) and values.dtype == np.float32
    assert abs(values.mean()) < 0.1
    np.testing.assert_allclose(values.std(axis=0), 1.0, atol=0.25)
    assert np.abs(np.diff(values, axis=2)).mean() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 2)])
def test_fields_of_tiny_pictures(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    assert slow_field(size, 0.5, 300.0, rng).shape == size
    assert oriented_field(size, 0.5, 5.0, rng, stretch=2.0, angle=1.0).shape == size
    assert np.isfinite(slow_field(size, 4.0, 1.0, rng)).all()
