"""A run over many slides, from what a folder holds to outputs, records and a report.

Each file has a record; the record says what the next run has to do with it. A run can be ended at any moment,
by Ctrl-C, a deadline or a kill: the same command goes on, and slides that are done are recognised by the
fingerprint of their outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from wsi_pipeline.errors import ConfigError, OutputError
from wsi_pipeline.pipeline.convert import Inspect
from wsi_pipeline.pipeline.events import Notice
from wsi_pipeline.runs.budgets import DiskBudget, folder_bytes
from wsi_pipeline.runs.drive import Drive, Tools
from wsi_pipeline.runs.events import RunEmit, SlideChanged, ignore
from wsi_pipeline.runs.folder import RunFolder
from wsi_pipeline.runs.found import stamp
from wsi_pipeline.runs.inputs import Found, find_inputs
from wsi_pipeline.runs.journal import Journal, deciding
from wsi_pipeline.runs.names import OutputNames, key_of
from wsi_pipeline.runs.publish import exists_with, is_url
from wsi_pipeline.runs.records import Record, Records
from wsi_pipeline.runs.settings import RunConfig
from wsi_pipeline.runs.settle import Settled
from wsi_pipeline.runs.sizes import parse_deadline, parse_size
from wsi_pipeline.runs.staff import hire
from wsi_pipeline.runs.staging import clean_staging
from wsi_pipeline.runs.tasks import SlideTask

__all__ = ["RunResult", "convert_many"]

STEP_SECONDS = 0.5
LEASE_TOUCH_SECONDS = 5.0
RESCAN_SECONDS = 5.0
DEADLINE_MARGIN = timedelta(seconds=10)
"""What ending the workers and writing the report may take."""
ENDINGS = {"zarr": ".ome.zarr", "tiff": ".ome.tif"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended. ``counts``: files by status; ``why`` it stopped early, "" where it did not;
    ``exit_code``: 0 all done, 3 some failed or were left, 130 stopped by Ctrl-C."""

    folder: Path
    counts: dict[str, int]
    why: str
    seconds: float
    report: Path

    @property
    def exit_code(self) -> int:
        if self.why == "stopped":
            return 130
        return 3 if any(self.counts.get(status) for status in ("failed", "queued", "running")) else 0


def convert_many(
    given: str,
    target: str,
    config: RunConfig,
    *,
    run_folder: Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    inspect: Inspect | None = None,
    emit: RunEmit = ignore,
    tools: Tools | None = None,
) -> RunResult:
    """Convert every slide that ``given`` (folder, CSV, pattern) names to ``target`` (folder or URL).

    ``run_folder`` holds the records where ``target`` is a URL; ``overwrite``: convert again what is done;
    ``restart``: forget an earlier run with other settings. Raises ConfigError where nothing can start and
    OutputError where another run is at work; a slide that fails is no error, see ``RunResult.exit_code``.
    """
    started, now = time.perf_counter(), datetime.now()
    wishes = config.directory
    deadline = parse_deadline(wishes.deadline, now) if wishes.deadline else None
    limit = parse_size(wishes.max_disk, "directory.max_disk") if wishes.max_disk else None
    quota = parse_size(wishes.stage_quota, "directory.stage_quota")
    min_free = parse_size(wishes.min_free, "directory.min_free")
    folder = _folder(target, run_folder)
    if wishes.watch and not Path(given).is_dir():
        raise ConfigError(f"{given}: --watch looks at a folder; name one")
    found = find_inputs(given, links=wishes.links, exclude=folder.root, may_be_empty=wishes.watch)
    if is_url(target):  # a missing package or key is told now, not after the first slide
        exists_with(target, f"probe{ENDINGS[wishes.format]}", "")
    with folder.taken():
        if restart:
            _forget(folder)
        if wishes.stage:
            clean_staging(Path(wishes.stage))
        journal = Journal.begin(folder, given, target, config)
        records = Records(folder.records)
        with hire(config, len(found), emit) as staff, _lease(folder, deadline) as session:
            names = OutputNames({record.output for record in records if record.output})
            clerk = _Clerk(
                config=config,
                folder=folder,
                target=target,
                session=session,
                overwrite=overwrite,
                inspect=inspect,
                records=records,
                worker_config=staff.config,
                names=names,
                stage_quota=quota,
                min_free=min_free,
            )
            disk = _budget(limit, records, folder, config, target)
            drive = Drive(staff.workers, records, disk, wishes.retries, emit, tools or Tools())
            journal.staff(staff, disk)
            if not wishes.watch:  # there, a file may still be growing
                clerk.register(found, drive, gone=True)
            why = _loop(drive, clerk, journal, given, config, deadline, emit)
        counts: dict[str, int] = dict(Counter(str(record.status) for record in records))
        journal.end(records, why)
    return RunResult(
        folder=folder.root,
        counts=counts,
        why=why,
        seconds=time.perf_counter() - started,
        report=folder.root / "report.html",
    )


