"""When a file in a watched folder is complete.

Nobody says so: a scanner writes for minutes, a copy over a network stops and goes on. A file counts as
complete when nothing about it changed for a while, and at least from one look to the next. Besides size and
date that is the time of its last change of any kind and the space that it takes on the disk: some copy
programs give a file its final size and date first and fill it then. Of a slide in several files it is all of
them, of an OME-Zarr folder every file below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from wsi_pipeline.runs.found import Found, every_file, stamp

__all__ = ["Settled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """Since when (seconds) a file has looked as it does; ``given``: stamp under which it was handed out."""

    look: str
    since: float
    given: str | None = None


class Settled:
    """Hands out what is complete, each file once, and once more whenever it is complete after a change.

    ``settle``: seconds for which a file must have stood still. Memory is one entry a file that is there.
    """

    def __init__(self, settle: float) -> None:
        self._settle = settle
        self._seen: dict[str, _Seen] = {}
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Slides of the last look that are not complete yet."""
        return self._waiting

    def update(self, found: Iterable[Found], now: float) -> list[Found]:
        """What became complete since the last look, in the order of ``found``; skipped files among it.

        ``found``: all files that are there now; ``now``: seconds of a clock that never goes back.
        """
        seen: dict[str, _Seen] = {}
        complete: list[Found] = []
        self._waiting = 0
        for file in found:
            before = self._seen.get(file.source)
            after = self._look(file, before, now)
            seen[file.source] = after
            if after.given is None:
                self._waiting += not file.skip
            elif before is None or before.given is None:
                complete.append(file)
        self._seen = seen
        return complete

    def _look(self, file: Found, before: _Seen | None, now: float) -> _Seen:
        current = _marked(file)
        if before is not None and before.given == current:
            return before
        look = _closely(file)
        if before is None or before.look != look or before.given is not None:
            return _Seen(look=look, since=now)
        if now - before.since < self._settle:
            return before
        return _Seen(look=look, since=before.since, given=current)


def _marked(file: Found) -> str:
    return f"{stamp(file.path, file.parts)} {file.skip}"


def _closely(file: Found) -> str:
    """All that changes while a file is written; what vanishes meanwhile is another state as well."""
    looks = [file.skip, file.path, *file.parts]
    count = size = blocks = newest = 0
    try:
        for path in (file.path, *file.parts):
            for each in every_file(path):
                state = os.stat(each)
                count += 1
                size += state.st_size
                blocks += getattr(state, "st_blocks", 0)
                newest = max(newest, state.st_mtime_ns, state.st_ctime_ns)
    except OSError as error:
        looks.append(type(error).__name__)
    return "\n".join((*looks, f"{count} {size} {blocks} {newest}"))
