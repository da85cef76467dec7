"""From a cohort to its tile index: each slide measured once, by any number of processes and runs.

Every slide becomes a part file in ``INDEX.parts`` beside the index; the index is put together from parts at
the end, and replaced at once. The folder may be deleted; while it is there, a run with other filters, splits
or more slides measures only what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline._version import __version__
from wsi_pipeline.cohorts.events import Checked, CohortEmit, SlideFailed, SlideTiled, ignore
from wsi_pipeline.cohorts.index_file import INDEX_KEY, VERSION, index_metadata, judge, slide_columns
from wsi_pipeline.cohorts.manifest import Cohort, CohortSlide, read_cohort
from wsi_pipeline.cohorts.parquet import import_parquet
from wsi_pipeline.cohorts.processes import begin_worker, clean_context, single_threaded_children
from wsi_pipeline.cohorts.qc_page import SHOWN_SCORES, Finding, is_page, write_page
from wsi_pipeline.cohorts.settings import CohortConfig
from wsi_pipeline.cohorts.slide_tiles import Part, SlideJob, read_part, tile_slide
from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError, SlideError, WsiPipelineError

__all__ = ["IndexResult", "make_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexResult:
    """``kept`` of ``tiles`` serve, by (domain, split) in ``counts``; ``failed``: slide names and reasons."""

    path: Path
    page: Path
    slides: int
    tiles: int
    kept: int
    counts: dict[tuple[str, str], int]
    failed: dict[str, str]


def make_index(
    cohort: str | Path,
    out: str | Path,
    config: CohortConfig,
    *,
    workers: int = 1,
    overwrite: bool = False,
    emit: CohortEmit = ignore,
) -> IndexResult:
    """Tile a cohort (a table or a folder of slides) and write the index and its quality page.

    A slide that fails is reported and left out. Raises ConfigError for a cohort that is not sound,
    OutputExistsError where another cohort's or setting's index stands, or a page that is none of ours,
    SlideError where all slides fail.
    """
    out = Path(out)
    if out.suffix.lower() != ".parquet":
        raise ConfigError(f"--out {out}: name a .parquet file")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: give 1 or more")
    page = out.with_suffix(".html")
    if os.path.lexists(page) and not overwrite and not is_page(page):
        raise OutputExistsError(
            f"{page}: exists and is no quality page of a tile index; choose another --out, or use "
            "--overwrite",
            path=page,
        )
    read = read_cohort(cohort, split=config.split)
    slides = [s for s in read.slides if config.normal == "keep" or not s.normal]
    notices = read.notices
    if len(slides) < len(read.slides):
        notices += (f"left out, for they are normal tissue: {len(read.slides) - len(slides)}",)
    about = _about(read, slides, config)
    _check_out(out, about, overwrite)
    folder = out.with_suffix(".parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})", path=folder) from error
    jobs = [SlideJob(slide=slide, config=config, folder=folder) for slide in slides]
    pending = [job for job in jobs if read_part(job.path) is None]
    emit(Checked(slides=len(jobs), resumed=len(jobs) - len(pending), notices=notices))
    failed = _run(pending, workers, len(jobs), emit)
    return _assemble(jobs, failed, about, out)


def _about(cohort: Cohort, slides: Sequence[CohortSlide], config: CohortConfig) -> dict[str, Any]:
    """What the index says of itself; its fingerprint tells whether another run means the same index."""
    settings = json.loads(json.dumps(asdict(config)))
    rows = [replace(slide, path="", transform="", mask=Path(slide.mask).name) for slide in slides]
    content = json.dumps([settings, [asdict(row) for row in rows]], sort_keys=True)
    return {
        "version": VERSION,
        "mpp": config.tiling.mpp,
        "tile": config.tiling.tile,
        "icc": config.icc,
        "cohort": Path(cohort.origin).name,
        "config": settings,
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "wsi_pipeline": __version__,
    }


def _check_out(out: Path, about: dict[str, Any], overwrite: bool) -> None:
    if overwrite or not out.exists():
        return
    there = index_metadata(out)
    if there is None:
        raise OutputExistsError(f"{out}: exists and is no tile index; choose another name", path=out)
    if there.get("fingerprint") != about["fingerprint"]:
        raise OutputExistsError(
            f"{out}: an index of another cohort or of other settings; use --overwrite to replace it", path=out
        )


def _run(jobs: list[SlideJob], workers: int, total: int, emit: CohortEmit) -> dict[str, str]:
    """Tile what is pending; returns the slides that failed, by path, and why."""
    failed: dict[str, str] = {}
    done = total - len(jobs)
    for job, problem in _outcomes(jobs, workers):
        done += 1
        part = None if problem else read_part(job.path)
        if part is None:
            failed[job.slide.path] = problem or f"{job.slide.name}: its part cannot be read again"
            emit(SlideFailed(slide=job.slide.name, message=failed[job.slide.path], done=done, total=total))
            continue
        table, found = part
        emit(
            SlideTiled(
                slide=job.slide.name,
                tiles=len(table),
                seconds=found.facts["seconds"],
                reason=found.facts["reason"],
                astray=found.facts["astray"],
                done=done,
                total=total,
            )
        )
    return failed


def _outcomes(jobs: list[SlideJob], workers: int) -> Iterator[tuple[SlideJob, str | None]]:
    """Each job as it finishes, and what went wrong."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, _attempt(job)
        return
    with single_threaded_children():
        context = clean_context("wsi_pipeline.cohorts.slide_tiles")
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, begin_worker)
        futures: dict[Future[str | None], SlideJob] = {pool.submit(_attempt, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise WsiPipelineError(
            "tile: a worker process died (killed, or out of memory); run the same command again to continue, "
            "with fewer --workers"
        ) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(job: SlideJob) -> str | None:
    """Tile one slide; its error as text, for one bad slide must not end the others."""
    try:
        tile_slide(job)
    except (SlideError, ConfigError) as error:
        return str(error)
    return None


def _assemble(
    jobs: Sequence[SlideJob], failed: dict[str, str], about: dict[str, Any], out: Path
) -> IndexResult:
    """Put the parts together, with what the filters make of each row, and write the page."""
    names = {Path(path).name: problem for path, problem in failed.items()}
    about = about | {"failed": names}
    findings: list[Finding] = []
    fresh = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        _write_index(fresh, out, (job for job in jobs if job.slide.path not in failed), about, findings)
        if not findings:
            first = next(iter(failed.values()), "the cohort names no slide")
            raise SlideError(f"{out.name}: no slide could be tiled; the first: {first}", slide_id=out.stem)
        fresh.replace(out)
        page = out.with_suffix(".html")
        write_page(page, about, findings, names)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})", path=out) from error
    finally:
        fresh.unlink(missing_ok=True)
    counts: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        counts[finding.slide.domain, finding.slide.split] += finding.kept
    return IndexResult(
        path=out,
        page=page,
        slides=len(findings),
        tiles=sum(len(finding.reason_N) for finding in findings),
        kept=sum(counts.values()),
        counts=dict(counts),
        failed=names,
    )


