"""Do two sets of images cover each other? Precision and recall, density and coverage, realism.

A set's manifold is the union of balls around its feature vectors, each as wide as the distance to the k-th
neighbour within the set. Precision: share of the generated images that lie in the reference's manifold;
recall: share of the reference in the generated one's. Neither is 1 for two draws of one distribution, and how
far below depends on dimensions and numbers: read them beside two halves of the reference.

Sources: T. Kynkaanniemi et al., NeurIPS 2019 (``<=``); M. Naeem et al., ICML 2020 (density and coverage, a
strict ``<``). Written from the definitions; parity is with torch-fidelity 0.4 and later (before, precision
and recall were swapped there) and prdc.

Why a tolerance at the surface of a ball: distances come from a matrix product, whose rounding must not decide
on which side equal points lie. Far more than rounding, it is far less than any real gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.fid import F64
from wsi_pipeline.errors import ConfigError

__all__ = ["K_DENSITY", "K_PRECISION", "Overlap", "overlap", "realism", "squared_radii"]

K_PRECISION = 3
K_DENSITY = 5

_CHUNK = 1024  # rows of distances that are in memory at once
_ROUNDING = 1e-12  # of the squared lengths of the two vectors
_NO_ZERO = 1e-5  # the published realism score adds it to squared distances

Features = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overlap:
    """What holds for each image. A figure is the mean of its array, so that patients can be drawn again.

    ``precision`` [generated]: lies in a ball of the reference; ``recall`` [reference]: lies in a ball of the
    generated set; ``density`` [generated]: number of the reference's balls around it, by k; ``coverage``
    [reference]: its ball holds a generated image.
    """

    precision: F64
    recall: F64
    density: F64
    coverage: F64


def overlap(
    generated_ND: Features, reference_MD: Features, *, k: int = K_PRECISION, k_density: int = K_DENSITY
) -> Overlap:
    """Precision and recall with the ``k``-th neighbour, density and coverage with the ``k_density``-th.

    Raises ConfigError for sets that have not more images than that, or different numbers of features.
    """
    x, y = _centred(generated_ND, reference_MD)
    (radius_N,), (radius_M, wide_M) = squared_radii(x, k), squared_radii(y, k, k_density)
    precision_N, density_N = np.zeros((2, len(x)))
    recall_M, coverage_M = np.zeros((2, len(y)))
    for rows, squared_BM, slack_BM in _distances(x, y):
        precision_N[rows] = (squared_BM <= radius_M + slack_BM).any(axis=1)
        recall_M[(squared_BM <= radius_N[rows, None] + slack_BM).any(axis=0)] = 1.0
        held_BM = squared_BM < wide_M - slack_BM
        density_N[rows] = held_BM.sum(axis=1) / k_density
        coverage_M[held_BM.any(axis=0)] = 1.0
    return Overlap(precision=precision_N, recall=recall_M, density=density_N, coverage=coverage_M)


def realism(generated_ND: Features, reference_MD: Features, *, k: int = K_PRECISION) -> F64:
    """How deep each generated image lies in the reference's manifold, [N]; above 1 is inside.

    The published program's: the largest squared radius by squared distance, over all balls (the paper takes
    plain lengths, and the smaller half of the balls).
    """
    x, y = _centred(generated_ND, reference_MD)
    (radius_M,) = squared_radii(y, k)
    found = [(radius_M / (squared_BM + _NO_ZERO)).max(axis=1) for _, squared_BM, _ in _distances(x, y)]
    return np.asarray(np.concatenate(found), np.float64)


def squared_radii(features_ND: Features, *nearest: int) -> F64:
    """Squared distances [len(nearest), N] to the k-th neighbours in the set itself; 0 is the point itself."""
    if not 0 < max(nearest) < len(features_ND):
        raise ConfigError(
            f"neighbour {max(nearest)}: needs more than {max(nearest)} images, not {len(features_ND)}; "
            "give more tiles"
        )
    x = features_ND.astype(np.float64)
    found = [np.sort(squared, axis=1)[:, list(nearest)].T for _, squared, _ in _distances(x, x)]
    return np.concatenate(found, axis=1)


def _centred(x_ND: Features, y_MD: Features) -> tuple[F64, F64]:
    """Both less the mean of the second, float64: short vectors, small rounding."""
    if x_ND.shape[1:] != y_MD.shape[1:]:
        raise ConfigError(
            f"features {x_ND.shape} and {y_MD.shape} cannot be compared; use one extractor for both"
        )
    mean_D = y_MD.mean(axis=0, dtype=np.float64)
    return x_ND - mean_D, y_MD - mean_D


def _distances(x_ND: F64, y_MD: F64) -> Iterator[tuple[slice, F64, F64]]:
    """Rows of ``x``, their squared distances to all ``y``, and by how much rounding may have moved them."""
    lengths_M = (y_MD * y_MD).sum(axis=1)
    for start in range(0, len(x_ND), _CHUNK):
        rows = slice(start, start + _CHUNK)
        both_BM = (x_ND[rows] ** 2).sum(axis=1)[:, None] + lengths_M
        yield rows, np.maximum(both_BM - 2.0 * x_ND[rows] @ y_MD.T, 0.0), both_BM * _ROUNDING
