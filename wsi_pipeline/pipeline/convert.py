"""One slide to one output: plan, make blocks, finish; or continue what an interrupted run left behind.

The OME-Zarr is always the working store. An OME-TIFF is exported from a finished store, because TIFF is
sequential and cannot resume; the store then goes away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.core.pyramid import BlockKey
from wsi_pipeline.errors import (
    ConfigError,
    CorruptRegionError,
    IncompleteOutputError,
    OutputError,
    OutputExistsError,
)
from wsi_pipeline.pipeline.events import Emit, Notice, Planned, Progress, Stage, ignore
from wsi_pipeline.pipeline.executors import run_jobs
from wsi_pipeline.pipeline.planning import Survey, label_mask, survey
from wsi_pipeline.pipeline.qc import write_overlay, write_qc
from wsi_pipeline.pipeline.run import Job
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.icc import srgb_profile
from wsi_pipeline.writers.ledger import merge_ledgers, read_ledgers
from wsi_pipeline.writers.manifest import (
    MANIFEST,
    SYNTHETIC,
    file_digest,
    manifest,
    read_manifest,
    write_manifest,
)
from wsi_pipeline.writers.ometiff import export_ometiff
from wsi_pipeline.writers.omezarr import LEDGERS, OmeZarrWriter, read_label

__all__ = ["ConvertResult", "Inspect", "convert_slide", "export_slide", "output_kind", "sidecar"]

Inspect: TypeAlias = Callable[[Slide, Slide, Survey], Mapping[str, Any]]
"""Measures (source, finished output, survey), e.g. seam figures; goes into the manifest."""

PROFILE = "profile.icc"
"""ICC profile of the output's pixels, inside the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What became of one slide. ``reason`` is set where ``status`` is ``no_tissue``.

    ``blocks`` and ``tiles`` count what this run made, ``resumed`` the blocks found finished.
    """

    slide_id: str
    status: Literal["converted", "no_tissue"]
    path: Path | None
    qc: Path | None
    tissue_mm2: float
    tiles: int
    blocks: int
    resumed: int
    seconds: float
    reason: str | None = None
    figures: Mapping[str, Any] | None = None


def output_kind(out: Path) -> Literal["zarr", "tiff"]:
    """The format that an output's name asks for; raises ConfigError for any other ending."""
    name = out.name.lower()
    if name.endswith(".zarr"):
        return "zarr"
    if name.endswith((".ome.tif", ".ome.tiff")):
        return "tiff"
    raise ConfigError(f"{out}: an output ends in .ome.zarr or .ome.tif; choose such a name")


def sidecar(out: Path, ending: str) -> Path:
    """A file beside the output, named after all of its name: ``a.ome.zarr`` -> ``a.ome.zarr.qc.png``.

    Why all of it: ``a.ome.zarr`` and ``a.ome.tif`` may lie side by side and must not share files.
    """
    return out.with_name(out.name + ending)


def convert_slide(
    slide: Slide,
    out: Path,
    config: ConvertConfig,
    *,
    overwrite: bool = False,
    restart: bool = False,
    inspect: Inspect | None = None,
    emit: Emit = ignore,
) -> ConvertResult:
    """Convert ``slide`` to ``out`` (``.ome.zarr`` or ``.ome.tif``), continuing an interrupted run.

    An existing ``out`` raises OutputExistsError unless ``overwrite``; a partial output of other
    settings raises FingerprintMismatchError unless ``restart``. No error leaves a finished-looking
    output. Without tissue only an overlay picture is written and the result says why.
    """
    started, kind = time.perf_counter(), output_kind(out)
    _refuse_existing(out, overwrite)
    emit(Stage(slide_id=slide.slide_id, stage="plan"))
    if "file says" in slide.mpp_origin:
        emit(Notice(slide_id=slide.slide_id, message=f"pixel size from {slide.mpp_origin}"))
    found = survey(slide, config)
    _make_folder(out)
    if found.is_empty:
        return _nothing(found, out, started, emit)
    store = out if kind == "zarr" else sidecar(out, ".work.ome.zarr")
    made = _make_store(slide, found, store, config, overwrite or kind == "tiff", restart, emit)
    finished = open_slide(store)
    figures = dict(made.figures)
    if inspect is not None:
        emit(Stage(slide_id=slide.slide_id, stage="measure"))
        figures["seams"] = dict(inspect(slide, finished, found))
        write_manifest(store / MANIFEST, read_manifest(store / MANIFEST) | {"run": figures})
    qc = sidecar(out, ".qc.png") if config.output.qc else None
    if qc is not None:
        write_qc(found, slide, finished, store, qc)
    if kind == "tiff":
        export_slide(store, out, config, overwrite=overwrite, emit=emit)
        finished.close()
        shutil.rmtree(store)
    return ConvertResult(
        slide_id=slide.slide_id,
        status="converted",
        path=out,
        qc=qc,
        tissue_mm2=found.tissue.tissue.area_mm2,
        tiles=made.tiles,
        blocks=made.blocks,
        resumed=made.resumed,
        seconds=time.perf_counter() - started,
        figures=figures,
    )


