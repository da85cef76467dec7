"""Where jobs run: in this process, or one spawned process each.

Bands share nothing but the file system, so any ``concurrent.futures.Executor`` would do. Progress of
other processes is read from their ledgers: the ledger is the truth, a message would be a second one.
Workers ignore Ctrl-C, which a terminal sends to everybody; the parent tells them to stop at the next
block, and if it dies itself the kernel ends them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event as StopEvent

from wsi_pipeline.errors import OutputError, WsiPipelineError
from wsi_pipeline.pipeline.events import Emit, Event, Progress
from wsi_pipeline.pipeline.run import Job, JobReport, run_band
from wsi_pipeline.writers.ledger import read_ledgers

__all__ = ["run_jobs"]

POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1

_stop: StopEvent | None = None
"""In a worker: set when the parent wants it to end."""


def run_jobs(jobs: Sequence[Job], workers: int, total: int, emit: Emit) -> list[JobReport]:
    """Run all jobs, in this process where one worker is enough; the first error stops the rest."""
    if workers == 1 or len(jobs) == 1:
        return [run_band(job, emit) for job in jobs]
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _begin_worker, (stop, os.getpid())) as pool:
        with _workers_ignore_interrupts():
            futures = [pool.submit(_run_until_stopped, job) for job in jobs]
        try:
            _report_progress(jobs[0], futures, total, emit)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            root = jobs[0].writer.root
            raise OutputError(
                f"{root}: a worker process died (killed, or out of memory); run the same command "
                "again to continue",
                path=root,
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _report_progress(job: Job, futures: list[Future[JobReport]], total: int, emit: Emit) -> None:
    while True:
        done, pending = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
        committed = len(read_ledgers(job.ledgers)) - len(job.done)
        emit(Progress(slide_id=job.plan.slide_id, done=max(committed, 0), total=total))
        if not pending or any(future.exception() for future in done):
            return


@contextmanager
def _workers_ignore_interrupts() -> Iterator[None]:
    """Processes that are spawned in here inherit SIG_IGN; only the main thread may change a handler."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_worker(stop: StopEvent, parent: int) -> None:
    global _stop
    _stop = stop
    library = ctypes.CDLL(None)
    if hasattr(library, "prctl"):
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
    # Several processes that each start one thread a core only get in each other's way.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _run_until_stopped(job: Job) -> JobReport:
    return run_band(job, _raise_if_stopped)


def _raise_if_stopped(event: Event) -> None:
    if _stop is not None and _stop.is_set():
        raise WsiPipelineError("stopped by the parent process")
