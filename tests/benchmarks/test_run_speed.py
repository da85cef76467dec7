"""Ratios of a run over many slides: two workers against one, and what the driving costs. Asserts no time."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "e2e"), str(Path(__file__).parents[1] / "unit")]

from run_helpers import make_slide, run  # noqa: E402
from test_drive import FakePlan, result, task  # noqa: E402

from wsi_pipeline.runs.budgets import DiskBudget  # noqa: E402
from wsi_pipeline.runs.dask_workers import DaskWorkers  # noqa: E402
from wsi_pipeline.runs.drive import Drive, Tools  # noqa: E402
from wsi_pipeline.runs.events import ignore  # noqa: E402
from wsi_pipeline.runs.folder import RunFolder  # noqa: E402
from wsi_pipeline.runs.records import Record, Records, SlideResult  # noqa: E402
from wsi_pipeline.runs.tasks import SlideTask  # noqa: E402
from wsi_pipeline.runs.workers import InlineWorkers, ProcessWorkers, Workers  # noqa: E402

pytestmark = pytest.mark.benchmark

SLIDES, BANDS = 5_000, 10


def no_plan(given: SlideTask, count: int) -> FakePlan:
    return FakePlan(tuple((row, row + 1) for row in range(BANDS)))


def no_band(given: SlideTask, laid: FakePlan, band: tuple[int, int]) -> None:
    pass


def no_whole(given: SlideTask) -> SlideResult:
    return result(given.key)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("executor", ["inline", "processes", "dask"])
def test_what_the_driving_costs_a_band(tmp_path: Path, executor: str) -> None:
    slides = SLIDES if executor != "dask" else SLIDES // 10
    folder = RunFolder(tmp_path)
    make: dict[str, Any] = {
        "inline": InlineWorkers,
        "processes": lambda: ProcessWorkers(2, 1),
        "dask": lambda: DaskWorkers(None, 2, 1, memory=None),
    }
    with folder.taken():
        records = Records(folder.records)
        workers: Workers = make[executor]()
        tools = Tools(plan=no_plan, band=no_band, whole=no_whole)  # type: ignore[arg-type]
        drive = Drive(workers, records, DiskBudget(10**15, 0), 1, ignore, tools)
        for number in range(slides):
            key = f"s{number}"
            drive.add(task(tmp_path, key), Record(key=key, source=key, status="queued"))
        started = time.perf_counter()
        while drive.step(0.5):
            pass
        seconds = time.perf_counter() - started
        workers.stop()
    assert sum(record.status == "done" for record in records) == slides
    bands = slides * BANDS
    print(
        f"\n{executor}: {slides} slides, {bands} bands, {1000 * seconds / bands:.2f} ms a band, all included"
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("generator", ["identity", "stain_transfer", "ffpe_mini"])
def test_two_workers_against_one(tmp_path: Path, generator: str) -> None:
    count, side = (4, 1800) if generator == "ffpe_mini" else (16, 5000)
    for seed in range(count):
        make_slide(tmp_path / "in" / f"s{seed}.ome.tif", seed, side=side, tissue=0.6)
    seconds = {}
    for workers in (1, 2, 1, 2):
        started = time.perf_counter()
        out = tmp_path / f"out-{len(seconds)}-{workers}-{time.time_ns()}"
        chosen = ("directory.executor=processes", f"run.workers={workers}", "run.threads=1")
        run(tmp_path / "in", out, *chosen, f"generator.name={generator}", "output.qc=false")
        seconds[workers] = min(time.perf_counter() - started, seconds.get(workers, 1e9))
    print(f"\n{generator}: two workers are {seconds[1] / seconds[2]:.2f} times as fast as one ({seconds})")
