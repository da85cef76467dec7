"""The workers of a dask cluster: one on this machine, or one that is there already.

The cluster's workers have to see the slides, the target and the run's folder under the same paths, and to
have this package installed. Where they offer the resource ``GPU``, each slide in hand claims its share of
one. No pixels and no weights pass through the scheduler.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import ConfigError, WorkerDiedError
from wsi_pipeline.pipeline.executors import threads_of_a_worker

__all__ = ["DaskWorkers"]

START_SECONDS = 20
AHEAD = 4
"""Calls that wait at the scheduler for each that runs: a round trip costs more than a small band."""


class DaskWorkers:
    """``scheduler``: address, or path of a scheduler file (None: a cluster of ``count`` processes here).

    ``memory``: bytes for all workers of a cluster that is started here. Raises ConfigError where dask is not
    installed or no scheduler or worker answers.
    """

    name = "dask"

    def __init__(self, scheduler: str | None, count: int, slots: int, *, memory: int | None) -> None:
        try:
            import dask
            import distributed
        except ImportError as error:
            raise ConfigError(f"dask is not installed ({error}): pip install '.[cluster]'") from error
        self._distributed = distributed
        self._cluster: Any = None
        try:
            if scheduler is None:
                # A slide that kills its worker is judged here, not tried four times by the scheduler.
                dask.config.set({"distributed.scheduler.allowed-failures": 0})
                os.environ.update(threads_of_a_worker(count))
                self._cluster = distributed.LocalCluster(
                    n_workers=count,
                    threads_per_worker=slots,
                    processes=True,
                    dashboard_address=":0",  # any free port: two runs must not quarrel over one
                    memory_limit=memory // count if memory else 0,
                    silence_logs=50,
                )
                self._client = distributed.Client(self._cluster, timeout=START_SECONDS)
            elif Path(scheduler).is_file():
                self._client = distributed.Client(scheduler_file=scheduler, timeout=START_SECONDS)
            else:
                self._client = distributed.Client(scheduler, timeout=START_SECONDS)
            self._client.wait_for_workers(1, timeout=START_SECONDS)
        except (OSError, ValueError, RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"directory.scheduler: {scheduler or 'a local cluster'} does not answer or has no workers "
                f"({error}); start one with `dask worker {scheduler or 'ADDRESS'} --nworkers 1`"
            ) from error
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        self.count, self.slots = len(workers), slots
        self.ahead = AHEAD * self.count * slots
        share = {"GPU": 1 / slots} if any(worker["resources"].get("GPU") for worker in workers) else {}
        whole = {"GPU": 1} if share else {}
        self._shared = self._client.get_executor(pure=False, retries=0, resources=share)
        self._alone = self._client.get_executor(pure=False, retries=0, resources=whole)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, alone: bool = False) -> Future[Any]:
        future: Future[Any]
        try:
            future = (self._alone if alone else self._shared).submit(function, *arguments)
        except (OSError, RuntimeError, ValueError):  # the scheduler is gone
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
        return future

    def died(self, error: BaseException) -> WorkerDiedError | None:
        if isinstance(error, self._distributed.KilledWorker):
            return WorkerDiedError("the dask worker died (a crash, or out of memory)", alone=True)
        if isinstance(error, CancelledError | self._distributed.CancelledError):
            return WorkerDiedError("the dask scheduler lost it", alone=False)
        return None

    def pids(self) -> list[int]:
        """Only of a cluster that runs here."""
        if self._cluster is None:
            return []
        return [worker.pid for worker in self._cluster.workers.values() if worker.pid]

    def stop(self) -> None:
        """A cluster that does not end in time ends with this process; the results are in already."""
        with contextlib.suppress(TimeoutError, OSError):
            self._client.close(timeout=5)
        if self._cluster is not None:
            with contextlib.suppress(TimeoutError, OSError):
                self._cluster.close(timeout=5)
