"""What is trained on: the seam that every objective joins.

An objective turns a batch into *updates*, in order. An update belongs to one group of parameters, has its own
optimiser step, and consists of *terms*: sums of losses that are differentiated one after the other, each
before the next is computed. Why terms: gradients add up, so the sum of two directions needs the memory of
one.

Why updates and not one sum of losses: adversarial training takes turns, and the published program takes five
(``adversarial.py``). An objective with one loss yields one update with one term.

The loop (``loop.py``) knows groups, updates and terms, and no name of any method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsi_pipeline.core.sampling import sample_rng

__all__ = ["Group", "Objective", "Sample", "Term", "Update", "keyed_dropout"]

Group = str
"""Parameters that one optimiser steps: ``generator``, ``discriminator``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A batch on its device. ``source``, ``target``: [B, 3, H, W] float32 in [-1, 1]; ``numbers``: int64 [B].

    ``label``: int64 [B], class of the target, where the data has classes; ``source_mask``, ``target_mask``:
    [B, 1, H, W] float32, 1 where a pixel was in its slide's field of view (None: everywhere).

    Whatever an objective draws, it draws from (``seed``, number): then neither ranks nor batches nor an
    interruption can change it. ``first``: the iteration's first micro-batch on its process; what moves with
    every pass (power iterations) moves with this one alone, so that cutting a batch changes nothing.
    """

    source: Tensor
    target: Tensor
    numbers: npt.NDArray[np.int64]
    seed: int
    first: bool = True
    label: Tensor | None = None
    source_mask: Tensor | None = None
    target_mask: Tensor | None = None


class Term(NamedTuple):
    """``loss``: scalar, to be differentiated now; ``logs``: scalars to be shown, detached, by name."""

    loss: Tensor
    logs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One step of one group. ``terms`` is lazy: asking for the next one computes it."""

    group: Group
    name: str
    terms: Iterable[Term]


class Objective(Protocol):
    """Losses of one method. Networks are built before; an objective holds no step, clock or file."""

    @property
    def groups(self) -> Mapping[Group, Mapping[str, nn.Parameter]]:
        """Parameters that learn, by group and by a name that checkpoints keep."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Other tensors that training changes (power iterations), to be kept in checkpoints."""

    def updates(self, sample: Sample) -> Iterator[Update]:
        """The updates of one iteration. An update's terms are exhausted before the next is asked for."""


@contextmanager
def keyed_dropout(sample: Sample) -> Iterator[None]:
    """What torch draws inside (dropout) belongs to the micro-batch: its seed and first number; outside
    nothing changes. Cut a batch otherwise, and these draws are others."""
    seed = int(sample_rng(sample.seed, int(sample.numbers[0]), "dropout").integers(2**63))
    with torch.random.fork_rng(devices=[sample.source.device] if sample.source.is_cuda else []):
        torch.manual_seed(seed)
        yield