def export_slide(
    store: Path, out: Path, config: ConvertConfig, *, overwrite: bool = False, emit: Emit = ignore
) -> Path:
    """Export a finished output to a hybrid OME-TIFF; levels are copied, never recomputed.

    The manifest goes along as ``NAME.manifest.json`` with the digest of the TIFF. Raises
    IncompleteOutputError where ``store`` is no finished OME-Zarr of this program.
    """
    document = read_manifest(store / MANIFEST)
    if output_kind(out) != "tiff":
        raise ConfigError(f"{out}: an export ends in .ome.tif; choose such a name")
    slide = open_slide(store)
    emit(Stage(slide_id=slide.slide_id, stage="export"))
    _make_folder(out)
    profile = store / PROFILE
    try:
        export_ometiff(
            slide,
            out,
            config.output.tiff,
            icc_profile=profile.read_bytes() if profile.exists() else None,
            progress=lambda done, total: emit(Progress(slide_id=slide.slide_id, done=done, total=total)),
            overwrite=overwrite,
        )
    except CorruptRegionError as error:
        raise IncompleteOutputError(
            f"{store}: is damaged ({error.region}); see `wsi-pipeline verify`, and convert the slide again",
            path=store,
        ) from error
    finally:
        slide.close()
    digest = {"sha256": file_digest(out), "bytes": out.stat().st_size}
    write_manifest(sidecar(out, f".{MANIFEST}"), document | {"tiff": digest})
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    tiles: int
    blocks: int
    resumed: int
    figures: Mapping[str, Any]