def _write_index(
    fresh: Path, out: Path, jobs: Iterable[SlideJob], about: dict[str, Any], findings: list[Finding]
) -> None:
    """One slide after the other, so that memory holds one; ``findings`` is filled for the page."""
    _, parquet = import_parquet()
    writer: Any = None
    try:
        for job in jobs:
            read = read_part(job.path)
            if read is None:  # somebody deleted it while we ran
                raise OutputError(f"{job.path}: has vanished; run the same command again", path=job.path)
            table, part = read
            reason_N = judge(table, job.config.filters)
            slide = replace(job.slide, transform=job.slide.transform and _written(job.slide.transform, out))
            rows = slide_columns(table, slide, part.facts["mpp"], reason_N, _written(slide.path, out))
            if writer is None:
                schema = rows.schema.with_metadata({INDEX_KEY: json.dumps(about).encode()})
                writer = parquet.ParquetWriter(fresh, schema, compression="zstd")
            writer.write_table(rows.replace_schema_metadata(schema.metadata))
            findings.append(_finding(job.slide, table, reason_N, part))
    finally:
        if writer is not None:
            writer.close()


def _finding(slide: CohortSlide, table: Any, reason_N: npt.NDArray[np.int8], part: Part) -> Finding:
    region_N4 = np.stack([table[name].to_numpy() for name in ("y", "x", "height", "width")], axis=1)
    return Finding(
        slide=slide,
        part=part,
        region_N4=region_N4,
        reason_N=reason_N,
        scores={name: table[name].to_numpy() for name in SHOWN_SCORES},
    )


def _written(slide: str, out: Path) -> str:
    """Slides below the index's folder are named relative to it; the others absolutely."""
    if "://" in slide:
        return slide
    path, folder = Path(slide), out.absolute().parent
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
