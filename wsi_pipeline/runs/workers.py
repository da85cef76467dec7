"""Where the slides of a run are converted: here, in processes of this machine, or on a dask cluster.

All three are executors of the standard library's kind with two facts more: how many calls they take at once,
and what an error says about the worker rather than about the slide.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from wsi_pipeline.errors import ConfigError, WorkerDiedError
from wsi_pipeline.pipeline.executors import threads_of_a_worker
from wsi_pipeline.pipeline.lanes import Lanes

__all__ = ["InlineWorkers", "ProcessWorkers", "Workers", "gpus_for"]


class Workers(Protocol):
    """An executor of slides. ``count``: workers; ``slots``: calls that each has in hand at once; ``ahead``:
    calls that it takes beyond these, so that no worker waits for the next one to arrive."""

    name: str
    count: int
    slots: int
    ahead: int

    def submit(self, function: Callable[..., Any], /, *arguments: Any, alone: bool = False) -> Future[Any]:
        """Queue a call; ``alone``: nothing else runs in its process."""

    def died(self, error: BaseException) -> WorkerDiedError | None:
        """The error as the death of a worker, None where it is something else."""

    def pids(self) -> list[int]:
        """Processes of this machine that count towards its memory."""

    def stop(self) -> None:
        """End what is under way as soon as possible."""


class InlineWorkers:
    """One slide after the other in this process; nothing protects the run from a decoder that crashes."""

    name, count, slots, ahead = "inline", 1, 1, 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any, alone: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # the slide boundary: as in any executor, it belongs to who asked
            future.set_exception(error)
        return future

    def died(self, error: BaseException) -> WorkerDiedError | None:
        return None

    def pids(self) -> list[int]:
        return []

    def stop(self) -> None:
        pass


class ProcessWorkers:
    """Processes of this machine, one for each of ``gpus`` or ``count`` on the CPU."""

    name, ahead = "processes", 0

    def __init__(self, count: int, slots: int, *, gpus: tuple[str, ...] = (), memory: int | None = None):
        self.count, self.slots = count, slots
        threads = threads_of_a_worker(count)
        environments = [threads | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [threads]
        self._lanes = Lanes(count, slots=slots, environments=environments, memory=memory)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, alone: bool = False) -> Future[Any]:
        submit = self._lanes.submit_alone if alone else self._lanes.submit
        return submit(function, *arguments)

    def died(self, error: BaseException) -> WorkerDiedError | None:
        return error if isinstance(error, WorkerDiedError) else None

    def pids(self) -> list[int]:
        return self._lanes.pids()

    def stop(self) -> None:
        self._lanes.stop()


def gpus_for(device: str | None) -> tuple[str, ...]:
    """The GPUs that a generator with the option ``device`` may use, as CUDA_VISIBLE_DEVICES names them.

    ``device``: None where the generator has no such option. Empty where it runs on the CPU.
    """
    if device is None or device == "cpu":
        return ()
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    if device in ("auto", "cuda"):
        return tuple(names)
    index = device.removeprefix("cuda:")
    if not index.isdigit() or int(index) >= len(names):
        raise ConfigError(f"device '{device}': is not there (CUDA devices: {len(names)}); give auto or cpu")
    return (names[int(index)],)
