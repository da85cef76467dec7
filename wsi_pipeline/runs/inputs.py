"""What a run over many slides is given: a folder, a table or a pattern, as one list with a row a file.

A folder or pattern gives a row for every file below it, also for those that are no slides, with the reason;
only hidden files and what systems leave behind (``.DS_Store``, ``Thumbs.db``) get none. An OME-Zarr folder is
one row. Nothing is opened but the first bytes of files, and no pipe, device or socket at all.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers._source import is_remote
from wsi_pipeline.runs.companions import is_within
from wsi_pipeline.runs.found import Found, stamp
from wsi_pipeline.runs.judge import Listing, judge, judge_zarr
from wsi_pipeline.runs.kinds import PICTURES, ZARR_MARKERS, ending_of
from wsi_pipeline.runs.names import key_of, output_name, shown
from wsi_pipeline.runs.tables import TABLES, TableRow, read_table
from wsi_pipeline.runs.walk import Walk, file_key, is_zarr_like

__all__ = ["Found", "find_inputs", "is_many", "key_of", "output_name", "stamp"]

Key = tuple[int, int]
_REASONS = 4


def is_many(given: str) -> bool:
    """Whether an input names many slides: a folder that is no OME-Zarr, a table, or a pattern."""
    if is_remote(given):
        return False
    if os.path.isdir(given):
        return not _is_zarr(given)
    if given.lower().endswith(TABLES):
        return True
    return glob.has_magic(given) and not os.path.lexists(given)


def find_inputs(given: str, *, links: bool, exclude: Path | None, may_be_empty: bool = False) -> list[Found]:
    """Every file that ``given`` names, sorted by source (of a table, in its order).

    ``links``: follow symbolic links that leave the input folder; ``exclude``: the run's own output folder,
    which is not looked into; ``may_be_empty``: no slide is no error (of a folder that is watched). Raises
    ConfigError where there is no such input or no slide in it, and for a table with all its problems.
    """
    if os.path.isdir(given):
        rows = _folder(given, links=links, exclude=exclude)
    elif given.lower().endswith(TABLES):
        rows = _table(given, links=links, exclude=exclude)
    elif glob.has_magic(given):
        rows = _pattern(given, links=links, exclude=exclude)
    else:
        raise ConfigError(f"{shown(given)}: no such folder; give a folder, a table (.csv) or a pattern")
    found = _without_doubles(rows)
    if not may_be_empty and all(row.skip for row in found):
        raise ConfigError(_nothing(given, found))
    return found


def _folder(given: str, *, links: bool, exclude: Path | None) -> list[tuple[Found, Key | None]]:
    root = os.path.abspath(given)
    if exclude is not None and os.path.realpath(exclude) == os.path.realpath(root):
        raise ConfigError(f"{shown(given)}: is input and output folder at once; choose another output folder")
    try:
        return Walk(
            root=root,
            links=links,
            exclude=exclude,
            pictures=(),
            matches=lambda parts: True,
            enters=lambda parts: True,
        ).rows()
    except OSError as error:
        raise ConfigError(
            f"{shown(given)}: cannot be listed ({error.strerror}); check permissions"
        ) from error


def _pattern(given: str, *, links: bool, exclude: Path | None) -> list[tuple[Found, Key | None]]:
    """What a pattern matches below the folder before its first wildcard; ``**`` is any depth."""
    parts = [part for part in given.split("/") if part not in ("", ".")]
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = os.path.abspath(("/" if given.startswith("/") else "") + "/".join(parts[:fixed]) or ".")
    pattern = _Pattern.of(parts[fixed:])
    ending = ending_of(parts[-1])
    try:
        return Walk(
            root=base,
            links=links,
            exclude=exclude,
            pictures={ending} & PICTURES,
            matches=pattern.matches,
            enters=pattern.enters,
        ).rows()
    except OSError as error:
        raise ConfigError(
            f"{shown(given)}: {shown(base)} cannot be listed ({error.strerror}); check the pattern"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pattern:
    """A pattern, one expression a folder level; None is ``**``."""

    levels: tuple[re.Pattern[str] | None, ...]

    @classmethod
    def of(cls, parts: Iterable[str]) -> _Pattern:
        return cls(levels=tuple(None if p == "**" else re.compile(fnmatch.translate(p)) for p in parts))

    def matches(self, parts: Sequence[str]) -> bool:
        """Whether the pattern is the whole path's."""
        return _fits(parts, self.levels, prefix=False)

    def enters(self, parts: Sequence[str]) -> bool:
        """Whether the pattern can match something below a folder."""
        return _fits(parts, self.levels, prefix=True)


