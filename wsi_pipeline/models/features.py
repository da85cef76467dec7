"""Feature extractors: tiles in, one feature vector a tile out; every distance between sets rests on one.

A further kind of feature (another layer, logits) is a further extractor, one line of ``EXTRACTORS``: whoever
compares features never asks which network made them.

Why the resize is a function of its own: "FID" of two programs differs by the resize more than by the method
(G. Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation", CVPR 2022).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsi_pipeline.errors import ConfigError

__all__ = ["EXTRACTORS", "F32", "FeatureExtractor", "clean_resize", "make_extractor"]

F32: TypeAlias = npt.NDArray[np.float32]

EXTRACTORS: dict[str, str] = {
    "tiny": "wsi_pipeline.models.tiny_features:make_tiny",
    "inception": "wsi_pipeline.models.inception:make_inception",
    "inception_spatial": "wsi_pipeline.models.inception:make_spatial",
    "inception_logits": "wsi_pipeline.models.inception:make_logits",
    "timm": "wsi_pipeline.models.vit_features:make_timm",
    "open_clip": "wsi_pipeline.models.vit_features:make_open_clip",
    "dino": "wsi_pipeline.models.vit_features:make_dino",
}
"""Kind -> constructor; all are called alike, and imported on use."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """A frozen network that turns tiles into vectors; the same tile gives the same vector in every batch."""

    @property
    def name(self) -> str:
        """Kind and model, for people: features compare only within one name and digest."""

    @property
    def dims(self) -> int:
        """Length of a feature vector."""

    @property
    def side(self) -> int | None:
        """Pixels along a side of what the network sees; None where it takes tiles of any size as they are."""

    @property
    def resize(self) -> str:
        """How tiles get to that side, in words."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""

    def __call__(self, pixels_BHWC: npt.NDArray[np.uint8]) -> F32:
        """Features [B, dims] float32 of RGB tiles of one size."""


def make_extractor(
    kind: str,
    *,
    weights: str | Path | None = None,
    model: str | None = None,
    device: str = "cpu",
    trust: bool = False,
) -> FeatureExtractor:
    """The extractor of that kind, its network on ``device``.

    ``weights``: the file or folder that ``inception``, ``timm``, ``open_clip`` and ``dino`` need; ``model``:
    name of the network for ``timm`` and ``open_clip``; ``trust``: run a TorchScript file that is not the
    known one, i.e. its code. Raises ConfigError for a kind that does not exist or options that do not belong
    to it, and CheckpointError for weights that are missing, damaged or of another network.
    """
    target = EXTRACTORS.get(kind)
    if target is None:
        raise ConfigError(f"extractor {kind!r}: unknown; choose from {', '.join(EXTRACTORS)}")
    module, _, name = target.partition(":")
    path = None if weights is None else Path(weights).expanduser()
    made: FeatureExtractor = getattr(_imported(module, kind), name)(
        weights=path, model=model, device=device, trust=trust
    )
    return made


def _imported(module: str, kind: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"extractor {kind!r}: needs {error.name}; in the package's folder, "
            "pip install -c constraints.txt '.[train]'"
        ) from error


def clean_resize(pixels_HWC: npt.NDArray[np.uint8], side: int) -> F32:
    """Tile [H, W, 3] uint8 -> [side, side, 3] float32 in [0, 255], not rounded to grey levels.

    Bicubic with antialiasing, each channel for itself in float (PIL's mode F), then clipped, as in
    clean-fid. The aspect is not kept.
    """
    channels = [
        Image.fromarray(pixels_HWC[..., channel].astype(np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    stacked_HWC = np.stack([np.asarray(plane, np.float32) for plane in channels], axis=-1)
    return np.asarray(np.clip(stacked_HWC, 0.0, 255.0), np.float32)
