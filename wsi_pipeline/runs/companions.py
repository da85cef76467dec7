"""Slides that are several files: which files belong to which slide, and whether they may be read.

MIRAX keeps its pixels in a folder beside the ``.mrxs``, Hamamatsu VMS and VMU in files that an index names,
DICOM in one file a resolution. Such an index is text from outside, so a name in it that leaves the folder
is refused, as is a link that does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from wsi_pipeline.runs.dicom import WHOLE_SLIDE, read_instance
from wsi_pipeline.runs.kinds import DICOMS, ending_of, head_of
from wsi_pipeline.runs.names import shown

__all__ = ["FOLLOW", "INDEXES", "SLIDEDAT", "indexed_parts", "is_within", "owner_of", "parts_of", "trouble"]

SLIDEDAT = "Slidedat.ini"
INDEXES = frozenset({".vms", ".vmu"})
FOLLOW = "copy what it points to, or follow links with --set directory.links=true"

_LARGEST_INDEX = 1 << 20
_VMS_PART = re.compile(r"(?im)^[ \t]*(?:ImageFile[^=\n]*|MapFile|OptimisationFile|MacroImage)=(.*)$")
_MIRAX_PART = re.compile(r"(?im)^[ \t]*(?:FILE_\d+|INDEXFILE)[ \t]*=(.*)$")


def is_within(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies below it; both without links and dots."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def owner_of(folder: str, siblings: Iterable[str]) -> str:
    """The slide whose data folder this is, by the files and folders beside it; "" where there is none.

    ``folder`` is a name. MIRAX ``a.mrxs`` has ``a``, Olympus ``a.vsi`` has ``_a_``, Deep Zoom ``a.dzi`` has
    ``a_files``.
    """
    siblings = siblings if isinstance(siblings, set | frozenset) else set(siblings)
    candidates = [folder + ".mrxs", folder + ".MRXS"]
    if folder.startswith("_") and folder.endswith("_"):
        candidates += [folder[1:-1] + ".vsi"]
    if folder.endswith("_files"):
        candidates += [folder.removesuffix("_files") + ".dzi"]
    return next((name for name in candidates if name in siblings), "")


def indexed_parts(path: str) -> list[str]:
    """Names of the files that a VMS or VMU index lists, as they stand there."""
    return [os.fsdecode(name.encode("latin-1")) for name in _names(_VMS_PART, path)]


def parts_of(path: str) -> tuple[str, ...]:
    """Absolute paths of a local slide's other files that exist, of MIRAX of its folder; see ``Found``."""
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    ending = ending_of(name)
    if ending == ".mrxs":
        data = os.path.splitext(path)[0]
        return (data,) if os.path.isdir(data) else ()
    if ending in INDEXES:
        named = {os.path.join(folder, part) for part in indexed_parts(path) if _is_plain(part)}
        return tuple(sorted(part for part in named if os.path.isfile(part)))
    instance = read_instance(path) if ending in DICOMS else None
    if instance is None or not instance.series or instance.sop_class != WHOLE_SLIDE:
        return ()
    others = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name != name and ending_of(entry.name) in DICOMS and entry.is_file():
                other = read_instance(entry.path)
                if other is not None and other.series == instance.series:
                    others.append(entry.path)
    return tuple(sorted(others))


def trouble(path: str, *, links: bool) -> str:
    """Why a slide in several files, or an OME-Zarr folder, must not be opened; "" where nothing speaks
    against it. ``links``: links that leave its folder are followed."""
    if os.path.isdir(path):
        return _inside(path, links=links)
    ending = ending_of(path)
    if ending in INDEXES:
        return _named(indexed_parts(path)) or _beside(path, links=links)
    data = os.path.splitext(path)[0]
    if ending == ".mrxs" and os.path.isdir(data):
        if os.path.islink(data) and not links and not os.path.islink(path):
            return f"its folder {shown(os.path.basename(data))} is a link; {FOLLOW}"
        refused = _inside(data, links=links)
        return refused or _named(_names(_MIRAX_PART, os.path.join(data, SLIDEDAT)))
    return ""


def _named(parts: Iterable[str]) -> str:
    if all(map(_is_plain, parts)):
        return ""
    return "it names files outside its folder, which no scanner does; it is not opened"


def _is_plain(name: str) -> bool:
    return not re.search(r"[/\\\0]", name) and name not in ("", ".", "..")


def _beside(path: str, *, links: bool) -> str:
    for part in parts_of(path):
        if os.path.islink(part) and not links and not os.path.islink(path):
            return f"its part {shown(os.path.basename(part))} is a link; {FOLLOW}"
    return ""


def _inside(folder: str, *, links: bool) -> str:
    """Look at everything below a folder; nothing is opened."""
    real = os.path.realpath(folder)
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    below = shown(os.path.relpath(entry.path, folder))
                    if entry.is_symlink():
                        if not links and not is_within(os.path.realpath(entry.path), real):
                            return f"its file {below} is a link that leaves it; {FOLLOW}"
                        if os.path.exists(entry.path) and not (entry.is_file() or entry.is_dir()):
                            return f"its file {below} is a link to a device, pipe or socket; delete it"
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        return f"its file {below} is a device, pipe or socket; delete it"
        except OSError as error:
            below = shown(os.path.relpath(current, folder))
            return f"its folder {below} cannot be listed ({error.strerror}); check permissions"
    return ""


def _names(part: re.Pattern[str], index: str) -> list[str]:
    text = head_of(index, _LARGEST_INDEX).decode("latin-1")
    return [name for found in part.findall(text) if (name := found.strip())]
