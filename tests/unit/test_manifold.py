"""Precision and recall, density and coverage: known values, orientation, ties, duplicates, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_pipeline.core.fid import frechet_distance, kernel_distance, statistics
from wsi_pipeline.core.manifold import overlap, realism, squared_radii
from wsi_pipeline.errors import ConfigError

COUNT = 1500


def gaussian(seed: int, dims: int, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dims))


def two_draws(dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Real, then generated, of one stream. Other seeds move figures by 0.02 (one sigma), those of collapsed
    and wide sets in two dimensions, which hang on few balls, by up to 0.06."""
    real, made = np.random.default_rng(3).standard_normal((2, COUNT, dims))
    return real, made


@pytest.mark.parametrize(
    ("dims", "precision", "recall"), [(2, 0.98, 0.97), (16, 0.78, 0.81), (64, 0.60, 0.63)]
)
def test_two_draws_of_one_distribution_do_not_reach_1(dims: int, precision: float, recall: float) -> None:
    """M2."""
    real, made = two_draws(dims)
    found = overlap(made, real)
    assert found.precision.mean() == pytest.approx(precision, abs=0.03)
    assert found.recall.mean() == pytest.approx(recall, abs=0.03)


@pytest.mark.parametrize(("dims", "recall"), [(2, 0.055), (16, 0.0), (64, 0.0)])
def test_a_collapsed_set_is_precise_and_has_no_recall(dims: int, recall: float) -> None:
    """M2: this is what tells precision from recall where a program swaps them."""
    real, made = two_draws(dims)
    found = overlap(0.1 * made, real)
    assert found.precision.mean() >= 0.99
    assert found.recall.mean() == pytest.approx(recall, abs=0.03)
    assert (len(found.precision), len(found.recall)) == (COUNT, COUNT)


@pytest.mark.parametrize(("dims", "precision", "recall"), [(2, 0.57, 0.97), (16, 0.0, 1.0), (64, 0.0, 1.0)])
def test_a_wide_set_covers_all_and_is_not_precise(dims: int, precision: float, recall: float) -> None:
    """M2."""
    real, made = two_draws(dims)
    found = overlap(3.0 * made, real)
    assert found.precision.mean() == pytest.approx(precision, abs=0.03)
    assert found.recall.mean() == pytest.approx(recall, abs=0.03)


def test_sets_that_are_far_apart_and_sets_that_are_equal() -> None:
    """M2."""
    real = gaussian(0, 16, 400)
    far = overlap(real + 100.0, real)
    same = overlap(real, real)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(far, name).mean() == 0.0
        assert getattr(same, name).mean() == pytest.approx(1.0, abs=1e-12)


def test_kid_of_two_draws_of_one_distribution_is_0_within_its_error() -> None:
    """M6 (the table ends at M5): 100 subsets; of a set with itself it is slightly negative, as subsets share
    rows."""
    real, made = gaussian(0, 16, 2000), gaussian(1, 16, 2000)
    each = [kernel_distance(made, real, subsets=1, size=100, seed=seed) for seed in range(100)]
    error = float(np.std(each)) / 10
    assert abs(np.mean(each)) < 3 * error
    itself = kernel_distance(real, real, subsets=100, size=100)
    own = float((((real * real).sum(axis=1) / 16 + 1) ** 3).mean())
    assert -2 * own / len(real) - 3 * error < itself < 3 * error
    assert kernel_distance(made + 0.5, real, subsets=100, size=100) > 20 * error


def test_frechet_closed_forms() -> None:
    """M1: a shift m costs |m|^2, a scale of 2 costs the number of dimensions."""
    base = statistics(gaussian(0, 8, 20_000))
    shifted = statistics(gaussian(1, 8, 20_000) + 0.75 / np.sqrt(2))
    scaled = statistics(2.0 * gaussian(2, 8, 20_000))
    assert frechet_distance(shifted, base) == pytest.approx(2.25, abs=0.07)
    assert frechet_distance(scaled, base) == pytest.approx(8.0, abs=0.15)


def test_spatial_features_may_be_flattened_in_any_order() -> None:
    """M3."""
    drawn = np.random.default_rng(3)
    real, made = drawn.standard_normal((90, 3, 3, 7)), 1.2 * drawn.standard_normal((80, 3, 3, 7))
    orders = [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1)]
    values = [
        frechet_distance(*(statistics(x.transpose(order).reshape(len(x), -1)) for x in (made, real)))
        for order in orders
    ]
    assert max(values) - min(values) < 1e-8
    assert values[0] > 1.0


def test_points_on_a_line_by_hand() -> None:
    real = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert squared_radii(real, 1, 2).tolist() == [[1.0, 1.0, 4.0, 16.0], [9.0, 4.0, 9.0, 36.0]]
    made = np.array([[2.0], [-0.9], [20.0]])
    found = overlap(made, real, k=1, k_density=1)
    # 2 lies on the balls of 1 and in that of 3; -0.9 in that of 0; 20 in none.
    assert found.precision.tolist() == [1.0, 1.0, 0.0]
    # The balls of the made points have radii 2.9, 2.9 and 18: they hold all four.
    assert found.recall.tolist() == [1.0, 1.0, 1.0, 1.0]
    # Strictly inside: 2 in the ball of 3 alone.
    assert found.density.tolist() == [1.0, 1.0, 0.0]
    assert found.coverage.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_rounding_decides_nothing_for_equal_points() -> None:
    """Far from the origin, with duplicates: radii are 0, and a point is not outside itself."""
    rows = 1000.0 + np.repeat(gaussian(5, 32, 40), 6, axis=0)
    found = overlap(rows[::-1], rows)
    assert found.precision.mean() == found.recall.mean() == 1.0
    assert found.density.mean() == found.coverage.mean() == 0.0, "nothing lies strictly inside a ball of 0"


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = gaussian(1, 5, 70), gaussian(0, 5, 60)
    whole = overlap(made, real)
    monkeypatch.setattr("wsi_pipeline.core.manifold._CHUNK", 9)
    parts = overlap(made, real)
    for name in ("precision", "recall", "density", "coverage"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name


def test_realism_is_above_1_inside() -> None:
    made, real = gaussian(1, 4, 200), gaussian(0, 4, 200)
    inside = overlap(made, real).precision
    score = realism(made, real)
    assert score[inside == 1].min() > 0.99 >= score[inside == 0].max() - 0.01
    assert 0 < inside.mean() < 1


def test_too_few_points_and_other_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs more than 5 images, not 5"):
        overlap(gaussian(0, 3, 50), gaussian(1, 3, 5))
    with pytest.raises(ConfigError, match="cannot be compared"):
        overlap(gaussian(0, 3, 50), gaussian(1, 4, 50))
