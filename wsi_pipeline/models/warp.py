"""Warps of images by affine maps and displacement fields, in 2-D and 3-D (Honkamaa et al., MedIA 90, 2023).

A transform is a pull-back in pixels: the warped image at point p is the image at transform(p), multilinear,
axes in the order of the array. It is a matrix [B, n + 1, n + 1] or a ``Field`` of displacements.

``compose`` takes transforms in the order in which an image would be warped by one after the other:
V o a o b (p) = V(a(b(p))), so matrices multiply from left to right. Why compose at all: an image resampled
once by the composition keeps the sharpness that it loses when it is resampled at every step.

Masks ride along. What lies outside the field of view has no value: it is 0 and its mask is 0. A warped mask
is 1 only where every pixel that went into the value was valid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Field",
    "Masked",
    "RigidityConfig",
    "Transform",
    "affine_matrix",
    "compose",
    "coordinates",
    "exponential",
    "jacobian",
    "random_turns",
    "rigidity",
    "warp",
]

_BORDER = 1e-4  # px: a turn by 90 degrees in float32 leaves the image by less, and must not lose its rim
_VALID = 1.0 - 1e-5


class Masked(NamedTuple):
    """``image``: [B, C, *S] float32; ``mask``: [B, 1, *S] float32, 1 where the image has a value."""

    image: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """``displacement``: [B, n, *S] pixels, added to points; ``mask``: [B, 1, *S], None is 1 everywhere."""

    displacement: Tensor
    mask: Tensor | None = None

    def detach(self) -> Field:
        """The same field, through which no gradient flows."""
        return Field(displacement=self.displacement.detach(), mask=self.mask)


Transform: TypeAlias = Tensor | Field


def coordinates(like: Tensor) -> Tensor:
    """Pixel coordinates [n, *S] of an image [B, C, *S]."""
    axes = [torch.arange(size, device=like.device, dtype=like.dtype) for size in like.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def warp(source: Masked, transform: Transform) -> Masked:
    """``source`` seen through a transform, on its own grid; gradients flow to the image and the transform."""
    points, mask = _points(transform, source.image)
    both, inside = _sample(torch.cat([source.image, source.mask], dim=1), points)
    inside = inside if mask is None else inside * mask
    return Masked(both[:, :-1] * inside, (both[:, -1:].detach() >= _VALID) * inside)


def compose(*transforms: Transform) -> Transform:
    """One transform that does what these do in their order; a matrix if all are matrices, otherwise a field.

    A matrix before a field adds no mask: its plane has no end. A field is sampled and ends: where a later
    transform looks past its edge, the result is masked.
    """
    return functools.reduce(_then, transforms)


def _then(first: Transform, second: Transform) -> Transform:
    if isinstance(first, Tensor):
        if isinstance(second, Tensor):
            return _product(first, second)
        grid = coordinates(second.displacement)
        moved = _apply(first, grid + second.displacement) - grid
        return Field(displacement=moved, mask=second.mask)
    points, mask = _points(second, first.displacement)
    moved, inside = _sample(first.displacement, points)
    inside = inside if mask is None else inside * mask
    if first.mask is not None:
        inside = inside * (_sample(first.mask, points)[0] >= _VALID)
    return Field(displacement=points - coordinates(moved) + moved, mask=inside)


def _points(transform: Transform, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the grid of ``like`` [B, C, *S] goes, [B, n, *S], and the transform's own mask."""
    if isinstance(transform, Field):
        return coordinates(like) + transform.displacement, transform.mask
    return _apply(transform, coordinates(like)), None


def exponential(velocity: Tensor, steps: int = 7) -> Tensor:
    """Displacement [B, n, *S] after unit time in a stationary velocity field, by scaling and squaring.

    The inverse is ``exponential(-velocity)`` (Arsigny et al., MICCAI 2006).
    """
    grid = coordinates(velocity)
    moved = velocity / 2**steps
    for _ in range(steps):
        moved = moved + _sample(moved, grid + moved)[0]
    return moved


