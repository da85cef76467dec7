"""Two slides in; a transform file, its field and a picture out, or a refusal that says what was measured.

Files: ``NAME.json``; ``NAME.field.zarr`` beside it, where there is a field; ``NAME.png``. A refused
registration writes ``NAME.refused.png`` at the most. Nothing in them comes from a file's own metadata but the
pixel size: no label, no texts, only the two names and digests.

Points of another program (VALIS, or landmarks set by hand) come as a CSV with the columns ``fixed_x``,
``fixed_y``, ``moving_x``, ``moving_y``, in level-0 pixels; they pass the same gates, on blocks that they
never saw. VALIS keeps its results in pickles, which are not opened here; its ``warp_xy_from_to`` makes such
points.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.core.stain import F64
from wsi_pipeline.core.tissue import TissueConfig, detect_tissue
from wsi_pipeline.core.transform import SlideTransform, fit_affine
from wsi_pipeline.errors import (
    ConfigError,
    MissingMppError,
    OutputError,
    OutputExistsError,
    RegistrationError,
)
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.readers.warped import PAIR_VERSION
from wsi_pipeline.registration.estimate import Section, make_section
from wsi_pipeline.registration.gate import GATES, measured, refusals, trust_map
from wsi_pipeline.registration.picture import draw_registration
from wsi_pipeline.registration.refine import Fitted, measure, register, smooth_field

__all__ = ["register_slides"]

_STRIP = 256
_COLUMNS = ("fixed_y", "fixed_x", "moving_y", "moving_x")
_MIN_POINTS = 16


def register_slides(
    fixed: str | Path,
    moving: str | Path,
    out: str | Path,
    *,
    mpp: float = 8.0,
    elastic: bool = True,
    picture: bool = True,
    points: str | Path | None = None,
    mpps: tuple[float | None, float | None] = (None, None),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Register two slides and write ``out``; returns its content.

    ``mpp``: working µm per pixel; ``elastic``: a field on top of the affine map, where it helps; ``points``:
    a CSV of another program instead of our own estimate; ``mpps``: pixel sizes that override those of the two
    files. Raises RegistrationError where the result cannot be trusted, SlideError for a file that cannot be
    read, OutputExistsError, OutputError and ConfigError.
    """
    out = Path(out)
    if out.suffix.lower() != ".json":
        raise ConfigError(f"--out {out}: name a .json file")
    if not 1 <= mpp <= 64:
        raise ConfigError(f"--mpp {mpp}: sections are compared at 1 to 64 µm per pixel; give 8 or 16")
    field, drawing, refused = (out.with_suffix(end) for end in (".field.zarr", ".png", ".refused.png"))
    for path in (out, field, drawing):
        if os.path.lexists(path) and not overwrite:
            raise OutputExistsError(f"{path}: exists; choose another --out, or use --overwrite", path=path)
    try:
        slides = [open_slide(path, mpp=own) for path, own in zip((fixed, moving), mpps, strict=True)]
    except MissingMppError as error:
        raise ConfigError(f"{error.args[0].rpartition(';')[0]}; give --fixed-mpp or --moving-mpp") from error
    try:
        sections = (_section(slides[0], mpp), _section(slides[1], mpp))
        fitted = None
        if all(section.tissue_HW.any() for section in sections):
            given = None if points is None else _points(Path(points), slides[0].mpp, slides[1].mpp)
            fitted = (
                register(*sections, elastic=elastic) if given is None else _given(*sections, *given, elastic)
            )
        figures = {} if fitted is None else measured(sections[0], fitted)
        missed = refusals(figures, fitted) if fitted else ["there is no tissue"]
        if picture:
            _write(refused if missed else drawing, draw_registration(*sections, fitted))
        if missed or fitted is None:
            look = f" ({refused})" if picture else ""
            areas = (f"{section.tissue_HW.sum() * mpp**2 * 1e-6:.3g} mm²" for section in sections)
            raise RegistrationError(
                f"{fixed} and {moving}: do not register ({'; '.join(missed)}; tissue {' and '.join(areas)}); "
                f"check that they are sections of one block, neither of them mirrored{look}, try "
                f"--mpp {mpp / 2:g} (small pieces) or {mpp * 2:g} (pale ones), or give points of another "
                "program with --from-valis",
                path=out,
            )
        about = _about(slides[0], slides[1], fitted.transform, figures)
    finally:
        for slide in slides:
            slide.close()
    about["method"] = f"{'blocks' if points is None else 'given points'} at {mpp:g} um"
    about["register"] = {
        "um_per_cell": sections[0].stride * mpp,
        "cells": ["".join(map(str, row)) for row in trust_map(sections[0], fitted).tolist()],
    }
    about["field"] = None if fitted.transform.field_2HW is None else field.name
    for stale in (out, refused):
        stale.unlink(missing_ok=True)  # an old JSON beside a new field would be a lie
    _write(field, fitted.transform.field_2HW)
    _write(out, about)
    return about


