"""The generator that changes nothing: to test the pipeline, and to convert a slide without translating it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC, Context, GeneratorSpec, TileBatch
from wsi_pipeline.errors import ConfigError

__all__ = ["Identity"]

VERSION = 1  # raise it when pixels would change


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Returns its pixels unchanged.

    ``tile``: side of the square tiles in pixels; ``batch``: tiles per call. Raises ConfigError below 1.
    """

    tile: int = 1088
    batch: int = 4

    def __post_init__(self) -> None:
        if self.tile < 1 or self.batch < 1:
            raise ConfigError(f"generator identity: tile={self.tile}, batch={self.batch}: both must be >= 1")

    @property
    def spec(self) -> GeneratorSpec:
        return GeneratorSpec(
            kind="identity",
            tile=self.tile,
            halo=0,
            align=1,
            mpp=None,
            batch=self.batch,
            digest=hashlib.sha256(f"identity/{VERSION}".encode()).hexdigest(),
            exact=True,
            stain="any",
            overlap=min(64, self.tile // 2),
        )

    def prepare(self, thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], mpp: Mpp) -> Context:
        """Nothing needs to be known."""
        return {}

    def __call__(self, batch: TileBatch, context: Context) -> U8_BHWC:
        """The same array, not a copy."""
        return batch.pixels_BHWC

    def background(self, pixels_HWC: U8_HWC, context: Context) -> U8_HWC:
        """The same array, not a copy."""
        return pixels_HWC
