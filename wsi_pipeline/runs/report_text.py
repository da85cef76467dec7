"""Words, numbers and links of a run's report; whatever leaves here is safe inside HTML."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Set
from datetime import datetime
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from wsi_pipeline.runs.records import Record
from wsi_pipeline.runs.summary import reason_of, visible

__all__ = ["Lying", "cause", "clock", "elapsed", "href", "name", "number", "plural", "size", "span", "text"]


def text(words: str) -> str:
    """Any text, for element content and for attributes in double quotes."""
    return html.escape(visible(words))


def name(words: str) -> str:
    """A file's name, its folder told apart, as an element of its own.

    Right-to-left letters in it then do not reorder what stands beside it.
    """
    folder, slash, file = words.rpartition("/")
    return f"<bdi class=name><span class=dir>{text(folder + slash)}</span>{text(file)}</bdi>"


def href(relative: str) -> str:
    """URL of a path below the folder of the page. The leading ``./`` and the encoding leave it no scheme."""
    return "./" + quote(relative.encode("utf-8", "surrogateescape"))


def plural(count: int, one: str, many: str) -> str:
    """``1 slide``, ``2,400 slides``."""
    return f"{count:,} {one if count == 1 else many}"


def number(value: float) -> str:
    """Three significant digits, without an exponent for what occurs here."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes for people, in powers of 1000: ``1.94 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


def elapsed(seconds: float) -> str:
    """Seconds for people: ``4.2 s``, ``12 min 5 s``, ``3 h 20 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def clock(moment: str) -> str:
    """An ISO date and time without seconds; anything else as it is."""
    found = _parsed(moment)
    return f"{found:%Y-%m-%d %H:%M}" if found is not None else moment


def span(started: str, updated: str) -> float | None:
    """Seconds from one ISO date and time to another; None where they are none."""
    first, last = _parsed(started), _parsed(updated)
    if first is None or last is None or (first.tzinfo is None) != (last.tzinfo is None):
        return None
    return max(0.0, (last - first).total_seconds())


def _parsed(moment: str) -> datetime | None:
    try:
        return datetime.fromisoformat(moment)
    except ValueError:
        return None


def cause(record: Record) -> tuple[str, str]:
    """What is wrong and the remedy, from a reason ``FILE: what is wrong; remedy``; "" for no remedy.

    The file's own name goes, so that slides with the same trouble come to stand together.
    """
    reason = _without_name(reason_of(record), record.source)
    depth = 0
    for at in range(len(reason) - 1, 0, -1):
        depth += {")": 1, "(": -1}.get(reason[at], 0)
        if not depth and reason.startswith("; ", at):
            return reason[:at], reason[at + 2 :]
    return reason, ""


def _without_name(reason: str, source: str) -> str:
    file = PurePosixPath(source).name
    stem = re.sub(r"(\.ome)?\.[^.]*$", "", file)
    for own in (source, file, stem):
        head, found, rest = reason.partition(f"{own}: ")
        # Only the end of a path may stand before it.
        if own and found and (not head or (head.endswith("/") and ": " not in head)):
            return rest
    return reason


class Lying:
    """Which files lie in and below a folder, asked of the disk once for each folder in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, Set[str]] = {}

    def has(self, relative: str) -> bool:
        """Whether there is such a file or folder, and it lies below the folder."""
        parent, _, last = relative.rpartition("/")
        if not last or relative.startswith("/") or ".." in relative.split("/") or "\0" in relative:
            return False
        if parent not in self._names:
            self._names[parent] = _names_in(self._folder / parent)
        return last in self._names[parent]


def _names_in(folder: Path) -> Set[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):
        return frozenset()
