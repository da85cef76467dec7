"""What a run writes down about itself: ``run.json``, and the report with its summary."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from wsi_pipeline._version import __version__
from wsi_pipeline.errors import FingerprintMismatchError
from wsi_pipeline.runs.budgets import DiskBudget
from wsi_pipeline.runs.folder import RunFolder
from wsi_pipeline.runs.records import Records
from wsi_pipeline.runs.report import write_report
from wsi_pipeline.runs.run_facts import RunFacts
from wsi_pipeline.runs.settings import RunConfig
from wsi_pipeline.runs.sizes import parse_size, show_size
from wsi_pipeline.runs.staff import Staff
from wsi_pipeline.writers.manifest import environment

__all__ = ["Journal", "deciding"]

REPORT_SECONDS = 30.0


class Journal:
    """The papers of one run, brought up to date while it works."""

    def __init__(self, folder: RunFolder, document: dict[str, Any], config: RunConfig) -> None:
        self._folder, self._document, self._config = folder, document, config
        self._staff: Staff | None = None
        self._disk: DiskBudget | None = None
        self._peak = 0
        self._written = -REPORT_SECONDS

    @classmethod
    def begin(cls, folder: RunFolder, given: str, target: str, config: RunConfig) -> Journal:
        """Write ``run.json``; FingerprintMismatchError where the folder has records of another run: one over
        another input or with other settings."""
        decides = deciding(config)
        digest = hashlib.sha256(str(Path(given).absolute()).encode(errors="replace")).hexdigest()[:16]
        before = folder.read_document()
        if before is not None and any(folder.records.iterdir()):
            if before["decides"] != decides:
                changed = ", ".join(sorted(_differing(before["decides"], decides)))
                raise _other(folder, f"with other settings was begun there ({changed}); use its settings")
            if before.get("input_digest", digest) != digest:
                given_then = before.get("input")
                raise _other(folder, f"over another input ({given_then}) was begun there; use that input")
        now = datetime.now().isoformat(timespec="seconds")
        document = {
            "notice": "a run of wsi-pipeline over many slides; outputs are synthetic, not for diagnosis",
            "input": Path(given).name,
            "input_digest": digest,
            "target": Path(target).name,
            "started": before["started"] if before else now,
            "resumed": now if before else None,
            "state": "running",
            "why": "",
            "decides": decides,
            "config": asdict(config),
            "environment": environment(),
        }
        folder.write_document(document)
        return cls(folder, document, config)

    def staff(self, staff: Staff, disk: DiskBudget) -> None:
        """Note who works, and the budgets."""
        self._staff, self._disk = staff, disk

    def keep_up(self, records: Records) -> None:
        """Measure, and write the report again where it is old."""
        if self._staff is not None:
            self._peak = max(self._peak, self._staff.resident())
        if time.monotonic() - self._written >= REPORT_SECONDS:
            self._report(records, "running", "")

    def end(self, records: Records, why: str) -> None:
        """The last entries; ``why`` the run stopped early, "" where it did not."""
        state = "stopped" if why else "finished"
        self._document |= {
            "state": state,
            "why": why,
            "ended": datetime.now().isoformat(timespec="seconds"),
            "counts": dict(Counter(record.status for record in records)),
            "peak_ram_bytes": self._peak,
        }
        self._folder.write_document(self._document)
        self._report(records, state, why)

    def _report(self, records: Records, state: Any, why: str) -> None:
        self._written = time.monotonic()
        staff, budgets = self._staff, {}
        wishes = self._config.directory
        if wishes.max_ram:
            promised = show_size(parse_size(wishes.max_ram, "directory.max_ram"))
            budgets["memory"] = f"promised {promised}, peak {show_size(self._peak)}"
        if wishes.max_disk and self._disk is not None:
            promised = show_size(parse_size(wishes.max_disk, "directory.max_disk"))
            budgets["disk"] = f"promised {promised}, used {show_size(self._disk.used)}"
        if wishes.deadline:
            budgets["deadline"] = f"{wishes.deadline}, {'reached' if why == 'deadline' else 'kept'}"
        facts = RunFacts(
            title=self._document["input"],
            started=self._document["resumed"] or self._document["started"],
            updated=datetime.now().isoformat(timespec="seconds"),
            state=state,
            why=why,
            generator=self._config.generator.name,
            executor=staff.workers.name if staff else "",
            workers=staff.workers.count if staff else 0,
            version=__version__,
            peak_ram_bytes=self._peak,
            disk_bytes=sum(record.result.size_bytes for record in records if record.result),
            budgets=budgets,
            notices=staff.notices if staff else (),
        )
        write_report(self._folder.root, records, facts)


def _other(folder: RunFolder, what: str) -> FingerprintMismatchError:
    return FingerprintMismatchError(
        f"{folder.root}: a run {what}, another folder, or --restart to forget it (outputs stay)",
        path=folder.root,
    )


def deciding(config: RunConfig) -> dict[str, Any]:
    """The settings that decide bytes of outputs, or their names."""
    conversion = asdict(config.conversion)
    del conversion["run"]
    conversion["generator"]["options"] = {
        name: value for name, value in conversion["generator"]["options"].items() if name not in _MACHINE
    }
    decides: dict[str, Any] = _plain(conversion | {"format": config.directory.format})
    return decides


_MACHINE = ("device", "max_vram", "batch")


def _plain(values: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    if isinstance(values, dict):
        return {str(key): _plain(value) for key, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


def _differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(set(one) | set(other)):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names
