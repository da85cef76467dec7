"""The settings of a tile index; each default stands here once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from wsi_pipeline.cohorts.splits import SplitConfig
from wsi_pipeline.core.tissue import TissueConfig
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers.lattice import IccMode
from wsi_pipeline.readers.mpp import plausible

__all__ = ["CohortConfig", "FilterConfig", "LatticeConfig"]

Window = tuple[float, float]

AI_FFPE: tuple[Window, Window, Window] = ((150.0, 217.0), (80.0, 185.0), (130.0, 205.0))
"""Mean red, green and blue between which AI-FFPE's preparation keeps a tile, bounds excluded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatticeConfig:
    """How slides are cut. ``mpp``: µm per pixel of the tiles; a slide whose own pixels, halved some times,
    are within ``tolerance`` (a share) of it keeps them, as in a conversion (0: resample all exactly);
    ``tile``: side in pixels; ``stride``: from tile to tile (None: the side, no overlap)."""

    mpp: float = 0.5
    tolerance: float = 0.1
    tile: int = 512
    stride: int | None = None

    def __post_init__(self) -> None:
        if not plausible((self.mpp, self.mpp)):
            raise ConfigError(f"tiling.mpp: {self.mpp} is no pixel size in µm; give 0.02 to 20")
        if self.tile < 1 or self.step < 1:
            raise ConfigError(f"tiling: tile {self.tile} and stride {self.step} are at least 1 px")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tiling.tolerance: {self.tolerance} is no share from 0 to 1")

    @property
    def step(self) -> int:
        """Pixels from one tile to the next."""
        return self.tile if self.stride is None else self.stride


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Which tiles serve. The index keeps them all, with their scores; these thresholds only mark them.

    ``min_tissue``: share of the tissue mask; ``max_pen``: of ink; ``max_white``: of glass (holes in the
    tissue, too); ``max_black``: of pixels below 40; ``min_sharpness``: see ``core.tile_scores`` (out of
    focus by a Gaussian of 1 µm is 0.11 to 0.17, sharp is 0.35 and more); ``red``, ``green``, ``blue``:
    least and largest mean, in grey levels; ``preset``: ``ai-ffpe`` takes that program's windows for them.
    """

    min_tissue: float = 0.5
    max_pen: float = 0.02
    max_white: float = 0.8
    max_black: float = 0.05
    min_sharpness: float = 0.18
    red: Window = (0.0, 255.0)
    green: Window = (0.0, 255.0)
    blue: Window = (0.0, 255.0)
    preset: Literal["none", "ai-ffpe"] = "none"

    @property
    def windows(self) -> tuple[Window, Window, Window]:
        """Mean red, green, blue: least and largest."""
        return AI_FFPE if self.preset == "ai-ffpe" else (self.red, self.green, self.blue)


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortConfig:
    """Everything that ``wsi-pipeline tile`` can be told. ``frozen``, ``ffpe``: tissue detection on the
    slides of each domain; ``icc``, ``stain``: as in a conversion; ``normal``: ``drop`` leaves out slides
    whose barcode says normal tissue (published cohorts have it among the frozen slides only)."""

    tiling: LatticeConfig = field(default_factory=LatticeConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    frozen: TissueConfig = field(default_factory=TissueConfig)
    ffpe: TissueConfig = field(default_factory=lambda: TissueConfig(preset="ffpe"))
    icc: IccMode = "srgb"
    stain: Literal["h&e", "any"] = "h&e"
    normal: Literal["keep", "drop"] = "keep"
