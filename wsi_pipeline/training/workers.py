"""Batches made in other processes: torch's DataLoader, with its corners rounded off.

- Pixels cross in a ring of shared memory that exists from start to end, one slot for each batch that may be
  under way. Why: a fresh piece of shared memory for every batch costs more than to decode its tiles (12.6 MB
  take 30 ms to copy into a new piece, 1.5 ms into a slot that was used before).
- An error of ours crosses as a value: a DataLoader would rebuild it from its text alone and lose its kind.
- The loader draws its own seeds from a generator of its own: by default it takes one from the global one, and
  a resumed run, which makes one loader more, would then draw other noise than an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.cohorts.processes import begin_worker, clean_context, single_threaded_children
from wsi_pipeline.errors import WsiPipelineError

__all__ = ["load_in_processes"]

Numbers = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Fill = Callable[[int, Pixels], Numbers]
"""Writes the batch of a step into an array, and returns its sample numbers."""


@dataclass(frozen=True, slots=True)
class _Steps:
    """A map-style dataset: item i is the numbers of step i, whose pixels then stand in slot i modulo their
    count; errors are items too."""

    fill: Fill
    steps: Sequence[int]
    ring: Any

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, position: int) -> Any:
        import torch

        try:
            numbers = self.fill(self.steps[position], self.ring[position % len(self.ring)].numpy())
        except WsiPipelineError as error:
            return error
        return torch.from_numpy(numbers)


def load_in_processes(
    fill: Fill, steps: Sequence[int], *, shape: tuple[int, ...], workers: int, prefetch: int
) -> Iterator[tuple[Numbers, Pixels]]:
    """Numbers and pixels (uint8, of ``shape``) of every step, in order, made ahead by ``workers`` processes.

    ``prefetch``: batches of each process under way. Raises what ``fill`` raised, and WsiPipelineError where a
    process dies.
    """
    import torch
    from torch.utils.data import DataLoader

    # When batch i is handed over, those up to i + workers * prefetch are under way: one slot more is i's.
    ring = torch.empty((workers * prefetch + 1, *shape), dtype=torch.uint8).share_memory_()
    dataset = _Steps(fill, steps, ring)
    loader: Any = DataLoader(
        dataset,  # type: ignore[arg-type, unused-ignore]
        sampler=range(len(steps)),
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
        for position, item in enumerate(items):
            if isinstance(item, WsiPipelineError):
                raise item
            yield item.numpy(), ring[position % len(ring)].numpy().copy()
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
