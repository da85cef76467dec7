"""Is an OME-TIFF what our export writes: one pyramid, its known tags, and not a byte beside them?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from wsi_pipeline.core.geometry import Size
from wsi_pipeline.readers._base import FOREIGN_ERRORS

__all__ = ["tiff_faults"]

# NewSubfileType to YCbCr and the ICC profile: what writers/ometiff.py asks tifffile for.
_TAGS = frozenset(
    {
        254,
        256,
        257,
        258,
        259,
        262,
        270,
        277,
        282,
        283,
        284,
        296,
        305,
        322,
        323,
        324,
        325,
        330,
        530,
        532,
        34675,
    }
)
_HEADER = 16
_PADDING = 16


def tiff_faults(path: Path) -> list[tuple[str, str]]:
    """(part, what is wrong) of a TIFF output."""
    try:
        with np.errstate(all="ignore"), tifffile.TiffFile(path) as tiff:
            return list(_faults(tiff, path))
    except FOREIGN_ERRORS as error:
        return [
            ("structure", f"cannot be read ({type(error).__name__}), so nothing is proven about its pages")
        ]


def _faults(tiff: tifffile.TiffFile, path: Path) -> Iterator[tuple[str, str]]:
    first, *others = list(tiff.pages)
    below: list[Any] = list(first.pages) if first.subifds else []
    size = Size(int(first.imagelength), int(first.imagewidth))
    tiles = {first.dataoffsets[0]}
    for number, page in enumerate(below):
        size = size.halved()
        tiles.add(page.dataoffsets[0])
        if (page.imagelength, page.imagewidth) != (size.height, size.width):
            yield f"SubIFD {number}", "a page that is no level of the pyramid"
    for number, page in enumerate(others, start=1):
        if not page.dataoffsets or page.dataoffsets[0] not in tiles:
            yield f"page {number}", "a page that is no level of the pyramid"
    for number, page in enumerate([first, *others, *below]):
        foreign = sorted(tag.code for tag in page.tags if tag.code not in _TAGS)
        if foreign:
            yield f"IFD {number}", f"tags {foreign} that no output of this program has"
    spare = _spare_bytes([first, *others, *below], path)
    if spare:
        yield "file", f"{spare} bytes that belong to no page"


def _spare_bytes(pages: list[Any], path: Path) -> int:
    """Bytes outside header, IFDs, tag values and tiles, but for gaps of padding."""
    spans = [(0, _HEADER)]
    for page in pages:
        spans.append((page.offset, page.offset + 16 + 20 * len(page.tags)))
        spans += ((tag.valueoffset, tag.valueoffset + tag.valuebytecount) for tag in page.tags)
        spans += ((o, o + n) for o, n in zip(page.dataoffsets, page.databytecounts, strict=True))
    spare, reached = 0, 0
    with path.open("rb") as file:
        for start, stop in [*sorted(spans), (path.stat().st_size,) * 2]:
            if start > reached:
                file.seek(reached)
                gap = start - reached
                spare += gap if gap >= _PADDING or any(file.read(gap)) else 0
            reached = max(reached, stop)
    return spare
