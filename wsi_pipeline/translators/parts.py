"""The three choices that training and sampling share, made from a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators.conditions import Condition
from wsi_pipeline.translators.paths import Path, Step, make_path
from wsi_pipeline.translators.representations import Representation, make_representation
from wsi_pipeline.translators.settings import DiffusionConfig

__all__ = ["Net", "Parts", "make_parts"]

Net: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [B,Cin,...], t float32 [B], label int64 [B] or None) -> [B,Cout,...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    path: Path
    representation: Representation
    condition: Condition

    def network_channels(self, image_channels: int = 3) -> tuple[int, int]:
        """Channels that enter and leave the network."""
        own, config = self.representation.channels(image_channels), self.condition.config
        return own * (1 + config.concat * config.sources), own * (1 + self.path.learned)

    def encode_source(self, source: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """x1 of the path, which is the first source image, and all of them as condition, encoded one by one.

        ``source``: [B, sources * C, ...], images in the order of the recipe.
        """
        if source is None:
            return None, None
        count = self.condition.config.sources
        if source.shape[1] % count:
            raise ConfigError(f"condition.sources: {source.shape[1]} channels are no {count} images")
        images = [self.representation.encode(image) for image in source.chunk(count, 1)]
        return images[0], torch.cat(images, 1)

    def ask(
        self, net: Net, n: Step, x_n: Tensor, source_h: Tensor | None, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the network returns at x_n, and its variances (-1..1 of their range) where it learns them."""
        times = self.path.time_input(n).to(x_n.device).expand(len(x_n))
        label = label if self.condition.config.classes else None
        out = net(self.condition.join(x_n, source_h), times, label)
        if not self.path.learned:
            return out, None
        first, second = out.chunk(2, 1)
        return first, second


def make_parts(config: DiffusionConfig) -> Parts:
    """Path, representation and condition of a recipe."""
    return Parts(
        path=make_path(config.path),
        representation=make_representation(config.representation),
        condition=Condition(config.condition),
    )
