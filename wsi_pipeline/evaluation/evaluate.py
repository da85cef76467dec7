"""The story of an evaluation on one page: open the sides, measure sets, measure pairs, report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError
from wsi_pipeline.evaluation.cautions import side_warnings
from wsi_pipeline.evaluation.distances import extract, set_distances
from wsi_pipeline.evaluation.figures import EXPLAINED, Figure, averaged
from wsi_pipeline.evaluation.pairs import (
    F64,
    BatchMeasure,
    Pairs,
    load_dino,
    load_lpips,
    measure_pairs,
    to_source,
    to_truth,
)
from wsi_pipeline.evaluation.pictures import choose_pictures
from wsi_pipeline.evaluation.probes import (
    load_segmenter,
    tissue_figures,
    translator_figures,
    variety_figures,
)
from wsi_pipeline.evaluation.report import write_report
from wsi_pipeline.evaluation.result import EvaluationResult, ExtractorFacts, SideFacts, TileFigures
from wsi_pipeline.evaluation.settings import Emit, EvaluateConfig, Notice, Stage, ignore
from wsi_pipeline.evaluation.statistics_file import StoredStatistics, read_statistics, write_statistics
from wsi_pipeline.evaluation.tile_sets import TileSet, open_tiles, pair_up
from wsi_pipeline.generators._torch import choose_device
from wsi_pipeline.models.features import FeatureExtractor, make_extractor

__all__ = ["evaluate"]

_STATISTICS = ".npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """What was opened: tiles, or of the first two the statistics in a file. ``truth``: the reference, where
    it holds the true tiles; ``pairs``: rows that belong together, by role of the other side."""

    generated: TileSet | StoredStatistics
    reference: TileSet | StoredStatistics | None
    source: TileSet | None
    truth: TileSet | None
    pairs: Mapping[str, Pairs]


def evaluate(
    generated: str,
    reference: str | None = None,
    config: EvaluateConfig | None = None,
    *,
    report: Path | None = None,
    save_stats: Path | None = None,
    overwrite: bool = False,
    emit: Emit = ignore,
) -> EvaluationResult:
    """Judge generated tiles against a reference set, and against their sources (``config.source``).

    ``generated``, ``reference``: a folder of tiles, a tile index (.parquet), a slide, or statistics (.npz).
    ``report``: OUT.html, with OUT.png and OUT.json beside it; ``save_stats``: statistics of the generated
    side, to serve as a reference later. Raises ConfigError for settings and inputs that do not fit,
    SlideError for a tile that cannot be read, CheckpointError for weights, OutputError for what cannot be
    written; nothing is written before all is measured.
    """
    config = config or EvaluateConfig()
    files = _targets(generated, reference, config, report, save_stats, overwrite)
    sides = _open(generated, reference, config, emit)
    warnings = side_warnings(
        *(side for side in (sides.generated, sides.reference, sides.source) if side is not None)
    )
    extractor = _extractor(sides, config, save_stats)
    figures, stored = _set_figures(sides, extractor, config, emit)
    tiles, more, notes = _pair_figures(sides, config, emit)
    more += _probe_figures(sides, config, emit)
    order = list(EXPLAINED)
    result = EvaluationResult(
        figures=tuple(sorted([*figures, *more], key=lambda figure: order.index(figure.key))),
        sides=_facts(sides, generated, reference),
        extractor=None if extractor is None else _extractor_facts(extractor),
        warnings=(*warnings, *_distance_warnings(stored, config), *notes),
        seed=config.seed,
        tiles=tiles,
        files=files,
    )
    for warning in result.warnings:
        emit(Notice(message=warning))
    _write(result, sides, stored, config, emit)
    return result


def _targets(
    generated: str,
    reference: str | None,
    config: EvaluateConfig,
    report: Path | None,
    save_stats: Path | None,
    overwrite: bool,
) -> dict[str, Path]:
    """What will be written, by kind; every mistake that can be told now is told now."""
    if reference is None and config.source is None and save_stats is None:
        raise ConfigError(
            f"{generated}: there is nothing to compare it with; give --reference, --source or --save-stats"
        )
    if config.paired and reference is None:
        raise ConfigError("--paired: the true tiles are the reference; give --reference")
    if config.translator is not None and config.source is None:
        raise ConfigError("--translator: is tried on source tiles; give --source")
    if config.segmenter is not None and not config.paired:
        raise ConfigError("--segmenter: its maps are compared with those of true tiles; give --paired")
    if config.segmenter is not None:
        load_segmenter(config.segmenter)
    files: dict[str, Path] = {}
    if save_stats is not None:
        files["statistics"] = _ending(save_stats, _STATISTICS)
    if report is not None:
        page = _ending(report, ".html")
        files |= {"report": page, "picture": page.with_suffix(".png"), "json": page.with_suffix(".json")}
    for path in files.values():
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path}: its folder is not there or not writable; create it first", path=path)
        if os.path.lexists(path) and not overwrite:
            raise OutputExistsError(
                f"{path}: exists already; choose another name or use --overwrite", path=path
            )
    return files


def _ending(path: Path, ending: str) -> Path:
    if path.suffix.lower() != ending:
        raise ConfigError(f"{path}: has to end in {ending}")
    return path


def _open(generated: str, reference: str | None, config: EvaluateConfig, emit: Emit) -> _Sides:
    emit(Stage(stage="opening tiles"))
    first = _tiles_or_statistics(generated, "generated", config, None)
    like = first if isinstance(first, TileSet) else None
    second = None if reference is None else _tiles_or_statistics(reference, "reference", config, like)
    for wish, told in ((config.source is not None, "--source"), (config.paired, "--paired")):
        if wish and (like is None or (told == "--paired" and not isinstance(second, TileSet))):
            raise ConfigError(f"{told}: pairs need tiles, and statistics hold none; name folders or slides")
    truth = second if config.paired and isinstance(second, TileSet) else None
    pairs: dict[str, Pairs] = {}
    source = None
    if like is not None and config.source is not None:
        source = open_tiles(config.source, "source", config, like)
        found = pair_up(like, source)
        # Tiles without a partner are left out: FID before and after translation needs equal sets.
        source = source.rows([row for _, row in found], [like.groups[row] for row, _ in found])
        pairs["source"] = [(row, partner) for partner, (row, _) in enumerate(found)]
    if like is not None and truth is not None:
        pairs["reference"] = pair_up(like, truth)
    return _Sides(generated=first, reference=second, source=source, truth=truth, pairs=pairs)


def _tiles_or_statistics(
    path: str, role: str, config: EvaluateConfig, like: TileSet | None
) -> TileSet | StoredStatistics:
    if path.lower().endswith(_STATISTICS) and not os.path.isdir(path):
        return read_statistics(Path(path).expanduser())
    return open_tiles(path, "generated" if role == "generated" else "reference", config, like)


def _extractor(sides: _Sides, config: EvaluateConfig, save_stats: Path | None) -> FeatureExtractor | None:
    """The network, where features have to be made of tiles."""
    of_sets = (config.fid or config.kid) and sides.reference is not None
    have_tiles = isinstance(sides.generated, TileSet) or isinstance(sides.reference, TileSet)
    if not have_tiles or not (of_sets or save_stats is not None):
        return None
    kind = config.extractor or ("tiny" if config.weights is None else "inception")
    return make_extractor(
        kind,
        weights=config.weights,
        model=config.model,
        device=str(choose_device(config.device)),
        trust=config.trust_weights,
    )


def _set_figures(
    sides: _Sides, extractor: FeatureExtractor | None, config: EvaluateConfig, emit: Emit
) -> tuple[list[Figure], dict[str, StoredStatistics]]:
    """FID and KID, also of the source, and the statistics of every side by role."""
    stored: dict[str, StoredStatistics] = {}
    named: Mapping[str, TileSet | StoredStatistics | None] = {
        "generated": sides.generated,
        "reference": sides.reference,
        "source": sides.source if sides.reference is not None else None,
    }
    for role, side in named.items():
        if isinstance(side, StoredStatistics):
            _check_extractor(side, role, extractor)
            stored[role] = side
        elif side is not None and extractor is not None:
            stored[role] = extract(side, extractor, config, emit)
    figures: list[Figure] = []
    for role, suffix in (("generated", ""), ("source", "_source")):
        if role in stored and "reference" in stored:
            figures += set_distances((stored[role], stored["reference"]), config, emit, suffix=suffix)
    return figures, stored


def _check_extractor(side: StoredStatistics, role: str, extractor: FeatureExtractor | None) -> None:
    if extractor is None:
        return
    facts = side.statistics
    if facts.dims != extractor.dims or (facts.extractor and facts.extractor != extractor.name):
        made_by = facts.extractor or "another extractor"
        raise ConfigError(
            f"{role} statistics: made by {made_by} ({facts.dims} features), not by {extractor.name} "
            f"({extractor.dims}); choose it with --extractor, or make them again with --save-stats"
        )
    if side.digest and side.digest != extractor.digest:
        raise ConfigError(
            f"{role} statistics: made by {extractor.name} with other weights (SHA-256 {side.digest[:12]}..., "
            f"not {extractor.digest[:12]}...); make them again with --save-stats"
        )


def _pair_figures(
    sides: _Sides, config: EvaluateConfig, emit: Emit
) -> tuple[TileFigures | None, list[Figure], list[str]]:
    """Figures against the source and against the truth: of each tile, and averaged."""
    if not isinstance(sides.generated, TileSet) or not sides.pairs:
        return None, [], []
    device = str(choose_device(config.device))
    lpips = load_lpips(config.lpips_vgg, device)
    notes = [] if lpips else ["LPIPS was left out: no VGG16 weights are here; name them with --lpips-vgg"]
    values: dict[str, F64] = {}
    figures: list[Figure] = []
    for other, each, suffix in ((sides.source, to_source, "_source"), (sides.truth, to_truth, "")):
        if other is None:
            continue
        batched: dict[str, BatchMeasure] = {}
        if lpips is not None:
            batched[f"lpips{suffix}"] = lpips
        if other is sides.source and config.dino is not None:
            batched["dino_structure"] = load_dino(config.dino, device)
        pairs = sides.pairs[other.role]
        if len(pairs) < len(sides.generated):
            notes.append(
                f"only {len(pairs)} of {len(sides.generated)} generated tiles have a partner in "
                f"{other.origin}"
            )
        measured = measure_pairs(sides.generated, other, pairs, each, batched, config, emit)
        groups = [sides.generated.groups[row] for row, _ in pairs]
        for key, found in measured.items():
            figure = averaged(key, found, groups, draws=config.draws, seed=config.seed)
            figures += [figure] if figure is not None else []
            values[key] = _by_row(found, pairs, len(sides.generated))
    return TileFigures(names=sides.generated.names, values=values), figures, notes


def _probe_figures(sides: _Sides, config: EvaluateConfig, emit: Emit) -> list[Figure]:
    """Variety of the generated tiles, the translator on turned sources, and tissue maps."""
    if not isinstance(sides.generated, TileSet):
        return []
    reference = sides.reference if isinstance(sides.reference, TileSet) else None
    figures = variety_figures(sides.generated, reference, config, emit)
    if sides.source is not None:
        figures += translator_figures(sides.source, config, emit)
    if sides.truth is not None:
        figures += tissue_figures(sides.generated, sides.truth, sides.source, sides.pairs, config, emit)
    return figures


def _by_row(found: F64, pairs: Pairs, count: int) -> F64:
    """Figures of pairs at the rows of the generated side; NaN where a tile has no partner."""
    values_N = np.full(count, np.nan)
    values_N[[row for row, _ in pairs]] = found
    return values_N


def _distance_warnings(stored: Mapping[str, StoredStatistics], config: EvaluateConfig) -> list[str]:
    """What the extractor and few tiles do to the distances."""
    if not {"generated", "reference"} <= set(stored):
        return []
    said = []
    if stored["generated"].statistics.extractor == "tiny":
        said.append("extractor tiny is for a quick look: its FID and KID compare with no published figure")
    if not config.fid:
        return said
    sizes = {role: (side.statistics.n, side.statistics.dims) for role, side in stored.items()}
    few = [f"{n} {role}" for role, (n, dims) in sizes.items() if 0 < n <= dims]
    if not few:
        return said
    return [
        *said,
        f"{', '.join(few)} tiles for {stored['generated'].statistics.dims} features: the covariance is "
        "rank-deficient, and FID tells mostly how few tiles there are; trust KID, and compare FID only at "
        "equal N",
    ]


def _facts(sides: _Sides, generated: str, reference: str | None) -> tuple[SideFacts, ...]:
    found = [_side_facts(sides.generated, "generated", generated)]
    if sides.reference is not None and reference is not None:
        found.append(_side_facts(sides.reference, "reference", reference))
    if sides.source is not None:
        found.append(_side_facts(sides.source, "source", sides.source.origin))
    return tuple(found)


def _side_facts(side: TileSet | StoredStatistics, role: str, origin: str) -> SideFacts:
    if isinstance(side, TileSet):
        return SideFacts(
            role=role,
            origin=origin,
            tiles=len(side),
            encoding=side.encoding,
            size=side.size,
            mpp=side.mpp,
            patients=len(set(side.groups)),
            group_rule=side.group_rule,
        )
    return SideFacts(
        role=role,
        origin=origin,
        tiles=side.statistics.n,
        encoding=side.statistics.encoding or "not stated",
        patients=None if side.groups is None else len(set(side.groups)),
        group_rule="" if side.groups is None else "numbers in the statistics file",
    )


def _extractor_facts(extractor: FeatureExtractor) -> ExtractorFacts:
    return ExtractorFacts(
        name=extractor.name, dims=extractor.dims, resize=extractor.resize, digest=extractor.digest
    )


def _write(
    result: EvaluationResult,
    sides: _Sides,
    stored: Mapping[str, StoredStatistics],
    config: EvaluateConfig,
    emit: Emit,
) -> None:
    if "statistics" in result.files:
        write_statistics(result.files["statistics"], stored["generated"])
    if "report" in result.files:
        emit(Stage(stage="writing the report"))
        rows = (
            choose_pictures(sides.generated, sides.reference, sides.source, sides.pairs, result, config)
            if isinstance(sides.generated, TileSet)
            else None
        )
        write_report(result, rows)
