"""The settings of a run over many slides. None of them decides a byte of an output.

``RunConfig`` is a conversion's configuration with one more part, so one file serves both: ``convert``
reads the settings of ``directory`` only where its input is a folder, a table or a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.pipeline.settings import ConvertConfig

__all__ = ["DirectoryConfig", "ExecutorName", "RunConfig"]

ExecutorName = Literal["auto", "inline", "processes", "dask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryConfig:
    """How many slides are converted.

    ``executor``: ``inline`` in this process, ``processes`` on this machine, ``dask`` on a cluster, ``auto``:
    dask where a scheduler is named, else processes; ``scheduler``: address or scheduler file of a dask
    cluster (None: one on this machine); ``slots``: slides that one worker has in hand at once, so that a GPU
    does not wait between two (None: 2 on a GPU, 1 on a CPU); ``format``: of the outputs; ``timeout``: seconds
    without any progress after which a worker counts as hung; ``retries``: attempts after a worker died;
    ``retry_failed``: try again what failed in an earlier run; ``strict``: files that are no slides fail the
    run; ``links``: follow symbolic links that leave the input folder.

    Budgets, None without: ``max_ram`` for all processes of this machine together, ``max_disk`` for the
    outputs, work and staging of this run (sizes as ``64GB``, ``500MiB``); ``deadline``: a time of day
    (``06:30``), an ISO date and time, or a duration (``8h``); ``min_free``: disk that is left free in any
    case. ``stage``: a local folder to which slides are copied before they are read; ``stage_quota``: bytes
    there.

    ``watch``: go on converting what appears in the folder; ``settle``: seconds for which a file's size and
    date must have stood still before it is taken.
    """

    executor: ExecutorName = "auto"
    scheduler: str | None = None
    slots: int | None = None
    format: Literal["zarr", "tiff"] = "zarr"
    seams: bool = False
    timeout: float = 900.0
    retries: int = 1
    retry_failed: bool = False
    strict: bool = False
    links: bool = False
    max_ram: str | None = None
    max_disk: str | None = None
    min_free: str = "1GB"
    deadline: str | None = None
    stage: str | None = None
    stage_quota: str = "50GB"
    watch: bool = False
    settle: float = 60.0

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.settle < 0:
            raise ConfigError("directory.timeout and directory.settle are positive numbers of seconds")
        if self.retries < 0 or (self.slots is not None and self.slots < 1):
            raise ConfigError("directory.retries is 0 or more, directory.slots 1 or more")
        if self.scheduler is not None and self.executor in ("inline", "processes"):
            raise ConfigError(
                f"directory.scheduler: a scheduler is named but directory.executor is {self.executor}; "
                "use dask, or name no scheduler"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(ConvertConfig):
    """A conversion's settings, and those of a run over many slides."""

    directory: DirectoryConfig = field(default_factory=DirectoryConfig)

    @property
    def conversion(self) -> ConvertConfig:
        """What one slide's conversion is told."""
        return ConvertConfig(**{part.name: getattr(self, part.name) for part in fields(ConvertConfig)})
