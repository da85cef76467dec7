"""What processes that start find in their environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["environment", "thread_variables"]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that start in here have these variables: libraries read them as they load."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def thread_variables(threads: int) -> dict[str, str]:
    """Variables after which BLAS and OpenMP compute with so many threads.

    Several processes that each start one thread a core only get in each other's way.
    """
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