def _loop(
    drive: Drive,
    clerk: _Clerk,
    journal: Journal,
    given: str,
    config: RunConfig,
    deadline: datetime | None,
    emit: RunEmit,
) -> str:
    """Until all is done, the deadline comes or somebody stops it; returns why it ended early."""
    watching = config.directory.watch
    settled, next_look, later = Settled(config.directory.settle), 0.0, list[Found]()
    try:
        while True:
            if deadline is not None and datetime.now() >= deadline - DEADLINE_MARGIN:
                drive.stop("the deadline came; run the same command again to continue")
                return "deadline"
            busy = drive.step(STEP_SECONDS)
            journal.keep_up(clerk.records)
            if watching and time.monotonic() >= next_look:
                next_look = time.monotonic() + RESCAN_SECONDS
                later = clerk.watch(given, settled, later, drive, emit)
            elif not busy and not watching:
                return ""
            if not busy:
                time.sleep(STEP_SECONDS)
    except KeyboardInterrupt:
        drive.stop("stopped; run the same command again to continue")
        emit(Notice(slide_id="run", message="stopped; run the same command again to continue"))
        return "stopped"
    except BaseException:
        drive.stop("the run ended with an error; run the same command again")
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Clerk:
    """Decides what is to be done with each file that was found."""

    config: RunConfig
    folder: RunFolder
    target: str
    session: str
    overwrite: bool
    inspect: Inspect | None
    records: Records
    worker_config: RunConfig
    names: OutputNames
    stage_quota: int
    min_free: int

    def watch(
        self, given: str, settled: Settled, later: list[Found], drive: Drive, emit: RunEmit
    ) -> list[Found]:
        """Queue what is complete; returns what changed while it is converted, to be queued after that."""
        links = self.config.directory.links
        try:
            found = find_inputs(given, links=links, exclude=self.folder.root, may_be_empty=True)
            ready = later + settled.update(found, time.monotonic())
            busy = [one for one in ready if drive.holds(key_of(one.source))]
            self.register([one for one in ready if one not in busy], drive, gone=False)
            return busy
        except (ConfigError, OutputError, OSError) as error:  # a share that is away for a while
            emit(Notice(slide_id="run", message=f"{error}; looked at again in {RESCAN_SECONDS:.0f} s"))
            return later

    def register(self, found: list[Found], drive: Drive, *, gone: bool) -> None:
        """Give each file its record and queue what is to be converted; ``gone``: drop what is no more."""
        here = {key_of(one.source): one for one in found}
        if gone:
            for record in list(self.records):
                if record.key not in here and record.status != "done":
                    self.records.drop(record.key)
                    self.folder.drop_work(record.key)
        again = 0
        for key, one in here.items():
            record = self._judged(key, one)
            before = self.records.get(key)
            if record != before:
                self.records.put(record)
                if record.status in ("failed", "skipped"):
                    told = SlideChanged(source=record.source, status=record.status, reason=record.reason)
                    drive.emit(told)
            elif record.status == "failed":
                again += 1
            if record.status == "queued":
                drive.add(self._task(record, one), record)
        if again:
            message = f"{again} slides failed before and are not tried again; use --retry-failed"
            drive.emit(Notice(slide_id="run", message=message))

    def _judged(self, key: str, one: Found) -> Record:
        before = self.records.get(key)
        if one.skip:
            failed = one.unknown and self.config.directory.strict
            return Record(
                key=key, source=one.source, status="failed" if failed else "skipped", reason=one.skip
            )
        now = stamp(one.path, one.parts)
        ending = ENDINGS[self.config.directory.format]
        output = before.output if before and before.output else self.names.add(one.source, ending)
        queued = Record(key=key, source=one.source, status="queued", stamp=now, output=output)
        if before is None or before.status in ("queued", "running"):
            return queued
        changed = before.stamp != now
        if before.status == "failed":
            # What was converted once, and changed since, is replaced only on demand.
            again = before.result is None and (self.config.directory.retry_failed or changed)
            return queued if again or self.overwrite else before
        if before.result is None or self.overwrite:  # it was no slide before, or is wanted anew
            return queued
        if before.result.no_tissue:
            return queued if changed else before
        there = exists_with(self.target, before.output, before.result.fingerprint)
        if there is None:
            return queued
        if changed:
            why = "the slide changed after it was converted; use --overwrite to convert it again"
            return replace(before, status="failed", reason=why, stamp=now)
        if not there:
            why = f"{before.output}: another output stands there; move it away, or use --overwrite"
            return replace(before, status="failed", reason=why)
        return before

    def _task(self, record: Record, one: Found) -> SlideTask:
        wishes, conversion = self.config.directory, self.worker_config.conversion
        given = replace(
            conversion.input,
            mask=one.mask or conversion.input.mask,
            roi=one.roi or conversion.input.roi,
        )
        conversion = replace(conversion, input=given, run=replace(conversion.run, workers=1))
        decides = json.dumps([deciding(replace(self.config, input=given)), one.mpp, record.stamp])
        digest = hashlib.sha256(decides.encode()).hexdigest()[:8]
        inline = wishes.executor == "inline"
        return SlideTask(
            key=record.key,
            path=one.path,
            mpp=one.mpp,
            config=conversion,
            folder=self.folder,
            work=self.folder.work / f"{record.key}-{digest}",
            target=self.target,
            output=record.output,
            session=self.session,
            overwrite=self.overwrite,
            stage=Path(wishes.stage) if wishes.stage else None,
            stage_quota=self.stage_quota,
            allowance=None,
            min_free=self.min_free,
            timeout=None if inline else wishes.timeout,
            inspect=self.inspect,
        )


