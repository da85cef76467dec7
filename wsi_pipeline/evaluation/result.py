"""What an evaluation found, with everything that a figure depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline._version import __version__
from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.evaluation.figures import Figure

__all__ = ["LIMITS", "SYNTHETIC", "EvaluationResult", "ExtractorFacts", "SideFacts", "TileFigures"]

SYNTHETIC = "synthetic images; not for diagnosis"

LIMITS = (
    "The generated tiles are synthetic. No figure here says that they may be used for diagnosis.",
    "FID and KID compare how sets look to a network. They cannot tell a true nucleus from an invented one.",
    "Structure figures compare haematoxylin density. What keeps it (lost mucin, altered erythrocytes, other "
    "stroma) goes unseen.",
    "What is measured is these tiles at this pixel size. Other organs, scanners and laboratories may differ.",
    "Intervals cover the choice of patients, not bias: few tiles raise FID, and compression differs from "
    "staining only to a person.",
)
"""What no reader of a report may overlook."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFacts:
    """One side of the comparison. ``size``, ``mpp``, ``patients``: None where unknown."""

    role: str
    origin: str
    tiles: int
    encoding: str
    size: tuple[int, int] | None = None
    mpp: Mpp | None = None
    patients: int | None = None
    group_rule: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractorFacts:
    """The network behind FID and KID; ``digest``: SHA-256 of its weights."""

    name: str
    dims: int
    resize: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileFigures:
    """Figures of each pair of tiles: ``names`` of the generated ones, ``values`` by key, [N] each."""

    names: tuple[str, ...]
    values: Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationResult:
    """Figures of an evaluation in the order of reports; ``tiles``: those of each pair, against the source and
    against the truth together; ``warnings``: what a reader must know; ``files``: what was written."""

    figures: tuple[Figure, ...]
    sides: tuple[SideFacts, ...]
    extractor: ExtractorFacts | None
    warnings: tuple[str, ...]
    seed: int
    tiles: TileFigures | None = None
    files: Mapping[str, Path]

    def figure(self, key: str) -> Figure | None:
        """The figure of a key, if it was measured."""
        return next((figure for figure in self.figures if figure.key == key), None)

    def side(self, role: str) -> SideFacts | None:
        """The side of a role, if there is one."""
        return next((side for side in self.sides if side.role == role), None)

    def to_json(self, *, with_tiles: bool = False) -> dict[str, Any]:
        """Plain values; ``with_tiles`` adds the figures of each pair."""
        document: dict[str, Any] = {
            "notice": SYNTHETIC,
            "figures": {figure.key: figure.to_json() for figure in self.figures},
            "sides": {side.role: asdict(side) for side in self.sides},
            "extractor": None if self.extractor is None else asdict(self.extractor),
            "warnings": list(self.warnings),
            "seed": self.seed,
            "version": __version__,
            "files": {name: str(path) for name, path in self.files.items()},
        }
        if with_tiles and self.tiles is not None:
            document["tiles"] = {
                "names": list(self.tiles.names),
                **{key: [_plain(v) for v in values.tolist()] for key, values in self.tiles.values.items()},
            }
        return document


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
