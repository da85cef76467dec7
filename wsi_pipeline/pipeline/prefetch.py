"""The one piece of concurrency: map a function over a stream in threads, in order, a few items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

from wsi_pipeline.errors import WsiPipelineError

__all__ = ["ordered_map"]

In = TypeVar("In")
Out = TypeVar("Out")


def ordered_map(
    pool: Executor, function: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Iterator[Out]:
    """Results of ``function`` in the order of ``items``; at most ``ahead`` are under way or waiting.

    The bound is the back-pressure: nothing is pulled from ``items`` before there is room for it. An
    error is raised at its place in the order: where ``items`` fails (a slide vanished), the results
    before it still come out, so that finished work is kept.
    """
    waiting: deque[Future[Out]] = deque()
    failure: WsiPipelineError | None = None
    source = iter(items)
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except WsiPipelineError as error:
                failure = error
                break
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
    if failure is not None:
        raise failure
