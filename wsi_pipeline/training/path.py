"""Training along a path: one regression hosts I2SB, DDPM with P2 weights, WDM and cWDM.

Each sample draws its step, its noise and whether its condition is dropped from (seed, number). The formulae
are in ``translators`` (``paths``, ``losses``); this is their place in the training loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from wsi_pipeline.core.sampling import sample_rng
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.training.objective import Group, Sample, Term, Update, keyed_dropout
from wsi_pipeline.translators.losses import path_loss
from wsi_pipeline.translators.settings import (
    ConditionConfig,
    DiffusionConfig,
    PathConfig,
    RepresentationConfig,
    SamplingConfig,
    WeightConfig,
)
from wsi_pipeline.translators.trainable import TileNetwork

__all__ = ["PathObjective", "PathObjectiveConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathObjectiveConfig:
    """``path``, ``representation``, ``condition`` and ``weight`` are the four choices that make a system;
    ``sampling``: what validation and the weights file use; ``measure_bands``: tiles on which the strength of
    Haar channels is measured, by which they are then divided (0: none, ``ll_scale`` alone).
    """

    path: PathConfig = field(default_factory=PathConfig)
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    measure_bands: int = 0

    def __post_init__(self) -> None:
        if self.weight.kind == "bands" and self.representation.kind == "identity":
            raise ConfigError("objective.diffusion.weight: bands need representation.kind=haar")
        if self.weight.kind == "p2" and self.path.kind != "vp":
            raise ConfigError("objective.diffusion.weight: p2 is made for path.kind=vp")
        _ = self.system  # refuses what cannot go together

    @property
    def system(self) -> DiffusionConfig:
        """The choices that sampling needs too; ConfigError for those that cannot go together."""
        return DiffusionConfig(path=self.path, representation=self.representation, condition=self.condition)

    @property
    def translates(self) -> bool:
        """Whether a source image is needed."""
        return self.system.translates


class PathObjective:
    """One update with one term. ``network``: of a spec that has a diffusion."""

    def __init__(self, network: TileNetwork, config: PathObjectiveConfig) -> None:
        if network.parts is None:
            raise ConfigError("objective.kind: diffusion needs a denoiser; set model.network.family=unet2d")
        self._network, self._parts, self._config = network, network.parts, config

    @property
    def groups(self) -> Mapping[Group, Mapping[str, nn.Parameter]]:
        return {"generator": self._network.learning}

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self._network.buffers_by_name

    def updates(self, sample: Sample) -> Iterator[Update]:
        yield Update(group="generator", name="path", terms=self._terms(sample))

    def _terms(self, sample: Sample) -> Iterator[Term]:
        rngs = [sample_rng(sample.seed, int(number), "path") for number in sample.numbers]
        device, shape = sample.target.device, sample.target.shape[1:]
        n = torch.tensor(
            [int(rng.integers(self._parts.path.steps)) for rng in rngs]
        )  # on the CPU: it looks up tables there
        drawn = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
        condition = self._parts.condition.config
        dropped = torch.tensor([bool(rng.random() < condition.drop) for rng in rngs], device=device)
        if condition.classes and sample.label is None:
            raise ConfigError(
                "data.labels: the objective has classes and the data no labels; name a CSV file"
            )
        with keyed_dropout(sample):
            loss, logs = path_loss(
                self._network,
                self._parts,
                self._config.weight,
                x0=sample.target,
                source=sample.source if self._network.spec.translates else None,
                label=sample.label if condition.classes else None,
                n=n,
                z=torch.from_numpy(drawn).to(device),
                drop_B=dropped if condition.drop else None,
            )
        yield Term(loss, logs)
