"""Which of a folder's files are slides, and why the others are not.

Why pictures are no slides here. Beside slides, ``overview.jpg``, ``label.png`` or a screenshot is what a
folder holds as PNG or JPEG; it has no pixel size, would fail every night, and a label must not be converted
at all. Who means pictures says so: with a table that names them, or with a pattern such as ``DIR/*.jpg``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from wsi_pipeline.runs.companions import INDEXES, indexed_parts, parts_of, trouble
from wsi_pipeline.runs.dicom import WHOLE_SLIDE, Instance, read_instance
from wsi_pipeline.runs.found import Found
from wsi_pipeline.runs.kinds import (
    ANNOTATIONS,
    DICOMS,
    PICTURES,
    SLIDES,
    archive_by_head,
    ending_of,
    head_of,
    is_output_part,
    is_synthetic,
    is_temporary,
    looks_like_slide,
    refused,
)
from wsi_pipeline.runs.names import shown
from wsi_pipeline.writers.manifest import MANIFEST

__all__ = ["OURS", "Listing", "judge", "judge_zarr"]

OURS = "an output of this program; it is synthetic and not translated again"
_OURS_PART = "of an output of this program"
_RUN_FILES = frozenset({"run.json", "report.html", "summary.csv"})
_UNFINISHED = "an unfinished output of this program, or what a run left behind"
_TEMPORARY = "has the name of an unfinished copy; rename it if it is complete"
_PICTURE = (
    "a picture, not a slide; to convert it, name it in a table with its mpp or by a pattern like 'DIR/*{}'"
)

Verdict = tuple[str, bool]
"""Why a file is skipped, and whether its kind is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A folder as it is judged. ``prefix``: of its files' sources; ``files``: names of all its regular files,
    links that are followed among them; ``wanted``: those that get a row; ``owner``: why everything in it is
    part of something else (None: it is not); ``run``: an earlier run put its outputs there."""

    path: str
    prefix: str
    files: Collection[str]
    wanted: Iterable[str]
    owner: Verdict | None = None
    run: bool = False


def judge(listing: Listing, *, links: bool, pictures: Collection[str]) -> list[Found]:
    """A row for each wanted file. ``pictures``: endings of pictures that are taken as slides."""
    indexed = _indexed(listing)
    named_like = _named_like_slides(listing)
    found: list[Found] = []
    dicoms: list[str] = []
    for name in listing.wanted:
        path = os.path.join(listing.path, name)
        verdict = _by_owner(listing, name, indexed) or _by_name(name, path, pictures, named_like)
        parts: tuple[str, ...] = ()
        if verdict is None:
            ending = ending_of(name)
            if ending in DICOMS or ending not in SLIDES | PICTURES and head_of(path)[128:132] == b"DICM":
                dicoms.append(name)
                continue
            if ending == ".mrxs" or ending in INDEXES:
                verdict = _refusal(path, links=links)
                parts = parts_of(path)
        found.append(_row(listing, name, verdict, parts))
    return found + (_series(listing, dicoms) if dicoms else [])


def judge_zarr(path: str, source: str, *, links: bool) -> Found:
    """The one row of an OME-Zarr folder, which is looked into for links and read not at all."""
    name = os.path.basename(path)
    if is_output_part(name) or ending_of(name) == ".partial":
        verdict: Verdict | None = (_UNFINISHED, False)
    elif is_synthetic(path):
        verdict = (OURS, False)
    else:
        verdict = _refusal(path, links=links)
    skip, unknown = verdict or ("", False)
    return Found(source=source, path=path, skip=skip, unknown=unknown)


def _refusal(path: str, *, links: bool) -> Verdict | None:
    reason = trouble(path, links=links)
    return (f"refused: {reason}", True) if reason else None


def _row(listing: Listing, name: str, verdict: Verdict | None, parts: tuple[str, ...] = ()) -> Found:
    skip, unknown = verdict or ("", False)
    return Found(
        source=listing.prefix + shown(name),
        path=os.path.join(listing.path, name),
        skip=skip,
        unknown=unknown,
        parts=parts,
    )


def _indexed(listing: Listing) -> dict[str, str]:
    """The index (VMS, VMU) that names a file as its part, by the file's name."""
    indexes = sorted(name for name in listing.files if ending_of(name) in INDEXES)
    return {part: index for index in indexes for part in indexed_parts(os.path.join(listing.path, index))}


