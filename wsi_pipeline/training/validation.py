"""Validation: figures on tiles that are not trained on, and pictures of them.

For unpaired tiles FID between translations and the other domain, and how well structure survives (SSIM of
haematoxylin between input and output); for paired tiles also PSNR and SSIM against the truth. Both directions
are judged, where the network has both. Numbers of samples begin at 0 with one seed, so every validation sees
the same tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from wsi_pipeline.cohorts.tiles import load_tiles
from wsi_pipeline.core.fid import frechet_distance, statistics
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC
from wsi_pipeline.core.structure import compare_structure, psnr
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.features import FeatureExtractor
from wsi_pipeline.models.layout import Direction
from wsi_pipeline.training.data import DataConfig, TileSamples

__all__ = ["SMALLER_IS_BETTER", "Validation", "ValidationConfig", "is_better"]

Metric = Literal["auto", "fid", "structure", "psnr"]
Translate = Callable[[U8_BHWC, Direction], U8_BHWC]
"""Tiles and direction -> translated tiles."""

SMALLER_IS_BETTER = ("fid",)
SEED = 0  # of the choice of tiles; never the run's, so that figures of several runs compare


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """``every``: iterations (0: never); ``tiles``: of each side; ``split``: of the tiles, where they have
    splits, or ``source`` and ``target`` name others; ``extractor``: ``tiny``, or ``inception``, ``timm``,
    ``open_clip`` with ``weights`` and ``model`` as in `wsi-pipeline evaluate`; ``metric``: what the best
    checkpoint is best by (``fid``, ``structure``, ``psnr``; ``auto``: psnr for pairs, else fid), of the
    direction a2b; ``choose``: whether the bundle has the best or the last weights; ``shown``: samples in
    pictures."""

    every: int = 1000
    tiles: int = 64
    split: str | None = "val"
    source: str | None = None
    target: str | None = None
    extractor: str = "tiny"
    weights: str | None = None
    model: str | None = None
    metric: Metric = "auto"
    choose: Literal["best", "last"] = "best"
    shown: int = 4

    def __post_init__(self) -> None:
        if self.every < 0 or self.tiles < 2 or self.shown < 1:
            raise ConfigError("validation: every is at least 0, tiles at least 2, shown at least 1")


class Validation:
    """Tiles to judge by, read once, and the figures of a network on them.

    ``metric``: what is best by; ``notice``: what the user should know about the choice of tiles, or "".
    """

    def __init__(self, config: ValidationConfig, data: DataConfig, extractor: FeatureExtractor) -> None:
        chosen = replace(
            data,
            source=config.source or data.source,
            target=config.target or data.target,
            split=config.split,
            augment="none",
            workers=0,
        )
        if config.metric == "psnr" and data.pairing not in ("aligned", "simulated"):
            raise ConfigError("validation.metric: psnr needs pairs (data.pairing aligned or simulated)")
        paired = data.pairing in ("aligned", "simulated")
        best_by = "psnr" if paired else "fid"
        self.metric = best_by if config.metric == "auto" else config.metric
        has_splits = any(load_tiles(path).has_splits for path in (chosen.source, chosen.target) if path)
        self.notice = ""
        same = (config.source or data.source, config.target or data.target) == (data.source, data.target)
        if same and (not has_splits or config.split in (None, data.split)):
            self.notice = (
                "no tile is held out: validation looks at tiles that are trained on; name others as "
                "validation.source and validation.target, or give the cohort splits"
            )
        samples = TileSamples(chosen, SEED)
        pairs = [samples.sample(number) for number in range(config.tiles)]
        self.source_BHWC = np.stack([source for source, _ in pairs])
        self.target_BHWC = np.stack([target for _, target in pairs])
        self._config = config
        self._paired = paired
        self._follows = data.pairing != "labelled"  # else nothing of a source can be kept
        self._extractor = extractor
        self._statistics = {
            "a2b": statistics(extractor(self.target_BHWC)),
            "b2a": statistics(extractor(self.source_BHWC)),
        }

    def figures(self, translate: Translate, directions: tuple[Direction, ...]) -> dict[str, float]:
        """Figures by name; those of b2a end in ``_b2a``, the others speak of a2b."""
        found: dict[str, float] = {}
        for direction in directions:
            ends = (self.source_BHWC, self.target_BHWC)
            given, truth = ends if direction == "a2b" else ends[::-1]
            made = translate(given, direction)
            suffix = "" if direction == "a2b" else "_b2a"
            reached = frechet_distance(statistics(self._extractor(made)), self._statistics[direction])
            found[f"fid{suffix}"] = reached
            if not self._follows:
                continue
            kept = np.array([compare_structure(a, b).ssim for a, b in zip(given, made, strict=True)])
            kept = kept[np.isfinite(kept)]  # tiles without haematoxylin have no figure
            found[f"structure{suffix}"] = float(kept.mean()) if len(kept) else float("nan")
            if self._paired:
                found[f"psnr{suffix}"] = float(
                    np.mean([psnr(a, b) for a, b in zip(made, truth, strict=True)])
                )
        return found

    def pictures(
        self, translate: Translate, directions: tuple[Direction, ...]
    ) -> tuple[list[str], list[list[U8_HWC]]]:
        """Headings, and rows of pictures under them: source, its translation, target, and its."""
        count = min(self._config.shown, len(self.source_BHWC))
        columns = [self.source_BHWC[:count], translate(self.source_BHWC[:count], "a2b")]
        columns.append(self.target_BHWC[:count])
        headings = ["source (A)", "A to B", "target (B)"]
        if "b2a" in directions:
            headings.append("B to A")
            columns.append(translate(self.target_BHWC[:count], "b2a"))
        return headings, [list(row) for row in zip(*columns, strict=True)]


def is_better(metric: str, figures: Mapping[str, float], best: float | None) -> bool:
    """Whether the figure of this name is better than the best one so far."""
    value = figures[metric]
    if not np.isfinite(value):
        return False
    return best is None or (value < best if metric in SMALLER_IS_BETTER else value > best)
