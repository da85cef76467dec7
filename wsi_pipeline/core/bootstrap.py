"""Confidence intervals that respect patients: whole groups are resampled, never single tiles.

Why: tiles of one patient are alike. An interval over tiles is as narrow as if every tile were a patient of
its own, and calls differences proven that the next ten patients will undo.

Why the interval is laid around the value: FID grows when a set holds fewer different images, and a resample
always does (about 63 % of the groups). Its percentiles can therefore lie wholly above the value itself. The
spread of the resamples is kept, their shift is not; the bias of a small N is in the value and stays there.

Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "bootstrap_by_group", "group_numbers"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where a figure may lie with the confidence ``level``; from ``draws`` resamples of ``groups`` groups."""

    low: float
    high: float
    level: float
    draws: int
    groups: int


def group_numbers(groups: Sequence[Sequence[str]]) -> tuple[list[str], list[I64]]:
    """Names of all groups, sorted, and for each set of images the group number of each of its images."""
    names = sorted({str(name) for labels in groups for name in labels})
    number = {name: index for index, name in enumerate(names)}
    return names, [np.array([number[str(name)] for name in labels], np.int64) for labels in groups]


def bootstrap_by_group(
    groups: Sequence[Sequence[str]],
    statistic: Callable[[Sequence[I64]], float],
    *,
    draws: int,
    seed: int,
    value: float | None = None,
    level: float = 0.95,
) -> Interval | None:
    """Interval of a figure, by resampling groups (patients) with replacement.

    ``groups``: for each set of images (generated, reference) the group of each image. A group that is in
    several sets is drawn for all of them at once; groups are drawn among those that are in the same sets, so
    that no set ever comes out empty. ``statistic`` gets, for each set, how many times each image counts.
    The interval lies around ``value``, by default the statistic of the images as they are. None where a set
    has fewer than two groups: then nothing is known of how patients differ.
    """
    names, numbers = group_numbers(groups)
    if draws < 2 or not numbers or min(len(np.unique(number)) for number in numbers) < 2:
        return None
    strata = _strata(len(names), numbers)
    rng = np.random.Generator(np.random.Philox(seed))
    found = np.empty(draws)
    for draw in range(draws):
        counts_G = np.zeros(len(names), np.int64)
        for members in strata:
            np.add.at(counts_G, members[rng.integers(0, len(members), len(members))], 1)
        found[draw] = statistic([counts_G[number] for number in numbers])
    found = found[np.isfinite(found)]
    if len(found) < 2:
        return None
    if value is None:
        value = statistic([np.ones(len(number), np.int64) for number in numbers])
    low, high = np.quantile(found, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    shift = value - float(found.mean())
    return Interval(
        low=float(low) + shift, high=float(high) + shift, level=level, draws=len(found), groups=len(names)
    )


def _strata(count: int, numbers: Sequence[I64]) -> list[I64]:
    """Groups that occur in the same sets."""
    code_G = np.zeros(count, np.int64)
    for bit, number in enumerate(numbers):
        code_G[np.unique(number)] |= 1 << bit
    return [np.flatnonzero(code_G == code) for code in np.unique(code_G)]
