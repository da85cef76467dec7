"""Make the working store of one slide: a finished OME-Zarr, or a partial one that the next run continues."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsi_pipeline.core.plan import Band, SlidePlan
from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.core.pyramid import BlockKey
from wsi_pipeline.errors import IncompleteOutputError, LedgerCorruptError
from wsi_pipeline.pipeline.events import Emit, Notice, Planned, Stage
from wsi_pipeline.pipeline.executors import run_jobs
from wsi_pipeline.pipeline.outputs import exclusive, mapped, open_partial, sidecar, swap_in
from wsi_pipeline.pipeline.planning import Survey, label_mask
from wsi_pipeline.pipeline.run import Job
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.pipeline.verify import record_files, verify_output
from wsi_pipeline.readers.icc import srgb_profile
from wsi_pipeline.writers.ledger import merge_ledgers, read_ledgers
from wsi_pipeline.writers.manifest import MANIFEST, SYNTHETIC, manifest, read_manifest
from wsi_pipeline.writers.omezarr import LEDGERS, OmeZarrWriter, read_label

__all__ = ["PROFILE", "Made", "finished_before", "job_for", "make_store", "still_valid", "store_writer"]

PROFILE = "profile.icc"
"""ICC profile of the output's pixels, inside the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a run made, and the figures that the manifest holds."""

    tiles: int
    blocks: int
    resumed: int
    figures: Mapping[str, Any]


def finished_before(store: Path, found: Survey) -> Made | None:
    """The working store of an interrupted export, if it was finished with the same fingerprint."""
    if not (store / MANIFEST).exists():
        return None
    document = read_manifest(store / MANIFEST)
    if document.get("fingerprint") != found.plan.fingerprint or not verify_output(store).ok:
        return None
    figures = document["run"]
    return Made(tiles=0, blocks=0, resumed=figures["blocks"], figures=figures)


def make_store(
    slide: Slide,
    found: Survey,
    store: Path,
    config: ConvertConfig,
    *,
    overwrite: bool,
    restart: bool,
    emit: Emit,
    shared: bool = False,
) -> Made:
    """The finished OME-Zarr at ``store``; only the last rename makes it visible.

    ``shared``: other attempts may be writing the same store, e.g. one that was taken for dead. No harm:
    all make equal bytes, each replaces whole files and keeps a ledger of its own.
    """
    started, plan = time.perf_counter(), found.plan
    partial = sidecar(store, ".partial")
    with open_partial(store) if shared else exclusive(store, partial, restart):
        writer = store_writer(store, plan, config)
        made, resumed, tiles = _make_blocks(slide, found, writer, config, emit)
        emit(Stage(slide_id=slide.slide_id, stage="finish"))
        checksums = _checksums(writer, plan)
        figures = {
            "tiles": plan.tile_count,
            "blocks": len(checksums),
            "blocks_resumed": resumed,
            "seconds": round(time.perf_counter() - started, 3),
            "disagreement": _disagreement(writer.root),
        }
        facts = {
            "reader": slide.reader,
            "stain": found.verdict.kind,
            "tissue_mm2": round(found.tissue.tissue.area_mm2, 4),
            "excluded_mm2": found.excluded_mm2,
        }
        with mapped(partial):
            _keep_profile(slide, config, partial / PROFILE)
            writer.finalise(
                name=plan.slide_id,
                tissue_HW=label_mask(found.tissue.tissue, plan.grid.size, plan.mpp),
                extra={"notice": SYNTHETIC, "manifest": MANIFEST},
                manifest=manifest(plan, asdict(config), facts, figures),
            )
            record_files(partial)
            merge_ledgers(partial / LEDGERS, plan.fingerprint, checksums)
        swap_in(partial, store, overwrite)
    return Made(tiles=tiles, blocks=made, resumed=resumed, figures=figures)


