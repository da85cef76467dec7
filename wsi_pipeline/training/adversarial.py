"""Adversarial cycle training, Diffusion-FFPE's objective (Zhang et al., BIBM 2024; CycleGAN, Zhu et al.
2017).

With A = frozen, B = FFPE, translations a2b and b2a, discriminators D_a on B images and D_b on A images (so
named by the published program: each judges what the translation *of* that letter makes), one iteration is

    cycle    b2a(a2b(a)) = a,  a2b(b2a(b)) = b       weights: L1 1, LPIPS 10
    gan      D_a(a2b(a)) and D_b(b2a(b)) say "real"  0.5
    identity a2b(b) = b,  b2a(a) = a                 L1 1, LPIPS 1
    fake     D_a(a2b(a)) and D_b(b2a(b)) say "fake"  0.5 * 0.5, on the images of the gan update
    real     D_a(b) and D_b(a) say "real"            0.5 * 0.5

each with a step of its own: three of the generator, two of the discriminators.

``legacy_disc_grad_leak`` repeats a defect of the published program: gradients that the gan update leaves in
the discriminators are still there in the fake update, which then pushes logits of fakes *up* until their
sigmoid is 2/3. Here discriminators are frozen during the gan update, so nothing can leak; with the switch
they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from wsi_pipeline.core.sampling import sample_rng
from wsi_pipeline.models.backbones import BackboneConfig
from wsi_pipeline.models.diff_augment import Draws, draw
from wsi_pipeline.models.discriminator import multilevel_loss
from wsi_pipeline.models.layout import Direction
from wsi_pipeline.models.trainable import TurboNetwork
from wsi_pipeline.training.objective import Group, Sample, Term, Update

__all__ = ["AdversarialConfig", "AdversarialObjective", "keyed_draws", "posterior_noise"]

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""LPIPS of two image batches in [-1, 1] -> [B]."""

DrawAugmentation = Callable[[Sample, str, int, int], Draws]
"""Draws of DiffAugment for (sample, call, height, width)."""

