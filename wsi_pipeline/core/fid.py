"""How far two sets of images lie apart in a feature space: Frechet distance (FID) and kernel distance (KID).

Pure functions on feature arrays [N, D], whatever network made them: further distances between sets (precision
and recall, density and coverage) are further functions of the same two ``Statistics``.

Sources: M. Heusel et al., NIPS 2017 (FID); M. Binkowski et al., ICLR 2018 (KID, polynomial kernel of degree
3); G. Parmar et al., CVPR 2022 (the conventions: float32 mean, covariance with N - 1, 100 subsets of 1000).

Why no matrix square root of the product: ``Tr sqrt(S1 S2)`` is the sum of the singular values of ``F1 F2^T``
for any factors with ``S = F^T F``. Both sides stay symmetric, so nothing complex appears, and a covariance of
fewer samples than features, where ``sqrtm`` loses digits, is no special case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import ConfigError

__all__ = [
    "F32",
    "F64",
    "I64",
    "KID_SIZE",
    "KID_SUBSETS",
    "KernelSums",
    "Statistics",
    "factor",
    "frechet_between",
    "frechet_distance",
    "kernel_distance",
    "statistics",
    "symmetric_root",
]

F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]
I64: TypeAlias = npt.NDArray[np.int64]

KID_SUBSETS = 100
KID_SIZE = 1000

_CHUNK = 1024  # rows of a kernel matrix that are in memory at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """A set of images as its features see it.

    ``mu`` [D] in the dtype of the features, ``sigma`` [D, D] float64, ``features`` [N, D] float32 where they
    are at hand (KID and intervals need them). The rest are facts for people, "" or 0 where nobody stated
    them: ``n`` images, ``extractor`` and its ``resize``, ``encoding`` of the files (PNG, JPEG, ...).
    """

    mu: npt.NDArray[np.floating[Any]]
    sigma: F64
    features: F32 | None = None
    n: int = 0
    extractor: str = ""
    resize: str = ""
    encoding: str = ""

    @property
    def dims(self) -> int:
        return int(self.mu.shape[0])


def statistics(
    features_ND: npt.NDArray[np.floating[Any]], *, extractor: str = "", resize: str = "", encoding: str = ""
) -> Statistics:
    """Mean and covariance (N - 1) of features [N, D]; ConfigError for fewer than two or non-finite ones."""
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise ConfigError(
            f"features {features_ND.shape}: a covariance needs at least 2 images; give more tiles"
        )
    if not np.isfinite(features_ND).all():
        raise ConfigError("features: some are not finite; look at the tiles and at the extractor's weights")
    return Statistics(
        mu=features_ND.mean(axis=0),
        sigma=np.atleast_2d(np.cov(features_ND, rowvar=False)).astype(np.float64),
        features=features_ND.astype(np.float32),
        n=len(features_ND),
        extractor=extractor,
        resize=resize,
        encoding=encoding,
    )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID, ``|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 sqrt(S_a S_b))``; 0 for equal sets, up to rounding.

    Biased upwards where N is small: by about the trace of the covariance divided by N and more. Compare
    only sets of equal N. Raises ConfigError for different numbers of features.
    """
    _same_dims(a.dims, b.dims)
    roots = (symmetric_root(a.sigma), symmetric_root(b.sigma))
    traces = float(np.trace(a.sigma) + np.trace(b.sigma))
    return _frechet(a.mu.astype(np.float64) - b.mu.astype(np.float64), traces, *roots)


def factor(features_ND: npt.NDArray[np.floating[Any]], counts_N: I64) -> tuple[F64, F64]:
    """Mean [D] and factor F [<= D, D] of features that count ``counts_N`` times; ``F^T F`` = covariance."""
    taken_N = counts_N > 0
    rows_ND = features_ND[taken_N].astype(np.float64)
    weight_N = counts_N[taken_N].astype(np.float64)
    mu = np.average(rows_ND, axis=0, weights=weight_N)
    rows_ND = (rows_ND - mu) * np.sqrt(weight_N / max(weight_N.sum() - 1.0, 1.0))[:, None]
    if len(rows_ND) > rows_ND.shape[1]:
        rows_ND = np.asarray(np.linalg.qr(rows_ND, mode="r"), np.float64)
    return mu, rows_ND


def frechet_between(a: tuple[F64, F64], b: tuple[F64, F64]) -> float:
    """FID of two sets given as ``factor`` gives them."""
    (mu_a, factor_a), (mu_b, factor_b) = a, b
    traces = float((factor_a * factor_a).sum() + (factor_b * factor_b).sum())
    return _frechet(mu_a - mu_b, traces, factor_a, factor_b)


def _frechet(difference_D: F64, traces: float, factor_a: F64, factor_b: F64) -> float:
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False)
    return float(difference_D @ difference_D + traces - 2.0 * cross.sum())


def symmetric_root(sigma: F64) -> F64:
    """Symmetric square root of a covariance; eigenvalues below 0, which are rounding, count as 0."""
    if not np.isfinite(sigma).all():
        raise ConfigError("statistics: the covariance is not finite; make the statistics again")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2.0)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T, np.float64)


