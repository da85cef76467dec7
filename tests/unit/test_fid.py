"""Distances between sets of features, and their intervals by patient."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from wsi_pipeline.core.bootstrap import bootstrap_by_group, group_numbers
from wsi_pipeline.core.fid import (
    KernelSums,
    Statistics,
    factor,
    frechet_between,
    frechet_distance,
    kernel_distance,
    statistics,
)
from wsi_pipeline.errors import ConfigError


def drawn(seed: int, count: int, dims: int, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (mean + scale * rng.standard_normal((count, dims))).astype(np.float32)


def test_closed_forms_of_gaussians() -> None:
    """|m|^2 for a shift, D for twice the scale (other_systems M1)."""
    base = statistics(drawn(0, 20_000, 8))
    shifted = statistics(drawn(1, 20_000, 8, mean=0.53))
    wide = statistics(drawn(2, 20_000, 8, scale=2.0))
    assert frechet_distance(base, shifted) == pytest.approx(8 * 0.53**2, abs=0.07)
    assert frechet_distance(base, wide) == pytest.approx(8.0, abs=0.15)


def test_a_set_has_no_distance_from_itself() -> None:
    """T12."""
    for count in (10, 64, 500):
        found = statistics(drawn(3, count, 64))
        assert abs(frechet_distance(found, found)) < 1e-3
        assert found.features is not None
        # Unbiased means: a set against itself comes out below 0, by the kernel of a row with itself.
        own = kernel_distance(found.features, found.features, subsets=5)
        assert -20.0 / count < own <= 0.0


@pytest.mark.parametrize("count", [12, 40, 200])
def test_agrees_with_the_matrix_square_root(count: int) -> None:
    a, b = drawn(4, count, 32, scale=1.3), drawn(5, 150, 32, mean=0.2)
    mixing = np.random.default_rng(6).standard_normal((32, 32)).astype(np.float32) / 5
    one, other = statistics(a @ mixing), statistics(b)
    root = linalg.sqrtm(one.sigma @ other.sigma).real
    gap = one.mu.astype(np.float64) - other.mu
    direct = gap @ gap + np.trace(one.sigma) + np.trace(other.sigma) - 2 * np.trace(root)
    assert frechet_distance(one, other) == pytest.approx(direct, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12), st.integers(0, 10**6))
def test_both_forms_agree_are_symmetric_and_never_negative(n: int, m: int, dims: int, seed: int) -> None:
    a, b = drawn(seed, n, dims), drawn(seed + 1, m, dims, mean=0.5, scale=2.0)
    one, other = statistics(a), statistics(b)
    distance = frechet_distance(one, other)
    assert distance == pytest.approx(frechet_distance(other, one), abs=1e-6)
    assert distance > -1e-6
    by_factors = frechet_between(factor(a, np.ones(n, np.int64)), factor(b, np.ones(m, np.int64)))
    assert by_factors == pytest.approx(distance, abs=1e-3, rel=1e-4)


def test_counts_mean_repeated_rows() -> None:
    a, b = drawn(7, 30, 6), drawn(8, 25, 6, mean=0.4)
    counts = np.random.default_rng(9).integers(0, 4, 30)
    repeated = statistics(np.repeat(a, counts, axis=0))
    counted = frechet_between(factor(a, counts), factor(b, np.ones(25, np.int64)))
    assert counted == pytest.approx(frechet_distance(repeated, statistics(b)), rel=1e-4)


def test_bias_of_few_samples_is_as_documented() -> None:
    """Two samples of one distribution, D = 64 (other_systems 2.6c)."""
    for count, bias in ((64, 33.7), (256, 8.6), (1024, 2.16)):
        found = frechet_distance(statistics(drawn(10, count, 64)), statistics(drawn(11, count, 64)))
        assert found == pytest.approx(bias, rel=0.1)


def test_kid_is_unbiased_and_seeded() -> None:
    a, b = drawn(12, 150, 16), drawn(13, 160, 16)
    assert abs(kernel_distance(a, b, subsets=50, size=60, seed=1)) < 0.1
    assert kernel_distance(a, b, subsets=5, size=60, seed=1) == kernel_distance(
        a, b, subsets=5, size=60, seed=1
    )
    assert kernel_distance(a, b, subsets=5, size=60, seed=1) != kernel_distance(
        a, b, subsets=5, size=60, seed=2
    )
    assert kernel_distance(a, b + 1.0, subsets=5) > 1.0


def test_kid_does_not_touch_the_global_generator() -> None:
    np.random.seed(4)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    kernel_distance(drawn(1, 20, 4), drawn(2, 20, 4), subsets=3, seed=9)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_kernel_sums_equal_the_direct_distance() -> None:
    a, b = drawn(14, 40, 8), drawn(15, 30, 8, mean=0.3)
    _, (group_a, group_b) = group_numbers(
        [[f"p{i % 7}" for i in range(40)], [f"p{i % 9}" for i in range(30)]]
    )
    sums = KernelSums.of(a, group_a, b, group_b)
    every = np.arange(40)

    def direct(x: np.ndarray, y: np.ndarray) -> float:
        kxx, kyy, kxy = (
            ((u.astype(float) @ v.T.astype(float)) / 8 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))
        )
        n, m = len(x), len(y)
        within = (kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
        return float(within - 2 * kxy.mean())

    assert sums.distance(np.ones(9, np.int64)) == pytest.approx(direct(a, b), rel=1e-9)
    without = np.ones(9, np.int64)
    without[3] = 0
    kept = direct(a[every[group_a != 3]], b[group_b != 3])
    assert sums.distance(without) == pytest.approx(kept, rel=1e-9)


def test_what_cannot_be_compared_is_an_error_in_a_line() -> None:
    a = statistics(drawn(16, 10, 4))
    with pytest.raises(ConfigError, match="4 and of 5 dimensions"):
        frechet_distance(a, statistics(drawn(17, 10, 5)))
    with pytest.raises(ConfigError, match="at least 2 images"):
        statistics(drawn(18, 1, 4))
    with pytest.raises(ConfigError, match="not finite"):
        statistics(np.full((3, 4), np.nan, np.float32))
    broken = Statistics(mu=a.mu, sigma=np.full((4, 4), np.nan))
    with pytest.raises(ConfigError, match="not finite"):
        frechet_distance(a, broken)
    with pytest.raises(ConfigError, match="at least 2 images"):
        kernel_distance(drawn(19, 1, 4), drawn(20, 5, 4))


def mean_of(values: np.ndarray):  # type: ignore[no-untyped-def]
    return lambda counts: float((counts[0] * values).sum() / counts[0].sum())


def test_interval_respects_patients() -> None:
    """Tiles that repeat their patient carry nothing: the interval is that of the patients, not of tiles."""
    rng = np.random.default_rng(21)
    patients = rng.standard_normal(20)
    values = np.repeat(patients, 50)
    groups = [f"p{i}" for i in range(20) for _ in range(50)]
    by_patient = bootstrap_by_group([groups], mean_of(values), draws=400, seed=1)
    by_tile = bootstrap_by_group([[str(i) for i in range(1000)]], mean_of(values), draws=400, seed=1)
    assert by_patient is not None
    assert by_tile is not None
    expected = 2 * 1.96 * patients.std() / np.sqrt(20)
    assert by_patient.high - by_patient.low == pytest.approx(expected, rel=0.2)
    assert by_tile.high - by_tile.low < (by_patient.high - by_patient.low) / 4
    assert by_patient.low < patients.mean() < by_patient.high
    assert by_patient.groups == 20


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(22)
    hits = 0
    for trial in range(150):
        values = np.repeat(rng.standard_normal(25), 4)
        groups = [f"p{i}" for i in range(25) for _ in range(4)]
        interval = bootstrap_by_group([groups], mean_of(values), draws=150, seed=trial)
        assert interval is not None
        hits += interval.low <= 0.0 <= interval.high
    assert 0.86 <= hits / 150 <= 0.99


def test_interval_lies_around_the_value_although_resamples_are_biased() -> None:
    a, b = drawn(23, 120, 24), drawn(24, 120, 24, mean=0.1)
    groups = [f"p{i // 6}" for i in range(120)]
    value = frechet_distance(statistics(a), statistics(b))

    def distance(counts):  # type: ignore[no-untyped-def]
        return frechet_between(factor(a, counts[0]), factor(b, counts[1]))

    interval = bootstrap_by_group([groups, groups], distance, draws=60, seed=2, value=value)
    assert interval is not None
    assert interval.low < value < interval.high


def test_shared_patients_are_drawn_for_both_sides_and_no_side_is_empty() -> None:
    generated, reference = ["a", "a", "b", "c"], ["b", "c", "d", "e"]
    seen = []

    def record(counts):  # type: ignore[no-untyped-def]
        seen.append([c.copy() for c in counts])
        return float(counts[0].sum())

    bootstrap_by_group([generated, reference], record, draws=50, seed=3)
    for left, right in seen:
        assert left.sum() > 0
        assert right.sum() > 0
        assert left[0] == left[1]
        assert (left[2], left[3]) == (right[0], right[1])
    assert any(left[2] != 1 for left, _ in seen)


def test_one_patient_has_no_interval() -> None:
    assert bootstrap_by_group([["a", "a"], ["b", "c"]], lambda _: 1.0, draws=10, seed=0) is None
    assert bootstrap_by_group([["a", "b"]], lambda _: 1.0, draws=0, seed=0) is None


def test_intervals_repeat() -> None:
    values = drawn(25, 30, 1)[:, 0]
    groups = [str(i % 5) for i in range(30)]
    runs = [bootstrap_by_group([groups], mean_of(values), draws=20, seed=7) for _ in range(2)]
    assert runs[0] == runs[1]
