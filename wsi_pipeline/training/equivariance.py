"""Commutation with the dihedral group as a term of any objective (Honkamaa et al., MedIA 90, 2023, L_com).

A translator that moves what it paints does not commute with flips and quarter turns g: T(x o g) differs from
T(x) o g. The loss needs no target, so it holds an unpaired translator in place as well. Turns of a square
grid are exact: nothing is interpolated and nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from wsi_pipeline.core.sampling import sample_rng
from wsi_pipeline.training.objective import Group, Objective, Sample, Term, Update

__all__ = ["EquivarianceConfig", "WithCommutation", "commutation_error", "dihedral"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EquivarianceConfig:
    """``weight``: of the mean absolute difference; 0 leaves it out."""

    weight: float = 0.0


class WithCommutation:
    """An objective with one more term in the generator's first update: ``translate`` commutes with turns.

    ``translate``: of images [B, C, H, W] of the source's kind (for two directions, of the one to be held).
    """

    def __init__(
        self, objective: Objective, translate: Callable[[Tensor], Tensor], config: EquivarianceConfig
    ) -> None:
        self._objective = objective
        self._translate = translate
        self._config = config

    @property
    def groups(self) -> Mapping[Group, Mapping[str, nn.Parameter]]:
        return self._objective.groups

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self._objective.buffers

    def updates(self, sample: Sample) -> Iterator[Update]:
        added = self._config.weight == 0
        for update in self._objective.updates(sample):
            if update.group == "generator" and not added:
                added, update = True, replace(update, terms=chain(update.terms, self._terms(sample)))
            yield update

    def _terms(self, sample: Sample) -> Iterator[Term]:
        rngs = [sample_rng(sample.seed, int(number), "dihedral") for number in sample.numbers]
        # Not the identity, element 0, which costs a pass and says nothing.
        loss = commutation_error(self._translate, sample.source, [int(rng.integers(1, 8)) for rng in rngs])
        yield Term(self._config.weight * loss, {"commutation": loss.detach()})


def commutation_error(
    translate: Callable[[Tensor], Tensor], image: Tensor, elements: Sequence[int]
) -> Tensor:
    """Mean |T(x o g) - T(x) o g|, scalar; ``elements``: g of each image. Images have to be square."""
    plain, turned = translate(torch.cat([image, dihedral(image, elements)])).chunk(2)
    return (turned - dihedral(plain, elements)).abs().mean()


def dihedral(image: Tensor, elements: Sequence[int]) -> Tensor:
    """Each image of [B, C, N, N], mirrored where its element is 4 or more, turned ``element % 4`` times."""
    pairs = zip(image, elements, strict=True)
    turned = [torch.rot90(one.flip(-1) if g >= 4 else one, g % 4, (-2, -1)) for one, g in pairs]
    return torch.stack(turned)
