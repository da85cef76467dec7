"""Training from roughly registered pairs (Honkamaa et al., Medical Image Analysis 90, 2023).

A translator T and three registration networks learn together. Registration may explain why target y and
translation do not fit; T may not, because it has to commute with a random R (flips, quarter turns, a
rotation): a T that moves what it paints moves it elsewhere once the source is turned. Gradients are cut so
that each network answers for one kind of error. With o = T(x), o_R = T(x o R), o in the order of
application, sg = no gradient:

    rigid        y o rho = sg o                                        moves rho
    cross        y o sg rho o phi = sg o                               moves phi
    intra        sg(y o rho o phi) = c,  c = o_R o R^-1 o psi^-1       moves T and psi
    commutation  o_R = o o R                                           moves T
    rigidity     of phi, sg phi o psi and their inverses               moves phi, psi and T (psi sees o)
    adversarial  the judge of pairs says "real" to (x o R, c o R)      moves T and psi
    rotation, shift   what rho is beyond its limits, squared           moves rho
    own          T(x o A) = o o A,  A = sg(psi^-1 o phi^-1 o rho^-1)   moves T; off, as published

Turns of the judge use one half of the batch, those of the generator the other. Why the judge sees both images
in the frame of x o R: it then may see the source as well, though the pair does not fit.

Differences from the published program: errors are averaged over valid pixels, not over all
(``published_mean``), because small masks would weaken them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.core.sampling import sample_rng
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models import warp as warps
from wsi_pipeline.models.registration import RegistrationConfig, make_judge, make_registration
from wsi_pipeline.models.warp import Field, Masked, RigidityConfig, Transform
from wsi_pipeline.training.objective import Group, Sample, Term, Update

__all__ = ["Aligned", "AlignedConfig", "AlignedObjective", "aligned_networks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedConfig:
    """Weights of the losses, with the values published for stained tissue.

    ``rotate_deg``: R rotates within +- this, besides flips and quarter turns; ``max_rotation`` (degrees) and
    ``max_shift`` (pixels): limits of rho; ``implicit``: off compares y with o o psi^-1 in place of c;
    ``common_frame``: off shows the judge the pair as it lies; ``svf_steps``: squarings of an exponential.
    """

    similarity: Literal["l1", "l2"] = "l1"
    rigid: float = 1.0
    cross: float = 1.0
    intra: float = 1.0
    commutation: float = 1.0
    own: float = 0.0
    forward_rigidity: float = 100.0
    inverse_rigidity: float = 100.0
    adversarial: float = 0.01
    rotate_deg: float = 15.0
    max_rotation: float = 20.0
    max_shift: float = 80.0
    svf_steps: int = 7
    implicit: bool = True
    common_frame: bool = True
    published_mean: bool = False
    penalties: RigidityConfig = field(default_factory=RigidityConfig)
    networks: RegistrationConfig = field(default_factory=RegistrationConfig)


class Aligned(NamedTuple):
    """``losses``: unweighted, by name; ``shown``: source, real and made image as the judge gets them;
    ``total``: where a source's point lies in the target; ``made``: the translation [B, C, H, W]."""

    losses: dict[str, Tensor]
    shown: tuple[Tensor, Tensor, Tensor]
    total: Transform
    made: Tensor


def aligned_networks(
    config: AlignedConfig, seed: int, channels: int = 3
) -> tuple[nn.ModuleDict, nn.Module | None]:
    """The registration networks, and the judge where it has a weight."""
    judge = make_judge(config.networks, seed + 1, channels) if config.adversarial else None
    return make_registration(config.networks, seed, channels), judge