def _named_like_slides(listing: Listing) -> frozenset[str]:
    """Names that an annotation of one of the folder's slides has before its own ending."""
    slides = [name for name in listing.files if ending_of(name) in SLIDES]
    return frozenset(slides) | {os.path.splitext(name)[0] for name in slides}


def _by_owner(listing: Listing, name: str, indexed: Mapping[str, str]) -> Verdict | None:
    if listing.owner is not None:
        return listing.owner
    if listing.run and name in _RUN_FILES:
        return "of an earlier run of this program", False
    if is_output_part(name):
        return (_OURS_PART if name.endswith((".json", ".png")) else _UNFINISHED), False
    if is_temporary(name):
        return _TEMPORARY, False
    if name in indexed:
        return f"part of {shown(indexed[name])}", False
    if f"{name}.{MANIFEST}" in listing.files and is_synthetic(os.path.join(listing.path, name)):
        return OURS, False
    return None


def _by_name(name: str, path: str, pictures: Collection[str], named_like: Collection[str]) -> Verdict | None:
    ending = ending_of(name)
    if ending in SLIDES or ending in pictures:
        if archive_by_head(head_of(path)):
            return "an archive, whatever its name says; unpack it first", False
        return None
    if ending in PICTURES:
        return _PICTURE.format(ending), False
    if ending in ANNOTATIONS and os.path.splitext(name)[0] in named_like:
        return "annotations or notes beside a slide of that name", False
    if name.upper() == "DICOMDIR":
        return "the index of a DICOM medium; its slides have rows of their own", False
    known = refused(name)
    if known is not None or looks_like_slide(name, head_of(path)):
        return known
    return f"no kind of slide that is known ({shown(ending) or 'a name without ending'})", True


def _series(listing: Listing, names: list[str]) -> list[Found]:
    """Rows of DICOM files: the first pyramid file of a series stands for the slide, the others are its parts.

    OpenSlide looks for the others of a series in the same folder, so a series is one within a folder.
    """
    others = [name for name in listing.files if ending_of(name) in DICOMS]
    instances = {n: read_instance(os.path.join(listing.path, n)) for n in sorted({*names, *others})}
    series: dict[str, list[str]] = {}
    for name, instance in instances.items():
        if instance is not None and instance.series and instance.sop_class == WHOLE_SLIDE:
            series.setdefault(instance.series, []).append(name)
    found = []
    for name in names:
        instance = instances[name]
        members = series.get(instance.series, []) if instance is not None else []
        verdict = _by_series(name, instance, members, instances, names)
        parts = () if verdict else tuple(os.path.join(listing.path, n) for n in members if n != name)
        found.append(_row(listing, name, verdict, parts))
    return found


def _by_series(
    name: str,
    instance: Instance | None,
    members: list[str],
    instances: Mapping[str, Instance | None],
    wanted: Collection[str],
) -> Verdict | None:
    if instance is None:
        return None  # damaged or no DICOM at all: opening it says what is wrong
    if instance.sop_class not in ("", WHOLE_SLIDE):
        return "a DICOM file, but no whole-slide image", True
    if name not in members:
        return None
    pyramid = [n for n in members if (i := instances[n]) is not None and i.flavour in ("", "VOLUME")]
    if not pyramid:
        return "a label, an overview or a thumbnail (DICOM) whose slide is not in this folder", False
    first = next((n for n in pyramid if n in wanted), pyramid[0])
    return None if name == first else (f"part of {shown(first)}", False)