def _make_store(
    slide: Slide,
    found: Survey,
    store: Path,
    config: ConvertConfig,
    overwrite: bool,
    restart: bool,
    emit: Emit,
) -> _Made:
    """The finished OME-Zarr at ``store``; only the last rename makes it visible."""
    started, plan = time.perf_counter(), found.plan
    partial = store.with_name(store.name + ".partial")
    with _exclusive(partial, restart):
        writer = OmeZarrWriter(partial, plan.shape, plan.mpp, config.output.zarr)
        made, resumed, tiles = _make_blocks(slide, found, writer, config, emit)
        emit(Stage(slide_id=slide.slide_id, stage="finish"))
        planned = [
            (level, index)
            for level, indices in enumerate(plan.shape.planned(plan.blocks()))
            for index in indices
        ]
        figures = {
            "tiles": plan.tile_count,
            "blocks": len(planned),
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
        merge_ledgers(partial / LEDGERS, plan.fingerprint, {key: writer.checksum(*key) for key in planned})
        _keep_profile(slide, config, partial / PROFILE)
        writer.finalise(
            name=plan.slide_id,
            tissue_HW=label_mask(found.tissue.tissue, plan.grid.size, plan.mpp),
            extra={"notice": SYNTHETIC, "manifest": MANIFEST},
            manifest=manifest(plan, asdict(config), facts, figures),
        )
        _swap_in(partial, store, overwrite)
    return _Made(tiles=tiles, blocks=made, resumed=resumed, figures=figures)


def _make_blocks(
    slide: Slide, found: Survey, writer: OmeZarrWriter, config: ConvertConfig, emit: Emit
) -> tuple[int, int, int]:
    """Commit every block that is missing; returns (made, found finished, tiles generated)."""
    plan, ledgers = found.plan, writer.root / LEDGERS
    done = _still_valid(writer, plan.fingerprint, emit, plan.slide_id)
    planned = plan.shape.planned(plan.blocks())
    total = sum(len(indices) for indices in planned) - len(done)
    emit(Planned(slide_id=plan.slide_id, tiles=plan.tile_count, blocks=total + len(done), resumed=len(done)))
    bands = plan.bands(config.run.workers) if config.run.workers > 1 else (None,)
    jobs = [
        Job(
            slide=slide,
            plan=plan,
            band=band,
            generator=config.generator,
            input=config.input,
            writer=writer,
            ledgers=ledgers,
            name="band" if band is None else f"band-{band[0]}-{band[1]}",
            done=done,
            batch=config.run.batch or plan.generator.batch,
            threads=config.run.threads,
        )
        for band in bands
    ]
    reports = run_jobs(jobs, config.run.workers, total, emit)
    if len(jobs) > 1:
        # Parents whose children belong to several bands are made once all bands are done.
        written = _still_valid(writer, plan.fingerprint, emit, plan.slide_id)
        rest = replace(jobs[0], band=None, name="shared", done=written)
        reports += run_jobs([rest], 1, total, emit)
    return sum(r.blocks for r in reports), len(done), sum(r.tiles for r in reports)


def _disagreement(store: Path) -> dict[str, float]:
    """How far overlapping tiles differed before blending, in grey levels (M4); all 0 proves no seam."""
    cells = read_label(store, "disagreement")
    return {"largest": int(cells.max()), "mean": round(float(cells.mean()), 4)}


def _still_valid(writer: OmeZarrWriter, fingerprint: str, emit: Emit, slide_id: str) -> frozenset[BlockKey]:
    """Blocks whose bytes on disk have a recorded checksum; the others are made again."""
    records = read_ledgers(writer.root / LEDGERS, fingerprint)
    valid = frozenset(key for key, sums in records.items() if writer.checksum(*key) in sums)
    if lost := len(records) - len(valid):
        emit(Notice(slide_id=slide_id, message=f"{lost} blocks differ from the ledger: made again"))
    return valid


def _keep_profile(slide: Slide, config: ConvertConfig, path: Path) -> None:
    """Pixels without a profile count as sRGB, as every viewer takes them."""
    profile = {"srgb": srgb_profile(), "keep": slide.icc_profile, "ignore": None}[config.input.icc]
    if profile is not None:
        path.write_bytes(profile)


@contextmanager
def _exclusive(partial: Path, restart: bool) -> Iterator[None]:
    """Create the partial folder and keep other processes out of it."""
    try:
        if restart:
            shutil.rmtree(partial, ignore_errors=True)
        (partial / LEDGERS).mkdir(parents=True, exist_ok=True)
        lock = (partial / LEDGERS / "lock").open("w")
    except OSError as error:
        raise _cannot_write(partial, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{partial}: another process is writing it; wait for that process or stop it",
                path=partial,
            ) from None
        yield


def _swap_in(partial: Path, store: Path, overwrite: bool) -> None:
    old = store.with_name(store.name + ".old")
    try:
        (partial / LEDGERS / "lock").unlink(missing_ok=True)
        if store.exists():
            _refuse_existing(store, overwrite)
            shutil.rmtree(old, ignore_errors=True)
            os.replace(store, old)
        os.replace(partial, store)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(store, error) from error


def _nothing(found: Survey, out: Path, started: float, emit: Emit) -> ConvertResult:
    overlay = sidecar(out, ".overlay.png")
    write_overlay(found, overlay)
    reason = found.tissue.reason or "no tile touches tissue"
    emit(Notice(slide_id=found.plan.slide_id, message=f"no tissue: {reason}"))
    return ConvertResult(
        slide_id=found.plan.slide_id,
        status="no_tissue",
        path=None,
        qc=overlay,
        tissue_mm2=0.0,
        tiles=0,
        blocks=0,
        resumed=0,
        seconds=time.perf_counter() - started,
        reason=reason,
    )


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out}: exists already; choose another name or use --overwrite", path=out)


def _make_folder(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(out.parent, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror}); check permissions and space", path=path
    )
