"""The settings of a training run, part by part; each default stands here, or beside the code it
configures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.lora_turbo import SIZE_MULTIPLE
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.models.trainable import Trainable
from wsi_pipeline.readers.mpp import plausible
from wsi_pipeline.training.adversarial import AdversarialConfig
from wsi_pipeline.training.aligned import AlignedConfig
from wsi_pipeline.training.data import DataConfig
from wsi_pipeline.training.equivariance import EquivarianceConfig
from wsi_pipeline.training.paired import PairedConfig
from wsi_pipeline.training.path import PathObjectiveConfig
from wsi_pipeline.training.pix2pix import Pix2PixConfig
from wsi_pipeline.training.validation import ValidationConfig

__all__ = ["LoopConfig", "ModelConfig", "ObjectiveConfig", "OptimiserConfig", "TrainConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is trained. One of ``weights``, ``base``, ``scratch`` and ``network`` says where it begins.

    ``weights``: a bundle; ``base``: folder or hub id of SD-Turbo, for fresh adapters; ``scratch``: ``mini``,
    a small network from nothing; ``network``: another translator, from nothing. ``directions``: ``both``, or
    ``a2b`` alone (paired training); ``multi_view``: encode tiles as 4x4 cells, too; ``trainable``:
    ``adapters`` or ``all``; ``train_local_lora``: also the adapters of the local encoders (the published
    program did not); ``recompute``: gradient checkpointing; ``mpp``: µm per pixel that the bundle states and
    `convert` then works at (None: that of the tiles); ``tile``: side in px of the tiles that `convert` will
    make; ``licence``: what users of the weights have to know."""

    weights: str | None = None
    base: str | None = None
    scratch: Literal["mini"] | None = None
    network: NetworkConfig | None = None
    rank_unet: int = 128
    rank_vae: int = 4
    directions: Literal["both", "a2b"] = "both"
    multi_view: bool = True
    prompt_a2b: str = "paraffin section"
    prompt_b2a: str = "frozen section"
    trainable: Trainable = "adapters"
    train_local_lora: bool = False
    recompute: bool = False
    mpp: float | None = None
    tile: int = 512
    licence: str = ""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.weights, self.base, self.scratch, self.network)) > 1:
            raise ConfigError("model: give one of weights, base, scratch and network, not several")
        for name in ("rank_unet", "rank_vae", "tile"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not a positive number")
        if self.tile % SIZE_MULTIPLE:
            raise ConfigError(f"model.tile: {self.tile} is not a multiple of {SIZE_MULTIPLE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """``kind``: ``adversarial`` (unpaired cycle training), ``paired``, ``pix2pix`` (paired, with a judge),
    ``diffusion`` (paths: diffusion and bridges) or ``aligned`` (roughly registered pairs); each has its
    settings. ``equivariance``: a term that any of them but ``diffusion`` can add."""

    kind: Literal["adversarial", "paired", "pix2pix", "diffusion", "aligned"] = "adversarial"
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    paired: PairedConfig = field(default_factory=PairedConfig)
    pix2pix: Pix2PixConfig = field(default_factory=Pix2PixConfig)
    diffusion: PathObjectiveConfig = field(default_factory=PathObjectiveConfig)
    aligned: AlignedConfig = field(default_factory=AlignedConfig)
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW and its schedule, one for each group of parameters, with the published values.

    ``clip``: largest norm of a group's gradients; ``schedule``: ``constant``, ``linear`` or ``cosine`` to 0
    at ``loop.steps``, after ``warmup`` iterations of linear growth; stepped once an iteration; ``ema``: decay
    of averaged weights (0: none), which validation and the bundle then use.
    """

    learning_rate: float = 5e-6
    discriminator_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    epsilon: float = 1e-8
    clip: float = 10.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    ema: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema < 1.0:
            raise ConfigError(f"optimiser.ema: {self.ema} is not in [0, 1)")
        if min(self.learning_rate, self.clip, self.epsilon) <= 0:
            raise ConfigError("optimiser: learning_rate, clip and epsilon must be above 0")
        own = self.discriminator_learning_rate
        if (own is not None and own <= 0) or min(self.weight_decay, self.warmup) < 0:
            raise ConfigError(
                "optimiser: discriminator_learning_rate must be above 0, weight_decay and warmup not below"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optimiser.betas: {list(self.betas)} are not in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How long, how fast, and what is kept.

    ``steps``: iterations; ``batch``: samples of one process and micro-batch; ``accumulate``: micro-batches an
    update; ``precision``: ``bf16`` runs the networks in bfloat16 (float32 weights, losses and one-step
    formula); ``device``: ``auto`` or ``cpu``; ``log_every``, ``sample_every``, ``checkpoint_every``:
    iterations; ``keep``: newest checkpoints that are kept, besides the best; ``collapse_change``: alarm where
    outputs differ from inputs by less than this (in [-1, 1], averaged over ``collapse_steps`` iterations);
    ``on_collapse``: ``stop`` or ``warn`` (``auto``: stop with bf16, which is known for it).
    """

    steps: int = 100_000
    batch: int = 1
    accumulate: int = 1
    seed: int = 2024
    precision: Literal["float32", "bf16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    log_every: int = 20
    sample_every: int = 500
    checkpoint_every: int = 1000
    keep: int = 3
    collapse_change: float = 0.01
    collapse_steps: int = 200
    on_collapse: Literal["auto", "stop", "warn"] = "auto"
    tensorboard: bool = True

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "accumulate", "log_every", "sample_every", "checkpoint_every", "keep")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name}: {getattr(self, name)} is not a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that one training run can be told."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        for name, value in _numbers(self):
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name}: {value} is not a number of 0 or more")
        if self.model.mpp is not None and not plausible((self.model.mpp, self.model.mpp)):
            raise ConfigError(f"model.mpp: {self.model.mpp} is no pixel size in µm; give 0.02 to 20")
        self._check_pairing()
        if self.data.crop % SIZE_MULTIPLE:
            raise ConfigError(
                f"data.crop: {self.data.crop} px is not a multiple of {SIZE_MULTIPLE}; give "
                f"{max(1, self.data.crop // SIZE_MULTIPLE) * SIZE_MULTIPLE}"
            )

    def _check_pairing(self) -> None:
        """Data and objective have to fit: a loss that compares pixels must not be given strangers."""
        kind, pairing = self.objective.kind, self.data.pairing
        path = self.objective.diffusion
        needs: dict[str, tuple[str, ...]] = {
            "adversarial": ("unpaired", "aligned", "simulated"),
            "paired": ("aligned", "simulated"),
            "pix2pix": ("aligned", "simulated"),
            "diffusion": ("aligned", "simulated") if path.translates else ("labelled", "unpaired", "aligned"),
            "aligned": ("rough", "aligned", "simulated"),
        }
        if pairing in needs[kind]:
            return
        reason = f"objective.kind: {kind} needs data.pairing {' or '.join(needs[kind])}, not {pairing}"
        if pairing == "rough":
            reason += ": the pairs are not aligned; train with objective.kind=aligned, which registers them"
        elif pairing == "unpaired":
            reason += "; give aligned or simulated data, or train with objective.kind=adversarial"
        raise ConfigError(reason)


def _numbers(part: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted names and values of all floats, but those of the artefact model, whose ranges it checks."""
    for item in fields(part):
        value, name = getattr(part, item.name), f"{prefix}{item.name}"
        if is_dataclass(value) and item.name != "frozen":
            yield from _numbers(value, f"{name}.")
        elif isinstance(value, float):
            yield name, value
