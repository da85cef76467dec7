"""One slide to one output: plan, make blocks, finish; or continue what an interrupted run left behind.

The OME-Zarr is always the working store. An OME-TIFF is exported from a finished store, because TIFF is
sequential and cannot resume; the store then goes away.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.errors import ConfigError, IncompleteOutputError, OutputError
from wsi_pipeline.pipeline.events import Emit, Notice, Progress, Stage, ignore
from wsi_pipeline.pipeline.outputs import check_target, mapped, output_kind, sidecar
from wsi_pipeline.pipeline.planning import Survey, survey
from wsi_pipeline.pipeline.qc import write_overlay, write_qc
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.pipeline.store import PROFILE, finished_before, make_store
from wsi_pipeline.pipeline.verify import verify_output
from wsi_pipeline.readers import open_slide
from wsi_pipeline.writers.manifest import MANIFEST, file_digest, read_manifest, write_manifest
from wsi_pipeline.writers.ometiff import export_ometiff

__all__ = ["ConvertResult", "Inspect", "convert_slide", "export_slide"]

Inspect: TypeAlias = Callable[[Slide, Slide, Survey], Mapping[str, Any] | None]
"""Looks at (source, finished output, survey); seam figures that it returns go into the manifest."""


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


def convert_slide(
    slide: Slide,
    out: Path,
    config: ConvertConfig,
    *,
    overwrite: bool = False,
    restart: bool = False,
    shared: bool = False,
    inspect: Inspect | None = None,
    emit: Emit = ignore,
) -> ConvertResult:
    """Convert ``slide`` to ``out`` (``.ome.zarr`` or ``.ome.tif``), continuing an interrupted run.

    An existing ``out`` raises OutputExistsError unless ``overwrite``; a partial output of other
    settings raises FingerprintMismatchError unless ``restart``. No error leaves a finished-looking
    output. Without tissue only an overlay picture is written and the result says why. ``shared``: several
    attempts at this conversion may be under way; what one of them finished is taken as it is.
    """
    started, kind = time.perf_counter(), output_kind(out)
    if not shared:
        check_target(out, overwrite, slide)
    emit(Stage(slide_id=slide.slide_id, stage="plan"))
    if "file says" in slide.mpp_origin:
        emit(Notice(slide_id=slide.slide_id, message=f"pixel size from {slide.mpp_origin}"))
    found = survey(slide, config)
    for message in found.plan.context.get("notices", ()):
        emit(Notice(slide_id=slide.slide_id, message=message))
    with mapped(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    if found.is_empty:
        return _nothing(found, out, started, emit)
    store = out if kind == "zarr" else sidecar(out, ".work.ome.zarr")
    ours = shared or kind == "tiff"
    made = finished_before(store, found) if ours else None
    if made is None:
        replaceable = overwrite or ours
        made = make_store(
            slide, found, store, config, overwrite=replaceable, restart=restart, emit=emit, shared=shared
        )
    finished = open_slide(store)
    figures = dict(made.figures)
    if inspect is not None:
        emit(Stage(slide_id=slide.slide_id, stage="measure"))
        if (seams := inspect(slide, finished, found)) is not None:
            figures["seams"] = _judged(dict(seams), figures["disagreement"])
            write_manifest(store / MANIFEST, read_manifest(store / MANIFEST) | {"run": figures})
    qc = _picture(found, slide, finished, store, sidecar(out, ".qc.png"), config, emit)
    finished.close()
    if kind == "tiff":
        export_slide(store, out, config, overwrite=overwrite or shared, emit=emit)
        shutil.rmtree(store, ignore_errors=True)
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

    The manifest goes along as ``OUT.manifest.json`` with the digest of the TIFF. Raises
    IncompleteOutputError where ``store`` is no finished OME-Zarr of this program, or is damaged.
    """
    if output_kind(out) != "tiff":
        raise ConfigError(f"{out}: an export ends in .ome.tif; choose such a name")
    check_target(out, overwrite)
    document = read_manifest(store / MANIFEST)
    state = verify_output(store)
    if not state.ok:
        raise IncompleteOutputError(
            f"{store}: is damaged ({', '.join(state.damaged[:3])}); convert the slide again", path=store
        )
    slide = open_slide(store)
    emit(Stage(slide_id=slide.slide_id, stage="export"))
    profile, fresh = store / PROFILE, sidecar(out, ".export")
    with mapped(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        export_ometiff(
            slide,
            fresh,
            config.output.tiff,
            icc_profile=profile.read_bytes() if profile.exists() else None,
            progress=lambda done, total: emit(Progress(slide_id=slide.slide_id, done=done, total=total)),
            overwrite=True,
        )
        slide.close()
        # The manifest first: a TIFF that is visible under its name can be verified.
        digest = {"sha256": file_digest(fresh), "bytes": fresh.stat().st_size}
        write_manifest(sidecar(out, f".{MANIFEST}"), document | {"tiff": digest})
        fresh.replace(out)
    return out


def _judged(seams: dict[str, Any], disagreement: Mapping[str, float]) -> dict[str, Any]:
    """The overall verdict, where a stronger proof than sampled gradients exists.

    If overlapping tiles agree at every sample of the slide, and no shifted grid changes a pixel, then the
    grid left no trace: what M1, M2 or M5 see is texture of the slide that happens to keep step with it.
    """
    shifted = seams.get("grid_shift", {}).get("largest")
    if disagreement["largest"] == 0 and shifted == 0 and seams["roi_equality"]["pass"]:
        reason = "all tiles agree and shifted grids change no pixel: no trace of the grid is possible"
        return seams | {"pass": True, "reason": reason}
    return seams


def _picture(
    found: Survey,
    slide: Slide,
    finished: Slide,
    store: Path,
    path: Path,
    config: ConvertConfig,
    emit: Emit,
) -> Path | None:
    """The QC picture, if it is wanted; a conversion does not fail for want of it."""
    if not config.output.qc:
        return None
    try:
        write_qc(found, slide, finished, store, path)
    except OutputError as error:
        emit(Notice(slide_id=found.plan.slide_id, message=f"no QC picture: {error}"))
        return None
    return path


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
