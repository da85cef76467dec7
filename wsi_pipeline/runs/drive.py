"""Keeps the workers busy: which slide, or which band of one, is handed out next, and what became of it.

The executor schedules; this decides only three things. A slide is cut into bands where workers outnumber
slides. A call whose worker died is tried again, alone in its process and with less memory; a call that merely
shared the process of another one that died is not blamed. A slide that failed ends alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from wsi_pipeline.core.plan import Band
from wsi_pipeline.errors import (
    CheckpointError,
    GeneratorContractError,
    OutputError,
    OutputExistsError,
    SlideError,
    StoppedError,
    WorkerDiedError,
    WsiPipelineError,
)
from wsi_pipeline.pipeline.run import JobReport
from wsi_pipeline.runs.budgets import DiskBudget, folder_bytes
from wsi_pipeline.runs.events import RunEmit, RunProgress, SlideChanged
from wsi_pipeline.runs.records import Record, Records, SlideResult
from wsi_pipeline.runs.tasks import Laid, SlideTask, convert_band, convert_whole, plan_slide
from wsi_pipeline.runs.vitals import hang_told, read_beat
from wsi_pipeline.runs.workers import Workers

__all__ = ["Drive", "Tools"]

TOLD_SECONDS = 1.0
MOST_TRIES = 8
"""After so many attempts that ended without its fault a slide is left to the next run."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What workers are asked to do; others take the place of these in tests."""

    plan: Callable[[SlideTask, int], Laid] = plan_slide
    band: Callable[[SlideTask, Laid, Band], JobReport] = convert_band
    whole: Callable[[SlideTask], SlideResult] = convert_whole


@dataclass(slots=True, eq=False)
class _Slide:
    """A slide in hand. ``suspect``: a worker died over it, so it runs alone from now on."""

    task: SlideTask
    record: Record
    suspect: bool = False
    ended: bool = False
    laid: Laid | None = None
    bands_left: int = 0


@dataclass(slots=True, eq=False)
class _Call:
    slide: _Slide
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    beat: str = ""
    deaths: int = 0
    tries: int = 0


