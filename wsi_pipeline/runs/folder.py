"""Where a run keeps what: results for people at the top, its own affairs in ``.wsi_run``.

report.html  summary.csv  run.json  <outputs, in the folders of their sources>
.wsi_run/slides/KEY.json     one record a file found
.wsi_run/pictures/KEY.*.jpg  thumbnails of the report
.wsi_run/work/KEY-DIGEST/    outputs in the making: nothing half-done has a final name
.wsi_run/beats/KEY.json      the latest sign of life of a worker
.wsi_run/lease               touched by the living parent; workers stop without it
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import ConfigError, OutputError
from wsi_pipeline.pipeline.outputs import mapped
from wsi_pipeline.writers.manifest import write_manifest

__all__ = ["HIDDEN", "RunFolder"]

HIDDEN = ".wsi_run"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of a run; ``root`` is a local folder, also where the outputs go to a URL."""

    root: Path

    @property
    def hidden(self) -> Path:
        return self.root / HIDDEN

    @property
    def records(self) -> Path:
        return self.hidden / "slides"

    @property
    def pictures(self) -> Path:
        return self.hidden / "pictures"

    @property
    def work(self) -> Path:
        return self.hidden / "work"

    @property
    def beats(self) -> Path:
        return self.hidden / "beats"

    @property
    def lease(self) -> Path:
        return self.hidden / "lease"

    @property
    def document(self) -> Path:
        return self.root / "run.json"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Make the folders and keep a second run out; OutputError where one is at work."""
        with mapped(self.root):
            for folder in (self.records, self.pictures, self.work, self.beats):
                folder.mkdir(parents=True, exist_ok=True)
            lock = (self.hidden / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"{self.root}: another run is at work there; wait for it or stop it", path=self.root
                ) from None
            yield

    def read_document(self) -> dict[str, Any] | None:
        """``run.json`` of an earlier run, None where there was none."""
        try:
            document = json.loads(self.document.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.document}: cannot be read ({error}); move it away to begin a new run",
                path=self.document,
            ) from error
        if not isinstance(document, dict) or not isinstance(document.get("decides"), dict):
            raise ConfigError(f"{self.document}: is no run of this program; choose another folder")
        return document

    def write_document(self, document: Mapping[str, Any]) -> None:
        with mapped(self.document):
            write_manifest(self.document, dict(document))

    def drop_work(self, key: str) -> None:
        """Remove the work on a slide, that of earlier settings too."""
        for path in self.work.glob(f"{glob.escape(key)}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def touch_lease(self, session: str) -> None:
        """Tell the workers that this run's parent lives; needs no space on the disk after the first time."""
        with mapped(self.lease):
            with suppress(OSError):
                if self.lease.read_text(encoding="ascii") == session:
                    os.utime(self.lease)
                    return
            fresh = self.lease.with_suffix(".new")
            fresh.write_text(session, encoding="ascii")
            os.replace(fresh, self.lease)