def _fits(parts: Sequence[str], levels: Sequence[re.Pattern[str] | None], *, prefix: bool) -> bool:
    if not parts:
        return bool(levels) if prefix else all(level is None for level in levels)
    if not levels:
        return False
    if levels[0] is None:
        return _fits(parts, levels[1:], prefix=prefix) or _fits(parts[1:], levels, prefix=prefix)
    return levels[0].match(parts[0]) is not None and _fits(parts[1:], levels[1:], prefix=prefix)


def _table(given: str, *, links: bool, exclude: Path | None) -> list[tuple[Found, Key | None]]:
    """The rows of a table; what it names it means, so links and pictures are taken as slides."""
    rows = read_table(given)
    out = None if exclude is None else os.path.realpath(exclude)
    found: dict[str, Found] = {}
    folders: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.path in found:
            continue
        kind = "missing" if is_remote(row.path) else _kind(row.path)
        found[row.path] = Found(source="", path=row.path)
        if kind == "special":
            found[row.path] = Found(source="", path=row.path, skip="a device, pipe or socket, not a file")
        elif out is not None and kind != "missing" and is_within(os.path.realpath(row.path), out):
            found[row.path] = Found(source="", path=row.path, skip="in the output folder of this run")
        elif kind == "folder" and _is_zarr(row.path):
            found[row.path] = judge_zarr(row.path, "", links=links)
        elif kind == "file":
            folders[os.path.dirname(row.path)].append(os.path.basename(row.path))
    for folder, names in folders.items():
        files = {entry for entry in _names(folder) if os.path.isfile(os.path.join(folder, entry))}
        listing = Listing(path=folder, prefix="", files=files | set(names), wanted=sorted(set(names)))
        found |= {row.path: row for row in judge(listing, links=links, pictures=PICTURES)}
    return _told(rows, found)


def _told(rows: Sequence[TableRow], found: dict[str, Found]) -> list[tuple[Found, Key | None]]:
    """What was found of each row, under the row's own name and with what else the table says."""
    told: list[tuple[Found, Key | None]] = []
    sources: set[str] = set()
    for row in rows:
        source = shown(row.slide)
        while source in sources:
            source += f" ({row.where})"
        sources.add(source)
        slide = replace(found[row.path], source=source, mpp=row.mpp, mask=row.mask, roi=row.roi)
        told.append((slide, None if slide.skip or is_remote(row.path) else file_key(row.path)))
    return told


def _without_doubles(rows: Iterable[tuple[Found, Key | None]]) -> list[Found]:
    """The same file under another name (hard link, two ways through links, a row twice) is skipped."""
    found: list[Found] = []
    first: dict[Key | str, Found] = {}
    for row, key in rows:
        before = None if row.skip else first.setdefault(key or row.path, row)
        if before is not None and before is not row and _is_same(before.path, row.path):
            row = replace(row, skip=f"the same file as {before.source}")
        found.append(row)
    return found


def _is_same(first: str, second: str) -> bool:
    """Whether two paths lead to one file; a file system without inode numbers of its own is not believed."""
    if first == second or os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        a, b = os.stat(first), os.stat(second)
    except OSError:
        return False
    return os.path.samestat(a, b) and a.st_nlink > 1


def _nothing(given: str, found: Sequence[Found]) -> str:
    if not found:
        what = "matches no file" if glob.has_magic(given) and not os.path.isdir(given) else "holds no file"
        return f"{shown(given)}: {what}; check the path (hidden files do not count)"
    reasons = Counter(row.skip for row in found).most_common()
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons[:_REASONS])
    more = f"; and {len(reasons) - _REASONS} other reasons" if len(reasons) > _REASONS else ""
    return f"{shown(given)}: holds no slide to convert, of {len(found)} files: {told}{more}"


def _is_zarr(folder: str) -> bool:
    if is_zarr_like(os.path.basename(os.path.abspath(folder))):
        return True
    return any(os.path.exists(os.path.join(folder, marker)) for marker in ZARR_MARKERS)


def _kind(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "missing"
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "special"


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