@dataclass(slots=True)
class Drive:
    """Drives slides through workers; ``add`` them, then ``step`` until it returns False.

    ``disk`` decides when a slide fits; ``retries``: attempts after a worker died.
    """

    workers: Workers
    records: Records
    disk: DiskBudget
    retries: int
    emit: RunEmit
    tools: Tools = field(default_factory=Tools)
    _new: deque[_Slide] = field(default_factory=deque)
    _calls: deque[_Call] = field(default_factory=deque)
    _waiting: list[_Slide] = field(default_factory=list)
    _flying: dict[Future[Any], _Call] = field(default_factory=dict)
    _open: dict[str, _Slide] = field(default_factory=dict)
    _settled: int = 0
    _told: float = 0.0

    def add(self, task: SlideTask, record: Record) -> None:
        """Queue a slide."""
        slide = _Slide(task, record)
        self._open[record.key] = slide
        self._new.append(slide)

    def step(self, timeout: float) -> bool:
        """Hand out what fits, wait at most ``timeout`` seconds, take what came back; False when all is done.

        Raises CheckpointError and GeneratorContractError: no other slide would fare better.
        """
        most = self.workers.count * self.workers.slots + self.workers.ahead
        while len(self._flying) < most and (call := self._next()):
            self._hand_out(call)
        if self._flying:
            done, _ = wait(self._flying, timeout=timeout, return_when=FIRST_COMPLETED)
            for future in done:
                self._take(self._flying.pop(future), future)
        self._tell()
        return bool(self._open)

    def holds(self, key: str) -> bool:
        """Whether a slide is queued or in hand."""
        return key in self._open

    def stop(self, reason: str) -> None:
        """End all work; what is in hand stays queued, with the reason. What waits is recorded as queued."""
        self.workers.stop()
        for slide in list(self._open.values()):
            if slide.record.status == "running":
                self._end(slide, "queued", reason)
        for queue in (self._new, self._calls, self._waiting, self._open):
            queue.clear()
        self._flying.clear()

    def _next(self) -> _Call | None:
        while self._calls:
            call = self._calls.popleft()
            if not call.slide.ended:
                return call
        if not self._new:
            return None
        slide = self._new.popleft()
        slide.record = replace(slide.record, status="running", reason="", attempts=1)
        self._keep(slide.record)
        bands = self.workers.count // len(self._open)
        if bands > 1 or self.disk.limited:
            return _Call(slide, self.tools.plan, (max(bands, 1),), slide.task.key)
        return self._whole(slide)

    def _whole(self, slide: _Slide) -> _Call:
        return _Call(slide, self.tools.whole, beat=slide.task.key)

    def _hand_out(self, call: _Call) -> None:
        slide = call.slide
        call.tries += 1
        future = self.workers.submit(call.function, slide.task, *call.arguments, alone=slide.suspect)
        self._flying[future] = call

    def _take(self, call: _Call, future: Future[Any]) -> None:
        slide = call.slide
        if slide.ended:
            return
        error = CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            self._failed(call, error)
        elif call.function is self.tools.plan:
            self._planned(slide, future.result())
        elif call.function is self.tools.band:
            slide.bands_left -= 1
            if slide.bands_left == 0:
                self._calls.append(self._whole(slide))
        else:
            self._finished(slide, future.result())

    def _planned(self, slide: _Slide, laid: Laid) -> None:
        slide.laid = laid
        admission = self.disk.admit(slide.record.key, laid.need)
        if admission.wait:
            self._waiting.append(slide)
            return
        if admission.allowance is None and self.disk.limited:
            self._end(slide, "queued", admission.reason)
            return
        slide.task = replace(slide.task, allowance=admission.allowance)
        if len(laid.bands) < 2:
            self._calls.append(self._whole(slide))
            return
        slide.bands_left = len(laid.bands)
        for band in laid.bands:
            beat = f"{slide.task.key}.{band[0]}"
            self._calls.append(_Call(slide, self.tools.band, (laid, band), beat))

    def _finished(self, slide: _Slide, result: SlideResult) -> None:
        self.disk.settle(slide.record.key, result.size_bytes)
        slide.task.folder.drop_work(slide.task.key)
        slide.record = replace(slide.record, result=result)
        if result.no_tissue:
            slide.record = replace(slide.record, output="")
            self._end(slide, "skipped", f"no tissue: {result.no_tissue}")
        else:
            self._end(slide, "done", "")

    def _failed(self, call: _Call, error: BaseException) -> None:
        slide = call.slide
        if isinstance(error, CheckpointError | GeneratorContractError):
            raise error
        died = self.workers.died(error)
        if died is not None:
            self._died(call, died)
        elif isinstance(error, StoppedError):
            self._stopped(call, error)
        elif isinstance(error, OutputError) and not isinstance(error, OutputExistsError):
            self._end(slide, "queued", " ".join(str(error).split()))  # it is not the slide's fault
        elif isinstance(error, WsiPipelineError):
            if isinstance(error, SlideError):  # a mended file is another slide: nothing to go on with
                slide.task.folder.drop_work(slide.task.key)
            self._end(slide, "failed", " ".join(str(error).split()))
        else:
            log.error("%s: unexpected error", slide.record.source, exc_info=error)
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self._end(slide, "failed", f"unexpected error, please report ({told[:300]})")

    def _stopped(self, call: _Call, error: StoppedError) -> None:
        """A worker that took us for dead, after a pause of this machine, say, is told otherwise."""
        try:
            os.utime(call.slide.task.folder.lease)
        except OSError:  # gone: the run is at its end
            call.tries = MOST_TRIES
        if call.tries < MOST_TRIES:
            self._calls.append(call)
        else:
            self._end(call.slide, "queued", str(error))

    def _died(self, call: _Call, error: WorkerDiedError) -> None:
        slide = call.slide
        beat = slide.task.folder.beats / f"{call.beat}.json"
        began = beat.exists()  # what only waited in a worker's queue is not to blame
        beat.unlink(missing_ok=True)
        hung = hang_told(slide.task.folder, call.beat)
        why = f"no progress for {slide.task.timeout:.0f} s, the read hangs" if hung else str(error)
        if hung or (error.alone and began):
            call.deaths += 1
        if call.tries >= MOST_TRIES:
            self._end(slide, "queued", f"{why}; run the same command again")
            return
        if call.deaths > self.retries:
            times = f", {call.deaths} times" if call.deaths > 1 else ""
            self._end(slide, "failed", f"{why}{times}")
            return
        self._calls.append(call)
        if not (began or hung):
            return
        log.warning("%s: %s; it is tried again", slide.record.source, why)
        slide.suspect = True
        run = replace(slide.task.config.run, threads=1, batch=1)
        slide.task = replace(slide.task, config=replace(slide.task.config, run=run))
        slide.record = replace(slide.record, attempts=slide.record.attempts + 1)
        self._keep(slide.record)

    def _end(self, slide: _Slide, status: Any, reason: str) -> None:
        slide.ended = True
        self._open.pop(slide.record.key, None)
        if status != "done" and slide.record.result is None:
            self.disk.settle(slide.record.key, _size_of(slide.task))
        slide.record = replace(slide.record, status=status, reason=reason)
        self._settled += 1
        self._keep(slide.record)
        waiting, self._waiting = self._waiting, []
        for other in waiting:  # there may be room on the disk now
            if not other.ended and other.laid is not None:
                self._planned(other, other.laid)

    def _keep(self, record: Record) -> None:
        self.records.put(record)
        self.emit(SlideChanged(source=record.source, status=record.status, reason=record.reason))

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < TOLD_SECONDS and self._open:
            return
        self._told = now
        running = {call.slide.record.key: call for call in self._flying.values()}
        total, half, lines = self._settled + len(self._open), 0.0, []
        for call in running.values():
            beat = read_beat(call.slide.task.folder, call.beat) or {}
            done, whole = beat.get("done", 0), beat.get("total", 0)
            share = done / whole if isinstance(done, int) and isinstance(whole, int) and whole else 0.0
            half += min(share, 1.0)
            lines.append(f"{call.slide.record.source}: {beat.get('stage', '')}")
        share = (self._settled + half) / total if total else 1.0
        self.emit(RunProgress(done=self._settled, total=total, share=share, running=tuple(lines)))


def _size_of(task: SlideTask) -> int:
    """Bytes that the work of a slide left on the disk, to be continued by the next run."""
    return folder_bytes(task.work) if task.work.is_dir() else 0