def affine_matrix(
    angles: Tensor,
    shifts: Tensor,
    centre: Tensor,
    *,
    turns: Tensor | None = None,
    flips: Tensor | None = None,
    log_scales: Tensor | None = None,
    log_shears: Tensor | None = None,
) -> Tensor:
    """Matrix [B, n + 1, n + 1] of stretch, flip, quarter turns, rotation about ``centre``, then shift.

    ``angles``: [B, 1] or [B, 3] radians, about axis 0, 1, 2 in this order; ``shifts``: [B, n] pixels;
    ``centre``: [n]; ``turns``: as angles, multiples of 90 degrees; ``flips``: [B, n] of -1 and 1. The stretch
    is the exponential of the symmetric matrix of ``log_scales`` [B, n] and ``log_shears`` [B, 1 or 3].
    """
    linear, size = _rotation(angles), len(centre)
    if turns is not None:
        linear = _product(linear, _rotation(turns * (math.pi / 2)))
    if flips is not None:
        linear = linear * flips[:, None]
    if log_scales is not None and log_shears is not None:
        stretch = torch.diag_embed(log_scales)
        rows, columns = torch.triu_indices(size, size, 1)
        stretch[:, rows, columns] = stretch[:, columns, rows] = log_shears
        linear = _product(linear, torch.linalg.matrix_exp(stretch))
    column = centre + shifts - (linear * centre).sum(-1)
    last = torch.eye(size + 1, dtype=linear.dtype, device=linear.device)[size:]
    return torch.cat([torch.cat([linear, column[..., None]], 2), last.expand(len(linear), 1, -1)], 1)


