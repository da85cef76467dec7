"""The figures of a reader study: exact intervals, equivalence, agreement, and how many images they take.

Sources: C. Clopper and E. Pearson, Biometrika 1934 (intervals of shares); J. Hanley and B. McNeil, Radiology
1982 (variance of the AUC), taken at the bounds as R. Newcombe proposes (Statistics in Medicine 2006), so that
an AUC of 1 does not claim certainty; J. Cohen, 1960 (kappa); D. Schuirmann, 1987 (two one-sided tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

__all__ = ["Estimate", "auc", "equivalence_p", "kappa", "share", "size_for_equivalence", "size_for_interval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its interval, from ``n`` answers."""

    value: float
    low: float
    high: float
    n: int


def share(hits: int, n: int, level: float = 0.95) -> Estimate:
    """A share with its exact binomial interval (Clopper and Pearson)."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return Estimate(value=hits / n, low=low, high=high, n=n)


def auc(synthetic: Sequence[float], real: Sequence[float], level: float = 0.95) -> Estimate:
    """How often a synthetic image scores higher than a real one, ties by half; 0.5 is chance."""
    m, n = len(synthetic), len(real)
    above_MN = np.sign(np.subtract.outer(np.asarray(synthetic), np.asarray(real)))
    value = float((above_MN + 1).mean() / 2)
    z = float(stats.norm.ppf((1 + level) / 2))

    def gap(a: float) -> float:
        both = (m - 1) * (a / (2 - a) - a * a) + (n - 1) * (2 * a * a / (1 + a) - a * a)
        return (a - value) ** 2 - z * z * (a * (1 - a) + both) / (m * n)

    low = 0.0 if value == 0 else float(optimize.brentq(gap, 0, min(value, 1 - 1e-9)))
    high = 1.0 if value == 1 else float(optimize.brentq(gap, max(value, 1e-9), 1))
    return Estimate(value=value, low=low, high=high, n=m + n)


def kappa(first: Sequence[object], second: Sequence[object]) -> float:
    """Cohen's kappa of two readers on the same images: 1 agree always, 0 no more than by chance (also where
    both say one word only, or judged nothing)."""
    n = max(len(first), 1)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum((first.count(word) / n) * (second.count(word) / n) for word in {*first, *second})
    return (agreed - chance) / (1 - chance) if chance < 1 else 0.0


def equivalence_p(hits: int, n: int, margin: float) -> float:
    """p that the accuracy lies within 0.5 +- ``margin`` (TOST): the larger of two exact one-sided tests."""
    above = float(stats.binom.sf(hits - 1, n, 0.5 - margin))
    below = float(stats.binom.cdf(hits, n, 0.5 + margin))
    return max(above, below)


def size_for_interval(half_width: float = 0.1, level: float = 0.95) -> int:
    """Images a reader has to judge for an accuracy known to +- ``half_width`` (at 0.5, the worst case)."""
    return int(np.ceil((stats.norm.ppf((1 + level) / 2) / half_width) ** 2 / 4))


def size_for_equivalence(
    margin: float = 0.1, power: float = 0.9, alpha: float = 0.05, *, both: bool = False
) -> int:
    """Images for TOST: (z_alpha + z_power)^2 / 4 margin^2, the usual figure, which grants each of the two
    tests its ``power``; at a true accuracy of 0.5 they pass together less often (0.9 each, 0.8 together).
    ``both``: the ``power`` of the two together."""
    z_power = stats.norm.ppf((1 + power) / 2 if both else power)
    return int(np.ceil(((stats.norm.ppf(1 - alpha) + z_power) / margin) ** 2 / 4))
