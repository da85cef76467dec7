"""Paired training: the translation of a tile shall be its aligned partner.

For pixel-aligned pairs only (simulated artefacts, re-stained sections after registration). Losses:

    l1          mean |y - b|
    gradient    mean |dy/dx - db/dx| + mean |dy/dy - db/dy|, forward differences: edges, which l1 alone blurs
                (Mathieu, Couprie and LeCun, ICLR 2016, eq. 6 with alpha = 1)
    lpips       optional
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from wsi_pipeline.models.trainable import TurboNetwork
from wsi_pipeline.training.objective import Group, Sample, Term, Update

__all__ = ["PairedConfig", "PairedObjective", "gradient_difference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedConfig:
    """Weights of the losses; ``lpips`` 0 needs no VGG weights."""

    l1: float = 1.0
    gradient: float = 1.0
    lpips: float = 0.0
    lpips_vgg: str | None = None


class PairedObjective:
    """One update; one term for each direction that the network has."""

    def __init__(
        self,
        network: TurboNetwork,
        config: PairedConfig,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self._network = network
        self._config = config
        self._perceptual = perceptual

    @property
    def groups(self) -> Mapping[Group, Mapping[str, nn.Parameter]]:
        return {"generator": self._network.learning}

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return {}

    def updates(self, sample: Sample) -> Iterator[Update]:
        yield Update(group="generator", name="paired", terms=self._terms(sample))

    def _terms(self, sample: Sample) -> Iterator[Term]:
        for direction in self._network.directions:
            ends = (sample.source, sample.target)
            image, wanted = ends if direction == "a2b" else ends[::-1]
            found = self._network(image, direction)
            letter = "a" if direction == "a2b" else "b"
            l1 = (found - wanted).abs().mean()
            edges = gradient_difference(found, wanted)
            loss = self._config.l1 * l1 + self._config.gradient * edges
            logs = {f"l1_{letter}": l1.detach(), f"gradient_{letter}": edges.detach()}
            logs[f"change_{letter}"] = (found.detach() - image).abs().mean()
            if self._perceptual is not None and self._config.lpips:
                perceived = self._perceptual(found, wanted).mean()
                loss = loss + self._config.lpips * perceived
                logs[f"lpips_{letter}"] = perceived.detach()
            yield Term(loss, logs)


def gradient_difference(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of forward differences along both axes, summed over the axes; scalar."""
    error = found - wanted
    down, right = error.diff(dim=-2), error.diff(dim=-1)
    return down.abs().mean() + right.abs().mean()
