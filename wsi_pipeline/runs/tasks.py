"""What workers do: lay a slide out, make one of its bands, or make the slide whole and publish it.

    plan_slide -> convert_band ... -> convert_whole     a slide of which several workers make bands
    convert_whole                                       any other

``convert_whole`` makes whatever is missing, so after bands it finishes, after a crash it goes on, and where a
band was lost it heals. Each is a top-level function of one picklable value, run by any executor.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.core.plan import Band, SlidePlan
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.core.pyramid import BlockKey
from wsi_pipeline.pipeline.convert import ConvertResult, Inspect, convert_slide
from wsi_pipeline.pipeline.outputs import open_partial, output_kind, sidecar
from wsi_pipeline.pipeline.planning import Survey, survey
from wsi_pipeline.pipeline.run import JobReport, run_band
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.pipeline.store import job_for, still_valid, store_writer
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.overview import read_overview
from wsi_pipeline.runs.budgets import DiskGuard, upper_bound
from wsi_pipeline.runs.folder import RunFolder
from wsi_pipeline.runs.pictures import SIDE, after_thumbnail, write_pictures
from wsi_pipeline.runs.publish import exists_with, publish
from wsi_pipeline.runs.records import SlideResult
from wsi_pipeline.runs.staging import staged
from wsi_pipeline.runs.vitals import Pulse, at_work
from wsi_pipeline.writers.manifest import MANIFEST, file_digest, read_manifest, write_synced
from wsi_pipeline.writers.omezarr import LEDGERS

__all__ = ["Laid", "SlideTask", "convert_band", "convert_whole", "plan_slide"]

RESULT = "result.json"
"""In a slide's work folder, written before its output is published: a kill in between redoes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideTask:
    """What a worker needs to know about one slide; picklable, paths and settings only.

    ``path``: of the source; ``mpp``: (y, x) of a table, wins over the file;
    ``work``: folder of this slide and these settings; ``output``: name relative to ``target`` (a folder or
    URL); ``session``: of the run that waits for it; ``allowance``: bytes that work and output may take (None:
    any), ``min_free``: bytes that the disk keeps; ``timeout``: seconds without progress (None: no watchdog);
    ``inspect``: measures seams.
    """

    key: str
    path: str
    mpp: Mpp | None
    config: ConvertConfig
    folder: RunFolder
    work: Path
    target: str
    output: str
    session: str
    overwrite: bool
    stage: Path | None
    stage_quota: int
    allowance: int | None
    min_free: int
    timeout: float | None
    inspect: Inspect | None

    @property
    def store(self) -> Path:
        """The output while it is made, under the last part of its name."""
        return self.work / Path(self.output).name


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """A slide that was planned. ``bands`` is empty where there is no tissue; ``need``: bytes that its output
    can at most take while it is made."""

    plan: SlidePlan
    bands: tuple[Band, ...]
    done: frozenset[BlockKey]
    need: int


def plan_slide(task: SlideTask, count: int) -> Laid:
    """Plan a slide and cut it into at most ``count`` bands; its partial output is begun."""
    with _taken(task) as (slide, pulse):
        found = survey(slide, task.config)
        is_tiff = output_kind(task.store) == "tiff"
        need = upper_bound(found.plan, task.config.output.tiff if is_tiff else False)
        if found.is_empty:
            return Laid(plan=found.plan, bands=(), done=frozenset(), need=need)
        store = _working_store(task)
        with open_partial(store):
            done = still_valid(store_writer(store, found.plan, task.config), found.plan, pulse.emit)
        return Laid(plan=found.plan, bands=found.plan.bands(count), done=done, need=need)


def convert_band(task: SlideTask, laid: Laid, band: Band) -> JobReport:
    """Make the blocks of one band."""
    with _taken(task, f"{task.key}.{band[0]}") as (slide, pulse):
        writer = store_writer(_working_store(task), laid.plan, task.config)
        return run_band(job_for(slide, laid.plan, band, writer, laid.done, task.config), pulse.emit)


def convert_whole(task: SlideTask) -> SlideResult:
    """Make what is missing of a slide's output, finish it and put it into its place."""
    if (before := _published(task)) is not None:
        return before
    started = time.perf_counter()
    with _taken(task) as (slide, pulse):
        looked = _Looked(task)
        made = convert_slide(
            slide, task.store, task.config, shared=True, inspect=looked.inspect, emit=pulse.emit
        )
        if made.status == "no_tissue":
            result = _no_tissue(slide, made, pulse)
        else:
            result = replace(_told(task.store), warnings=tuple(pulse.warnings))
        result = replace(result, seconds=round(time.perf_counter() - started, 3))
        looked.write(slide)
        write_synced(task.work / RESULT, json.dumps(asdict(result)))
        files, fingerprint = _files(task, made), result.fingerprint
        publish(files, task.target, overwrite=task.overwrite, beat=pulse.beat, fingerprint=fingerprint)
        return result


