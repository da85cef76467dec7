"""A measured figure, and what each one means in words: the same in the report, the log and the JSON file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.bootstrap import I64, Interval, bootstrap_by_group

__all__ = ["EXPLAINED", "Explained", "Figure", "averaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """``label`` for people; ``better``: which way is good; ``unit``; ``digits`` shown; ``meaning``."""

    label: str
    better: Literal["lower", "higher"]
    meaning: str
    unit: str = ""
    digits: int = 3


EXPLAINED: dict[str, Explained] = {
    "fid": Explained(
        label="FID, generated to reference",
        better="lower",
        digits=2,
        meaning=(
            "How different the two sets look to the extractor as a whole. 0 is reached only by equal sets: "
            "two halves of one set lie above 0 too, the more so the fewer tiles. Compare only figures of "
            "equal N, extractor, resize and encoding. With the extractor inception_spatial it is the sFID."
        ),
    ),
    "fid_source": Explained(
        label="FID, source to reference",
        better="lower",
        digits=2,
        meaning="The same before translation. The translation has helped if the line above is clearly lower.",
    ),
    "kid": Explained(
        label="KID, generated to reference",
        better="lower",
        digits=4,
        meaning=(
            "The same question without FID's bias for few tiles; may be slightly negative. An interval that "
            "holds 0 means: no difference was found. Papers often print it times 1000."
        ),
    ),
    "kid_source": Explained(
        label="KID, source to reference", better="lower", digits=4, meaning="The same before translation."
    ),
    "precision": Explained(
        label="Precision",
        better="higher",
        meaning=(
            "Share of generated tiles that lie where real ones do. Compare it, as the next three, with one "
            "half of the reference against the other: that is below 1, too."
        ),
    ),
    "recall": Explained(
        label="Recall", better="higher", meaning="Share of real tiles that lie where generated ones do."
    ),
    "density": Explained(
        label="Density", better="higher", meaning="Precision in which a single odd real tile weighs little."
    ),
    "coverage": Explained(
        label="Coverage", better="higher", meaning="Share of real tiles with a generated one close by."
    ),
    "inception_score": Explained(
        label="Inception score", better="higher", meaning="As papers print it: its classes are no tissues."
    ),
    "diversity": Explained(
        label="MS-SSIM of generated tiles", better="lower", meaning="Above the reference's: too few forms."
    ),
    "structure_ssim": Explained(
        label="Haematoxylin similarity to source",
        better="higher",
        meaning=(
            "Are the nuclei where they were, with the same outlines? 1: nothing but the staining changed. "
            "Blur or removed nuclei lower it; so does sharpening."
        ),
    ),
    "shift_median": Explained(
        label="Displacement, median",
        better="lower",
        unit="px",
        digits=2,
        meaning="How far the tissue has moved against the source. Under half a pixel is none.",
    ),
    "shift_p95": Explained(
        label="Displacement, 95th percentile",
        better="lower",
        unit="px",
        digits=2,
        meaning="The same for the worst twentieth of each tile: local warping.",
    ),
    "matched": Explained(
        label="Windows found again",
        better="higher",
        meaning="Share of small windows whose structure can be recognised at all.",
    ),
    "edges_lost": Explained(
        label="Edges lost",
        better="lower",
        meaning="Share of the contours of nuclei that are gone or fainter: blur, or removed nuclei.",
    ),
    "edges_added": Explained(
        label="Edges added",
        better="lower",
        meaning="Share of contours that the source has not: sharper chromatin, noise, or invented nuclei.",
    ),
    "lpips_source": Explained(
        label="LPIPS to source",
        better="lower",
        meaning="Perceptual distance to the source, colour included; a model that does nothing has 0.",
    ),
    "dino_structure": Explained(
        label="DINO-structure to source",
        better="lower",
        digits=4,
        meaning="How far the layout of the tile departs from the source, as a frozen transformer sees it.",
    ),
    "psnr": Explained(
        label="PSNR to the true tile",
        better="higher",
        unit="dB",
        digits=2,
        meaning="Pixel by pixel agreement with the truth; punishes the smallest misalignment.",
    ),
    "ssim": Explained(
        label="SSIM to the true tile",
        better="higher",
        meaning="Agreement of local structure with the truth, in all colours; 1 is equal.",
    ),
    "true_structure_ssim": Explained(
        label="Haematoxylin similarity to the true tile",
        better="higher",
        meaning="Are the nuclei those of the truth, whatever the staining?",
    ),
    "lpips": Explained(
        label="LPIPS to the true tile",
        better="lower",
        meaning="Perceptual distance to the truth; 0 is equal.",
    ),
    "mae": Explained(
        label="Mean error to the true tile",
        better="lower",
        unit="of 255",
        digits=2,
        meaning="Absolute, where the true tile is not black (a registered section ends there).",
    ),
    "nmi": Explained(
        label="Information shared with the truth",
        better="higher",
        meaning="1: none; 2: all, whatever the colours.",
    ),
    "tissue_f1": Explained(
        label="F1 of tissue maps", better="higher", meaning="Are the tissues those of the true tile? By area."
    ),
    "tissue_f1_placed": Explained(
        label="F1 from floor to ceiling", better="higher", meaning="0: as the sources; 1: as true neighbours."
    ),
    "equivariance": Explained(
        label="Equivariance error",
        better="lower",
        unit="of 255",
        digits=2,
        meaning="How much turning or flipping a tile changes its translation; 0: it cannot move tissue.",
    ),
    "translator_shift": Explained(
        label="Displacement by the translator",
        better="lower",
        unit="px",
        digits=2,
        meaning="How far it moves the haematoxylin of its input, median of each tile.",
    ),
}
"""Key -> explanation, in the order of reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number: its key in ``EXPLAINED``, value, interval by patient (None where there is none, or
    no two patients), tiles that it rests on, and ``note``: what to know about this very value."""

    key: str
    value: float
    interval: Interval | None
    tiles: int
    note: str = ""

    @property
    def explained(self) -> Explained:
        return EXPLAINED[self.key]

    @property
    def text(self) -> str:
        """The value as people read it."""
        if not math.isfinite(self.value):
            return "infinite"
        return f"{self.value:.{self.explained.digits}f}{self._unit}"

    @property
    def interval_text(self) -> str:
        """The interval as people read it, "" where there is none."""
        if self.interval is None:
            return ""
        digits = self.explained.digits
        return f"{self.interval.low:.{digits}f} to {self.interval.high:.{digits}f}{self._unit}"

    @property
    def _unit(self) -> str:
        return f" {self.explained.unit}" if self.explained.unit else ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "ci95": None if low is None else [low, high],
            "patients": self.interval.groups if self.interval else None,
            "tiles": self.tiles,
            "better": self.explained.better,
            "note": self.note,
        }


def averaged(
    key: str,
    values_N: npt.NDArray[np.float64],
    groups: Sequence[str],
    *,
    draws: int,
    seed: int,
    note: str = "",
) -> Figure | None:
    """Mean of a figure over tiles, with its interval by patient; None where no tile has one (NaN).

    An infinite value (PSNR of equal tiles) makes the mean infinite, and there is no interval.
    """
    known_N = ~np.isnan(values_N)
    if not known_N.any():
        return None
    kept = values_N[known_N]
    labels = [group for group, known in zip(groups, known_N.tolist(), strict=True) if known]
    value = float(kept.mean())

    def mean(counts: Sequence[I64]) -> float:
        return float((counts[0] * kept).sum() / counts[0].sum())

    interval = None
    if math.isfinite(value):
        interval = bootstrap_by_group([labels], mean, draws=draws, seed=seed, value=value)
    if interval is not None:  # no resample's mean leaves the range of the values
        low, high = max(interval.low, float(kept.min())), min(interval.high, float(kept.max()))
        interval = replace(interval, low=low, high=high)
    if interval is None and draws and not note:
        note = "no interval: it needs two patients" if math.isfinite(value) else ""
    return Figure(key=key, value=value, interval=interval, tiles=len(kept), note=note)
