"""Profiles of strips, and what they say about seams: border gradient, line excess, sharpness modulation.

All three compare places of the lattice with other places a few pixels away in the same tissue, and then the
output with the source measured by the same code: what the tissue does, it does to both and cancels.

Why the control lines are *all* other lines of the strip and not a few random ones: the mean over every
phase is what random phases estimate, without their noise; the lengths are the strip's in both cases.

Why controls lie a multiple of 8 px away from their line: most slides are JPEG, whose 8 x 8 blocks raise the
source's gradient at every eighth column (by 35 % in CMU-1-Small-Region), and strides are multiples of 8. A
generator that removes those blocks would seem to differ from its source at tile borders.

Why confidence intervals come from strips: pixels of a strip, and lines of a strip, depend on each other.
Strips are drawn with replacement (bootstrap), and the standard error is widened by Student's quantile for
the number of strips, because the percentiles of a bootstrap over a handful of units are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from wsi_pipeline.core.grid import TileGrid
from wsi_pipeline.core.protocols import U8_HWC, View
from wsi_pipeline.evaluation.fields import MARGIN, OPTICAL_DENSITY, Lines, Strip, channel_mean, stained

__all__ = [
    "F64",
    "Kind",
    "StripProfile",
    "border_gradient",
    "figure",
    "finite",
    "line_excess",
    "no_figure",
    "profile_strip",
    "sharpness",
    "student",
]

F64: TypeAlias = npt.NDArray[np.float64]
Kind: TypeAlias = Literal["tile", "cell"]

_NEAREST, _FARTHEST = 6, 20
_MIN_LINE_PX = 32
_MIN_SIDE_PX = 2 * _MIN_LINE_PX
_JPEG_BLOCK = 8
_MIN_ZONE_PX = 256
_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class StripProfile:
    """What is kept of one strip; index 0 of a leading axis of two is the output, 1 the source.

    ``gradient_sums`` [2, W] float64: sums of |dOD| between columns c - 1 and c over pairs of tissue pixels,
    mean over R, G, B; ``pairs`` [W]: their number; ``period``
    bool [W]: columns that belong to this strip and to no other; ``on`` bool [W] for each kind of line, of
    the whole strip; ``away``: columns near no line. ``laplace`` [2, 2, 3]: sum of squares, sum and number of
    Laplacians (grey levels) at overlap centres (0) and at tile centres (1).
    """

    gradient_sums: F64
    pairs: F64
    period: npt.NDArray[np.bool_]
    on: Mapping[Kind, npt.NDArray[np.bool_]]
    away: npt.NDArray[np.bool_]
    laplace: F64


def profile_strip(
    source: View, output: View, strip: Strip, grid: TileGrid, lines: Lines, min_tissue: float = 0.05
) -> StripProfile | None:
    """Profile one strip; None where less than ``min_tissue`` of it is tissue."""
    before_HWC = strip.read(source)
    tissue_HW = stained(before_HWC) & strip.inside(grid)
    if tissue_HW.mean() < min_tissue:
        return None
    positions = strip.origin - MARGIN + np.arange(tissue_HW.shape[1], dtype=np.int64)
    pair_HW = np.zeros(tissue_HW.shape, np.bool_)
    pair_HW[:, 1:] = tissue_HW[:, 1:] & tissue_HW[:, :-1]
    away = lines.away(positions)
    zones = _zones(positions, strip.origin, grid) & away
    both = (strip.read(output), before_HWC)
    return StripProfile(
        gradient_sums=np.stack([_gradient_sums(pixels, pair_HW) for pixels in both]),
        pairs=pair_HW.sum(axis=0).astype(np.float64),
        period=(positions >= strip.origin) & (positions < strip.origin + grid.stride),
        on={"tile": np.isin(positions, lines.tile), "cell": np.isin(positions, lines.cell)},
        away=away,
        laplace=np.stack([_laplace(pixels, tissue_HW, zones) for pixels in both]),
    )


def _gradient_sums(pixels_HWC: U8_HWC, pair_HW: npt.NDArray[np.bool_]) -> F64:
    od_HWC = OPTICAL_DENSITY[pixels_HWC]
    step_HW = channel_mean(np.abs(od_HWC[:, 1:] - od_HWC[:, :-1]))
    sums = np.zeros(pair_HW.shape[1])
    sums[1:] = np.where(pair_HW[:, 1:], step_HW, 0).sum(axis=0, dtype=np.float64)
    return sums


def _zones(positions: npt.NDArray[np.int64], origin: int, grid: TileGrid) -> npt.NDArray[np.bool_]:
    """Bool [2, W]: columns around the overlap's centre and around the tile's, brought into the period.

    Lines have to be left out of them, or a step would count as detail.
    """
    stride = grid.stride
    half = int(np.clip(grid.overlap // 8, 4, MARGIN - 4))
    centres = (origin + (grid.overlap // 2) % stride, origin + (grid.write_side // 2) % stride)
    return np.stack([np.abs(positions + 0.5 - centre) <= half for centre in centres])


def _laplace(pixels_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], zones: npt.NDArray[np.bool_]) -> F64:
    """Sum of squares, sum and number of five-point Laplacians of the grey image in both zones, [2, 3]."""
    grey = channel_mean(pixels_HWC.astype(np.float32))
    inner = (
        grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    ).astype(np.float64)
    # Beyond the slide is white: an edge pixel's Laplacian would be an artefact of it.
    valid = tissue_HW[1:-1, 1:-1] & tissue_HW[1:-1, :-2] & tissue_HW[1:-1, 2:]
    sums = np.zeros((2, 3))
    for zone, columns in enumerate(zones[:, 1:-1]):
        values = inner[:, columns][valid[:, columns]]
        sums[zone] = (values * values).sum(), values.sum(), values.size
    return sums


def border_gradient(profiles: Sequence[StripProfile], kind: Kind = "tile") -> dict[str, Any]:
    """M1: mean |dOD| across the lines of one kind over that across control lines; output over source.

    Passes where the 95 % interval of the ratio of ratios lies inside [0.98, 1.02], fails where it lies
    neither inside nor around 1.
    """
    rows, count = [], 0
    for profile in profiles:
        lines = np.flatnonzero(profile.period & profile.on[kind] & (profile.pairs > 0)).tolist()
        expected = [_expected(profile, at, profile.period) for at in lines]
        pairs = [(at, control) for at, control in zip(lines, expected, strict=True) if control is not None]
        if pairs:
            across = sum(profile.gradient_sums[:, at] for at, _ in pairs)
            beside = sum(profile.pairs[at] * control for at, control in pairs)
            rows.append(np.concatenate([across, beside]))
            count += len(pairs)
    if not count:
        return no_figure("no lattice line crosses tissue")

    def ratios(table: F64) -> F64:
        """[..., 4] sums to [..., 3]: output, source, and their ratio."""
        contrast = table[..., 0:2] / table[..., 2:4]
        return np.concatenate([contrast, contrast[..., 0:1] / contrast[..., 1:2]], axis=-1)

    value, interval, _ = _estimate(np.array(rows), ratios)
    return figure(value, "ratio", interval, count, _equivalent(interval, 1.0, 0.02))


def line_excess(profiles: Sequence[StripProfile], kind: Kind = "tile") -> dict[str, Any]:
    """M2: ``e_c = prof(c) / mean(prof(c -+ 6..20)) - 1`` of every line of one kind, and its mean.

    With controls a multiple of 8 px away, 6..20 px are four neighbours, at -+8 and -+16 px.
    A line counts once for every strip that it crosses.

    ``z`` is the mean difference to the source in standard errors. Passes where that difference is at most
    0.5 % and its 95 % interval contains 0.
    """
    rows = []
    for profile in profiles:
        at = np.flatnonzero(profile.period & profile.on[kind])
        excess = [e for c in at if (e := _excess(profile, int(c))) is not None]
        if excess:
            rows.append([*np.sum(excess, axis=0), len(excess)])
    if not rows:
        return no_figure("no lattice line has enough tissue on both sides")

    def means(table: F64) -> F64:
        """[..., 3] sums to [..., 3]: output, source, and their difference."""
        mean = table[..., 0:2] / table[..., 2:3]
        return np.concatenate([mean, mean[..., 0:1] - mean[..., 1:2]], axis=-1)

    value, interval, error = _estimate(np.array(rows), means)
    difference = float(value[2])
    passed = _equivalent(interval, 0.0, 0.005)
    if passed is None and interval is not None and abs(difference) <= 0.005:
        passed = True
    z = None if error is None else 0.0 if difference == 0 else finite(difference / error if error else None)
    count = int(sum(row[2] for row in rows))
    return figure(value, "difference", interval, count, passed) | {"z": z}


def _excess(profile: StripProfile, at: int) -> F64 | None:
    """(output, source) excess of the line at a column, or None where there is too little tissue."""
    if profile.pairs[at] < _MIN_LINE_PX:
        return None
    distance = np.abs(np.arange(len(profile.pairs)) - at)
    beside = _expected(profile, at, (distance >= _NEAREST) & (distance <= _FARTHEST), _MIN_SIDE_PX)
    if beside is None:
        return None
    return np.asarray(profile.gradient_sums[:, at] / profile.pairs[at] / beside - 1, np.float64)


def _expected(profile: StripProfile, at: int, where: npt.NDArray[np.bool_], min_pairs: int = 1) -> F64 | None:
    """(output, source) mean |dOD| of the control lines of a column, None on too little tissue."""
    columns = where & profile.away & ((np.arange(len(where)) - at) % _JPEG_BLOCK == 0)
    pairs = profile.pairs[columns].sum()
    mean = profile.gradient_sums[:, columns].sum(axis=1) / max(pairs, 1.0)
    return np.asarray(mean, np.float64) if pairs >= min_pairs and (mean > 0).all() else None


def sharpness(profiles: Sequence[StripProfile]) -> dict[str, Any]:
    """M5: variance of the Laplacian at overlap centres over that at tile centres; output over source.

    Catches the blur bands that averaging of disagreeing tiles leaves, and that a gradient measure praises.
    Passes inside [0.97, 1.03], fails outside unless the 95 % interval contains 1.
    """
    table = np.array([profile.laplace.ravel() for profile in profiles])
    pixels = int(table[:, [2, 5]].sum(axis=0).min()) if len(table) else 0
    if pixels < _MIN_ZONE_PX:
        return no_figure("no overlap centre or no tile centre lies on tissue")

    def ratios(rows: F64) -> F64:
        sums = rows.reshape(*rows.shape[:-1], 2, 2, 3)
        variance = sums[..., 0] / sums[..., 2] - (sums[..., 1] / sums[..., 2]) ** 2
        contrast = variance[..., 0] / variance[..., 1]
        return np.concatenate([contrast, contrast[..., 0:1] / contrast[..., 1:2]], axis=-1)

    value, interval, _ = _estimate(table, ratios)
    passed = bool(0.97 <= value[2] <= 1.03) or _equivalent(interval, 1.0, 0.0)
    return figure(value, "ratio", interval, len(profiles), passed)


def _equivalent(interval: tuple[float, float] | None, ideal: float, tolerance: float) -> bool | None:
    """True where an interval lies within the tolerance of the ideal, False where it excludes even the ideal.

    None where it is too wide to tell: on a few lines nothing is proved, neither a seam nor its absence.
    """
    if interval is None:
        return None
    low, high = interval
    if ideal - tolerance <= low and high <= ideal + tolerance:
        return True
    return None if low <= ideal <= high else False


def _estimate(
    table: F64, statistic: Callable[[F64], F64]
) -> tuple[F64, tuple[float, float] | None, float | None]:
    """Value of a statistic of column sums [..., K] -> [..., 3], with interval and error of its last entry.

    ``table`` is [strips, K].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(table.sum(axis=0))
        count = len(table)
        if count < 2 or not np.isfinite(value[2]):
            return value, None, None
        drawn = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), _DRAWS)
        error = _standard_error(statistic(drawn @ table)[:, 2], count)
    if error is None:
        return value, None, None
    reach = student(count) * error
    return value, (float(value[2]) - reach, float(value[2]) + reach), error


