"""Sample i: permutations that hold every element, the same tomorrow, and streams that do not meet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.core.sampling import WindowedOrder, permutation_at, sample_rng, stream_key


@given(length=st.integers(1, 300), epoch=st.integers(0, 10**9), key=st.integers(0, 2**128 - 1))
def test_an_epoch_is_a_permutation(length: int, epoch: int, key: int) -> None:
    numbers = range(epoch * length, (epoch + 1) * length)
    assert sorted(permutation_at(number, length, key) for number in numbers) == list(range(length))


@given(length=st.integers(20, 200), numbers=st.lists(st.integers(0, 5000), min_size=2, max_size=30))
def test_elements_do_not_depend_on_what_was_asked_before(length: int, numbers: list[int]) -> None:
    there = [permutation_at(number, length, 7) for number in numbers]
    back = [permutation_at(number, length, 7) for number in reversed(numbers)]
    assert there == back[::-1]


@given(
    groups=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    window=st.integers(1, 15),
    epoch=st.integers(0, 1000),
    key=st.integers(0, 99),
)
def test_a_windowed_epoch_is_a_permutation_of_few_groups_at_a_time(
    groups: list[int], window: int, epoch: int, key: int
) -> None:
    order = WindowedOrder(np.array(groups, np.int32), window, key)
    drawn = [order.at(number) for number in range(epoch * len(groups), (epoch + 1) * len(groups))]
    assert sorted(drawn) == list(range(len(groups)))
    last = {group: place for place, group in enumerate(groups[thing] for thing in drawn)}
    first = {group: place for place, group in reversed(list(enumerate(groups[thing] for thing in drawn)))}
    for place in range(len(drawn)):
        assert sum(first[group] <= place <= last[group] for group in first) <= window
    if max(groups) < window:
        numbers = range(epoch * len(groups), (epoch + 1) * len(groups))
        assert drawn == [permutation_at(number, len(groups), key) for number in numbers]


def test_windows_hold_other_groups_in_every_epoch_and_other_orders_inside() -> None:
    group_N = np.repeat(np.arange(40, dtype=np.int32), 5)
    order = WindowedOrder(group_N, 10, 3)
    windows = [
        [frozenset(int(group_N[order.at(200 * epoch + 50 * w + i)]) for i in range(50)) for w in range(4)]
        for epoch in range(3)
    ]
    assert {len(window) for epoch in windows for window in epoch} == {10}
    assert len({window for epoch in windows for window in epoch}) == 12
    things = [[order.at(200 * epoch + i) for i in range(200)] for epoch in (0, 1)]
    runs = sum(group_N[a] == group_N[b] for a, b in zip(things[0], things[0][1:], strict=False))
    assert runs < 50  # of 199 neighbours; a tenth would be 20, groups in a row 160
    assert things[0] != things[1]


def test_a_windowed_order_is_refused_nonsense() -> None:
    some = np.zeros(3, np.int32)
    for arguments in ((some[:0], 1), (some, 0)):
        with pytest.raises(ValueError, match="things in windows"):
            WindowedOrder(*arguments, key=0)
    with pytest.raises(ValueError, match="sample -1"):
        WindowedOrder(some, 1, 0).at(-1)


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
