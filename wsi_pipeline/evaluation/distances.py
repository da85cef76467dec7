"""Distances between two sets of tiles: features once, then FID, KID and their intervals by patient.

A further distance is a further function of two ``StoredStatistics`` and one line of ``DISTANCES``.

Why precision, recall, density and coverage come with two halves of the reference: two draws of one
distribution do not reach 1, so the figure alone says nothing. Their intervals draw patients again but keep
the manifolds, which would shrink with every patient that is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from wsi_pipeline.core.bootstrap import I64, Interval, bootstrap_by_group, group_numbers
from wsi_pipeline.core.fid import (
    F64,
    KernelSums,
    factor,
    frechet_between,
    frechet_distance,
    kernel_distance,
    statistics,
    symmetric_root,
)
from wsi_pipeline.core.inception_score import inception_score
from wsi_pipeline.core.manifold import K_DENSITY, Overlap, overlap
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.evaluation.figures import Figure, averaged
from wsi_pipeline.evaluation.settings import Emit, EvaluateConfig, Progress, Stage
from wsi_pipeline.evaluation.statistics_file import StoredStatistics
from wsi_pipeline.evaluation.tile_sets import TileSet
from wsi_pipeline.models.features import F32, FeatureExtractor

__all__ = ["DISTANCES", "extract", "set_distances"]

Sides: TypeAlias = tuple[StoredStatistics, StoredStatistics]
"""Generated and reference."""
Statistic: TypeAlias = Callable[[Sequence[I64]], float]

_FIXED = "\0fixed"
"""The one group of a side whose patients nobody knows: it is never drawn again, so it counts once."""


def extract(
    tiles: TileSet, extractor: FeatureExtractor, config: EvaluateConfig, emit: Emit
) -> StoredStatistics:
    """Features of all tiles as statistics; threads read tiles, one batch ahead of the network."""
    emit(Stage(stage=f"features of {tiles.role} tiles"))
    found: list[F32] = []
    with ThreadPoolExecutor(config.workers, "tiles") as pool:

        def queued(start: int) -> list[Future[U8_HWC]]:
            rows = range(start, min(start + config.batch, len(tiles)))
            return [pool.submit(tiles.read, row) for row in rows]

        coming = queued(0)
        for start in range(0, len(tiles), config.batch):
            batch, coming = coming, queued(start + config.batch)
            found.append(extractor(np.stack([tile.result() for tile in batch])))
            emit(Progress(done=start + len(batch), total=len(tiles)))
    facts = statistics(
        np.concatenate(found), extractor=extractor.name, resize=extractor.resize, encoding=tiles.encoding
    )
    return StoredStatistics(statistics=facts, groups=tiles.groups, digest=extractor.digest)


def set_distances(sides: Sides, config: EvaluateConfig, emit: Emit, *, suffix: str = "") -> list[Figure]:
    """The distances that are switched on and can be told; their keys end in ``suffix``."""
    logits = sides[0].statistics.extractor == "inception_logits"
    wanted = {"fid": config.fid, "kid": config.kid}
    wanted |= {"overlap": config.overlap and not suffix, "inception_score": logits and not suffix}
    found = []
    for key, distance in DISTANCES.items():
        if not wanted.get(key, True):
            continue
        emit(Stage(stage=key.replace("_", " ").upper() + (" before translation" if suffix else "")))
        found += [replace(figure, key=figure.key + suffix) for figure in distance(sides, config, emit)]
    return found


def _fid(sides: Sides, config: EvaluateConfig, emit: Emit) -> list[Figure]:
    value = frechet_distance(sides[0].statistics, sides[1].statistics)
    fixed = [None if _moves(side) else _root(side) for side in sides]

    def resampled(counts: Sequence[I64]) -> float:
        left = iter(counts)
        a, b = (
            factor(side.statistics.features, next(left)) if known is None else known  # type: ignore[arg-type]
            for side, known in zip(sides, fixed, strict=True)
        )
        return frechet_between(a, b)

    interval, note = _interval(sides, resampled, value, config, emit)
    if interval is not None:
        interval = replace(interval, low=max(interval.low, 0.0))  # a distance of Gaussians is never less
    return [Figure(key="fid", value=value, interval=interval, tiles=sides[0].statistics.n, note=note)]


def _root(side: StoredStatistics) -> tuple[F64, F64]:
    return side.statistics.mu.astype(np.float64), symmetric_root(side.statistics.sigma)


def _kid(sides: Sides, config: EvaluateConfig, emit: Emit) -> list[Figure]:
    a, b = (side.statistics.features for side in sides)
    if a is None or b is None:
        return []
    value = kernel_distance(a, b, subsets=config.kid_subsets, size=config.kid_size, seed=config.seed)
    labels = [side.groups if side.groups is not None else [_FIXED] * side.statistics.n for side in sides]
    names, numbers = group_numbers(labels)
    moving = [number for side, number in zip(sides, numbers, strict=True) if _moves(side)]
    sums = KernelSums.of(a, numbers[0], b, numbers[1]) if config.draws and moving else None

    def resampled(counts: Sequence[I64]) -> float:
        counts_G = np.ones(len(names), np.int64)
        for number, count in zip(moving, counts, strict=True):
            counts_G[number] = count
        return sums.distance(counts_G) if sums is not None else value

    interval, note = _interval(sides, resampled, value, config, emit)
    return [Figure(key="kid", value=value, interval=interval, tiles=len(a), note=note)]


def _overlap(sides: Sides, config: EvaluateConfig, emit: Emit) -> list[Figure]:
    """Precision, recall, density and coverage, each beside that of two halves of the reference."""
    a, b = (side.statistics.features for side in sides)
    if a is None or b is None or min(len(a), len(b)) <= K_DENSITY:
        return []
    found, halves = overlap(a, b), _halves(sides[1], config.seed)
    figures = []
    for key, side in (("precision", 0), ("recall", 1), ("density", 0), ("coverage", 1)):
        note = "no real halves to compare with: too few tiles"
        if halves is not None:
            real = float(getattr(halves, key).mean())
            note = f"real halves: {real:.3f} ({len(b) // 2} tiles each)"
        values_N, groups = getattr(found, key), sides[side].groups or [_FIXED] * sides[side].statistics.n
        figures.append(averaged(key, values_N, groups, draws=config.draws, seed=config.seed, note=note))
    return [figure for figure in figures if figure is not None]


def _halves(side: StoredStatistics, seed: int) -> Overlap | None:
    """One half of the patients (of the tiles, where there are no patients) against the other; one patient
    may lie in both."""
    features = side.statistics.features
    if features is None or len(features) // 2 <= K_DENSITY:
        return None
    groups = side.groups if len(set(side.groups or ())) > 1 else None
    names, (number_N,) = group_numbers([groups or [str(row) for row in range(len(features))]])
    place_G = np.random.Generator(np.random.Philox(seed)).permutation(len(names))
    order_N = np.argsort(place_G[number_N], kind="stable")
    half = len(features) // 2
    return overlap(features[order_N[:half]], features[order_N[half:]])


def _inception_score(sides: Sides, config: EvaluateConfig, emit: Emit) -> list[Figure]:
    """Of the generated side, whose features are logits."""
    a, b = (side.statistics for side in sides)
    if a.features is None:
        return []
    value, spread = inception_score(a.features, splits=min(10, a.n))
    note = f"standard deviation over ten shuffled parts {spread:.3f}"
    if b.features is not None:
        note += f"; reference {inception_score(b.features, splits=min(10, b.n))[0]:.3f}"
    return [Figure(key="inception_score", value=value, interval=None, tiles=a.n, note=note)]


Distance: TypeAlias = Callable[[Sides, EvaluateConfig, Emit], list[Figure]]

DISTANCES: dict[str, Distance] = dict(fid=_fid, kid=_kid, overlap=_overlap, inception_score=_inception_score)
"""Name -> function that gives no, one or several figures, in the order of reports."""


def _moves(side: StoredStatistics) -> bool:
    """Whether patients of a side can be drawn again."""
    return side.groups is not None and side.statistics.features is not None


def _interval(
    sides: Sides, resampled: Statistic, value: float, config: EvaluateConfig, emit: Emit
) -> tuple[Interval | None, str]:
    """The interval around ``value``, and in words what it does not cover or why there is none."""
    if config.draws == 0:
        return None, ""
    moving = [side.groups for side in sides if side.groups is not None and _moves(side)]
    if not moving:
        return None, "no interval: no patients are stated"
    done = 0

    def counted(counts: Sequence[I64]) -> float:
        nonlocal done
        done += 1
        emit(Progress(done=min(done, config.draws), total=config.draws))
        return resampled(counts)

    interval = bootstrap_by_group(moving, counted, draws=config.draws, seed=config.seed, value=value)
    if interval is None:
        return None, "no interval: it needs two patients on each side"
    if len(moving) < len(sides):
        which = "generated" if _moves(sides[0]) else "reference"
        return interval, f"interval over patients of the {which} side only"
    return interval, ""