def student(count: int) -> float:
    """How many standard errors of a mean of ``count`` units its 95 % interval reaches to each side."""
    return float(stdtrit(count - 1, 0.975))


def _standard_error(draws: F64, count: int) -> float | None:
    """Standard error from bootstrap draws over ``count`` units, corrected for the units' small number."""
    kept = draws[np.isfinite(draws)]
    if len(kept) < _DRAWS // 2:
        return None
    # A draw that equals all others only up to rounding is no spread.
    spread = float(kept.std()) if np.ptp(kept) > 0 else 0.0
    return spread * float(np.sqrt(count / (count - 1)))


def figure(
    value: F64, relation: str, interval: tuple[float, float] | None, count: int, passed: bool | None
) -> dict[str, Any]:
    """One figure as JSON values; ``pass`` is None where there is no finite value, or nothing is proved."""
    judged = bool(np.isfinite(value).all()) and interval is not None and passed is not None
    return {
        "out": finite(value[0]),
        "src": finite(value[1]),
        relation: finite(value[2]),
        "ci95": None if interval is None else [finite(interval[0]), finite(interval[1])],
        "n": count,
        "pass": passed if judged else None,
        "reason": None if judged else "too little tissue between tiles to tell",
    }


def no_figure(reason: str) -> dict[str, Any]:
    """A figure that could not be measured, and why."""
    return {"out": None, "src": None, "ci95": None, "n": 0, "pass": None, "reason": reason}


def finite(value: float | None) -> float | None:
    """A JSON number, or None for what JSON has no number for."""
    return None if value is None or not np.isfinite(value) else round(float(value), 6)
