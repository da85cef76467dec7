"""A worker's signs of life, and what it does when they, or its parent's, fail.

Each event of a conversion is a heartbeat. At most once a second it is written down for the parent, the
lease is looked at, the disk is, and the watchdog is wound up again. A process whose slide makes no progress
for too long ends itself: ``faulthandler``'s timer is a thread of C that needs no GIL, so a decoder that hangs
while it holds the GIL does not stop it. To everybody else a hang then looks like any dead worker.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from wsi_pipeline.errors import StoppedError
from wsi_pipeline.pipeline.events import Event, Notice, Planned, Progress, Stage
from wsi_pipeline.runs.folder import RunFolder

__all__ = ["LEASE_SECONDS", "Pulse", "at_work", "hang_told", "read_beat"]

LEASE_SECONDS = 120.0
BEAT_SECONDS = 1.0


class _Watchdog:
    """The timer of this process: it rings for the slide whose time runs out first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[Path, float] = {}
        self._file: IO[str] | None = None

    def wind(self, trace: Path, timeout: float) -> None:
        with self._lock:
            self._due[trace] = time.monotonic() + timeout
            self._set()

    def drop(self, trace: Path) -> None:
        with self._lock:
            self._due.pop(trace, None)
            self._set()

    def _set(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self._due:
            return
        trace = min(self._due, key=self._due.__getitem__)
        self._file = trace.open("w", encoding="utf-8")
        left = max(self._due[trace] - time.monotonic(), 0.001)
        faulthandler.dump_traceback_later(left, exit=True, file=self._file)


_WATCHDOG = _Watchdog()


class Pulse:
    """The heartbeat of one slide in this process. ``warnings``: the notices that it passed on."""

    def __init__(
        self,
        folder: RunFolder,
        key: str,
        session: str,
        *,
        timeout: float | None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._beat = folder.beats / f"{key}.json"
        self._trace = folder.beats / f"{key}.hang"
        self._lease, self._session = folder.lease, session
        self._timeout, self._check = timeout, check
        self._last = 0.0
        self._state = {"stage": "plan", "done": 0, "total": 0}
        self.warnings: list[str] = []
        try:
            self.beat()
        except BaseException:
            self.end()  # or the watchdog would end whoever comes next
            raise

    def emit(self, event: Event) -> None:
        """Take an event of the conversion as a heartbeat."""
        match event:
            case Stage():
                self._state = {"stage": event.stage, "done": 0, "total": 0}
                self._last = 0.0
            case Planned():
                self._state = {"stage": "blocks", "done": 0, "total": event.blocks}
            case Progress():
                self._state |= {"done": event.done, "total": event.total}
            case Notice():
                self.warnings.append(event.message)
        self.beat()

    def beat(self) -> None:
        """Tell that this slide is alive; raises StoppedError where nobody waits for it any more."""
        now = time.monotonic()
        if now - self._last < BEAT_SECONDS:
            return
        self._last = now
        if self._timeout is not None:
            _WATCHDOG.wind(self._trace, self._timeout)
        with contextlib.suppress(OSError):  # a beat that cannot be written is one that is missed
            fresh = self._beat.with_suffix(f".{os.getpid()}.new")
            text = json.dumps(self._state | {"host": socket.gethostname(), "pid": os.getpid()})
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, self._beat)
        self._look_at_lease()
        if self._check is not None:
            self._check()

    def _look_at_lease(self) -> None:
        """Compares two dates of one file system, so that clocks of several machines do not matter."""
        try:
            session = self._lease.read_text(encoding="ascii")
        except FileNotFoundError:
            session = ""
        except OSError:  # a share that stumbles: the next beat looks again
            return
        if session != self._session:
            raise StoppedError("the run was stopped, or another one has taken its place")
        try:
            age = self._beat.stat().st_mtime - self._lease.stat().st_mtime
        except OSError:
            return
        if age > LEASE_SECONDS:
            raise StoppedError(f"the run's parent has given no sign for {age:.0f} s")

    def end(self) -> None:
        if self._timeout is not None:
            _WATCHDOG.drop(self._trace)
        for path in (self._beat, self._trace):
            path.unlink(missing_ok=True)


@contextmanager
def at_work(pulse: Pulse) -> Iterator[Pulse]:
    """Ends the heartbeat, and with it the watchdog, when the work ends."""
    try:
        yield pulse
    finally:
        pulse.end()


def read_beat(folder: RunFolder, key: str) -> dict[str, object] | None:
    """The latest heartbeat of a slide: stage, done, total, host, pid."""
    try:
        values = json.loads((folder.beats / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def hang_told(folder: RunFolder, key: str) -> bool:
    """Whether the watchdog ended the worker of this slide; asking takes the note away."""
    trace = folder.beats / f"{key}.hang"
    try:
        told = trace.stat().st_size > 0
    except OSError:
        return False
    trace.unlink(missing_ok=True)
    return told
