"""Shared by the tests of runs over many slides: small slides, settings, and what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wsi_pipeline.config import load_run_config
from wsi_pipeline.core.geometry import Size
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.runs.records import Record, Records
from wsi_pipeline.runs.run import RunResult, convert_many
from wsi_pipeline.writers.ometiff import TiffConfig, export_ometiff

EVIL = "input.reader=evil_reader:EvilSlide"


def make_slide(path: Path, seed: int = 0, *, side: int = 1500, tissue: float = 0.35) -> Path:
    """A small synthetic slide as an OME-TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slide = SyntheticSlide(size=Size(side, side - 100), tissue_share=tissue, seed=seed)
    export_ometiff(slide, path, TiffConfig())
    return path


def run(given: Path | str, out: Path | str, *settings: str, **more: Any) -> RunResult:
    """A run in this process, or where ``directory.executor`` says; blocks of 1024 pixels."""
    named = {"directory.executor": "inline", "output.zarr.block": 1024, "generator.name": "identity"}
    return convert_many(str(given), str(out), load_run_config(None, settings, named), **more)


def records(out: Path) -> dict[str, Record]:
    """The records of a run by source."""
    return {record.source: record for record in Records(out / ".wsi_run" / "slides")}


def contents(out: Path) -> dict[str, str]:
    """Digest of each finished output by source."""
    return {name: r.result.content for name, r in records(out).items() if r.status == "done" and r.result}


def document(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))