def _section(slide: Slide, mpp: float) -> Section:
    view = SlideView(slide, (mpp, mpp), icc="ignore")
    height, width = view.size.height, view.size.width
    strips = [view.read(Region(y, 0, min(_STRIP, height - y), width)) for y in range(0, height, _STRIP)]
    rgb_HWC = np.concatenate(strips)
    return make_section(rgb_HWC, detect_tissue(rgb_HWC, view.mpp, TissueConfig()).tissue.mask_HW, mpp)


def _given(fixed: Section, moving: Section, from_N2: F64, to_N2: F64, elastic: bool) -> Fitted:
    """What points (µm) of another program make, measured on all blocks."""
    transform = SlideTransform(affine_23=fit_affine(from_N2, to_N2))
    transform = smooth_field(from_N2, to_N2, transform, fixed) if elastic else transform
    return measure(fixed, moving, transform, held_out=1.0)


def _points(path: Path, fixed: Mpp, moving: Mpp) -> tuple[F64, F64]:
    """Points of a CSV in µm, (y, x), [N, 2] each."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[float(row[name]) for name in _COLUMNS] for row in csv.DictReader(file)]
        values = np.array(rows, np.float64).reshape(-1, 4)
        spread = np.linalg.svd(values[:, :2] - values[:, :2].mean(axis=0), compute_uv=False)
        if len(values) < _MIN_POINTS or spread[-1] < 1.0:
            raise ValueError(f"{len(values)} points, at least {_MIN_POINTS} that do not lie on a line needed")
    except (OSError, ValueError, KeyError, TypeError, csv.Error, np.linalg.LinAlgError) as error:
        raise ConfigError(
            f"{path}: holds no points ({error}); give a CSV with the columns {', '.join(_COLUMNS)}, "
            "in level-0 pixels"
        ) from error
    return values[:, :2] * fixed, values[:, 2:] * moving


def _about(
    fixed: Slide, moving: Slide, transform: SlideTransform, figures: Mapping[str, float]
) -> dict[str, Any]:
    """What ``pair.json`` says of two slides and their transform."""
    names = {"median": "median_um", "p90": "p90_um", "n": "tested"}
    size = fixed.levels[0].size
    return {
        "version": PAIR_VERSION,
        "from": fixed.slide_id,
        "to": moving.slide_id,
        "units": "micrometer",
        "axes": "yx",
        "affine": transform.affine_23.tolist(),
        "field_um_per_px": transform.field_um_per_px,
        "landmark_error_um": {name: figures[key] for name, key in names.items()},
        "from_identity": fixed.identity,
        "from_size": [size.height, size.width],
        "from_mpp": list(fixed.mpp),
        "to_identity": moving.identity,
        "to_mpp": list(moving.mpp),
        "figures": dict(figures),
        "gates": dict(GATES),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write(path: Path, content: dict[str, Any] | npt.NDArray[Any] | None) -> None:
    """A JSON file, a picture, or a field (None: none shall be there), under its name at once."""
    import zarr

    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        if isinstance(content, dict):
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        elif path.suffix == ".png":
            fresh.write_bytes(cv2.imencode(".png", np.asarray(content)[..., ::-1])[1].tobytes())
        else:
            shutil.rmtree(path, ignore_errors=True)
            if content is None:
                return
            zarr.save_array(fresh, content)
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})", path=path) from error
