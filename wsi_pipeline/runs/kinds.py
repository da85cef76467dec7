"""What a file in a folder of slides is, by its name and its first bytes."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from types import MappingProxyType

from wsi_pipeline.writers.manifest import MANIFEST, SYNTHETIC

__all__ = [
    "ANNOTATIONS",
    "DICOMS",
    "PICTURES",
    "SLIDES",
    "ZARR_MARKERS",
    "archive_by_head",
    "ending_of",
    "head_of",
    "is_hidden",
    "is_output_part",
    "is_synthetic",
    "is_temporary",
    "looks_like_slide",
    "refused",
]

DICOMS = frozenset({".dcm", ".dicom"})
SLIDES = DICOMS | frozenset(
    {".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".svslide", ".qptiff", ".ndpi", ".mrxs", ".scn", ".bif"}
    | {".vms", ".vmu", ".czi"}
)
PICTURES = frozenset({".png", ".jpg", ".jpeg"})
ANNOTATIONS = frozenset({".xml", ".geojson", ".json", ".ndpa", ".annotations", ".qpdata"})
ZARR_MARKERS = frozenset({"zarr.json", ".zgroup", ".zattrs", ".zmetadata", ".zarray"})
"""Files that make a folder a Zarr group, as in ``open_slide``."""

_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
_TEMPORARY = frozenset(
    {".part", ".tmp", ".temp", ".crdownload", ".filepart", ".download", ".partial", ".aria2", ".!ut", ".swp"}
)
_UNREAD: Mapping[str, str] = MappingProxyType(
    {
        ".vsi": "Olympus VSI",
        ".ets": "Olympus ETS",
        ".isyntax": "Philips iSyntax",
        ".i2syntax": "Philips iSyntax",
        ".kfb": "KFBio KFB",
        ".sdpc": "SQRAY SDPC",
        ".tmap": "UNIC TMAP",
        ".mds": "Motic MDS",
        ".mdsx": "Motic MDSX",
        ".lif": "Leica LIF",
        ".nd2": "Nikon ND2",
        ".zvi": "Zeiss ZVI",
        ".lsm": "Zeiss LSM",
        ".oib": "Olympus OIB",
        ".oir": "Olympus OIR",
        ".jp2": "JPEG 2000",
        ".dzi": "Deep Zoom",
        ".afi": "Aperio AFI (fluorescence)",
    }
)
_HIDDEN = frozenset(
    {"thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "__macosx"}
)
_OURS = re.compile(
    r"(?i)\.(zarr|tiff?)(\.work\.ome\.zarr)?"
    r"\.(partial|old|lock|export|qc\.png|overlay\.png|manifest\.json|manifest\.json\.new)$"
)
_ARCHIVE_HEADS = (
    (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"BZh")
    + (b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
)  # fmt: skip
_SLIDE_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"ZISRAWFILE")
_HEAD = 265
_LARGEST_MANIFEST = 16 << 20


def ending_of(name: str) -> str:
    """Last ending of a file name, lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a run leaves a file or folder out without a word: dot files, and what systems leave behind."""
    return name.startswith(".") or name.lower() in _HIDDEN


def is_temporary(name: str) -> bool:
    """Whether the name is one that copy programs and editors use while a file is not complete."""
    return name.endswith("~") or name.startswith("~$") or ending_of(name) in _TEMPORARY


def is_output_part(name: str) -> bool:
    """Whether the name is that of a side file or an unfinished state of an output of this program."""
    return _OURS.search(name) is not None


def is_synthetic(path: str) -> bool:
    """Whether an OME-Zarr folder or a TIFF is an output of this program, by its manifest."""
    manifest = os.path.join(path, MANIFEST) if os.path.isdir(path) else f"{path}.{MANIFEST}"
    try:
        with open(manifest, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return False
            text = file.read(_LARGEST_MANIFEST)
        document = json.loads(text) if SYNTHETIC.partition(",")[0].encode() in text else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("notice", "")).startswith("synthetic")


def head_of(path: str, count: int = _HEAD) -> bytes:
    """First bytes of a regular file; empty where it cannot be read. Never waits for a pipe's other end."""
    try:
        descriptor = _without_waiting(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, count)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def archive_by_head(head: bytes) -> bool:
    """Whether a file's first bytes are an archive's, whatever its name says."""
    return head.startswith(_ARCHIVE_HEADS) or head[257:262] == b"ustar"


def looks_like_slide(name: str, head: bytes) -> bool:
    """Whether a file without a known ending is a slide by its first bytes.

    DICOM under any name; TIFF and CZI only without an ending that means something: raw photographs are TIFF.
    """
    if head[128:132] == b"DICM":
        return True
    ending = ending_of(name)[1:]
    return head.startswith(_SLIDE_HEADS) and (not ending or not ending.isalpha())


def refused(name: str) -> tuple[str, bool] | None:
    """Why a file of this name is no slide, and whether its kind is unknown; None for the rest."""
    ending = ending_of(name)
    if ending in _ARCHIVES:
        return "an archive; unpack it first", False
    if ending in _UNREAD:
        return f"{_UNREAD[ending]}, which no reader opens; export it as a pyramidal OME-TIFF", True
    if ending == ".ndpis":
        return "a list of NDPI files, which have rows of their own", False
    return None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
