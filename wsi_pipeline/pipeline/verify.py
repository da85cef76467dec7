"""Is a finished output still what was written? Every block is hashed again and held against the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.core.geometry import BlockIndex, Size
from wsi_pipeline.core.pyramid import BlockKey, PyramidShape
from wsi_pipeline.errors import ConfigError, IncompleteOutputError
from wsi_pipeline.pipeline.convert import sidecar
from wsi_pipeline.pipeline.events import Emit, Progress, ignore
from wsi_pipeline.writers.ledger import read_ledgers
from wsi_pipeline.writers.manifest import MANIFEST, file_digest, read_manifest
from wsi_pipeline.writers.omezarr import LEDGERS, OmeZarrConfig, OmeZarrWriter

__all__ = ["VerifyResult", "verify_output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """``damaged`` are the (level, index) of blocks whose bytes differ from the ledger."""

    path: Path
    blocks: int
    damaged: tuple[BlockKey, ...]

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify_output(path: Path, emit: Emit = ignore) -> VerifyResult:
    """Hash a finished ``.ome.zarr`` or ``.ome.tif`` again and compare it with what was recorded.

    Raises IncompleteOutputError where there is nothing to compare with.
    """
    return _verify_tiff(path) if path.is_file() else _verify_store(path, emit)


def _verify_store(path: Path, emit: Emit) -> VerifyResult:
    document = read_manifest(path / MANIFEST)
    try:
        plan = document["plan"]
        shape = PyramidShape(Size(*plan["size"]), plan["block"])
        config = OmeZarrConfig(**document["config"]["output"]["zarr"])
        name, fingerprint = document["slide"]["name"], document["fingerprint"]
    except (KeyError, TypeError, ConfigError) as error:
        raise IncompleteOutputError(
            f"{path}: its {MANIFEST} lacks the plan ({error}); it cannot be verified", path=path
        ) from error
    writer = OmeZarrWriter(path, shape, (1.0, 1.0), config)
    records = read_ledgers(path / LEDGERS, fingerprint)
    if not records:
        raise IncompleteOutputError(f"{path}: has no ledger; it cannot be verified", path=path)
    damaged = []
    for count, (key, checksums) in enumerate(sorted(records.items()), start=1):
        if writer.checksum(*key) not in checksums:
            damaged.append(key)
        emit(Progress(slide_id=name, done=count, total=len(records)))
    return VerifyResult(path=path, blocks=len(records), damaged=tuple(damaged))


def _verify_tiff(path: Path) -> VerifyResult:
    recorded = read_manifest(sidecar(path, f".{MANIFEST}")).get("tiff", {}).get("sha256")
    if recorded is None:
        raise IncompleteOutputError(f"{path}: has no recorded digest; it cannot be verified", path=path)
    damaged = () if file_digest(path) == recorded else ((0, BlockIndex(0, 0)),)
    return VerifyResult(path=path, blocks=1, damaged=damaged)