def kernel_distance(
    generated_ND: npt.NDArray[np.floating[Any]],
    reference_ND: npt.NDArray[np.floating[Any]],
    *,
    subsets: int = KID_SUBSETS,
    size: int = KID_SIZE,
    seed: int = 0,
) -> float:
    """KID: unbiased squared MMD with the kernel ``(x.y / D + 1)^3``, mean over random subsets.

    Each subset draws m = min(N, M, ``size``) rows of either side without replacement; the draws are those of
    numpy's legacy generator after ``numpy.random.seed(seed)``, generated side first, as clean-fid makes them.
    Not multiplied by 1000. Raises ConfigError for fewer than two rows.
    """
    _same_dims(generated_ND.shape[1], reference_ND.shape[1])
    drawn = min(len(generated_ND), len(reference_ND), size)
    if drawn < 2:
        raise ConfigError("KID: needs at least 2 images on both sides; give more tiles")
    draws = np.random.RandomState(seed)
    total = 0.0
    for _ in range(subsets):
        x = generated_ND[draws.choice(len(generated_ND), drawn, replace=False)].astype(np.float64)
        y = reference_ND[draws.choice(len(reference_ND), drawn, replace=False)].astype(np.float64)
        within = _kernel_sum(x, x) - _own(x).sum() + _kernel_sum(y, y) - _own(y).sum()
        total += within / (drawn * (drawn - 1)) - 2.0 * _kernel_sum(x, y) / drawn**2
    return float(total / subsets)


def _kernel_sum(x_ND: F64, y_MD: F64) -> float:
    rows = range(0, len(x_ND), _CHUNK)
    return float(sum(_kernel(x_ND[row : row + _CHUNK], y_MD).sum() for row in rows))


def _kernel(x_ND: F64, y_MD: F64) -> F64:
    base_NM = x_ND @ y_MD.T / x_ND.shape[1] + 1.0
    return np.asarray(base_NM * base_NM * base_NM, np.float64)


def _own(x_ND: F64) -> F64:
    """Kernel of every row with itself."""
    return np.asarray(((x_ND * x_ND).sum(axis=1) / x_ND.shape[1] + 1.0) ** 3, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelSums:
    """Sums of the kernel over all pairs of groups: what KID of resampled groups needs, whatever N is.

    ``within_a`` and ``within_b`` [G, G] leave out pairs of a row with itself: they do not add up to a bias
    where a resampled group counts twice. ``size_a``, ``size_b`` [G] count rows, ``between`` is [G, G].
    """

    within_a: F64
    within_b: F64
    between: F64
    size_a: I64
    size_b: I64

    @classmethod
    def of(
        cls,
        a_ND: npt.NDArray[np.floating[Any]],
        group_a: I64,
        b_MD: npt.NDArray[np.floating[Any]],
        group_b: I64,
    ) -> KernelSums:
        """From features and the group number of each row; both sides number the same groups."""
        groups = int(max(group_a.max(), group_b.max())) + 1
        a, b = a_ND.astype(np.float64), b_MD.astype(np.float64)
        own_a, own_b = (
            np.bincount(index, weights=_own(rows), minlength=groups)
            for index, rows in ((group_a, a), (group_b, b))
        )
        return cls(
            within_a=_group_sums(a, group_a, a, group_a, groups) - np.diag(own_a),
            within_b=_group_sums(b, group_b, b, group_b, groups) - np.diag(own_b),
            between=_group_sums(a, group_a, b, group_b, groups),
            size_a=np.bincount(group_a, minlength=groups),
            size_b=np.bincount(group_b, minlength=groups),
        )

    def distance(self, counts_G: I64) -> float:
        """Unbiased squared MMD where group g counts ``counts_G[g]`` times on both sides."""
        w = counts_G.astype(np.float64)
        rows_a, rows_b = w * self.size_a, w * self.size_b
        pairs_a = rows_a.sum() ** 2 - (w * w * self.size_a).sum()
        pairs_b = rows_b.sum() ** 2 - (w * w * self.size_b).sum()
        if min(pairs_a, pairs_b) <= 0:
            return float("nan")
        within = w @ self.within_a @ w / pairs_a + w @ self.within_b @ w / pairs_b
        return float(within - 2.0 * (w @ self.between @ w) / (rows_a.sum() * rows_b.sum()))


def _group_sums(x_ND: F64, group_x: I64, y_MD: F64, group_y: I64, groups: int) -> F64:
    order = np.argsort(group_y, kind="stable")
    starts = np.searchsorted(group_y[order], np.arange(groups))
    sums = np.zeros((groups, groups))
    filled = np.bincount(group_y, minlength=groups) > 0
    for row in range(0, len(x_ND), _CHUNK):
        kernel = _kernel(x_ND[row : row + _CHUNK], y_MD[order])
        by_group = np.zeros((len(kernel), groups))
        by_group[:, filled] = np.add.reduceat(kernel, starts[filled], axis=1)
        np.add.at(sums, group_x[row : row + _CHUNK], by_group)
    return sums


def _same_dims(a: int, b: int) -> None:
    if a != b:
        raise ConfigError(
            f"features of {a} and of {b} dimensions cannot be compared; use one extractor for both"
        )
