"""What a run finds: one value a file, and the stamp by which a change of the file is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.readers._source import is_remote
from wsi_pipeline.runs.companions import parts_of
from wsi_pipeline.runs.kinds import ZARR_MARKERS

__all__ = ["Found", "every_file", "stamp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One file (or OME-Zarr folder, or row of a table) that a run's input names.

    ``source``: path below the input folder, or as the table has it, as one line of text; unique in a list;
    ``path``: absolute local path or URL, to be opened; ``skip``: why it is no slide to convert, one line with
    the remedy where there is one, "" = convert it; ``unknown``: it is skipped because its kind is not known;
    ``parts``: absolute paths of the other files, or of their folder, of a slide in several files;
    ``mpp``, ``mask``, ``roi``: of a table, (y, x) µm per pixel and as in ``input.mask``, ``input.roi``.
    """

    source: str
    path: str
    skip: str = ""
    unknown: bool = False
    parts: tuple[str, ...] = ()
    mpp: Mpp | None = None
    mask: str | None = None
    roi: str | None = None


def stamp(path: str, parts: Iterable[str] | None = None) -> str:
    """Size and date of a slide, ``"SIZE-NANOSECONDS"``; "" for a URL and for what is not there.

    Of an OME-Zarr folder it is that of the metadata at its root. Of a slide in several files it is the total
    size and the newest date; ``parts`` as in ``Found`` (None: they are looked up; of a DICOM series that
    means reading the head of every file in the folder).
    """
    if is_remote(path):
        return ""
    try:
        if os.path.isdir(path):
            files: list[str] = sorted(os.path.join(path, marker) for marker in ZARR_MARKERS)
            files = [file for file in files if os.path.exists(file)]
        else:
            others = parts_of(path) if parts is None else parts
            files = [path, *(file for part in others for file in every_file(part))]
        states = [os.stat(file) for file in files]
    except OSError:
        return ""
    if not states:
        return ""
    return f"{sum(s.st_size for s in states)}-{max(s.st_mtime_ns for s in states)}"


def every_file(path: str) -> Iterator[str]:
    """The file itself, or all files below a folder; links to folders are not followed. Raises OSError."""
    if not os.path.isdir(path):
        yield path
        return
    pending = [path]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file():
                    yield entry.path
