"""pix2pix (Isola et al., CVPR 2017): a translation close to its partner, which a patch judge takes for real.

With source a, target b and judge D of the pair, one iteration is, in the published order,

    judge       0.5 (gan(D(a, fake), 0) + gan(D(a, b), 1)), fake = G(a), no gradient into G
    generator   gan(D(a, fake), 1) + 100 mean |fake - b|, on the same fake, D as just updated

gan: binary cross-entropy (``vanilla``) or squared error (``lsgan``) of the logits, mean over patches. For
pixel-aligned pairs only: the second term blurs whatever is not aligned. The graph of G is held until its
update. Whether batch norms use the batch is the networks' mode, which this leaves alone; in training mode
those of D move three times an iteration, those of G once, as published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.training.objective import Group, Sample, Term, Update, keyed_dropout

__all__ = ["Pix2PixConfig", "Pix2PixObjective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pix2PixConfig:
    """``l1``: weight of the absolute error; ``gan_mode``: loss of the judge; ``norm``: of the judge, as
    published ``batch``, whose statistics differ from process to process."""

    l1: float = 100.0
    gan_mode: Literal["vanilla", "lsgan"] = "vanilla"
    norm: Literal["batch", "instance", "group", "none"] = "group"

    def __post_init__(self) -> None:
        if self.l1 < 0:
            raise ConfigError("objective.pix2pix.l1: is 0 or more")


class Pix2PixObjective:
    """Two updates of one term each. ``network``: has ``learning``, and makes an image of (image, ``a2b``);
    ``judge``: logits of source and image side by side."""

    def __init__(self, network: Any, judge: nn.Module, config: Pix2PixConfig) -> None:
        self._network, self._judge, self._config = network, judge, config

    @property
    def groups(self) -> Mapping[Group, Mapping[str, nn.Parameter]]:
        judged = {f"net_disc.{name}": parameter for name, parameter in self._judge.named_parameters()}
        return {"generator": self._network.learning, "discriminator": judged}

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        moving = {f"net_disc.{k}": b for k, b in self._judge.named_buffers() if b.is_floating_point()}
        return {**getattr(self._network, "buffers_by_name", {}), **moving}

    def updates(self, sample: Sample) -> Iterator[Update]:
        with keyed_dropout(sample):
            fake = self._network(sample.source, "a2b")
        yield Update(group="discriminator", name="judge", terms=self._judged(sample, fake.detach()))
        self._judge.requires_grad_(False)
        yield Update(group="generator", name="pix2pix", terms=self._made(sample, fake))
        self._judge.requires_grad_(True)

    def _judged(self, sample: Sample, fake: Tensor) -> Iterator[Term]:
        losses = {
            "disc_fake": self._gan(sample, fake, 0.0),
            "disc_real": self._gan(sample, sample.target, 1.0),
        }
        yield Term(0.5 * sum(losses.values()), {name: loss.detach() for name, loss in losses.items()})

    def _made(self, sample: Sample, fake: Tensor) -> Iterator[Term]:
        gan, l1 = self._gan(sample, fake, 1.0), (fake - sample.target).abs().mean()
        changed = (fake.detach() - sample.source).abs().mean()
        logs = {"gan": gan.detach(), "l1_a": l1.detach(), "change_a": changed}
        yield Term(gan + self._config.l1 * l1, logs)

    def _gan(self, sample: Sample, image: Tensor, wanted: float) -> Tensor:
        logits = self._judge(torch.cat([sample.source, image], dim=1))
        loss = F.mse_loss if self._config.gan_mode == "lsgan" else F.binary_cross_entropy_with_logits
        return loss(logits, torch.full_like(logits, wanted))
