"""Chooses the workers of a run: how many, where, with how much memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline.events import Notice
from wsi_pipeline.runs.budgets import total_rss, worker_limit
from wsi_pipeline.runs.events import RunEmit
from wsi_pipeline.runs.settings import RunConfig
from wsi_pipeline.runs.sizes import parse_size
from wsi_pipeline.runs.workers import InlineWorkers, ProcessWorkers, Workers, gpus_for

__all__ = ["Staff", "hire"]

USUAL_BYTES = 1.5e9
"""Of one worker without weights; measured 0.7 to 1.1 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staff:
    """The workers of a run; ``config`` is what they are told, where it differs from what the user said."""

    workers: Workers
    config: RunConfig
    notices: tuple[str, ...]

    def resident(self) -> int:
        """Bytes that this process and the workers of this machine hold now."""
        return total_rss([os.getpid(), *self.workers.pids()])


@contextmanager
def hire(config: RunConfig, slides: int, emit: RunEmit) -> Iterator[Staff]:
    """The workers that the settings ask for; they are ended in any case. Raises ConfigError."""
    wishes = config.directory
    device = _device(config)
    name = wishes.executor
    if name == "auto":
        name = "dask" if wishes.scheduler else "processes"
    limit = parse_size(wishes.max_ram, "directory.max_ram") if wishes.max_ram else None
    gpus = gpus_for(device) if name != "inline" else ()
    count = config.run.workers or _usual_count(gpus, config, limit)
    slots = wishes.slots or (2 if gpus else 1)
    notices = []
    if gpus and count > len(gpus):
        notices.append(f"{count} workers share {len(gpus)} GPUs")
    workers: Workers
    if name == "inline":
        workers = InlineWorkers()
    elif name == "dask":
        from wsi_pipeline.runs.dask_workers import DaskWorkers

        workers = DaskWorkers(wishes.scheduler, count, slots, memory=limit)
    else:
        memory = worker_limit(limit, count, total_rss([os.getpid()]))
        workers = ProcessWorkers(count, slots, gpus=gpus, memory=memory)
        if gpus:  # each process sees its own GPU only, as the first
            options = {**config.generator.options, "device": "cuda"}
            config = replace(config, generator=replace(config.generator, options=options))
    for notice in notices:
        emit(Notice(slide_id="run", message=notice))
    try:
        yield Staff(workers=workers, config=config, notices=tuple(notices))
    finally:
        workers.stop()


def _device(config: RunConfig) -> str | None:
    """The generator's option ``device``, None where it has none; also proves that it can be built."""
    generator: Any = make_generator(config.generator.name, config.generator.options)
    if not any(part.name == "device" for part in fields(generator)):
        return None
    return str(generator.device)


def _usual_count(gpus: tuple[str, ...], config: RunConfig, limit: int | None) -> int:
    if gpus:
        return len(gpus)
    if config.directory.executor == "inline":
        return 1
    cores = len(os.sched_getaffinity(0))
    memory = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.8
    count = min(cores // config.run.threads, int(memory // USUAL_BYTES))
    if count < 1 and limit is not None:
        raise ConfigError(f"directory.max_ram: {config.directory.max_ram} is too little for one worker")
    return max(count, 1)