def random_turns(rngs: Sequence[np.random.Generator], shape: Sequence[int], degrees: float) -> Tensor:
    """Flips, quarter turns and rotations within +-``degrees`` about the centre of an image of this shape.

    Sample b's draws come from ``rngs[b]`` alone. Returns float32 [B, n + 1, n + 1], on the CPU.
    """
    size, limit = len(shape), math.radians(degrees)
    planes = size * (size - 1) // 2
    draws = [
        (2 * r.integers(0, 2, size) - 1, r.integers(0, 4, planes), r.uniform(-limit, limit, planes))
        for r in rngs
    ]
    flips, turns, angles = (torch.from_numpy(np.stack(part)) for part in zip(*draws, strict=True))
    centre = (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    return affine_matrix(angles, 0 * centre.expand(len(rngs), -1), centre, turns=turns, flips=flips).float()


def _rotation(angles: Tensor) -> Tensor:
    """[B, 1] -> [B, 2, 2]; [B, 3] -> R2 R1 R0 [B, 3, 3], each about the axis of its angle."""
    size = 2 if angles.shape[1] == 1 else 3
    # Planes without axis 0, 1, 2: in the order of the axes that they turn about.
    planes = list(combinations(range(size), 2))[::-1]
    total = torch.eye(size, dtype=angles.dtype, device=angles.device).expand(len(angles), -1, -1)
    for angle, (i, j) in zip(angles.unbind(1), planes, strict=True):
        turn = torch.eye(size, dtype=angles.dtype, device=angles.device).repeat(len(angles), 1, 1)
        turn[:, i, i] = turn[:, j, j] = angle.cos()
        turn[:, j, i], turn[:, i, j] = angle.sin(), -angle.sin()
        total = _product(turn, total)
    return total


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Not matmul: reduced precisions of GPUs (TF32, autocast) would move a corner by pixels.
    return (left[:, :, :, None] * right[:, None]).sum(2)


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    """Points [n, *S] or [B, n, *S] through a matrix -> [B, n, *S]."""
    size = matrix.shape[1] - 1
    wide = matrix[(..., *[None] * size)]
    points = points if points.dim() == size + 2 else points[None]
    return (wide[:, :size, :size] * points[:, None]).sum(2) + wide[:, :size, size]


def _sample(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` [B, C, *S] at points [B, n, *T], the edge's value beyond it; and [B, 1, *T], 1 inside."""
    ends = [size - 1 for size in values.shape[2:]]
    axes = list(zip(points.unbind(1), ends, strict=True))
    # grid_sample wants the last axis first, from -1 to 1.
    grid = torch.stack([2.0 * p / max(end, 1) - 1.0 for p, end in reversed(axes)], dim=-1)
    sampled = F.grid_sample(values, grid, padding_mode="border", align_corners=True)
    near = [(p >= -_BORDER) & (p <= end + _BORDER) for p, end in axes]
    return sampled, torch.stack(near).all(dim=0)[:, None].to(values.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RigidityConfig:
    """Weights of the three penalties of ``rigidity``, and whether its differences are central or forward."""

    affinity: float = 1.0
    orthonormality: float = 0.01
    properness: float = 0.1
    first_central: bool = False
    second_central: bool = False


def rigidity(displacement: Tensor, config: RigidityConfig, spacing: Sequence[float] | None = None) -> Tensor:
    """How far a field [B, n, *S] is from rigid (Staring, Klein and Pluim, Medical Physics 2007); scalar.

    Means over pixels: affinity, squares of second derivatives (mixed ones twice); orthonormality,
    ||J J^T - I||^2; properness, (det J - 1)^2. ``spacing``: size of a pixel on each axis (None: 1).
    """
    first, axes = jacobian(displacement, config.first_central, spacing), range(displacement.shape[1])
    bends = [
        (1.0 if i == j else 2.0)
        * _difference(first[:, :, i], j, config.second_central).square().sum(1)
        / (spacing[j] ** 2 if spacing else 1.0)
        for i, j in combinations_with_replacement(axes, 2)
    ]
    identity = torch.eye(len(axes), dtype=first.dtype, device=first.device)[(..., *[None] * len(axes))]
    matrix = first + identity
    product = (matrix[:, :, None] * matrix[:, None]).sum(3)  # not matmul, see _product
    orthonormality = (product - identity).square().sum((1, 2)).mean()
    properness = (_determinant(matrix) - 1.0).square().mean()
    return (
        config.affinity * torch.stack(bends).sum(0).mean()
        + config.orthonormality * orthonormality
        + config.properness * properness
    )


def jacobian(displacement: Tensor, central: bool = False, spacing: Sequence[float] | None = None) -> Tensor:
    """Derivatives [B, n (component), n (axis), *S'] of a field; sides are 2 shorter if central, else 1."""
    axes = range(displacement.shape[1])
    size = displacement.new_tensor(spacing or [1.0] * len(axes))
    scaled = displacement * size.view(-1, *[1] * len(axes))
    return torch.stack([_difference(scaled, axis, central) / size[axis] for axis in axes], dim=2)


def _determinant(matrix: Tensor) -> Tensor:
    """[B, n, n, *S] -> [B, *S], for n = 2 and 3."""
    if matrix.shape[1] == 2:
        return matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]
    return (matrix[:, 0] * torch.linalg.cross(matrix[:, 1], matrix[:, 2], dim=1)).sum(1)


def _difference(values: Tensor, axis: int, central: bool) -> Tensor:
    """Difference along one axis of [B, C, *S], all sides cut alike.

    A forward difference is the mean over two opposite corners of the other axes (the published choice).
    """

    def cut(own: slice, other: slice) -> Tensor:
        return values[(..., *(own if i == axis else other for i in range(values.dim() - 2)))]

    if central:
        inner = slice(1, -1)
        return (cut(slice(2, None), inner) - cut(slice(None, -2), inner)) / 2
    upper, lower = slice(1, None), slice(None, -1)
    return (cut(upper, upper) - cut(lower, upper) + cut(upper, lower) - cut(lower, lower)) / 2
