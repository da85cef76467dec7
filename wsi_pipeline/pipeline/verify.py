"""Is a finished output still what was written? Every block is hashed again and held against the ledger."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.core.geometry import Size
from wsi_pipeline.core.pyramid import PyramidShape
from wsi_pipeline.errors import ConfigError, IncompleteOutputError
from wsi_pipeline.pipeline.events import Emit, Progress, ignore
from wsi_pipeline.pipeline.outputs import sidecar
from wsi_pipeline.writers.ledger import read_ledgers
from wsi_pipeline.writers.manifest import MANIFEST, file_digest, read_manifest, write_synced
from wsi_pipeline.writers.omezarr import LEDGERS, OmeZarrConfig, OmeZarrWriter

__all__ = ["VerifyResult", "record_files", "verify_output"]

FILES = "files.json"
"""Digests of what is no block: metadata, labels, the profile. In the folder of the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """``damaged`` names the blocks and files whose bytes differ from what was recorded."""

    path: Path
    blocks: int
    damaged: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify_output(path: Path, emit: Emit = ignore) -> VerifyResult:
    """Hash a finished ``.ome.zarr`` or ``.ome.tif`` again and compare it with what was recorded.

    Raises IncompleteOutputError where there is nothing to compare with.
    """
    return _verify_tiff(path) if path.is_file() else _verify_store(path, emit)


def record_files(root: Path) -> None:
    """Record the digests of all files of a store that no ledger line covers."""
    digests = {str(path.relative_to(root)): file_digest(path) for path in _other_files(root)}
    write_synced(root / LEDGERS / FILES, json.dumps(digests, indent=1, sort_keys=True))


def _other_files(root: Path) -> list[Path]:
    """Metadata, labels and profile; not the blocks, the ledger, or the manifest, which gains figures."""

    def is_other(path: Path) -> bool:
        parts = path.relative_to(root).parts
        is_block = parts[0].isdigit() and not path.name.startswith((".z", "zarr.json"))
        return not is_block and parts[0] not in (LEDGERS, MANIFEST)

    return sorted(path for path in root.rglob("*") if path.is_file() and is_other(path))


def _verify_store(path: Path, emit: Emit) -> VerifyResult:
    document = read_manifest(path / MANIFEST)
    try:
        plan = document["plan"]
        shape = PyramidShape(Size(*plan["size"]), plan["block"])
        config = OmeZarrConfig(**document["config"]["output"]["zarr"])
        name, fingerprint = document["slide"]["name"], document["fingerprint"]
        expected = document["run"]["blocks"]
        files = read_manifest(path / LEDGERS / FILES)
    except (KeyError, TypeError, ConfigError) as error:
        raise IncompleteOutputError(
            f"{path}: its {MANIFEST} lacks the plan ({error}); it cannot be verified", path=path
        ) from error
    writer = OmeZarrWriter(path, shape, (1.0, 1.0), config)
    records = read_ledgers(path / LEDGERS, fingerprint)
    if len(records) != expected:
        raise IncompleteOutputError(
            f"{path}: its ledger has {len(records)} of {expected} blocks; it cannot be trusted", path=path
        )
    damaged = []
    for count, ((level, index), checksums) in enumerate(sorted(records.items()), start=1):
        if writer.checksum(level, index) not in checksums:
            damaged.append(f"level {level} block ({index.row}, {index.col})")
        emit(Progress(slide_id=name, done=count, total=len(records)))
    damaged += [file for file, digest in files.items() if not _is_intact(path / file, digest)]
    return VerifyResult(path=path, blocks=len(records), damaged=tuple(damaged))


def _is_intact(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _verify_tiff(path: Path) -> VerifyResult:
    recorded = read_manifest(sidecar(path, f".{MANIFEST}")).get("tiff", {}).get("sha256")
    if recorded is None:
        raise IncompleteOutputError(f"{path}: has no recorded digest; it cannot be verified", path=path)
    damaged = () if file_digest(path) == recorded else (path.name,)
    return VerifyResult(path=path, blocks=1, damaged=damaged)
