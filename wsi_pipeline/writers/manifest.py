"""The manifest: where an output came from, and that it is synthetic."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from wsi_pipeline._version import __version__
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.errors import IncompleteOutputError

__all__ = [
    "MANIFEST",
    "SYNTHETIC",
    "environment",
    "file_digest",
    "manifest",
    "read_manifest",
    "sync_folder",
    "write_manifest",
    "write_synced",
]

MANIFEST = "manifest.json"

SYNTHETIC = "synthetic, derived; not for primary diagnosis"

_RECORDED = (
    "numpy",
    "scikit-image",
    "imagecodecs",
    "openslide-bin",
    "tifffile",
    "tensorstore",
    "torch",
    "diffusers",
    "safetensors",
)


def environment() -> dict[str, str]:
    """Versions of everything that touches pixels; asks the packages' metadata, imports nothing."""
    versions = {"wsi_pipeline": __version__, "python": platform.python_version()}
    for package in _RECORDED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def manifest(
    plan: SlidePlan, config: dict[str, Any], facts: dict[str, Any], figures: dict[str, Any]
) -> dict[str, Any]:
    """Provenance of one output as JSON values.

    ``config`` is the resolved configuration and itself a valid ``--config``; ``facts`` are measured on
    the slide (tissue area, stain, reader), ``figures`` on the run (tiles, seconds, seam figures).
    """
    return {
        "notice": SYNTHETIC,
        "slide": {
            "name": plan.slide_id,
            "identity": plan.identity,
            "mpp": list(plan.mpp),
            "mpp_origin": plan.mpp_origin,
            **facts,
        },
        "generator": {
            "kind": plan.generator.kind,
            "digest": plan.generator.digest,
            "exact": plan.generator.exact,
            "mpp": list(plan.generator.mpp) if plan.generator.mpp else None,
            "cell": plan.generator.cell,
            "context": dict(plan.context),
        },
        "fingerprint": plan.fingerprint,
        "plan": {
            "size": [plan.grid.size.height, plan.grid.size.width],
            "block": plan.block,
            "tile": plan.grid.tile,
            "halo": plan.grid.halo,
            "overlap": plan.grid.overlap,
            "background": plan.background,
            "seed": plan.seed,
        },
        "config": config,
        "environment": environment(),
        "run": figures,
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished output; raises IncompleteOutputError where there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
        return document
    except (OSError, ValueError, RecursionError) as error:
        raise IncompleteOutputError(
            f"{path.parent}: has no readable {path.name}; it is no finished output of this program",
            path=path.parent,
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path: Path, document: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    fresh = path.with_name(path.name + ".new")
    write_synced(fresh, json.dumps(document, indent=2))
    fresh.replace(path)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable where the platform can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