@contextmanager
def _taken(task: SlideTask, beat: str = "") -> Iterator[tuple[Slide, Pulse]]:
    """The slide, opened where it is read best, under a heartbeat of its own."""
    task.work.mkdir(parents=True, exist_ok=True)
    guard = DiskGuard(task.work, task.allowance, task.min_free)
    pulse = Pulse(task.folder, beat or task.key, task.session, timeout=task.timeout, check=guard.check)
    with (
        at_work(pulse),
        staged(task.path, task.stage, task.stage_quota, beat=pulse.beat) as path,
    ):
        source = task.config.input
        table = Path(source.mpp_table) if source.mpp_table else None
        slide = open_slide(path, mpp=task.mpp or source.mpp, mpp_table=table, reader=source.reader)
        try:
            yield slide, pulse
        finally:
            slide.close()


def _working_store(task: SlideTask) -> Path:
    """The OME-Zarr that is made first, whatever the output."""
    return task.store if output_kind(task.store) == "zarr" else sidecar(task.store, ".work.ome.zarr")


class _Looked:
    """What is looked at in a finished store before it moves away: seams, if wanted, and two thumbnails."""

    def __init__(self, task: SlideTask) -> None:
        self._task = task
        self._before: U8_HWC | None = None
        self._after: U8_HWC | None = None

    def inspect(self, source: Slide, output: Slide, found: Survey) -> Mapping[str, Any] | None:
        if max(found.thumbnail_HWC.shape) >= SIDE:
            self._before = found.thumbnail_HWC
        self._after = after_thumbnail(_working_store(self._task))
        measure = self._task.inspect
        return None if measure is None else measure(source, output, found)

    def write(self, slide: Slide) -> None:
        before, config = self._before, self._task.config
        if before is None:
            before, _ = read_overview(slide, icc=config.input.icc, threads=config.run.threads)
        write_pictures(self._task.folder.root, self._task.key, before, self._after)


def _told(out: Path) -> SlideResult:
    """What the manifest of a finished output says."""
    is_store = out.is_dir()
    document = read_manifest(out / MANIFEST if is_store else sidecar(out, f".{MANIFEST}"))
    slide, run = document["slide"], document["run"]
    files = _content_files(out) if is_store else [out]
    return SlideResult(
        slide_id=slide["name"],
        identity=slide["identity"],
        fingerprint=document["fingerprint"],
        reader=slide["reader"],
        stain=slide["stain"],
        mpp=(slide["mpp"][0], slide["mpp"][1]),
        mpp_origin=slide["mpp_origin"],
        tissue_mm2=slide["tissue_mm2"],
        tiles=run["tiles"],
        blocks=run["blocks"],
        resumed=run["blocks_resumed"],
        seconds=run["seconds"],
        size_bytes=sum(path.stat().st_size for path in files),
        content=_content(out, files),
        disagreement=run["disagreement"],
        seams=run.get("seams"),
    )


def _content_files(store: Path) -> list[Path]:
    """Every file of a store but ledger and manifest, which tell of the run and not of the slide."""
    apart = (store / LEDGERS, store / MANIFEST)
    return sorted(
        path
        for path in store.rglob("*")
        if path.is_file() and not any(path == other or other in path.parents for other in apart)
    )


def _content(out: Path, files: list[Path]) -> str:
    if files == [out]:
        return file_digest(out)
    lines = (f"{path.relative_to(out).as_posix()} {file_digest(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _no_tissue(slide: Slide, made: ConvertResult, pulse: Pulse) -> SlideResult:
    return SlideResult(
        slide_id=slide.slide_id,
        identity=slide.identity,
        fingerprint="",
        reader=slide.reader,
        stain="",
        mpp=slide.mpp,
        mpp_origin=slide.mpp_origin,
        tissue_mm2=0.0,
        tiles=0,
        blocks=0,
        resumed=0,
        seconds=made.seconds,
        warnings=tuple(pulse.warnings),
        no_tissue=made.reason or "no tissue",
    )


def _files(task: SlideTask, made: ConvertResult) -> dict[Path, str]:
    """What is published, under which names; the output itself last."""
    store, files = task.store, {}
    endings = (".overlay.png",) if made.status == "no_tissue" else (".qc.png", f".{MANIFEST}", "")
    for ending in endings:
        path = sidecar(store, ending) if ending else store
        if os.path.lexists(path):
            files[path] = task.output + ending
    return files


def _published(task: SlideTask) -> SlideResult | None:
    """The result of an attempt that published its output and was killed before it could say so."""
    try:
        result = SlideResult.from_json(json.loads((task.work / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if result.no_tissue or os.path.lexists(task.store):
        return None
    return result if exists_with(task.target, task.output, result.fingerprint) else None
