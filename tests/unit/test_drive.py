"""The loop that hands slides out, with workers and tools that only pretend."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import (
    CheckpointError,
    CorruptRegionError,
    OutputError,
    StoppedError,
    WorkerDiedError,
)
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.runs.budgets import DiskBudget
from wsi_pipeline.runs.drive import Drive, Tools
from wsi_pipeline.runs.events import ignore
from wsi_pipeline.runs.folder import RunFolder
from wsi_pipeline.runs.records import Record, Records, SlideResult
from wsi_pipeline.runs.tasks import SlideTask


def task(root: Path, key: str) -> SlideTask:
    return SlideTask(
        key=key,
        path=key,
        mpp=None,
        config=ConvertConfig(),
        folder=RunFolder(root),
        work=root / ".wsi_run" / "work" / f"{key}-0",
        target=str(root),
        output=f"{key}.ome.zarr",
        session="",
        overwrite=False,
        stage=None,
        stage_quota=0,
        allowance=None,
        min_free=0,
        timeout=1.0,
        inspect=None,
    )


def result(key: str, size: int = 10) -> SlideResult:
    return SlideResult(
        slide_id=key,
        identity="",
        fingerprint="f",
        reader="",
        stain="",
        mpp=(1.0, 1.0),
        mpp_origin="",
        tissue_mm2=1.0,
        tiles=1,
        blocks=1,
        resumed=0,
        seconds=0.0,
        size_bytes=size,
    )


@dataclass
class Pretended:
    """Workers whose calls end at once, or later in any order; ``most`` were in hand together."""

    count: int = 2
    slots: int = 1
    ahead: int = 0
    rng: random.Random | None = None
    name: str = "pretended"
    most: int = 0
    alone: list[bool] = field(default_factory=list)
    _late: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = field(default_factory=list)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, alone: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        self._late.append((future, function, arguments))
        self.alone.append(alone)
        self.most = max(self.most, len(self._late))
        if self.rng is None or len(self._late) == self.count * self.slots or self.rng.random() < 0.4:
            self.finish()
        return future

    def finish(self) -> None:
        if self.rng is not None:
            self.rng.shuffle(self._late)
        for future, function, arguments in self._late:
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
        self._late.clear()

    def died(self, error: BaseException) -> WorkerDiedError | None:
        return error if isinstance(error, WorkerDiedError) else None

    def pids(self) -> list[int]:
        return []

    def stop(self) -> None:
        self._late.clear()


@dataclass(frozen=True)
class FakePlan:
    bands: tuple[tuple[int, int], ...]
    need: int = 0


def driven(
    root: Path,
    keys: list[str],
    workers: Pretended,
    *,
    whole: Callable[[SlideTask], SlideResult] = lambda task: result(task.key),
    band: Callable[..., None] = lambda *_: None,
    plan: Callable[[SlideTask, int], FakePlan] = lambda _, n: FakePlan(tuple((i, i + 1) for i in range(n))),
    limit: int | None = None,
    retries: int = 1,
) -> dict[str, Record]:
    folder = RunFolder(root)
    with folder.taken():
        records = Records(folder.records)
        tools = Tools(plan=plan, band=band, whole=whole)  # type: ignore[arg-type]
        drive = Drive(workers, records, DiskBudget(limit, 0), retries, ignore, tools)
        for key in keys:
            drive.add(task(root, key), Record(key=key, source=key, status="queued"))
        while drive.step(0.001):
            workers.finish()
    return {record.key: record for record in records}


def test_each_slide_is_done_once_and_no_more_are_in_hand_than_fit(tmp_path: Path) -> None:
    made: list[str] = []
    workers = Pretended(count=2, slots=2, rng=random.Random(1))
    keys = [f"s{i}" for i in range(30)]
    found = driven(tmp_path, keys, workers, whole=lambda t: made.append(t.key) or result(t.key))  # type: ignore[func-returns-value]
    assert sorted(made) == sorted(keys)
    assert {record.status for record in found.values()} == {"done"}
    assert workers.most <= 4


def test_slides_are_split_only_where_workers_outnumber_them(tmp_path: Path) -> None:
    bands: list[tuple[str, tuple[int, int]]] = []

    def band(given: SlideTask, _: Any, rows: tuple[int, int]) -> None:
        bands.append((given.key, rows))

    driven(tmp_path / "few", ["a"], Pretended(count=4), band=band)
    assert bands == [("a", (0, 1)), ("a", (1, 2)), ("a", (2, 3)), ("a", (3, 4))]
    bands.clear()
    driven(tmp_path / "many", ["a", "b", "c", "d"], Pretended(count=2, rng=random.Random(0)), band=band)
    assert {key for key, _ in bands} <= {"d"}, "only the last slide may find a worker without work"


def test_a_slide_that_kills_its_worker_is_tried_again_alone_then_failed(tmp_path: Path) -> None:
    tries: list[int] = []

    def whole(given: SlideTask) -> SlideResult:
        if given.key == "bad":
            tries.append(given.config.run.threads)
            (given.folder.beats / "bad.json").touch()
            raise WorkerDiedError("the worker died: SIGSEGV", alone=True)
        return result(given.key)

    workers = Pretended(count=1)
    found = driven(tmp_path, ["good", "bad", "fine"], workers, whole=whole)
    assert found["bad"].status == "failed"
    assert "SIGSEGV" in found["bad"].reason
    assert found["bad"].attempts == 2
    assert found["good"].status == found["fine"].status == "done"
    assert tries == [ConvertConfig().run.threads, 1], "the second attempt takes less memory"
    assert workers.alone.count(True) == 1


def test_who_shared_a_process_with_the_guilty_is_not_blamed(tmp_path: Path) -> None:
    seen: list[str] = []

    def whole(given: SlideTask) -> SlideResult:
        first = given.key not in seen
        seen.append(given.key)
        if first:
            raise WorkerDiedError("the worker died: SIGKILL", alone=False)
        return result(given.key)

    found = driven(tmp_path, ["a", "b"], Pretended(count=1, slots=2), whole=whole, retries=0)
    assert {record.status for record in found.values()} == {"done"}


def test_an_error_of_the_slide_is_not_tried_again(tmp_path: Path) -> None:
    def whole(given: SlideTask) -> SlideResult:
        raise CorruptRegionError("x.svs: cannot be\ndecoded", slide_id="x")

    found = driven(tmp_path, ["x"], Pretended(count=1), whole=whole)
    assert (found["x"].status, found["x"].reason, found["x"].attempts) == (
        "failed",
        "x.svs: cannot be decoded",
        1,
    )


def test_a_bug_fails_the_slide_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = driven(tmp_path, ["x"], Pretended(count=1), whole=lambda _: {}["key"])  # type: ignore[index]
    assert found["x"].status == "failed"
    assert "please report" in found["x"].reason
    assert "KeyError" in caplog.text


def test_a_lost_band_fails_its_slide_alone(tmp_path: Path) -> None:
    def band(given: SlideTask, _: Any, rows: tuple[int, int]) -> None:
        if given.key == "x" and rows[0] == 1:
            raise CorruptRegionError("x: gone", slide_id="x")

    found = driven(tmp_path, ["x"], Pretended(count=3), band=band)
    assert found["x"].status == "failed"


def test_what_was_stopped_stays_queued(tmp_path: Path) -> None:
    def whole(given: SlideTask) -> SlideResult:
        raise StoppedError("the run was stopped")

    assert driven(tmp_path, ["x"], Pretended(count=1), whole=whole)["x"].status == "queued"


def test_a_worker_that_took_the_run_for_dead_is_told_otherwise(tmp_path: Path) -> None:
    tries: list[str] = []

    def whole(given: SlideTask) -> SlideResult:
        tries.append(given.key)
        given.folder.lease.touch()
        if len(tries) == 1:
            raise StoppedError("the run's parent has given no sign for 200 s")
        return result(given.key)

    assert driven(tmp_path, ["x"], Pretended(count=1), whole=whole)["x"].status == "done"


def test_a_full_disk_fails_no_slide_but_leaves_it_to_the_next_run(tmp_path: Path) -> None:
    def whole(given: SlideTask) -> SlideResult:
        raise OutputError("x.ome.zarr: the disk is full", path="x.ome.zarr")

    found = driven(tmp_path, ["x"], Pretended(count=1), whole=whole)
    assert (found["x"].status, found["x"].reason) == ("queued", "x.ome.zarr: the disk is full")


def test_what_only_waited_in_a_dead_workers_queue_is_not_to_blame(tmp_path: Path) -> None:
    tries: list[str] = []

    def whole(given: SlideTask) -> SlideResult:
        tries.append(given.key)
        if len(tries) < 5:
            raise WorkerDiedError("the dask worker died", alone=True)  # and the slide never had a heartbeat
        return result(given.key)

    assert driven(tmp_path, ["x"], Pretended(count=1), whole=whole, retries=0)["x"].status == "done"


def test_each_band_may_lose_a_worker_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def band(given: SlideTask, _: Any, rows: tuple[int, int]) -> None:
        first = rows not in seen
        seen.append(rows)
        if first:
            (given.folder.beats / f"{given.key}.{rows[0]}.json").touch()
            raise WorkerDiedError("the worker died: SIGKILL", alone=True)

    found = driven(tmp_path, ["x"], Pretended(count=3), band=band)
    assert found["x"].status == "done"


def test_weights_that_are_missing_stop_the_run(tmp_path: Path) -> None:
    def whole(given: SlideTask) -> SlideResult:
        raise CheckpointError("no weights")

    with pytest.raises(CheckpointError):
        driven(tmp_path, ["x", "y"], Pretended(count=1), whole=whole)


@given(seed=st.integers(0, 10_000), needs=st.lists(st.integers(1, 120), min_size=1, max_size=12))
def test_the_disk_budget_is_kept_and_everybody_gets_an_answer(
    tmp_path_factory: pytest.TempPathFactory, seed: int, needs: list[int]
) -> None:
    root = tmp_path_factory.mktemp("drive")
    in_use = 0

    def whole(given: SlideTask) -> SlideResult:
        nonlocal in_use
        assert given.allowance is not None
        size = min(needs[int(given.key)], given.allowance)
        in_use += size
        return result(given.key, size)

    workers = Pretended(count=3, rng=random.Random(seed))
    found = driven(
        root,
        [str(i) for i in range(len(needs))],
        workers,
        whole=whole,
        plan=lambda t, _: FakePlan(((0, 1),), needs[int(t.key)]),
        limit=200,
    )
    assert in_use <= 200
    assert {record.status for record in found.values()} <= {"done", "queued"}
    assert all(record.reason for record in found.values() if record.status == "queued")
