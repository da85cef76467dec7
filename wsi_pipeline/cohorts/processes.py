"""Processes that read slides: how they start, how many threads they use, when they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import AbstractContextManager
from multiprocessing.context import BaseContext

from wsi_pipeline._processes import environment, thread_variables

__all__ = ["begin_worker", "clean_context", "single_threaded_children"]


def clean_context(*preload: str) -> BaseContext:
    """Processes of a fork server (which loads ``preload`` once), or spawned ones where there is none.

    Why not a fork of this process: where torch's or a BLAS's threads run, a fork is a deadlock in waiting.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def single_threaded_children() -> AbstractContextManager[None]:
    """Processes that start in here compute with one thread."""
    return environment(thread_variables(1))


def begin_worker() -> None:
    """In a new worker: Ctrl-C is the parent's affair, and the parent's death is the worker's.

    Why a thread that waits for it: the fork server, which is the kernel's parent of a worker, lives as long
    as a worker does; a parent that is killed would leave them all behind.
    """
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
