"""What the network sees beside x_n: source images, joined as channels, and a class label.

A dropped condition is zeros in place of the images and the class after the last one in place of the label; a
translator trained with some of them (``condition.drop``) can be guided (Ho and Salimans, 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators.settings import ConditionConfig

__all__ = ["Condition"]


@dataclass(frozen=True, slots=True)
class Condition:
    """``source_h``: [B,C,...] in the representation of x_n, or None; ``label``: int64 [B], or None."""

    config: ConditionConfig

    def join(self, x_n: Tensor, source_h: Tensor | None) -> Tensor:
        """What enters the network."""
        if not self.config.concat:
            return x_n
        if source_h is None:
            raise ConfigError("condition.concat: a source image stands beside x_n, and none is given")
        return torch.cat([x_n, source_h], 1)

    def drop(
        self, source_h: Tensor | None, label: Tensor | None, drop_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The conditions of a batch, without those of the samples that ``drop_B`` marks."""
        if source_h is not None:
            drop = drop_B.to(source_h.device).reshape(-1, *[1] * (source_h.ndim - 1))
            source_h = source_h.masked_fill(drop, 0.0)
        if label is not None:
            label = label.masked_fill(drop_B.to(label.device), self.config.classes)
        return source_h, label

    def null(self, source_h: Tensor | None, label: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """All of them dropped."""
        return self.drop(source_h, label, torch.ones(1, dtype=torch.bool))
