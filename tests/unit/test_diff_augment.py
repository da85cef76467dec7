"""DiffAugment: pixels against plain numpy, ranges of the draws, and what a sample's draws depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.diff_augment import POLICY, Draws, augment, draw

SIDES = st.integers(1, 70)


def draws_of(count: int, **given: list[float]) -> Draws:
    """Draws that change nothing but what is given; a cut-out always lies somewhere."""
    still: dict[str, list[float]] = dict.fromkeys(("brightness", "contrast", "saturation"), [0.5] * count)
    whole = dict.fromkeys(("translation_rows", "translation_cols", "cutout_rows", "cutout_cols"), [0] * count)
    values = still | whole | given
    return Draws(*(torch.tensor(values[name]) for name in Draws._fields))


def images(count: int, height: int, width: int) -> Tensor:
    rng = np.random.default_rng(7)
    return torch.from_numpy(rng.uniform(-1, 1, (count, 3, height, width)).astype(np.float32))


@given(height=SIDES, width=SIDES, seed=st.integers(0, 2**32))
def test_draws_stay_in_their_ranges(height: int, width: int, seed: int) -> None:
    drawn = draw([np.random.default_rng([seed, b]) for b in range(20)], height, width)
    for uniform in drawn[:3]:
        assert uniform.dtype == torch.float32 and uniform.min() >= 0 and uniform.max() <= 1
    for side, shift, middle in ((height, drawn[3], drawn[5]), (width, drawn[4], drawn[6])):
        assert shift.dtype == middle.dtype == torch.int64
        assert shift.abs().max() <= int(side / 8 + 0.5)
        even = int(side / 2 + 0.5) % 2 == 0
        assert middle.min() >= 0 and middle.max() <= side - 1 + even


def test_both_ends_of_the_ranges_are_drawn() -> None:
    drawn = draw([np.random.default_rng(b) for b in range(600)], 16, 20)
    assert {int(v) for v in drawn.translation_rows} == set(range(-2, 3))
    assert {int(v) for v in drawn.translation_cols} == set(range(-3, 4))
    assert {int(v) for v in drawn.cutout_rows} == set(range(17))
    assert {int(v) for v in drawn.cutout_cols} == set(range(21))


def test_a_sample_draws_from_its_own_generator_alone() -> None:
    together = draw([np.random.default_rng(seed) for seed in (1, 2, 3)], 64, 96)
    alone = draw([np.random.default_rng(2)], 64, 96)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_no_samples_no_draws() -> None:
    assert all(field.shape == (0,) for field in draw([], 8, 8))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x = images(3, 40, 24)
    drawn = draw([np.random.default_rng(b) for b in range(3)], 40, 24)
    one = Draws(*(field[2:] for field in drawn))
    assert torch.equal(augment(x, drawn)[2:], augment(x[2:], one))


def test_colour_is_brightness_then_saturation_then_contrast() -> None:
    x = images(2, 5, 9)
    drawn = draws_of(2, brightness=[0.9, 0.1], saturation=[0.25, 0.8], contrast=[0.0, 0.75])
    wanted = x.numpy().astype(np.float64)
    for b, (bright, saturate, contrast) in enumerate(((0.4, 0.5, 0.5), (-0.4, 1.6, 1.25))):
        y = wanted[b] + bright
        grey = y.mean(axis=0)
        y = (y - grey) * saturate + grey
        wanted[b] = (y - y.mean()) * contrast + y.mean()
    np.testing.assert_allclose(augment(x, drawn, ("color",)).numpy(), wanted, atol=1e-6)


@given(height=st.integers(8, 40), width=st.integers(8, 40), data=st.data())
def test_translation_moves_by_whole_pixels_and_leaves_zeros(
    height: int, width: int, data: st.DataObject
) -> None:
    rows = data.draw(st.integers(-(height // 8), height // 8))
    cols = data.draw(st.integers(-(width // 8), width // 8))
    x = images(1, height, width)
    y = augment(x, draws_of(1, translation_rows=[rows], translation_cols=[cols]), ("translation",))
    assert y.shape == x.shape
    for i in range(height):
        for j in (0, width // 2, width - 1):
            inside = 0 <= i + rows < height and 0 <= j + cols < width
            wanted = x[0, :, i + rows, j + cols] if inside else torch.zeros(3)
            assert torch.equal(y[0, :, i, j], wanted)


@given(height=SIDES, width=SIDES, data=st.data())
def test_cutout_is_half_a_side_limited_to_the_image(height: int, width: int, data: st.DataObject) -> None:
    size = int(height / 2 + 0.5), int(width / 2 + 0.5)
    middle = [data.draw(st.integers(0, side - n % 2)) for side, n in zip((height, width), size, strict=True)]
    drawn = draws_of(1, cutout_rows=middle[:1], cutout_cols=middle[1:])
    y = augment(torch.ones(1, 3, height, width), drawn, ("cutout",))
    wanted = np.ones((height, width), np.float32)
    (top, left), (n, m) = [a - b // 2 for a, b in zip(middle, size, strict=True)], size
    wanted[max(top, 0) : top + n, max(left, 0) : left + m] = 0
    assert np.array_equal(y[0, 1].numpy(), wanted)
    assert (wanted == 0).any()


def test_parts_of_the_policy_are_applied_in_its_order() -> None:
    x = images(2, 16, 24)
    drawn = draw([np.random.default_rng(b) for b in range(2)], 16, 24)
    step = x
    for part in POLICY:
        step = augment(step, drawn, (part,))
    assert torch.equal(augment(x, drawn), step)
    assert torch.equal(augment(x, drawn, ()), x)


def test_gradients_reach_the_image() -> None:
    x = images(2, 6, 8).double().requires_grad_()
    drawn = draw([np.random.default_rng(b) for b in range(2)], 6, 8)
    assert torch.autograd.gradcheck(lambda image: augment(image, drawn), (x,))


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ConfigError, match="no colour; choose from color, translation, cutout"):
        augment(images(1, 8, 8), draws_of(1), ("colour",))