_BACK: dict[Direction, Direction] = {"a2b": "b2a", "b2a": "a2b"}
_LETTER: dict[Direction, str] = {"a2b": "a", "b2a": "b"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdversarialConfig:
    """Weights of the terms, with the published values, and what the discriminators see.

    ``augment``: parts of DiffAugment, in order; ``latent``: ``mode`` or ``sample`` of the posterior;
    ``lpips``: off trains without the perceptual terms; ``lpips_vgg``: VGG16 weights (None: torch's cache).
    """

    cycle_l1: float = 1.0
    cycle_lpips: float = 10.0
    identity_l1: float = 1.0
    identity_lpips: float = 1.0
    gan: float = 0.5
    lpips: bool = True
    lpips_vgg: str | None = None
    augment: tuple[str, ...] = ("color", "translation", "cutout")
    latent: Literal["mode", "sample"] = "mode"
    legacy_disc_grad_leak: bool = False
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


class AdversarialObjective:
    """The five updates of one iteration.

    ``network``: both directions; ``judges``: a discriminator for each direction, on the images that it makes;
    ``perceptual``: None leaves the LPIPS terms out; ``draws``: where augmentations come from.
    """

    def __init__(
        self,
        network: TurboNetwork,
        judges: Mapping[Direction, nn.Module],
        config: AdversarialConfig,
        perceptual: Perceptual | None,
        draws: DrawAugmentation | None = None,
    ) -> None:
        self._network = network
        self._judges = judges
        self._config = config
        self._perceptual = perceptual
        self._draws = draws or keyed_draws(config.augment)

    @property
    def groups(self) -> Mapping[Group, Mapping[str, nn.Parameter]]:
        judged = {
            f"net_disc_{_LETTER[direction]}.{name}": parameter
            for direction, judge in self._judges.items()
            for name, parameter in judge.named_parameters()
        }
        return {"generator": self._network.learning, "discriminator": judged}

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return {
            f"net_disc_{_LETTER[direction]}.{name}": buffer
            for direction, judge in self._judges.items()
            for name, buffer in judge.named_buffers()
            if name in judge.state_dict()
        }

    def updates(self, sample: Sample) -> Iterator[Update]:
        fakes: dict[Direction, Tensor] = {}
        yield Update(group="generator", name="cycle", terms=self._cycle(sample))
        self._freeze_judges(not self._config.legacy_disc_grad_leak)
        yield Update(group="generator", name="gan", terms=self._gan(sample, fakes))
        self._freeze_judges(False)
        yield Update(group="generator", name="identity", terms=self._identity(sample))
        yield Update(group="discriminator", name="fake", terms=self._judge(sample, fakes, "fake", 0.0))
        reals: dict[Direction, Tensor] = {"a2b": sample.target, "b2a": sample.source}
        yield Update(group="discriminator", name="real", terms=self._judge(sample, reals, "real", 1.0))

    def _cycle(self, sample: Sample) -> Iterator[Term]:
        for direction, image in self._sides(sample):
            there = self._translate(sample, image, direction, "cycle")
            back = self._translate(sample, there, _BACK[direction], "cycle")
            config, name = self._config, f"cycle_{_LETTER[direction]}"
            yield self._same(back, image, name, config.cycle_l1, config.cycle_lpips)

    def _gan(self, sample: Sample, fakes: dict[Direction, Tensor]) -> Iterator[Term]:
        for direction, image in self._sides(sample):
            fake = self._translate(sample, image, direction, "gan")
            fakes[direction] = fake.detach()
            loss = self._config.gan * self._judged(sample, fake, direction, "gan", 1.0)
            letter = _LETTER[direction]
            changed = (fakes[direction] - image).abs().mean()
            yield Term(loss, {f"gan_{letter}": loss.detach(), f"change_{letter}": changed})

    def _identity(self, sample: Sample) -> Iterator[Term]:
        for direction, image in self._sides(sample):
            # A translation leaves alone what already looks as it shall.
            back = _BACK[direction]
            same = self._translate(sample, image, back, "identity")
            config, name = self._config, f"idt_{_LETTER[back]}"
            yield self._same(same, image, name, config.identity_l1, config.identity_lpips)

    def _judge(
        self, sample: Sample, images: Mapping[Direction, Tensor], name: str, wanted: float
    ) -> Iterator[Term]:
        for direction, image in images.items():
            loss = self._config.gan * self._judged(sample, image, direction, name, wanted)
            yield Term(0.5 * loss, {f"disc_{_LETTER[direction]}_{name}": loss.detach()})

    def _judged(
        self, sample: Sample, image: Tensor, direction: Direction, name: str, wanted: float
    ) -> Tensor:
        call, judge = f"{name}_{_LETTER[direction]}", self._judges[direction]
        judge.train(sample.first)  # its spectral norms move in training mode
        logits = judge(image, self._draws(sample, call, *image.shape[-2:]))
        return multilevel_loss(logits, wanted).mean()

    def _translate(self, sample: Sample, image: Tensor, direction: Direction, name: str) -> Tensor:
        noise = None
        if self._config.latent == "sample":
            noise = posterior_noise(sample, image, self._network.latent_channels, f"{name}_{direction}")
        return self._network(image, direction, noise)

    def _same(self, found: Tensor, wanted: Tensor, name: str, l1: float, lpips: float) -> Term:
        loss = l1 * (found - wanted).abs().mean()
        if self._perceptual is not None and lpips:
            loss = loss + lpips * self._perceptual(found, wanted).mean()
        return Term(loss, {name: loss.detach()})

    def _sides(self, sample: Sample) -> tuple[tuple[Direction, Tensor], ...]:
        return ("a2b", sample.source), ("b2a", sample.target)

    def _freeze_judges(self, frozen: bool) -> None:
        for judge in self._judges.values():
            for parameter in judge.parameters():
                parameter.requires_grad_(not frozen)


def keyed_draws(policy: Sequence[str]) -> DrawAugmentation:
    """DiffAugment's draws as functions of (seed, sample number, call)."""

    def drawn(sample: Sample, call: str, height: int, width: int) -> Draws:
        rngs = [sample_rng(sample.seed, int(number), f"augment/{call}") for number in sample.numbers]
        return draw(rngs, height, width)

    return drawn


def posterior_noise(sample: Sample, image: Tensor, channels: int, call: str) -> Tensor:
    """Standard normals [B, L, H/8, W/8] that belong to the sample's number and the call."""
    height, width = (side // 8 for side in image.shape[-2:])
    noise = [
        sample_rng(sample.seed, int(n), f"latent/{call}").standard_normal(
            (channels, height, width), dtype=np.float32
        )
        for n in sample.numbers
    ]
    return torch.from_numpy(np.stack(noise)).to(image.device)
