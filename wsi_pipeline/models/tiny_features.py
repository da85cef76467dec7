"""The ``tiny`` extractor: a random convolutional network of a fixed seed, for tests and for a quick look.

It sees tiles at their own size, through four octaves. In each, half of the filters answer to colour (their
weights do not cancel), half to texture (they cancel: flat colour gives 0). A feature is the mean of one
filter's response over the tile, so that tiles of any size compare.

Why it can stand in for a trained network in tests, and why for nothing else: colour, contrast and blur move
these means, so distances order known degradations rightly. It knows nothing of nuclei or tissue, and its
FID has a scale of its own: never compare it with a published figure.

Why numpy draws the weights: Philox gives the same numbers everywhere; torch promises that for no release.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.features import F32

__all__ = ["TinyExtractor", "make_tiny"]

SEED = 20240627
OCTAVES = 4
FILTERS = 16  # an octave; 64 features in all
KERNEL = 3
MIN_SIDE = KERNEL << (OCTAVES - 1)
TEXTURE_GAIN = 4.0  # texture responses are weaker than colour ones; this makes their spreads alike


class TinyExtractor:
    """64 features of tiles of at least 24 px; see the module."""

    name = "tiny"
    dims = OCTAVES * FILTERS
    side = None
    resize = "none (tiles at their own size)"

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        kernels = _kernels()
        self.digest = hashlib.sha256(np.stack(kernels).astype("<f4").tobytes()).hexdigest()
        self._kernels = [torch.from_numpy(kernel).to(self._device) for kernel in kernels]

    def __call__(self, pixels_BHWC: npt.NDArray[np.uint8]) -> F32:
        """Features [B, 64] float32; ConfigError for tiles under 24 px."""
        if min(pixels_BHWC.shape[1:3]) < MIN_SIDE:
            raise ConfigError(
                f"extractor tiny: tiles of {pixels_BHWC.shape[1:3]} px; give {MIN_SIDE} px or more"
            )
        with torch.inference_mode():
            # One tile at a time: results do not depend on the batch, and memory stays small.
            rows = [self._features(torch.from_numpy(np.ascontiguousarray(tile))) for tile in pixels_BHWC]
            return np.asarray(torch.stack(rows).cpu().numpy(), np.float32)

    def _features(self, pixels_HWC: Tensor) -> Tensor:
        x = pixels_HWC.to(self._device).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        found = []
        for octave, kernel in enumerate(self._kernels):
            response = functional.conv2d(x, kernel)
            colour, texture = response[:, : FILTERS // 2], response[:, FILTERS // 2 :].abs() * TEXTURE_GAIN
            found += [functional.leaky_relu(colour, 0.2).mean(dim=(0, 2, 3)), texture.mean(dim=(0, 2, 3))]
            if octave + 1 < OCTAVES:
                x = functional.avg_pool2d(x, 2)
        return torch.cat(found)


def _kernels() -> list[npt.NDArray[np.float32]]:
    """Filters [16, 3, 3, 3] of each octave, unit norm; those of the second half sum to 0 in every channel."""
    random = np.random.Generator(np.random.Philox(key=SEED))
    kernels = []
    for _ in range(OCTAVES):
        drawn = random.standard_normal((FILTERS, 3, KERNEL, KERNEL))
        half = FILTERS // 2
        drawn[:half] = drawn[:half].mean(axis=(2, 3), keepdims=True) * KERNEL + 0.3 * drawn[:half]
        drawn[half:] -= drawn[half:].mean(axis=(2, 3), keepdims=True)
        drawn /= np.sqrt((drawn * drawn).sum(axis=(1, 2, 3), keepdims=True))
        kernels.append(drawn.astype(np.float32))
    return kernels


def make_tiny(*, weights: Path | None, model: str | None, device: str, trust: bool) -> TinyExtractor:
    """The one tiny extractor; it takes no weights and no model name."""
    if weights is not None or model is not None:
        raise ConfigError("extractor tiny: takes no weights and no model; leave them out or choose another")
    return TinyExtractor(device)
