"""Makes the SubIFD pyramid of an OME-TIFF visible to readers that only walk the main chain of IFDs.

Why: Bio-Formats and QuPath look for reduced levels in the SubIFDs tag (OME-TIFF 6), OpenSlide and libvips
look for them in the main chain (``NewSubfileType & 1``). A copy of each SubIFD *record* (20 bytes a tag),
appended to the main chain, serves both. The copies point to the same tiles, so no pixel is stored twice;
the original SubIFDs stay outside the chain, as the OME-TIFF specification wants.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

__all__ = ["chain_subifds"]

_BIGTIFF_LITTLE = b"II\x2b\x00\x08\x00\x00\x00"
_SUBIFDS_TAG = 330
_ENTRY = 20
_RECORD_ALIGN = 8


class _Ifd(NamedTuple):
    entries: bytes
    """The tags as they stand in the file: code, type, count and value or offset, 20 bytes each."""
    link: int
    """Where the offset of the next IFD is stored."""
    next: int


def chain_subifds(file: BinaryIO) -> int:
    """Append a copy of each SubIFD record of the first IFD to the main chain; returns how many.

    ``file`` is a finished little-endian BigTIFF, open for reading and writing. Raises ValueError for
    anything else. Source: TIFF 6.0 with Adobe's BigTIFF design (header and IFD layout).
    """
    file.seek(0)
    header = file.read(16)
    if len(header) < 16 or header[:8] != _BIGTIFF_LITTLE:
        raise ValueError("not a little-endian BigTIFF")
    first = _read_ifd(file, _u64(header, 8))
    last = first
    while last.next:
        last = _read_ifd(file, last.next)
    link = last.link
    offsets = _subifd_offsets(file, first)
    for offset in offsets:
        link = _append(file, _read_ifd(file, offset), link)
    return len(offsets)


def _append(file: BinaryIO, ifd: _Ifd, link: int) -> int:
    """Write a copy of ``ifd`` at the end of the file, point ``link`` to it; returns the copy's own link."""
    end = file.seek(0, 2)
    start = -(-end // _RECORD_ALIGN) * _RECORD_ALIGN
    file.write(bytes(start - end))
    file.write(struct.pack("<Q", len(ifd.entries) // _ENTRY) + ifd.entries + struct.pack("<Q", 0))
    file.seek(link)
    file.write(struct.pack("<Q", start))
    return start + 8 + len(ifd.entries)


def _read_ifd(file: BinaryIO, offset: int) -> _Ifd:
    file.seek(offset)
    length = _u64(file.read(8), 0) * _ENTRY
    body = file.read(length + 8)
    if len(body) != length + 8:
        raise ValueError(f"the IFD at byte {offset} is cut off")
    return _Ifd(entries=body[:length], link=offset + 8 + length, next=_u64(body, length))


def _subifd_offsets(file: BinaryIO, ifd: _Ifd) -> tuple[int, ...]:
    for start in range(0, len(ifd.entries), _ENTRY):
        code, _kind, count, value = struct.unpack_from("<HHQQ", ifd.entries, start)
        if code != _SUBIFDS_TAG:
            continue
        if count == 1:  # eight bytes fit into the tag itself
            return (value,)
        file.seek(value)
        return struct.unpack(f"<{count}Q", file.read(8 * count))
    return ()


def _u64(data: bytes, start: int) -> int:
    (value,) = struct.unpack_from("<Q", data, start)
    return int(value)
