"""Sample i: permutations that hold every element, the same tomorrow, and streams that do not meet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.core.sampling import permutation_at, sample_rng, stream_key


@given(length=st.integers(1, 300), epoch=st.integers(0, 10**9), key=st.integers(0, 2**128 - 1))
def test_an_epoch_is_a_permutation(length: int, epoch: int, key: int) -> None:
    numbers = range(epoch * length, (epoch + 1) * length)
    assert sorted(permutation_at(number, length, key) for number in numbers) == list(range(length))


@given(length=st.integers(20, 200), numbers=st.lists(st.integers(0, 5000), min_size=2, max_size=30))
def test_elements_do_not_depend_on_what_was_asked_before(length: int, numbers: list[int]) -> None:
    there = [permutation_at(number, length, 7) for number in numbers]
    back = [permutation_at(number, length, 7) for number in reversed(numbers)]
    assert there == back[::-1]


def test_epochs_and_keys_differ() -> None:
    orders = {
        tuple(permutation_at(epoch * 50 + i, 50, key) for i in range(50))
        for epoch in (0, 1, 2)
        for key in (0, 1)
    }
    assert len(orders) == 6


def test_every_element_comes_first_equally_often() -> None:
    firsts = np.bincount([permutation_at(epoch * 4, 4, 3) for epoch in range(4000)], minlength=4)
    assert np.abs(firsts - 1000).max() < 5 * np.sqrt(750)


@pytest.mark.parametrize(("number", "length"), [(0, 0), (-1, 3)])
def test_nonsense_is_refused(number: int, length: int) -> None:
    with pytest.raises(ValueError, match="sample"):
        permutation_at(number, length, 0)


def test_the_numbers_are_those_of_yesterday() -> None:
    """A change here is another order of tiles for every run that is resumed."""
    assert [permutation_at(i, 10, stream_key(2024, "source order")) for i in range(10)] == PERMUTATION
    assert sample_rng(2024, 5, "geometry").integers(1000, size=4).tolist() == DRAWN


def test_streams_samples_and_seeds_are_independent() -> None:
    draws = {
        tuple(sample_rng(seed, number, stream).integers(2**32, size=2).tolist())
        for seed in (0, 1, -1)
        for number in (0, 1, 11)
        for stream in ("a", "b", "b/1")
    }
    assert len(draws) == 27


PERMUTATION = [9, 4, 5, 3, 1, 2, 8, 7, 0, 6]
DRAWN = [275, 174, 113, 517]
