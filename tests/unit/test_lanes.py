"""Worker processes: results and errors come back, a death is told with its cause, and nobody else suffers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from wsi_pipeline.errors import CorruptRegionError, WorkerDiedError
from wsi_pipeline.pipeline.lanes import Lanes


class Stubborn(Exception):  # noqa: N818
    """An error as foreign code has them: it pickles, and does not unpickle."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def double(value: int) -> int:
    return 2 * value


def pid_and_environment() -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def fail(kind: str) -> object:
    if kind == "slide":
        raise CorruptRegionError("x.svs: bad", slide_id="x")
    if kind == "stubborn":
        raise Stubborn("two", "words")
    return lambda: None  # no function of a module: it cannot be pickled


def die(how: int) -> None:
    os.kill(os.getpid(), how)
    time.sleep(60)


def hoard() -> None:
    held = np.ones(600_000_000, np.uint8)
    time.sleep(60)
    del held


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes(2, environments=[{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "8"}])
    yield lanes
    lanes.stop()


def test_results_errors_and_what_cannot_travel(lanes: Lanes) -> None:
    futures = [lanes.submit(double, number) for number in range(20)]
    assert [future.result(60) for future in futures] == [2 * number for number in range(20)]
    with pytest.raises(CorruptRegionError, match="bad") as told:
        lanes.submit(fail, "slide").result(60)
    assert told.value.slide_id == "x"
    with pytest.raises(RuntimeError, match="two words"):
        lanes.submit(fail, "stubborn").result(60)
    with pytest.raises(RuntimeError, match="function"):
        lanes.submit(fail, "lambda").result(60)
    with pytest.raises(Exception, match=r"pickle|local"):
        lanes.submit(lambda: 1).result(60)
    assert lanes.submit(double, 4).result(60) == 8


def test_each_lane_has_its_own_device(lanes: Lanes) -> None:
    seen = {lanes.submit_alone(pid_and_environment).result(60) for _ in range(6)}
    pids, devices = {pid for pid, _ in seen}, {device for _, device in seen}
    assert len(pids) <= 2
    assert devices <= {"7", "8"}
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"] not in devices


def test_a_death_is_told_with_its_signal_and_the_lane_lives_on(lanes: Lanes) -> None:
    for how, name in ((signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL")):
        with pytest.raises(WorkerDiedError, match=name) as told:
            lanes.submit(die, int(how)).result(60)
        assert told.value.alone
    assert [lanes.submit(double, n).result(60) for n in range(4)] == [0, 2, 4, 6]


def test_who_shares_a_process_is_told_so() -> None:
    lanes = Lanes(1, slots=2)
    try:
        lanes.submit(double, 1).result(60)
        sleeper = lanes.submit(time.sleep, 60)
        with pytest.raises(WorkerDiedError) as told:
            lanes.submit(die, int(signal.SIGKILL)).result(60)
        assert not told.value.alone
        with pytest.raises(WorkerDiedError):
            sleeper.result(60)
    finally:
        lanes.stop()


def test_a_process_that_needs_too_much_memory_is_ended() -> None:
    lanes = Lanes(1, memory=400_000_000)
    try:
        with pytest.raises(WorkerDiedError, match="MiB"):
            lanes.submit(hoard).result(60)
        assert lanes.submit(double, 3).result(60) == 6
    finally:
        lanes.stop()


def test_stopping_ends_processes_and_calls() -> None:
    lanes = Lanes(1)
    busy, queued = lanes.submit(time.sleep, 600), lanes.submit(double, 1)
    while not lanes.pids():
        time.sleep(0.05)
    (pid,) = lanes.pids()
    lanes.stop()
    with pytest.raises(WorkerDiedError, match="stopped"):
        busy.result(60)
    assert queued.cancelled()
    with pytest.raises(OSError, match="No such process"):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        lanes.submit(double, 1)
