"""What a run knows about each file it found: one record a file, kept as one JSON file in the run's folder.

Only the run's parent writes records; workers report results. A record is replaced in one step, so a killed
run leaves the last whole one. Nothing in a record comes from the vendor's free text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from wsi_pipeline.errors import OutputError
from wsi_pipeline.pipeline.outputs import mapped

__all__ = ["Record", "Records", "SlideResult", "Status"]

Status: TypeAlias = Literal["queued", "running", "done", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideResult:
    """What a worker reports about a slide that it finished, or that holds no tissue; JSON values only.

    ``mpp``: (y, x) µm per pixel of the output, ``mpp_origin`` where the slide's came from; ``resumed``:
    blocks that an earlier attempt had committed; ``seconds``: wall time of the last attempt;
    ``size_bytes``: of the output; ``content``: SHA-256 over the names and bytes of all its files except
    manifest and ledger (of the TIFF itself); ``disagreement``: {largest, mean} grey levels; ``seams``: as in
    the manifest, None where not measured; ``no_tissue``: why there is no output, "" where there is one.
    """

    slide_id: str
    identity: str
    fingerprint: str
    reader: str
    stain: str
    mpp: tuple[float, float]
    mpp_origin: str
    tissue_mm2: float
    tiles: int
    blocks: int
    resumed: int
    seconds: float
    size_bytes: int = 0
    content: str = ""
    disagreement: Mapping[str, float] | None = None
    seams: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    no_tissue: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SlideResult:
        """What ``json`` made of ``asdict``; raises TypeError or KeyError for anything else."""
        lists = {"mpp": tuple(values["mpp"]), "warnings": tuple(values["warnings"])}
        return cls(**{**values, **lists})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One file that a run found.

    ``key``: names this file's records, pictures and work, safe as a file name; ``source``: as found, relative
    to the input folder, or as the table has it; ``stamp``: size and date of the source when it was taken
    (queued); ``output``: relative to the run's target, "" for what is no slide; ``reason``: why it failed or
    was skipped, or why it waits again; ``attempts``: how often a worker took it in the last run.
    """

    key: str
    source: str
    status: Status
    reason: str = ""
    stamp: str = ""
    output: str = ""
    attempts: int = 0
    result: SlideResult | None = None


class Records:
    """The records of a run, in memory and as ``FOLDER/KEY.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[str, Record] = {}
        with mapped(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.json")):
                record = _read(path)
                self._records[record.key] = record

    def __iter__(self) -> Iterator[Record]:
        """All records, in the order of their sources."""
        return iter(sorted(self._records.values(), key=lambda record: record.source))

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def put(self, record: Record) -> None:
        """Keep a record, replacing the earlier one; raises OutputError where it cannot be written."""
        path = self._folder / f"{record.key}.json"
        with mapped(path):
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(asdict(record), indent=1, default=str) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        self._records[record.key] = record

    def drop(self, key: str) -> None:
        """Forget a record, e.g. of a file that is no longer there and never was converted."""
        self._records.pop(key, None)
        (self._folder / f"{key}.json").unlink(missing_ok=True)


def _read(path: Path) -> Record:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        result = values.pop("result")
        return Record(**values, result=None if result is None else SlideResult.from_json(result))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"{path}: is no record of a run ({error}); delete it, and its slide is looked at anew", path=path
        ) from error
