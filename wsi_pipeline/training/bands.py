"""How strong each Haar channel is in the training tiles, so that all of them meet the same noise.

Why: the high bands of H&E have a standard deviation of 0.02 to 0.2. Beside noise of unit variance they are
lost within the first tenth of the steps; divided by what they measure, they are not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from wsi_pipeline.models.pixels import from_uint8
from wsi_pipeline.training.data import TileSamples
from wsi_pipeline.translators.representations import make_representation
from wsi_pipeline.translators.settings import RepresentationConfig

__all__ = ["measured"]


def measured(config: RepresentationConfig, samples: TileSamples, tiles: int) -> RepresentationConfig:
    """``config`` with the standard deviations of the channels of ``tiles`` targets; as it is for 0 tiles."""
    if not tiles or config.kind == "identity":
        return config
    plain = make_representation(replace(config, ll_scale=1.0, band_std=None))
    images = torch.stack([torch.from_numpy(samples.sample(number)[1]) for number in range(tiles)])
    coefficients = plain.encode(from_uint8(images)).transpose(0, 1).flatten(1)
    return replace(config, band_std=tuple(coefficients.std(dim=1).clamp(min=1e-3).tolist()))
