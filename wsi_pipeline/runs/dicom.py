"""Which series a DICOM file belongs to: as much of the format as that takes, and nothing more.

Why our own. A scanner writes one slide as several files, one a resolution, and label and overview beside
them; the files of a slide share a series. OpenSlide finds the others of a series itself, but has no way to
ask about one file without opening all of them. Source: DICOM PS3.5 (encoding), PS3.3 C.8.12 (whole slides).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from wsi_pipeline.runs.kinds import head_of

__all__ = ["WHOLE_SLIDE", "Instance", "read_instance"]

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""SOP class of whole-slide images; there is no other for them."""

_SYNTAX, _CLASS, _TYPE, _SERIES = 0x0002_0010, 0x0008_0016, 0x0008_0008, 0x0020_000E
_IMPLICIT = "1.2.840.10008.1.2"
_OTHER = ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
"""Big endian, and deflated: retired, and not used for slides."""
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD
_UNDEFINED = 0xFFFF_FFFF
_READ = (16 << 10, 1 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One file of a series. ``flavour``: VOLUME, THUMBNAIL, LABEL, OVERVIEW; empty where it is not stated."""

    sop_class: str
    flavour: str
    series: str


def read_instance(path: str) -> Instance | None:
    """What a DICOM file says about its series; None where it is no DICOM file, or one that is damaged."""
    for count in _READ:
        head = head_of(path, count)
        if head[128:132] != b"DICM":
            return None
        try:
            values = _values(head)
        except struct.error:
            if len(head) < count:
                return None
            continue
        kinds = values.get(_TYPE, "").split("\\")
        return Instance(
            sop_class=values.get(_CLASS, ""),
            flavour=kinds[2].strip().upper() if len(kinds) > 2 else "",
            series=values.get(_SERIES, ""),
        )
    return None


def _values(data: bytes) -> dict[int, str]:
    """Wanted elements of the file, by tag; struct.error where the bytes end before the series."""
    values, position = _elements(data, 132, explicit=True, last=0x0002_FFFF)
    if values.get(_SYNTAX) in _OTHER:
        return {}
    found, _ = _elements(data, position, explicit=values.get(_SYNTAX) != _IMPLICIT, last=_SERIES)
    return found


def _elements(data: bytes, position: int, *, explicit: bool, last: int) -> tuple[dict[int, str], int]:
    """Short values of the outermost elements up to tag ``last``, and where the next element starts."""
    values: dict[int, str] = {}
    depth = 0
    while True:
        if position == len(data):
            raise struct.error("the file ends before the series is named")
        group, element = struct.unpack_from("<HH", data, position)
        tag = group << 16 | element
        if depth == 0 and tag > last:
            return values, position
        if tag in (_ITEM_END, _SEQUENCE_END):
            depth, position = max(depth - 1, 0), position + 8
            continue
        kind = data[position + 4 : position + 6]
        if not explicit or tag == _ITEM:
            length, start = struct.unpack_from("<I", data, position + 4)[0], position + 8
        elif kind in _LONG:
            length, start = struct.unpack_from("<I", data, position + 8)[0], position + 12
        else:
            length, start = struct.unpack_from("<H", data, position + 6)[0], position + 8
        if length == _UNDEFINED:  # a sequence, or an item of one: its elements follow
            depth, position = depth + 1, start
            continue
        position = start + length
        if position > len(data):
            raise struct.error("an element reaches over the end")
        if depth == 0 and tag in (_SYNTAX, _CLASS, _TYPE, _SERIES):
            values[tag] = data[start:position].decode("ascii", "replace").strip(" \0")
