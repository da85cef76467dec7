"""The ledger: which blocks have been committed, with the checksum of the bytes on disk.

One append-only file of JSON lines a band: a header with the fingerprint, then one line a block, written
*after* the block's atomic replace. A line that a crash tore off at the end is cut away; a damaged line
anywhere else is an error. A block counts as committed only if its bytes still have a recorded checksum:
existence proves nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsi_pipeline.core.geometry import BlockIndex
from wsi_pipeline.core.pyramid import BlockKey
from wsi_pipeline.errors import FingerprintMismatchError, LedgerCorruptError, OutputError

__all__ = ["Ledger", "merge_ledgers", "read_ledgers"]

Records = dict[BlockKey, set[int]]
"""Every checksum that was recorded for a block; equal plans may compress to unequal bytes."""


class Ledger:
    """Appends to one band's ledger; made by ``Ledger.open``, used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")

    @classmethod
    def open(cls, path: Path, fingerprint: str, environment: Mapping[str, str]) -> Ledger:
        """Continue the ledger at ``path`` or start it; a different fingerprint is refused."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and (whole := _whole_lines(path)):
                _check_header(path, whole[0], fingerprint)
                os.truncate(path, sum(len(line) + 1 for line in whole))
                return cls(path)
            path.write_bytes(b"")
            ledger = cls(path)
            ledger._append({"fingerprint": fingerprint, "environment": dict(environment)})
            return ledger
        except OSError as error:
            raise _unwritable(path, error) from error

    def record(self, key: BlockKey, crc32c: int) -> None:
        """Note that a block is on disk; raises OutputError where the note cannot be kept."""
        level, index = key
        line = {"level": level, "row": index.row, "col": index.col, "crc32c": f"{crc32c:08x}"}
        try:
            self._append(line)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


def read_ledgers(folder: Path, fingerprint: str | None = None) -> Records:
    """All records of all ledgers in a folder; with ``fingerprint`` each must carry it."""
    records: Records = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = _whole_lines(path)
        if not lines:
            continue
        if fingerprint is not None:
            _check_header(path, lines[0], fingerprint)
        for number, line in enumerate(lines[1:], start=2):
            key, checksum = _parse(path, number, line)
            records.setdefault(key, set()).add(checksum)
    return records


def merge_ledgers(folder: Path, fingerprint: str, checksums: Mapping[BlockKey, int]) -> None:
    """Replace all ledgers of a finished output by one, sorted, with one checksum a block."""
    merged = folder / "ledger.jsonl.new"
    with merged.open("wb") as file:
        file.write(json.dumps({"fingerprint": fingerprint}).encode() + b"\n")
        for (level, index), checksum in sorted(checksums.items()):
            line = {"level": level, "row": index.row, "col": index.col, "crc32c": f"{checksum:08x}"}
            file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    finished = merged.replace(folder / "ledger.jsonl")
    for path in folder.glob("*.jsonl"):
        if path != finished:
            path.unlink()


def _whole_lines(path: Path) -> list[bytes]:
    """Lines that end in a newline; what follows the last newline was torn off by a crash."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise OutputError(f"{path}: the ledger cannot be read ({error.strerror})", path=path) from error


def _check_header(path: Path, line: bytes, fingerprint: str) -> None:
    try:
        found = json.loads(line)["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerCorruptError(
            f"{path}: the ledger has no header; delete the partial output to start again", path=path
        ) from error
    if found != fingerprint:
        raise FingerprintMismatchError(
            f"{path.parents[1]}: was begun with another plan, slide or generator "
            f"({found[:12]} there, {fingerprint[:12]} now); use the old settings to continue it, "
            "or --restart to throw it away",
            path=path.parents[1],
        )


def _parse(path: Path, number: int, line: bytes) -> tuple[BlockKey, int]:
    try:
        entry = json.loads(line)
        key = (int(entry["level"]), BlockIndex(int(entry["row"]), int(entry["col"])))
        return key, int(entry["crc32c"], 16)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise LedgerCorruptError(
            f"{path}: line {number} is damaged; delete the partial output to start again", path=path
        ) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: the ledger cannot be written ({error.strerror}); free space or check permissions, "
        "then run the same command again to continue",
        path=path,
    )
