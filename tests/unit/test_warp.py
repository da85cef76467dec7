"""Warps: inverses, the order of compositions, what is rigid, masks, turns that are exact, draws by number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsi_pipeline.models.warp import (
    Field,
    Masked,
    RigidityConfig,
    affine_matrix,
    compose,
    coordinates,
    exponential,
    jacobian,
    random_turns,
    rigidity,
    warp,
)

pytestmark = pytest.mark.usefixtures("one_thread")

AFFINITY = RigidityConfig(affinity=1.0, orthonormality=0.0, properness=0.0)
ORTHONORMALITY = RigidityConfig(affinity=0.0, orthonormality=1.0, properness=0.0)
PROPERNESS = RigidityConfig(affinity=0.0, orthonormality=0.0, properness=1.0)


def bump(peak: float, dims: int = 2, side: int = 96, sigma: float = 14.0) -> Tensor:
    """A velocity field that is ``peak`` pixels on each axis in the middle and 0 at the border."""
    grid = coordinates(torch.zeros(1, 1, *[side] * dims, dtype=torch.float64)) - (side - 1) / 2
    return (peak * torch.exp(-grid.square().sum(0) / (2 * sigma**2))).expand(1, dims, *[side] * dims)


def picture(*shape: int) -> Masked:
    """Smooth, float64, wholly valid."""
    grid = coordinates(torch.zeros(1, 1, *shape, dtype=torch.float64))
    image = torch.sin(sum((0.2 + 0.1 * i) * axis for i, axis in enumerate(grid)))[None, None]
    return Masked(image, torch.ones_like(image))


def affine(shape: tuple[int, ...], angle: float, shift: float, scale: float = 0.0) -> Tensor:
    """Rotation, shift and stretch about the middle; [1, n + 1, n + 1] float64."""
    size = len(shape)
    planes = size * (size - 1) // 2
    one = torch.ones(1, planes, dtype=torch.float64)
    return affine_matrix(
        angle * one,
        torch.full((1, size), shift, dtype=torch.float64),
        (torch.tensor(shape, dtype=torch.float64) - 1) / 2,
        log_scales=torch.full((1, size), scale, dtype=torch.float64),
        log_shears=0 * one,
    )


def as_field(matrix: Tensor, *shape: int) -> Field:
    nothing = Field(displacement=torch.zeros(1, len(shape), *shape, dtype=torch.float64))
    found = compose(matrix, nothing)
    assert isinstance(found, Field)
    return found


# Exponentials (D1)


def test_no_velocity_moves_nothing() -> None:
    assert exponential(torch.zeros(2, 3, 4, 5, 6)).abs().max() == 0


@pytest.mark.parametrize(("peak", "limit", "least"), [(2, 0.004, 0.85), (5, 0.02, 0.7), (10, 0.07, 0.5)])
def test_the_exponential_of_minus_a_velocity_is_the_inverse(peak: float, limit: float, least: float) -> None:
    velocity = bump(peak / math.sqrt(2))
    forward, inverse = (Field(displacement=exponential(v)) for v in (velocity, -velocity))
    both = compose(forward, inverse)
    assert isinstance(both, Field)
    assert both.displacement.norm(dim=1).max() <= limit
    assert forward.displacement.norm(dim=1).max() == pytest.approx(peak, rel=0.05)
    matrix = jacobian(forward.displacement).movedim((1, 2), (-2, -1)) + torch.eye(2)
    assert torch.linalg.det(matrix).min() > least


def test_a_constant_velocity_is_a_shift() -> None:
    moved = exponential(torch.full((1, 3, 6, 7, 8), 1.5))
    assert (moved - 1.5).abs().max() < 1e-6


# Composition


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3.2, 3.2), st.floats(-5, 5), st.floats(-0.2, 0.2)), min_size=2, max_size=3),
    st.sampled_from([(9, 12), (5, 8, 6)]),
)
def test_matrices_compose_from_left_to_right(
    maps: list[tuple[float, float, float]], shape: tuple[int, ...]
) -> None:
    matrices = [affine(shape, *numbers) for numbers in maps]
    product = torch.linalg.multi_dot([m[0] for m in matrices])[None]
    assert torch.allclose(compose(*matrices), product, atol=1e-5)
    # The same through a field: what comes before it is applied to where it points.
    field = as_field(matrices[-1], *shape)
    mixed = compose(*matrices[:-1], field)
    assert isinstance(mixed, Field) and mixed.mask is None
    assert torch.allclose(mixed.displacement, as_field(product, *shape).displacement, atol=1e-5)


def test_one_warp_by_a_composition_is_two_warps_in_its_order() -> None:
    source = picture(40, 40)
    turn, push = affine((40, 40), 0.2, 1.5), Field(displacement=exponential(bump(2.0, side=40)))
    for first, second in ((turn, push), (push, turn)):
        once, twice = warp(source, compose(first, second)), warp(warp(source, first), second)
        inner = (once.mask * twice.mask).bool()
        assert inner.float().mean() > 0.6
        assert (once.image - twice.image)[inner].abs().max() < 0.05  # two interpolations against one
    swapped = warp(source, compose(push, turn)).image - warp(source, compose(turn, push)).image
    assert swapped.abs().max() > 0.1


def test_a_field_ends_and_a_matrix_does_not() -> None:
    push = Field(displacement=torch.zeros(1, 2, 8, 8))
    away = affine((8, 8), 0.0, 3.0).float()
    ended, going_on = compose(push, away), compose(away, push)
    assert isinstance(ended, Field) and isinstance(going_on, Field)
    assert ended.mask is not None and going_on.mask is None
    assert ended.mask[0, 0].sum() == 25 and ended.mask[0, 0, :5, :5].all()
    there = compose(ended, torch.linalg.inv(away))  # the mask moves with it and does not grow back
    assert isinstance(there, Field) and there.mask is not None
    assert there.mask[0, 0].sum() == 25 and there.mask[0, 0, 3:, 3:].all()
    assert ended.detach().mask is ended.mask


# Warps


def test_outside_the_field_of_view_there_is_nothing() -> None:
    source = Masked(torch.ones(1, 2, 6, 6), torch.ones(1, 1, 6, 6))
    found = warp(source, affine((6, 6), 0.0, 1.5).float())
    assert torch.equal(found.image[:, :1], found.mask) and found.mask.sum() == 16


def test_a_value_made_from_an_invalid_pixel_is_invalid() -> None:
    mask = torch.ones(1, 1, 6, 6)
    mask[..., 2, 3] = 0
    half = affine((6, 6), 0.0, 0.0).float()
    half[:, 1, 2] += 0.5  # half a pixel along the rows
    found = warp(Masked(torch.ones_like(mask), mask), half)
    assert (found.mask[0, 0] == 0).nonzero().tolist() == [
        [0, 5],
        [1, 5],
        [2, 2],
        [2, 3],
        [2, 5],
        [3, 5],
        [4, 5],
        [5, 5],
    ]
    assert found.image[0, 0, 2, 2] == 1  # the image is kept: whoever compares has the mask


def test_gradients_reach_image_and_transform() -> None:
    source = picture(12, 12)
    image, angle = source.image.clone().requires_grad_(), torch.tensor([[0.1]], dtype=torch.float64)
    angle.requires_grad_()
    matrix = affine_matrix(angle, torch.zeros(1, 2), torch.tensor([5.5, 5.5]))
    warp(Masked(image, source.mask), matrix).image.sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert angle.grad is not None and angle.grad.abs().sum() > 0


def test_quarter_turns_and_flips_are_exact_and_keep_the_rim() -> None:
    image = torch.randn(1, 3, 32, 32)
    valid, nowhere = torch.ones(1, 1, 32, 32), torch.zeros(1, 2)
    for turns in range(4):
        for flip in (1, -1):
            matrix = affine_matrix(
                torch.zeros(1, 1),
                nowhere,
                torch.tensor([15.5, 15.5]),
                turns=torch.tensor([[turns]]),
                flips=torch.tensor([[1, flip]]),
            )
            found = warp(Masked(image, valid), matrix)
            assert found.mask.all()
            # Looking through "flip, then turn": V(turn(flip(p))) is the flip of the turned picture.
            turned = torch.rot90(image, -turns, (-2, -1))
            wanted = turned.flip(-1) if flip < 0 else turned
            assert (found.image - wanted).abs().max() < 2e-5, (turns, flip)


def test_draws_belong_to_numbers_and_cover_the_group() -> None:
    rngs = [np.random.default_rng(n) for n in range(200)]
    drawn = random_turns(rngs, (32, 32), 15.0)
    again = random_turns([np.random.default_rng(7)], (32, 32), 15.0)
    assert drawn.dtype == torch.float32 and torch.equal(drawn[7], again[0])
    linear, centre = drawn[:, :2, :2].double(), torch.full((2, 1), 15.5, dtype=torch.float64)
    assert torch.allclose(linear @ linear.mT, torch.eye(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(linear @ centre + drawn[:, :2, 2:].double(), centre, atol=1e-4)
    assert {round(float(d)) for d in torch.linalg.det(linear)} == {-1, 1}
    angles = torch.atan2(linear[:, 1, 0], linear[:, 0, 0]).rad2deg()
    off = (angles + 45.0) % 90.0 - 45.0
    assert 10 < off.abs().max() <= 15.0001
    assert {int(a) for a in torch.round(angles / 90.0) % 4} == {0, 1, 2, 3}
    exact = random_turns([np.random.default_rng(3)], (5, 7, 9), 0.0)
    assert set(exact[0, :3, :3].abs().round(decimals=6).flatten().tolist()) == {0.0, 1.0}


# Rigidity (D2)


@pytest.mark.parametrize("shape", [(20, 24), (8, 9, 10)])
def test_what_is_rigid_costs_nothing(shape: tuple[int, ...]) -> None:
    turned = as_field(affine(shape, 0.3, 2.0), *shape).displacement
    for config in (AFFINITY, ORTHONORMALITY, PROPERNESS):
        assert abs(float(rigidity(turned, config))) < 1e-10
    stretched = as_field(affine(shape, 0.3, 2.0, 0.15), *shape).displacement
    assert abs(float(rigidity(stretched, AFFINITY))) < 1e-10
    assert float(rigidity(stretched, ORTHONORMALITY)) > 0.1


def test_a_scaling_costs_what_it_does_to_area() -> None:
    scaled = 0.1 * coordinates(torch.zeros(1, 1, 16, 16, dtype=torch.float64))[None]
    assert float(rigidity(scaled, PROPERNESS)) == pytest.approx((1.21 - 1) ** 2, abs=1e-10)
    assert float(rigidity(scaled, ORTHONORMALITY)) == pytest.approx(2 * 0.21**2, abs=1e-10)


def test_bending_is_that_of_a_parabola() -> None:
    rows, columns = coordinates(torch.zeros(1, 1, 9, 9, dtype=torch.float64))
    bent = torch.stack([0.5 * columns**2 + rows * columns, 0 * rows])[None]
    for central in (False, True):
        config = RigidityConfig(orthonormality=0, properness=0, first_central=central, second_central=central)
        assert float(rigidity(bent, config)) == pytest.approx(1.0 + 2.0, abs=1e-10)  # mixed terms twice
    # Pixels of 2 along the columns: the same shape in units of length bends less.
    assert float(rigidity(bent, AFFINITY, [1.0, 2.0])) == pytest.approx(1 / 16 + 2 / 4, abs=1e-10)
