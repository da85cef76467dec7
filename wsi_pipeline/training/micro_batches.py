"""From a batch of tiles to the samples that an objective sees, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from wsi_pipeline.models.pixels import from_uint8
from wsi_pipeline.training.config import TrainConfig
from wsi_pipeline.training.data import TrainBatch
from wsi_pipeline.training.objective import Sample

__all__ = ["micro_batches"]


def micro_batches(batch: TrainBatch, config: TrainConfig, device: torch.device) -> Iterator[Sample]:
    """Samples of ``loop.batch`` tiles each."""
    rough = config.data.pairing == "rough"
    for at in range(0, len(batch.numbers), config.loop.batch):
        part = slice(at, at + config.loop.batch)
        source = torch.from_numpy(batch.source_BHWC[part]).to(device)
        target = torch.from_numpy(batch.target_BHWC[part]).to(device)
        yield Sample(
            source=from_uint8(source),
            target=from_uint8(target),
            numbers=batch.numbers[part],
            seed=config.loop.seed,
            first=at == 0,
            label=None if batch.labels is None else torch.from_numpy(batch.labels[part]).to(device),
            source_mask=_in_view(source) if rough else None,
            target_mask=_in_view(target) if rough else None,
        )


def _in_view(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] float32: 0 where a pixel is pure white, with which readers fill what lies outside a slide.

    Glass that is as white as that counts as outside too; it has nothing to teach.
    """
    return (pixels_BHWC < 255).any(dim=-1).float()[:, None]
