"""Settings of an evaluation, and what it tells the outside while it works."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wsi_pipeline.core.fid import KID_SIZE, KID_SUBSETS
from wsi_pipeline.errors import ConfigError

__all__ = ["Emit", "EvaluateConfig", "Event", "Notice", "Progress", "Stage", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and how.

    ``source``: the inputs of the generated tiles, in the same form: structure figures, and the distance
    before translation; ``paired``: the reference holds the true picture of each generated tile.

    ``extractor``: None means ``inception`` where ``weights`` are given and ``tiny`` otherwise; ``model``:
    network of ``timm`` and ``open_clip``; ``trust_weights``: run a TorchScript file that is not the known
    one; ``lpips_vgg``: VGG16 weights for LPIPS (None: those in torch's cache, if any); ``dino``: weights for
    DINO-structure (None: left out).

    ``overlap``: precision, recall, density and coverage beside FID or KID; ``diversity``: pairs of generated
    tiles whose MS-SSIM is averaged (0: left out); ``translator``: generator that is tried on turned source
    tiles, ``NAME`` or ``NAME=WEIGHTS``; ``segmenter``: ``package.module:function`` that makes a tissue map
    [H, W] of small whole numbers (0: background) of a tile; ``neighbour``: true tiles of the next section,
    for the ceiling of its F1.

    ``draws``: resamples of patients for each interval (0: no intervals); ``seed``: of KID's subsets, the
    resamples and every other choice; ``limit``: at most so many tiles of each side, chosen at random.

    ``domain``, ``reference_domain``, ``source_domain``, ``split``: rows of a tile index (None: FF for inputs
    and FFPE for references where an index has both, every split). ``tile``: side in px of tiles cut from
    slides; ``min_tissue``: share of such a tile that is tissue; ``mpp``: µm per pixel of slides that state
    none, such as a JPEG that was converted.

    ``batch``: tiles an extractor gets at once; ``workers``: threads that read and compare tiles;
    ``examples``, ``worst``: rows of pictures in the report.
    """

    source: str | None = None
    paired: bool = False
    extractor: (
        Literal["tiny", "inception", "inception_spatial", "inception_logits", "timm", "open_clip", "dino"]
        | None
    ) = None
    weights: str | None = None
    model: str | None = None
    trust_weights: bool = False
    device: str = "auto"
    lpips_vgg: str | None = None
    dino: str | None = None
    fid: bool = True
    kid: bool = True
    overlap: bool = True
    diversity: int = 0
    translator: str | None = None
    segmenter: str | None = None
    neighbour: str | None = None
    kid_subsets: int = KID_SUBSETS
    kid_size: int = KID_SIZE
    draws: int = 200
    seed: int = 0
    limit: int | None = None
    domain: str | None = None
    reference_domain: str | None = None
    source_domain: str | None = None
    split: str | None = None
    tile: int = 512
    mpp: float | None = None
    min_tissue: float = 0.5
    batch: int = 16
    workers: int = min(4, os.cpu_count() or 1)
    examples: int = 4
    worst: int = 4

    def __post_init__(self) -> None:
        for name in ("kid_subsets", "kid_size", "batch", "workers", "tile"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("draws", "diversity", "examples", "worst", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is negative; give 0 or more")
        if self.seed >= 2**32:
            raise ConfigError(f"seed: {self.seed} is too large; give less than 2**32")
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"limit: {self.limit} tiles are too few; give 2 or more")
        if not 0.0 <= self.min_tissue <= 1.0:
            raise ConfigError(f"min_tissue: {self.min_tissue} is no share; give 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A named part of the work begins."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """``done`` of ``total`` tiles (or resamples) of the current stage."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that the user should know, in one line."""

    message: str


Event: TypeAlias = Stage | Progress | Notice
Emit: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default ``emit``: nobody listens."""
