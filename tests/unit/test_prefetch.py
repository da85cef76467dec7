"""The ordered map: order, bound, and errors at their place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.pipeline.prefetch import ordered_map


def test_results_keep_their_order_and_the_bound_holds() -> None:
    pulled, finished, most = 0, 0, 0

    def items() -> Iterator[int]:
        nonlocal pulled, most
        for i in range(40):
            pulled += 1
            most = max(most, pulled - finished)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.005 if i % 4 == 0 else 0)
        return i * i

    results = []
    with ThreadPoolExecutor(3) as pool:
        for result in ordered_map(pool, slow_first, items(), ahead=5):
            results.append(result)
            finished += 1
    assert results == [i * i for i in range(40)]
    assert most <= 6


def test_what_came_before_an_upstream_error_still_comes_out() -> None:
    def items() -> Iterator[int]:
        yield from range(7)
        raise WsiPipelineError("the slide is gone")

    results = []
    with ThreadPoolExecutor(2) as pool, pytest.raises(WsiPipelineError, match="gone"):
        for result in ordered_map(pool, lambda i: i, items(), ahead=4):
            results.append(result)
    assert results == list(range(7))


def test_an_error_in_the_function_stops_the_stream() -> None:
    started: list[int] = []
    lock = threading.Lock()

    def fail_at_three(i: int) -> int:
        with lock:
            started.append(i)
        if i == 3:
            raise ValueError("three")
        return i

    results = []
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="three"):
        for result in ordered_map(pool, fail_at_three, range(1000), ahead=4):
            results.append(result)
    assert results == [0, 1, 2]
    assert len(started) < 10