class AlignedObjective:
    """The judge's update, if there is a judge, and the generator's.

    ``translate``: the translator, of images [B, 3, H, W]; ``learning``: its parameters; ``registration``:
    ``rigid``, ``cross``, ``intra``; ``turns``: R [B, 3, 3] of a sample, None draws by the samples' numbers.
    """

    def __init__(
        self,
        translate: Callable[[Tensor], Tensor],
        learning: Mapping[str, nn.Parameter],
        registration: nn.ModuleDict,
        judge: nn.Module | None,
        config: AlignedConfig,
        turns: Callable[[Sample], Tensor] | None = None,
    ) -> None:
        self._translate = translate
        self._learning = learning
        self._registration = registration
        self._judge = judge
        self._config = config
        self._turns = turns or self._drawn

    @property
    def groups(self) -> Mapping[Group, Mapping[str, nn.Parameter]]:
        moving = {f"registration.{name}": p for name, p in self._registration.named_parameters()}
        generator: dict[Group, Mapping[str, nn.Parameter]] = {"generator": {**self._learning, **moving}}
        if self._judge is None:
            return generator
        judged = {f"judge.{name}": p for name, p in self._judge.named_parameters()}
        return {**generator, "discriminator": judged}

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return {} if self._judge is None else {f"judge.{n}": b for n, b in self._judge.named_buffers()}

    def updates(self, sample: Sample) -> Iterator[Update]:
        if self._judge is not None:
            half = len(sample.source) // 2
            if not half:
                raise ConfigError(
                    "objective.aligned: the judge learns from one half of a batch and the generator from the "
                    "other; use a batch of 2 or more, or objective.aligned.adversarial=0"
                )
            shown = _part(sample, slice(0, half))
            yield Update(group="discriminator", name="judge", terms=self._judging(self._judge, shown))
            sample = _part(sample, slice(half, None))
        yield Update(group="generator", name="aligned", terms=self._generating(sample))

    def _judging(self, judge: nn.Module, sample: Sample) -> Iterator[Term]:
        with torch.no_grad():
            source, *images = self.align(sample).shown
        for name, image, wanted in zip(("real", "fake"), images, (1.0, 0.0), strict=True):
            loss = self._config.adversarial * _verdict(judge.train(sample.first), source, image, wanted)
            yield Term(loss, {f"disc_{name}": loss.detach()})

    def _generating(self, sample: Sample) -> Iterator[Term]:
        aligned, config = self.align(sample), self._config
        losses = aligned.losses
        if self._judge is not None:
            source, _, made = aligned.shown
            self._judge.requires_grad_(False)
            losses["adversarial"] = _verdict(self._judge.train(sample.first), source, made, 1.0)
            self._judge.requires_grad_(True)
        weights = {"rotation": 1.0, "shift": 1.0}
        for way, weight in (("forward", config.forward_rigidity), ("inverse", config.inverse_rigidity)):
            weights |= {f"rigidity_cross_{way}": 0.5 * weight, f"rigidity_total_{way}": 0.5 * weight}
        loss = sum(weights.get(name, getattr(config, name, 1.0)) * value for name, value in losses.items())
        logs = {name: value.detach() for name, value in losses.items()}
        logs["change"] = (aligned.made.detach() - sample.source).abs().mean()
        yield Term(loss, logs)

    def align(self, sample: Sample) -> Aligned:
        """All of a batch but the judge's verdict; each loss moves what the table above says."""
        config, nets = self._config, self._registration
        x, y = _masked(sample.source, sample.source_mask), _masked(sample.target, sample.target_mask)
        turn = self._turns(sample).to(x.image)
        back = torch.linalg.inv(turn)
        turned = warps.warp(x, turn)
        both = self._translate(torch.cat([x.image, turned.image])).float()
        made, made_turned = (Masked(o, of.mask) for o, of in zip(both.chunk(2), (x, turned), strict=True))

        size = x.image.new_tensor(x.image.shape[2:])
        place = (warps.coordinates(x.image) / size[:, None, None]).expand(len(turn), -1, -1, -1)
        angle, shift = nets["rigid"](torch.cat([*x, *y, place], dim=1)).split([1, 2], dim=1)
        rho = warps.affine_matrix(angle, shift, (size - 1) / 2)
        by_rho = warps.warp(y, rho)
        phi, phi_back = self._fields("cross", [by_rho.image.detach(), by_rho.mask, *x])
        to_phi = warps.compose(rho.detach(), phi)
        by_phi = warps.warp(y, to_phi)
        seen = [phi_back.displacement.detach(), by_phi.image.detach(), by_phi.mask, *made]
        psi, psi_back = self._fields("intra", seen)
        unturned = warps.compose(back, psi_back)

        still, total = Masked(made.image.detach(), made.mask), warps.compose(phi.detach(), psi)
        total_back = warps.compose(psi_back, phi_back.detach())
        losses = {
            "rigid": self._error(by_rho, still),
            "cross": self._error(by_phi, still),
            "intra": self._error(
                Masked(by_phi.image.detach(), by_phi.mask),
                warps.warp(made_turned, unturned) if config.implicit else warps.warp(made, psi_back),
            ),
            "commutation": self._error(made_turned, warps.warp(made, turn)),
            "rigidity_cross_forward": self._bending(phi),
            "rigidity_total_forward": self._bending(total),
            "rigidity_cross_inverse": self._bending(phi_back),
            "rigidity_total_inverse": self._bending(total_back),
            "rotation": _beyond(angle, math.radians(config.max_rotation)),
            "shift": _beyond(shift, config.max_shift),
        }
        if config.own:
            undone = warps.compose(phi_back.detach(), torch.linalg.inv(rho.detach()))
            away = warps.compose(psi_back.detach(), undone)
            moved = warps.warp(x, away)
            again = Masked(self._translate(moved.image).float(), moved.mask)
            losses["own"] = self._error(again, warps.warp(made, away))
        if config.common_frame:
            real, fake = (
                warps.warp(y, warps.compose(to_phi, turn)),
                warps.warp(made_turned, warps.compose(unturned, turn)),
            )
        else:
            real, fake = by_phi, warps.warp(made, psi_back)
        mask = real.mask * fake.mask
        shown = (turned.image, real.image.detach() * mask, fake.image * mask)
        return Aligned(losses, shown, warps.compose(to_phi, psi), made.image)

    def _drawn(self, sample: Sample) -> Tensor:
        rngs = [sample_rng(sample.seed, int(number), "turns") for number in sample.numbers]
        return warps.random_turns(rngs, sample.source.shape[2:], self._config.rotate_deg)

    def _fields(self, name: str, seen: Sequence[Tensor]) -> tuple[Field, Field]:
        """A deformation and its inverse."""
        velocity = self._registration[name](torch.cat(list(seen), dim=1))
        there, back = (warps.exponential(v, self._config.svf_steps) for v in (velocity, -velocity))
        return Field(displacement=there), Field(displacement=back)

    def _bending(self, transform: Transform) -> Tensor:
        return warps.rigidity(cast(Field, transform).displacement, self._config.penalties)

    def _error(self, found: Masked, wanted: Masked) -> Tensor:
        """Mean error over valid pixels, or over all pixels as published."""
        error, mask = found.image - wanted.image, found.mask * wanted.mask
        error = mask * (error.abs() if self._config.similarity == "l1" else error.square())
        if self._config.published_mean:
            return error.mean()
        return error.sum() / (mask.sum() * error.shape[1]).clamp(min=1.0)


def _part(sample: Sample, rows: slice) -> Sample:
    names = ("source", "target", "numbers", "label", "source_mask", "target_mask")
    values = {name: getattr(sample, name) for name in names}
    return replace(sample, **{name: value[rows] for name, value in values.items() if value is not None})


def _masked(image: Tensor, mask: Tensor | None) -> Masked:
    mask = torch.ones_like(image[:, :1]) if mask is None else mask
    return Masked(image * mask, mask)


def _beyond(value: Tensor, limit: float) -> Tensor:
    return F.relu(value.abs() - limit).square().mean(dim=0).sum()


def _verdict(judge: nn.Module, source: Tensor, image: Tensor, wanted: float) -> Tensor:
    logits = judge(source, image)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, wanted))
