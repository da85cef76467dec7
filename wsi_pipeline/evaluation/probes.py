"""Figures that need more than two sets and pairs: how alike generated tiles are to each other, what a
translator does to turned tiles, and whether a segmenter finds the tissues of the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.bootstrap import I64, bootstrap_by_group
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.geometry import TileIndex as Place
from wsi_pipeline.core.paired import confusion, diversity, equivariance_error, placed, tissue_f1
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC, Tile, TileBatch
from wsi_pipeline.core.structure import compare_structure
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.evaluation.figures import Figure, averaged
from wsi_pipeline.evaluation.pairs import Pairs
from wsi_pipeline.evaluation.settings import Emit, EvaluateConfig, Progress, Stage
from wsi_pipeline.evaluation.tile_sets import TileSet, open_tiles, pair_up
from wsi_pipeline.generators import make_generator

__all__ = ["Segmenter", "load_segmenter", "tissue_figures", "translator_figures", "variety_figures"]

Segmenter: TypeAlias = Callable[[U8_HWC], npt.NDArray[Any]]
"""Tile [H, W, 3] uint8 -> class of each pixel [H, W], whole numbers, 0: background."""

_CLASSES = 32
_TRIED = 8  # source tiles that a translator gets in eight poses
_STEP = 64  # px; sides of tiles that every translator takes are multiples
_NO_MPP = (0.5, 0.5)


def variety_figures(
    generated: TileSet, reference: TileSet | None, config: EvaluateConfig, emit: Emit
) -> list[Figure]:
    """MS-SSIM between generated tiles, beside that between reference tiles."""
    if config.diversity == 0:
        return []
    emit(Stage(stage="MS-SSIM between tiles"))
    sides = [side for side in (generated, reference) if side is not None]
    values = [
        diversity(side.read, len(side), pairs=config.diversity, seed=config.seed, peak=255.0)
        for side in sides
    ]
    note = "no interval: pairs share tiles" + "".join(f"; reference: {value:.3f}" for value in values[1:])
    return [Figure(key="diversity", value=values[0], interval=None, tiles=len(generated), note=note)]


def translator_figures(source: TileSet, config: EvaluateConfig, emit: Emit) -> list[Figure]:
    """Equivariance error over turns and flips, and displacement of haematoxylin, of ``config.translator`` on
    some of the source tiles, at their own side, cut to a multiple of 64 px. ConfigError for a generator that
    cannot be made so."""
    if config.translator is None:
        return []
    name, _, weights = config.translator.partition("=")
    side = min(source.size) // _STEP * _STEP
    options: dict[str, Any] = {"tile": side}
    if weights:
        options |= {"weights": weights, "device": config.device}
    generator = make_generator(name, options)
    rows = np.random.Generator(np.random.Philox(config.seed)).permutation(len(source))[:_TRIED].tolist()
    tiles_BHWC = np.stack([source.read(row)[:side, :side] for row in rows])
    tissue_HW = np.ones((len(rows) * side, side), np.bool_)
    context = generator.prepare(
        tiles_BHWC.reshape(*tissue_HW.shape, 3), tissue_HW, source.mpp or generator.spec.mpp or _NO_MPP
    )
    where = Region(0, 0, side, side)
    tile = Tile(index=Place(0, 0), read=where, write=where)

    def translate(pixels_BHWC: U8_BHWC) -> U8_BHWC:
        return generator(TileBatch(tiles=(tile,), pixels_BHWC=pixels_BHWC, noise_key=config.seed), context)

    emit(Stage(stage="translator on turned tiles"))
    found: dict[str, list[float]] = {"equivariance": [], "translator_shift": []}
    for done, tile_HWC in enumerate(tiles_BHWC, 1):
        found["equivariance"].append(equivariance_error(translate, tile_HWC[None]))
        moved = compare_structure(tile_HWC, translate(tile_HWC[None])[0])
        found["translator_shift"].append(moved.shift_median)
        emit(Progress(done=done, total=len(rows)))
    labels = [source.groups[row] for row in rows]
    every = {key: np.array(values) for key, values in found.items()}
    figures = (averaged(key, v, labels, draws=config.draws, seed=config.seed) for key, v in every.items())
    return [figure for figure in figures if figure is not None]


def load_segmenter(name: str) -> Segmenter:
    """The function of ``package.module:function``; ConfigError where there is none."""
    module, _, function = name.partition(":")
    try:
        found: Segmenter = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"segmenter {name}: cannot be imported ({error}); give package.module:function"
        ) from error
    return found


def tissue_figures(
    generated: TileSet,
    truth: TileSet,
    source: TileSet | None,
    pairs: Mapping[str, Pairs],
    config: EvaluateConfig,
    emit: Emit,
) -> list[Figure]:
    """F1 of tissue maps against the truth's, and where it lies between floor and ceiling, if both are there:
    F1 of the sources, and of the true neighbouring section (``config.neighbour``)."""
    if config.segmenter is None:
        return []
    segment = load_segmenter(config.segmenter)
    partners = {"": (generated, {row: row for row in range(len(generated))})}
    if source is not None:
        partners["floor"] = source, dict(pairs["source"])
    if config.neighbour is not None:
        beside = open_tiles(config.neighbour, "reference", config, truth)
        nearby = dict(pair_up(truth, beside))
        partners["ceiling"] = beside, {a: nearby[b] for a, b in pairs["reference"] if b in nearby}
    whole = [pair for pair in pairs["reference"] if all(pair[0] in rows for _, rows in partners.values())]
    tables = {case: np.zeros((len(whole), _CLASSES, _CLASSES), np.int64) for case in partners}
    emit(Stage(stage="tissue maps"))
    for number, (row, real) in enumerate(whole):
        true_HW = segment(truth.read(real))
        for case, (side, rows) in partners.items():
            tables[case][number] = confusion(true_HW, segment(side.read(rows[row])), classes=_CLASSES)
        emit(Progress(done=number + 1, total=len(whole)))

    def score(case: str, counts: Sequence[I64]) -> float:
        f1 = {each: tissue_f1(np.tensordot(counts[0], t, 1)).weighted for each, t in tables.items()}
        limits = {limit: f1.get(limit, math.nan) for limit in ("floor", "ceiling")}
        return placed(f1[""], **limits) if case == "_placed" else f1[case]

    ones = [np.ones(len(whole), np.int64)]
    said = [f"class {label} {f1:.3f}" for label, f1 in tissue_f1(tables[""].sum(axis=0)).per_class.items()]
    note = ", ".join(said + [f"{limit} {score(limit, ones):.3f}" for limit in tables if limit])
    groups = [[generated.groups[row] for row, _ in whole]]
    figures = []
    for case in ("", "_placed"):
        value, resampled = score(case, ones), partial(score, case)
        interval = bootstrap_by_group(groups, resampled, draws=config.draws, seed=config.seed, value=value)
        key, tiles = f"tissue_f1{case}", len(whole)
        figures.append(Figure(key=key, value=value, interval=interval, tiles=tiles, note=note))
    return [figure for figure in figures if math.isfinite(figure.value)]
