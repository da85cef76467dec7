"""Batches made in other processes: torch's DataLoader, with its corners rounded off.

- A batch crosses as two uint8 tensors in shared memory; an error of ours crosses as a value, since a
  DataLoader would rebuild it from its text alone and lose its kind.
- The loader draws its own seeds from a generator of its own: by default it takes one from the global one, and
  a resumed run, which makes one loader more, would then draw other noise than an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_pipeline.cohorts.processes import begin_worker, clean_context, single_threaded_children
from wsi_pipeline.errors import WsiPipelineError

if TYPE_CHECKING:
    from wsi_pipeline.training.data import TrainBatch

__all__ = ["load_in_processes"]


@dataclass(frozen=True, slots=True)
class _Steps:
    """A map-style dataset whose items are whole batches, as tensors; errors are items too."""

    make: Callable[[int], TrainBatch]

    def __getitem__(self, step: int) -> Any:
        import torch

        try:
            made = self.make(step)
        except WsiPipelineError as error:
            return error
        both = (made.numbers, made.source_BHWC, made.target_BHWC)
        return tuple(torch.from_numpy(np.ascontiguousarray(values)) for values in both)


def load_in_processes(
    make: Callable[[int], TrainBatch], steps: Sequence[int], *, workers: int, prefetch: int
) -> Iterator[TrainBatch]:
    """``make(step)`` of every step, in order, made ahead by ``workers`` processes (``prefetch`` each).

    Raises what ``make`` raised; WsiPipelineError where a process dies.
    """
    import torch
    from torch.utils.data import DataLoader

    from wsi_pipeline.training.data import TrainBatch

    loader: Any = DataLoader(
        _Steps(make),  # type: ignore[arg-type, unused-ignore]
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        worker_init_fn=_begin,
        multiprocessing_context=clean_context("torch", "wsi_pipeline.training.data"),
        generator=torch.Generator(),
    )
    with single_threaded_children():
        items = iter(loader)
    try:
        for item in items:
            if isinstance(item, WsiPipelineError):
                raise item
            numbers, source, target = (tensor.numpy() for tensor in item)
            yield TrainBatch(numbers=numbers, source_BHWC=source, target_BHWC=target)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise WsiPipelineError(
            "data.workers: a process that reads tiles died (killed, or out of memory); give fewer "
            "workers, or a smaller prefetch"
        ) from error
    finally:
        items._shutdown_workers()  # now, not when the garbage is collected


def _begin(worker: int) -> None:
    begin_worker()
