"""A training run on one page: open or continue a folder, iterate, validate, save, and leave a bundle.

    RUN/train.yaml              the settings, ready for --config
    RUN/checkpoints/            the newest ones and the best; see ``checkpoint.py``
    RUN/best.json               figures of the best
    RUN/log.jsonl, tensorboard/ losses and figures
    RUN/samples/                pictures: source, translation, target, translation back
    RUN/generator.safetensors   the bundle of the best checkpoint (or the last): `convert --weights` takes it

Killed and run again, it goes on from the newest checkpoint and ends with the same weights, bit for bit on a
CPU, and the same log. For that a checkpoint is the last thing that is done after an iteration: where it is,
all that belongs to its iteration is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from wsi_pipeline.core.protocols import U8_BHWC
from wsi_pipeline.errors import (
    CheckpointError,
    ConfigError,
    OutputError,
    TrainingError,
    WsiPipelineError,
)
from wsi_pipeline.models.bundle import BundleFacts
from wsi_pipeline.models.features import make_extractor
from wsi_pipeline.models.layout import Direction
from wsi_pipeline.models.pixels import from_uint8, to_uint8
from wsi_pipeline.training.build import make_objective, make_trainee
from wsi_pipeline.training.checkpoint import (
    State,
    checkpoint_bytes,
    damaged_checkpoints,
    find_checkpoints,
    learned_of,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from wsi_pipeline.training.config import TrainConfig
from wsi_pipeline.training.data import TileSamples, batches
from wsi_pipeline.training.ema import swapped
from wsi_pipeline.training.events import (
    Emit,
    Finished,
    Notice,
    Saved,
    Started,
    Stepped,
    Validated,
    ignore,
)
from wsi_pipeline.training.folder import Best, RunFolder
from wsi_pipeline.training.interrupt import CutShort, Interrupt, asking
from wsi_pipeline.training.logs import RunLog, save_grid
from wsi_pipeline.training.loop import Averages, Iteration, make_optimisers
from wsi_pipeline.training.micro_batches import micro_batches
from wsi_pipeline.training.validation import Validation, is_better
from wsi_pipeline.translators.bundle import TranslatorFacts, load_any_facts

__all__ = ["TrainResult", "train"]

_Made = TypeVar("_Made")

SPARE = 2**30
"""Bytes that must stay free beside what a run will write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """``bundle``: the generator; ``step``: iterations behind its weights; ``figures``: its validation, if
    any."""

    bundle: BundleFacts | TranslatorFacts
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
        return run.result()
    finally:
        run.close()


