"""A training run on one page: open or continue a folder, iterate, validate, save, and leave a bundle.

    RUN/train.yaml              the settings, ready for --config
    RUN/checkpoints/            the newest ones and the best; see ``checkpoint.py``
    RUN/log.jsonl, tensorboard/ losses and figures
    RUN/samples/                pictures: source, translation, target, translation back
    RUN/generator.safetensors   the bundle of the best checkpoint (or the last): `convert --weights` takes it

Killed and run again, it goes on from the newest checkpoint and ends with the same weights, bit for bit on a
CPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsi_pipeline.core.protocols import U8_BHWC
from wsi_pipeline.errors import ConfigError, TrainingError
from wsi_pipeline.models.bundle import BundleFacts, load_facts, save_bundle
from wsi_pipeline.models.features import make_extractor
from wsi_pipeline.models.layout import Direction
from wsi_pipeline.models.pixels import from_uint8, to_uint8
from wsi_pipeline.training.build import initial_weights, make_network, make_objective
from wsi_pipeline.training.checkpoint import (
    Checkpoint,
    State,
    checkpoint_bytes,
    find_checkpoints,
    learned_of,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from wsi_pipeline.training.config import TrainConfig
from wsi_pipeline.training.data import TrainBatch, batches
from wsi_pipeline.training.ema import swapped
from wsi_pipeline.training.events import Emit, Notice, Saved, Started, Stepped, Validated, ignore
from wsi_pipeline.training.folder import RunFolder
from wsi_pipeline.training.logs import RunLog, save_grid
from wsi_pipeline.training.loop import Averages, Iteration, make_optimisers
from wsi_pipeline.training.objective import Sample
from wsi_pipeline.training.validation import Validation, is_better

__all__ = ["TrainResult", "train"]

SPARE = 2**30
"""Bytes that must stay free beside what a run will write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """``bundle``: the generator; ``step``: iterations behind its weights; ``figures``: its validation, if
    any."""

    bundle: BundleFacts
    step: int
    figures: dict[str, float]


def train(config: TrainConfig, out: str | Path, *, restart: bool = False, emit: Emit = ignore) -> TrainResult:
    """Train, or go on training, in the folder ``out``; see the module for what it then holds.

    ``restart`` throws an earlier run in this folder away. Raises ConfigError and CheckpointError before
    anything starts, FingerprintMismatchError where the folder belongs to other settings, SlideError where a
    slide fails, TrainingError where training cannot go on.
    """
    accelerator = _accelerator(config)
    run = _Run(config, Path(out), restart, accelerator, emit)
    try:
        run.go()
    finally:
        run.close()
    return run.result()