def _make_blocks(
    slide: Slide, found: Survey, writer: OmeZarrWriter, config: ConvertConfig, emit: Emit
) -> tuple[int, int, int]:
    """Commit every block that is missing; returns (made, found finished, tiles generated)."""
    plan = found.plan
    done = still_valid(writer, plan, emit)
    _say_if_enlarged(slide, plan, emit)
    total = len(plan.block_keys()) - len(done)
    emit(Planned(slide_id=plan.slide_id, tiles=plan.tile_count, blocks=total + len(done), resumed=len(done)))
    workers = config.run.workers or 1
    bands = plan.bands(workers) if workers > 1 else (None,)
    jobs = [job_for(slide, plan, band, writer, done, config) for band in bands]
    reports = run_jobs(jobs, workers, total, emit)
    if len(jobs) > 1:
        # Parents whose children belong to several bands are made once all bands are done.
        written = still_valid(writer, plan, emit)
        reports += run_jobs([job_for(slide, plan, None, writer, written, config)], 1, total, emit)
    return sum(r.blocks for r in reports), len(done), sum(r.tiles for r in reports)


def job_for(
    slide: Slide,
    plan: SlidePlan,
    band: Band | None,
    writer: OmeZarrWriter,
    done: frozenset[BlockKey],
    config: ConvertConfig,
) -> Job:
    """The job that makes what is missing of a band (None: of the whole slide). Its ledger has a name of its
    own, so that no two attempts, dead or alive, append to one file."""
    rows = "all" if band is None else f"{band[0]}-{band[1]}"
    return Job(
        slide=slide,
        plan=plan,
        band=band,
        generator=config.generator,
        input=config.input,
        writer=writer,
        ledgers=writer.root / LEDGERS,
        name=f"band-{rows}.{os.urandom(6).hex()}",
        done=done,
        batch=config.run.batch or plan.generator.batch,
        threads=config.run.threads,
    )


def store_writer(store: Path, plan: SlidePlan, config: ConvertConfig) -> OmeZarrWriter:
    """The writer of the partial output that becomes ``store``."""
    return OmeZarrWriter(sidecar(store, ".partial"), plan.shape, plan.mpp, config.output.zarr)


def _say_if_enlarged(slide: Slide, plan: SlidePlan, emit: Emit) -> None:
    factor = max(own / working for own, working in zip(slide.mpp, plan.mpp, strict=True))
    if factor > 1.1:
        message = f"enlarged {factor:.3g} times, to {min(plan.mpp):.4g} µm per pixel: this adds no detail"
        emit(Notice(slide_id=slide.slide_id, message=message))


def still_valid(writer: OmeZarrWriter, plan: SlidePlan, emit: Emit) -> frozenset[BlockKey]:
    """Blocks whose bytes on disk have a recorded checksum; the others are made again."""
    records = read_ledgers(writer.root / LEDGERS, plan.fingerprint)
    if foreign := set(records) - set(plan.block_keys()):
        raise LedgerCorruptError(
            f"{writer.root}: the ledger names a block that the plan lacks ({min(foreign)}); use --restart",
            path=writer.root,
        )
    valid = frozenset(key for key, sums in records.items() if writer.checksum(*key) in sums)
    if lost := len(records) - len(valid):
        emit(Notice(slide_id=plan.slide_id, message=f"{lost} blocks differ from the ledger: made again"))
    return valid


def _checksums(writer: OmeZarrWriter, plan: SlidePlan) -> dict[BlockKey, int]:
    """What is on disk, held against what was recorded: nothing unrecorded may be finished."""
    records = read_ledgers(writer.root / LEDGERS, plan.fingerprint)
    found = {key: writer.checksum(*key) for key in plan.block_keys()}
    changed = [key for key, checksum in found.items() if checksum not in records.get(key, set())]
    if changed:
        level, index = changed[0]
        raise IncompleteOutputError(
            f"{writer.root}: {len(changed)} blocks changed while they were written (level {level}, "
            f"row {index.row}, column {index.col}); run the same command again",
            path=writer.root,
        )
    return found


def _disagreement(store: Path) -> dict[str, float]:
    """How far overlapping tiles differed before blending, in grey levels (M4); all 0 proves no seam."""
    cells = read_label(store, "disagreement")
    return {"largest": int(cells.max()), "mean": round(float(cells.mean()), 4)}


def _keep_profile(slide: Slide, config: ConvertConfig, path: Path) -> None:
    """Pixels without a profile count as sRGB, as every viewer takes them."""
    profile = {"srgb": srgb_profile(), "keep": slide.icc_profile, "ignore": None}[config.input.icc]
    if profile is not None:
        path.write_bytes(profile)