class _Run:
    """State of a run while it lasts."""

    def __init__(self, config: TrainConfig, out: Path, restart: bool, accelerator: Any, emit: Emit) -> None:
        self.config, self.accelerator = config, accelerator
        self.is_main = bool(accelerator.is_main_process)
        self.emit = emit if self.is_main else ignore
        self.device = accelerator.device
        samples = TileSamples(config.data, config.loop.seed)
        self.network = make_trainee(config, samples, self.device)
        self.objective = make_objective(config, self.network, self.device, config.loop.seed)
        self.validation = self._on_main(self._validation)
        learning = self.objective.groups["generator"]
        averaged = {name: p.detach().clone() for name, p in learning.items()} if config.optimiser.ema else {}
        self.state = State(
            groups=self.objective.groups,
            buffers=self.objective.buffers,
            optimisers=make_optimisers(self.objective, config.optimiser),
            ema=averaged,
        )
        self.notices = [self.validation.notice] if self.validation and self.validation.notice else []
        if samples.left_out:
            self.notices.append(
                f"{samples.left_out} tiles have no partner on the other side and are left out"
            )
        self.folder = RunFolder(
            out, config, f"{self.network.digest}/{samples.digest}", accelerator.num_processes
        )
        self.log: RunLog | None = None
        self.best: Best | None = None
        self.interrupt = Interrupt()
        self.owed = False  # pictures and validation of the newest checkpoint, which an interrupt cut short
        self.quiet = 0  # iterations for which outputs have been like inputs
        self._on_main(lambda: self.folder.check(restart))
        self.first = self.taken = self._resume(restart)
        self.stream = batches(
            config.data,
            seed=config.loop.seed,
            batch=config.loop.batch * config.loop.accumulate,
            start=self.first,
            stop=config.loop.steps,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        # Up to here nothing was written: settings that cannot work leave no trace.
        self._on_main(self._check_disk)
        self._on_main(lambda: self.folder.open(restart))

    def _on_main(self, action: Callable[[], _Made]) -> _Made | None:
        """What ``action`` makes on the main process, None on the others, which wait for it.

        An error of ours is raised on all: else the others would fail with one of the network.
        """
        from accelerate.utils import broadcast_object_list

        made: _Made | None = None
        failed: list[WsiPipelineError | None] = [None]
        if self.is_main:
            try:
                made = action()
            except WsiPipelineError as error:
                failed[0] = error
        broadcast_object_list(failed)
        if failed[0] is not None:
            raise failed[0]
        return made

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
        for notice in self.notices:
            self.emit(Notice(message=notice))
        self._on_main(self._begin)
        iteration = Iteration(
            objective=self.objective,
            optimisers=self.state.optimisers,
            config=config.optimiser,
            accelerator=self.accelerator,
            steps=steps,
            ema=self.state.ema,
        )
        averages = Averages()
        with asking(self.accelerator.num_processes == 1) as self.interrupt:
            if self.owed:
                self._on_main(lambda: self._look(self.first, True))
            for step, batch in enumerate(self.stream, start=self.first):
                averages.add(iteration.run(step, list(micro_batches(batch, config, self.device))))
                stops = self.interrupt.asked  # who asks while things are written waits for one more iteration
                self._after(step + 1, averages, stops)
                if stops or self.owed:
                    raise KeyboardInterrupt

    def _begin(self) -> None:
        self.log = RunLog(self.folder.path, self.first, self.config.loop.tensorboard)
        self._tidy()

    def _after(self, done: int, averages: Averages, stops: bool) -> None:
        """What is due after ``done`` iterations, or because the run ``stops`` after them."""
        loop, last = self.config.loop, done == self.config.loop.steps
        shows, validates = self._due(done)
        saves = done % loop.checkpoint_every == 0 or last or stops
        logs: dict[str, float] = {}
        # Averages end with every iteration that may be saved: a resumed run then averages over the same ones.
        if done % loop.log_every == 0 or validates or saves:
            logs = averages.take(self.accelerator)
        alarm = self._alarm(done, logs)

        def write() -> None:
            if self.log is not None and logs:
                self.log.write(done, "train", logs)
            self.emit(Stepped(step=done, steps=loop.steps, logs=logs))
            self._look(done, saves)

        if logs or shows:
            self._on_main(write)
        else:
            self.emit(Stepped(step=done, steps=loop.steps, logs=logs))
        if alarm:
            self._collapsed(alarm)

    def _due(self, done: int) -> tuple[bool, bool]:
        """Whether pictures are due after ``done`` iterations, and whether validation is."""
        everies = self.config.loop.sample_every, self.config.validation.every
        shows, validates = (e > 0 and (done % e == 0 or done == self.config.loop.steps) for e in everies)
        return shows, validates

    def _look(self, done: int, saves: bool) -> None:
        """Pictures and validation, where due, and a checkpoint. A sampler of many steps takes minutes: an
        interrupt cuts them short, and the next run makes them good."""
        (shows, validates), self.owed = self._due(done), False
        try:
            if shows:
                self._show(done)
            saves |= validates and self._validate(done)
        except CutShort:
            self.owed = saves = True
        if saves:
            self._save(done)

    def _show(self, done: int) -> None:
        if self.validation is None:
            return
        path = self.folder.samples / f"step-{done:08d}.png"
        headings, rows = self.validation.pictures(self._translate, self.network.directions)
        save_grid(path, headings, rows)
        self.emit(Saved(step=done, path=path))

    def _validate(self, done: int) -> bool:
        """Whether it is better than all before; the main process alone looks."""
        if self.validation is None:
            return False
        figures, metric = (
            self.validation.figures(self._translate, self.network.directions),
            self.validation.metric,
        )
        better = is_better(metric, figures, self.best.value if self.best else None)
        if better:
            self.best = Best(step=done, value=figures[metric], figures=figures)
        if self.log is not None:
            self.log.write(done, "validation", figures)
        self.emit(Validated(step=done, figures=figures, best=better))
        return better

    def _save(self, done: int) -> None:
        notes = {"best": self.best and asdict(self.best), "quiet": self.quiet, "owed": self.owed}
        if self.log is not None:
            self.log.flush()
        saved = save_checkpoint(self.folder.checkpoints, done, self.state, self.folder.fingerprint, notes)
        self._tidy()
        self.emit(Saved(step=done, path=saved.path))

    def _tidy(self) -> None:
        """What follows from a checkpoint; done again as a run goes on, as it may have been killed before."""
        self.folder.show_best(self.best)
        prune(self.folder.checkpoints, self.config.loop.keep, self.best.step if self.best else None)

    def _alarm(self, done: int, logs: Mapping[str, float]) -> str:
        """What is to be said of a generator that has learnt to return its input; empty where it has not."""
        loop = self.config.loop
        if logs:
            is_quiet = logs.get("change_a", math.inf) < loop.collapse_change
            self.quiet = self.quiet + done - self.taken if is_quiet else 0
            self.taken = done
        if not self.quiet or self.quiet < loop.collapse_steps:
            return ""
        quiet, self.quiet = self.quiet, 0
        return (
            f"iteration {done}: outputs have differed from inputs by less than {loop.collapse_change:g} (of "
            f"2) on average, for {quiet} iterations: the generator returns its input"
        )

    def _collapsed(self, said: str) -> None:
        loop = self.config.loop
        if loop.on_collapse == "stop" or (loop.on_collapse == "auto" and loop.precision == "bf16"):
            raise TrainingError(
                f"{said}; train with loop.precision=float32, or a higher weight of the adversarial term "
                "(loop.on_collapse=warn goes on)"
            )
        self.emit(Notice(message=said))

    def _translate(self, pixels_BHWC: U8_BHWC, direction: Direction) -> U8_BHWC:
        """Tiles one by one, with averaged weights where there are some."""
        with torch.no_grad(), swapped(self.state.groups["generator"], self.state.ema):
            images = (from_uint8(torch.from_numpy(p[None]).to(self.device)) for p in pixels_BHWC)
            made = [
                to_uint8(self.network.translate(image, direction, number), "round")
                for number, image in enumerate(self.interrupt.watching(images))
            ]
        translated_BHWC: U8_BHWC = torch.cat(made).cpu().numpy()
        return translated_BHWC

    def _validation(self) -> Validation | None:
        settings = self.config.validation
        if settings.every == 0:
            return None
        weights = None if settings.weights is None else Path(settings.weights)
        extractor = make_extractor(settings.extractor, weights=weights, model=settings.model)
        return Validation(settings, self.config.data, extractor)

    def _resume(self, restart: bool) -> int:
        """Go back to the newest whole checkpoint of the main process; returns its iterations, 0 for none."""
        from accelerate.utils import broadcast_object_list

        found = {c.step: c for c in find_checkpoints(self.folder.checkpoints)}
        agreed = [0 if restart else max(found, default=0)]
        broadcast_object_list(agreed)
        if agreed[0] == 0:
            if not restart:
                self._tell_damaged(0)
            return 0
        if agreed[0] not in found:
            raise OutputError(
                f"{self.folder.checkpoints}: process {self.accelerator.process_index} does not see the "
                f"checkpoint of iteration {agreed[0]}; give all processes one folder",
                path=self.folder.checkpoints,
            )
        notes = load_checkpoint(found[agreed[0]], self.state, self.folder.fingerprint)
        self.best = Best(**notes["best"]) if notes.get("best") else None
        self.quiet, self.owed = int(notes.get("quiet", 0)), bool(notes.get("owed", False))
        self._tell_damaged(agreed[0])
        return agreed[0]

    def _tell_damaged(self, first: int) -> None:
        for path in damaged_checkpoints(self.folder.checkpoints):
            if first == 0:
                raise CheckpointError(f"{path}: is damaged, and there is none before it; use --restart")
            self.emit(Notice(message=f"{path}: is damaged; going on from iteration {first}"))

    def _check_disk(self) -> None:
        loop = self.config.loop
        kept = min(loop.keep + 2, loop.steps // loop.checkpoint_every + 2)
        bundle = sum(p.numel() for p in self.network.parameters()) * 4
        needed = kept * checkpoint_bytes(self.state) + bundle + SPARE - self.folder.used
        folder = self.folder.path.absolute()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        if free < needed:
            raise ConfigError(
                f"{self.folder.path}: the run needs {needed / 1e9:.1f} GB more ({kept} checkpoints, the "
                f"bundle) and {free / 1e9:.1f} GB are free; lower loop.keep, or choose another folder"
            )

    def result(self) -> TrainResult:
        """Write the bundle of the best checkpoint, or of the last where nothing was validated."""
        from accelerate.utils import broadcast_object_list

        made: list[Any] = [self._on_main(self._write_bundle)]
        broadcast_object_list(made)
        step, figures = made[0]
        self.emit(Finished(bundle=self.folder.bundle, step=step, figures=figures))
        return TrainResult(bundle=load_any_facts(self.folder.bundle), step=step, figures=figures)

    def _write_bundle(self) -> tuple[int, dict[str, float]]:
        found = {checkpoint.step: checkpoint for checkpoint in find_checkpoints(self.folder.checkpoints)}
        best = self.best if self.config.validation.choose == "best" else None
        step = best.step if best and best.step in found else max(found)
        self.network.save(learned_of(found[step]), self.folder.bundle)
        return step, self.best.figures if self.best and self.best.step == step else {}

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        self.folder.close()


def _accelerator(config: TrainConfig) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=config.loop.device == "cpu" or not torch.cuda.is_available())
