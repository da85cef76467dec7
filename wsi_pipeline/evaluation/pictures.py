"""Which tiles a report shows, and how: some at random, and those where the structure suffered most.

Why both: tiles that somebody picked show what he hoped for; the worst ones show what can happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.core.structure import haematoxylin_pair
from wsi_pipeline.evaluation.figures import EXPLAINED
from wsi_pipeline.evaluation.pairs import Pairs
from wsi_pipeline.evaluation.result import EvaluationResult
from wsi_pipeline.evaluation.settings import EvaluateConfig
from wsi_pipeline.evaluation.statistics_file import StoredStatistics
from wsi_pipeline.evaluation.tile_sets import TileSet

__all__ = ["Panel", "Pictures", "Row", "change_map", "choose_pictures"]

_SHOWN_FIGURES = (
    *("structure_ssim", "shift_median", "edges_lost", "edges_added", "lpips_source", "dino_structure"),
    *("psnr", "ssim", "lpips"),
)
_NO_CHANGE, _STRONG_CHANGE = 0.1, 0.3  # of the source's haematoxylin range: not, and fully coloured
_LOST, _ADDED = (200, 20, 20), (20, 60, 220)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """One picture and what it shows."""

    caption: str
    pixels_HWC: U8_HWC


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """Pictures of one tile, its name and its figures in words."""

    name: str
    panels: tuple[Panel, ...]
    figures: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """Rows chosen at random, and the rows of the worst structure, worst first."""

    examples: tuple[Row, ...]
    worst: tuple[Row, ...]


def choose_pictures(
    generated: TileSet,
    reference: TileSet | StoredStatistics | None,
    source: TileSet | None,
    pairs: Mapping[str, Pairs],
    result: EvaluationResult,
    config: EvaluateConfig,
) -> Pictures:
    """Read the tiles of a report; ``pairs``: by role of the other side.

    Examples come from as many patients as possible; the choice is seeded.
    """
    rng = np.random.Generator(np.random.Philox(config.seed))
    real = reference if isinstance(reference, TileSet) else None
    sources, truths = (dict(pairs.get(role, ())) for role in ("source", "reference"))
    partnered = [row for row in range(len(generated)) if source is None or row in sources]
    examples = []
    for row in _spread(partnered, generated.groups, config.examples, rng):
        panels = _panels(generated, row, source, sources)
        if row in truths and real is not None:
            panels.append(Panel(caption="Reference (the true tile)", pixels_HWC=real.read(truths[row])))
        elif real is not None:
            other = int(rng.integers(len(real)))
            panels.append(Panel(caption="Reference (real, other tissue)", pixels_HWC=real.read(other)))
        examples.append(Row(name=generated.names[row], panels=tuple(panels), figures=_figures(result, row)))
    worst = []
    for row in _worst(result, config.worst) if source is not None else []:
        panels = _panels(generated, row, source, sources)
        change_HWC = change_map(panels[0].pixels_HWC, panels[1].pixels_HWC)
        panels.append(Panel(caption="Haematoxylin lost (red), new (blue)", pixels_HWC=change_HWC))
        worst.append(Row(name=generated.names[row], panels=tuple(panels), figures=_figures(result, row)))
    return Pictures(examples=tuple(examples), worst=tuple(worst))


def _panels(generated: TileSet, row: int, source: TileSet | None, sources: dict[int, int]) -> list[Panel]:
    made = Panel(caption="Generated (synthetic)", pixels_HWC=generated.read(row))
    if source is None:
        return [made]
    return [Panel(caption="Source", pixels_HWC=source.read(sources[row])), made]


def _spread(rows: Sequence[int], groups: Sequence[str], count: int, rng: np.random.Generator) -> list[int]:
    """Random rows, a second one of a group only after every group had its first."""
    shuffled = [rows[position] for position in rng.permutation(len(rows)).tolist()]
    rank: dict[str, int] = {}
    turn = {}
    for row in shuffled:
        turn[row] = rank[groups[row]] = rank.get(groups[row], -1) + 1
    return sorted(shuffled, key=lambda row: turn[row])[:count]


def _worst(result: EvaluationResult, count: int) -> list[int]:
    if result.tiles is None or "structure_ssim" not in result.tiles.values:
        return []
    scores_N = result.tiles.values["structure_ssim"]
    order = np.argsort(scores_N, kind="stable")
    return [row for row in order.tolist() if np.isfinite(scores_N[row])][:count]


def _figures(result: EvaluationResult, row: int) -> tuple[str, ...]:
    if result.tiles is None:
        return ()
    said = []
    for key in _SHOWN_FIGURES:
        values_N = result.tiles.values.get(key)
        if values_N is not None and np.isfinite(values_N[row]):
            how = EXPLAINED[key]
            said.append(f"{how.label} {values_N[row]:.{how.digits}f}{' ' + how.unit if how.unit else ''}")
    return tuple(said)


def change_map(source_HWC: U8_HWC, output_HWC: U8_HWC) -> U8_HWC:
    """The source, pale and grey, with haematoxylin that is gone in red and new one in blue."""
    grey_HW = cv2.cvtColor(source_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32) * 0.4 + 153.0
    canvas_HWC = np.repeat(grey_HW[..., None], 3, axis=2)
    pair = haematoxylin_pair(source_HWC, output_HWC)
    if pair is not None:
        change_HW = cv2.GaussianBlur(pair[1] - pair[0], (0, 0), 1.0)
        strength_HW = np.clip((np.abs(change_HW) - _NO_CHANGE) / _STRONG_CHANGE, 0.0, 1.0)[..., None]
        colour_HWC = np.where((change_HW < 0)[..., None], np.array(_LOST), np.array(_ADDED))
        canvas_HWC = canvas_HWC * (1 - strength_HW) + colour_HWC * strength_HW
    return np.asarray(np.clip(np.rint(canvas_HWC), 0, 255), np.uint8)