class _Run:
    """State of a run while it lasts."""

    def __init__(self, config: TrainConfig, out: Path, restart: bool, accelerator: Any, emit: Emit) -> None:
        self.config, self.accelerator = config, accelerator
        self.is_main = bool(accelerator.is_main_process)
        self.emit = emit if self.is_main else ignore
        self.device = accelerator.device
        weights = initial_weights(config.model, config.loop.seed)
        self.network = make_network(config, weights, self.device)
        self.objective = make_objective(config, self.network, self.device, config.loop.seed)
        self.validation = self._validation()
        self.folder = RunFolder(out, config, weights.digest, accelerator.num_processes)
        if self.is_main:
            self.folder.open(restart)
        accelerator.wait_for_everyone()
        learning = self.objective.groups["generator"]
        averaged = {name: p.detach().clone() for name, p in learning.items()} if config.optimiser.ema else {}
        self.state = State(
            groups=self.objective.groups,
            buffers=self.objective.buffers,
            optimisers=make_optimisers(self.objective, config.optimiser),
            ema=averaged,
        )
        self.first = self._resume()
        self.log: RunLog | None = None
        self.quiet_steps = 0

    def go(self) -> None:
        config, steps = self.config, self.config.loop.steps
        counts = {group: sum(p.numel() for p in ps.values()) for group, ps in self.state.groups.items()}
        self.emit(
            Started(
                step=self.first,
                steps=steps,
                learning=counts,
                device=str(self.device),
                processes=self.accelerator.num_processes,
            )
        )
        if self.is_main:
            self._check_disk()
            self.log = RunLog(self.folder.path, self.first, config.loop.tensorboard)
        iteration = Iteration(
            objective=self.objective,
            optimisers=self.state.optimisers,
            config=config.optimiser,
            accelerator=self.accelerator,
            steps=steps,
            ema=self.state.ema,
        )
        averages = Averages()
        stream = batches(
            config.data,
            seed=config.loop.seed,
            batch=config.loop.batch * config.loop.accumulate,
            start=self.first,
            stop=steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        for step, batch in enumerate(stream, start=self.first):
            averages.add(iteration.run(step, list(self._samples(batch))))
            self._after(step + 1, averages)

    def _samples(self, batch: TrainBatch) -> Iterator[Sample]:
        """Micro-batches on the device."""
        for at in range(0, len(batch.numbers), self.config.loop.batch):
            part = slice(at, at + self.config.loop.batch)
            yield Sample(
                source=from_uint8(torch.from_numpy(batch.source_BHWC[part]).to(self.device)),
                target=from_uint8(torch.from_numpy(batch.target_BHWC[part]).to(self.device)),
                numbers=batch.numbers[part],
                seed=self.config.loop.seed,
            )

    def _after(self, done: int, averages: Averages) -> None:
        """What is due after ``done`` iterations."""
        loop, every = self.config.loop, self.config.validation.every
        last = done == loop.steps
        saves = done % loop.checkpoint_every == 0 or last
        logs: dict[str, float] = {}
        # A saved iteration is logged, too: a resumed run then averages over the same iterations.
        if done % loop.log_every == 0 or saves:
            logs = averages.take(self.accelerator)
            if self.log is not None:
                self.log.write(done, "train", logs)
        self.emit(Stepped(step=done, steps=loop.steps, logs=logs))
        if self.is_main and (done % loop.sample_every == 0 or last):
            self._show(done)
        if self.is_main and self.validation is not None and (done % every == 0 or last):
            self._validate(done)
        if saves:
            self._save(done)
            self.accelerator.wait_for_everyone()
        if "change_a" in logs:
            self._watch(done, logs["change_a"])

    def _show(self, done: int) -> None:
        if self.validation is None:
            return
        path = self.folder.samples / f"step-{done:08d}.png"
        save_grid(path, self.validation.pictures(self._translate, self.network.directions))
        self.emit(Saved(step=done, path=path))

    def _validate(self, done: int) -> None:
        if self.validation is None:
            return
        figures = self.validation.figures(self._translate, self.network.directions)
        best = self.folder.best()
        better = is_better(self.config.validation.metric, figures, best[1] if best else None)
        if better:
            self._save(done)
            self.folder.set_best(done, figures[self.config.validation.metric], figures)
        if self.log is not None:
            self.log.write(done, "validation", figures)
        self.emit(Validated(step=done, figures=figures, best=better))

    def _save(self, done: int) -> None:
        if self.is_main and not self.folder.has_checkpoint(done):
            saved = save_checkpoint(self.folder.checkpoints, done, self.state, self.folder.fingerprint)
            best = self.folder.best()
            prune(self.folder.checkpoints, self.config.loop.keep, best[0] if best else None)
            self.emit(Saved(step=done, path=saved.path))

    def _watch(self, done: int, change: float) -> None:
        """The identity-collapse alarm: a generator that has learnt to return its input."""
        loop = self.config.loop
        self.quiet_steps = self.quiet_steps + loop.log_every if change < loop.collapse_change else 0
        if self.quiet_steps < loop.collapse_steps:
            return
        said = (
            f"iteration {done}: outputs have differed from inputs by {change:.4f} (of 2) on average, for "
            f"{self.quiet_steps} iterations: the generator returns its input"
        )
        stops = loop.on_collapse == "stop" or (loop.on_collapse == "auto" and loop.precision == "bf16")
        if stops:
            raise TrainingError(
                f"{said}; train with loop.precision=float32, or a higher weight of the adversarial term "
                "(loop.on_collapse=warn goes on)"
            )
        self.emit(Notice(message=said))
        self.quiet_steps = 0

    @torch.no_grad()
    def _translate(self, pixels_BHWC: U8_BHWC, direction: Direction) -> U8_BHWC:
        """Tiles one by one, with averaged weights where there are some."""
        with swapped(self.state.groups["generator"], self.state.ema):
            made = [
                to_uint8(
                    self.network(from_uint8(torch.from_numpy(p[None]).to(self.device)), direction), "round"
                )
                for p in pixels_BHWC
            ]
        return torch.cat(made).cpu().numpy()

    def _validation(self) -> Validation | None:
        settings = self.config.validation
        if settings.every == 0 or not self.is_main:
            return None
        weights = None if settings.weights is None else Path(settings.weights)
        extractor = make_extractor(settings.extractor, weights=weights, model=settings.model)
        return Validation(settings, self.config.data, extractor)

    def _resume(self) -> int:
        found = find_checkpoints(self.folder.checkpoints)
        if not found:
            return 0
        load_checkpoint(found[-1], self.state, self.folder.fingerprint)
        return found[-1].step

    def _check_disk(self) -> None:
        loop = self.config.loop
        kept = min(loop.keep + 2, loop.steps // loop.checkpoint_every + 2)
        bundle = sum(p.numel() for p in self.network.parameters()) * 4
        needed = kept * checkpoint_bytes(self.state) + bundle + SPARE
        free = shutil.disk_usage(self.folder.path).free
        if free < needed:
            raise ConfigError(
                f"{self.folder.path}: the run needs {needed / 1e9:.1f} GB ({kept} checkpoints, the bundle) "
                f"and {free / 1e9:.1f} GB are free; lower loop.keep, or choose another folder"
            )

    def result(self) -> TrainResult:
        """Write the bundle of the best checkpoint, or of the last where nothing was validated."""
        best = self.folder.best()
        found = {checkpoint.step: checkpoint for checkpoint in find_checkpoints(self.folder.checkpoints)}
        chosen = best is not None and self.config.validation.choose == "best"
        step = best[0] if best and chosen and best[0] in found else max(found)
        learned = learned_of(found[step])
        facts = None
        if self.is_main:
            facts = save_bundle(self.network.weights(learned), self.folder.bundle, overwrite=True)
            self.emit(Saved(step=step, path=self.folder.bundle))
        self.accelerator.wait_for_everyone()
        figures = best[2] if best and best[0] == step else {}
        return TrainResult(bundle=facts or load_facts(self.folder.bundle), step=step, figures=figures)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def _accelerator(config: TrainConfig) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=config.loop.device == "cpu" or not torch.cuda.is_available())


def export_checkpoint(
    config: TrainConfig, checkpoint: Checkpoint, out: Path, overwrite: bool = False
) -> BundleFacts:
    """The bundle of any checkpoint of a run."""
    weights = initial_weights(config.model, config.loop.seed)
    network = make_network(config, weights, torch.device("cpu"))
    return save_bundle(network.weights(learned_of(checkpoint)), out, overwrite=overwrite)
