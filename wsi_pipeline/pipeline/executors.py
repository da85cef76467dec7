"""Where the jobs of one slide run: in this process, or one process each.

Bands share nothing but the file system, so any ``concurrent.futures.Executor`` would do. Progress of
other processes is read from their ledgers: the ledger is the truth, a message would be a second one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait

from wsi_pipeline._processes import thread_variables
from wsi_pipeline.errors import OutputError, WorkerDiedError
from wsi_pipeline.pipeline.events import Emit, Progress
from wsi_pipeline.pipeline.lanes import Lanes
from wsi_pipeline.pipeline.run import Job, JobReport, run_band
from wsi_pipeline.writers.ledger import read_ledgers

__all__ = ["run_jobs", "threads_of_a_worker"]

POLL_SECONDS = 0.5


def run_jobs(jobs: Sequence[Job], workers: int, total: int, emit: Emit) -> list[JobReport]:
    """Run all jobs, in this process where one worker is enough; the first error stops the rest."""
    if workers == 1 or len(jobs) == 1:
        return [run_band(job, emit) for job in jobs]
    lanes = Lanes(workers, environments=[threads_of_a_worker(workers)])
    try:
        futures = [lanes.submit(run_band, job) for job in jobs]
        _report_progress(jobs[0], futures, total, emit)
        return [future.result() for future in futures]
    except WorkerDiedError as error:
        root = jobs[0].writer.root
        raise OutputError(f"{root}: {error}; run the same command again to continue", path=root) from error
    finally:
        lanes.stop()


def threads_of_a_worker(workers: int) -> dict[str, str]:
    """Variables that share the cores among processes."""
    return thread_variables(max(1, len(os.sched_getaffinity(0)) // workers))


def _report_progress(job: Job, futures: list[Future[JobReport]], total: int, emit: Emit) -> None:
    while True:
        done, pending = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
        committed = len(read_ledgers(job.ledgers)) - len(job.done)
        emit(Progress(slide_id=job.plan.slide_id, done=max(committed, 0), total=total))
        if not pending or any(future.exception() for future in done):
            return