def _folder(target: str, run_folder: Path | None) -> RunFolder:
    if not is_url(target):
        if target.lower().endswith((".ome.zarr", ".ome.tif", ".ome.tiff")):
            raise ConfigError(
                f"{target}: many slides go to a folder; name one with -o, and --format for TIFF"
            )
        if run_folder is not None and run_folder.absolute() != Path(target).absolute():
            raise ConfigError(f"--run-dir {run_folder}: only for outputs to a URL; leave it out")
        return RunFolder(Path(target).absolute())
    if run_folder is None:
        raise ConfigError(f"{target}: outputs go to a URL; name a local folder for records, --run-dir DIR")
    return RunFolder(run_folder.absolute())


def _forget(folder: RunFolder) -> None:
    """Records and unfinished work go; outputs stay."""
    for path in (folder.records, folder.work, folder.pictures, folder.beats):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
    folder.document.unlink(missing_ok=True)


def _budget(
    limit: int | None, records: Records, folder: RunFolder, config: RunConfig, target: str
) -> DiskBudget:
    """What earlier runs into this folder left counts: outputs (unless elsewhere) and unfinished work."""
    used = 0 if is_url(target) else sum(r.result.size_bytes for r in records if r.result)
    if config.directory.stage:
        used += parse_size(config.directory.stage_quota, "directory.stage_quota")
    held: dict[str, int] = {}
    for path in folder.work.iterdir():
        key = path.name.rpartition("-")[0]
        held[key] = held.get(key, 0) + folder_bytes(path)
    return DiskBudget(limit, used + sum(held.values()), held)


@contextmanager
def _lease(folder: RunFolder, deadline: datetime | None) -> Iterator[str]:
    """Touches the lease from a thread of its own until the run ends or its deadline comes."""
    session, ended = os.urandom(8).hex(), threading.Event()
    folder.touch_lease(session)

    def touch() -> None:
        while not ended.wait(LEASE_TOUCH_SECONDS):
            if deadline is not None and datetime.now() >= deadline - DEADLINE_MARGIN:
                break
            with contextlib.suppress(OutputError):  # a full disk: the next touch may succeed
                folder.touch_lease(session)
        folder.lease.unlink(missing_ok=True)

    thread = threading.Thread(target=touch, name="lease", daemon=True)
    thread.start()
    try:
        yield session
    finally:
        ended.set()
        thread.join()
