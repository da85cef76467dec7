"""The loop's body: one iteration of any objective, on any number of processes.

Data parallel without a wrapper. Every process computes its part of the batch; before a group's step its
gradients are averaged over the processes, in one flat buffer. Why not DistributedDataParallel: it expects one
forward pass through one module for each backward pass, and cycle training passes four times through one UNet.
Averaging by hand gives the same numbers, needs to send only what learns (adapters), and is the same code for
one process. Other state (spectral norms) depends on parameters alone, so it stays equal by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipeline.errors import TrainingError
from wsi_pipeline.training.config import OptimiserConfig
from wsi_pipeline.training.objective import Group, Objective, Sample

__all__ = ["Averages", "Iteration", "learning_rate_at", "make_optimisers"]


def make_optimisers(objective: Objective, config: OptimiserConfig) -> dict[Group, torch.optim.Optimizer]:
    """AdamW for each group."""
    return {
        group: torch.optim.AdamW(
            parameters.values(),
            lr=_peak(group, config),
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,  # hundreds of small tensors: one call instead of ten for each
        )
        for group, parameters in objective.groups.items()
    }


def learning_rate_at(step: int, steps: int, group: Group, config: OptimiserConfig) -> float:
    """Rate of iteration ``step`` (from 0) of ``steps``; a function of the step, so there is nothing to
    resume."""
    rate = _peak(group, config)
    if step < config.warmup:
        return rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return rate
    done = min((step - config.warmup) / max(steps - config.warmup, 1), 1.0)
    return rate * (1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


def _peak(group: Group, config: OptimiserConfig) -> float:
    own = config.discriminator_learning_rate if group == "discriminator" else None
    return config.learning_rate if own is None else own


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One iteration of an objective; ``steps``: length of the whole run, for the schedule.

    ``accelerator``: of the accelerate library; ``ema``: averages to be moved towards the generator's
    parameters.
    """

    objective: Objective
    optimisers: Mapping[Group, torch.optim.Optimizer]
    config: OptimiserConfig
    accelerator: Any
    steps: int
    ema: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, step: int, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Run all updates on micro-batches of equal size; returns mean losses and norms of gradients.

        Gradients are means over micro-batches and processes. Raises TrainingError where one is not finite.
        """
        logs: dict[str, Tensor] = {}
        # Micro-batches go through the updates in step: each has its own iterator, and its own images in it.
        for updates in zip(*(self.objective.updates(sample) for sample in samples), strict=True):
            group, name = updates[0].group, updates[0].name
            for update in updates:
                for term in update.terms:
                    (term.loss / len(samples)).backward()
                    for key, value in term.logs.items():
                        logs[key] = logs.get(key, torch.zeros(())) + value.float().cpu() / len(samples)
            logs[f"norm_{name}"] = self._step(step, group, name)
        self._average()
        return logs

    def _step(self, step: int, group: Group, name: str) -> Tensor:
        parameters = list(self.objective.groups[group].values())
        average_gradients(parameters, self.accelerator)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"iteration {step + 1}: the gradients of update '{name}' are not finite; train with "
                "loop.precision=float32 or a lower optimiser.learning_rate, from the last checkpoint"
            )
        optimiser = self.optimisers[group]
        for settings in optimiser.param_groups:
            settings["lr"] = learning_rate_at(step, self.steps, group, self.config)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return norm.detach().cpu()

    def _average(self) -> None:
        learning = self.objective.groups["generator"]
        for name, average in self.ema.items():
            average.lerp_(learning[name].detach(), 1.0 - self.config.ema)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Any) -> None:
    """Replace each gradient by its mean over the processes; nothing to do for one process."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Averages:
    """Means of logged values since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, logs: Mapping[str, Tensor]) -> None:
        for name, value in logs.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value
        self._count += 1

    def take(self, accelerator: Any) -> dict[str, float]:
        """Means over iterations and processes; begins anew."""
        names = list(self._sums)
        means = torch.stack([self._sums[name] for name in names]) / self._count
        means = accelerator.reduce(means.to(accelerator.device), reduction="mean")
        self._sums, self._count = {}, 0
        return dict(zip(names, means.tolist(), strict=True))
