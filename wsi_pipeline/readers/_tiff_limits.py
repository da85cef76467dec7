"""What a TIFF may claim before its pages are grouped: tifffile believes every count that it reads.

Why here and not in the child process that a run may spend on a slide: a file of 300 bytes that states a
billion planes would take the machine's memory with it, and a dry run or a viewer has no such child.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

from wsi_pipeline.errors import UnsupportedSlideError

__all__ = ["refuse_absurd_counts"]

MAX_PAGES = 1000
"""Directories of a file, and images of an OME-XML; a slide has some dozens."""
MAX_PLANES = 1 << 20


def refuse_absurd_counts(tiff: Any, name: str, slide_id: str) -> None:
    """Raise UnsupportedSlideError for a file of more pages, images or planes than any slide has."""
    try:
        tiff.pages[MAX_PAGES]
    except IndexError:
        pass
    else:
        raise _refusal(name, slide_id, f"more than {MAX_PAGES} pages")
    if not tiff.is_ome:
        return
    try:
        # tifffile parses the same text the same way; expat itself refuses entity bombs.
        root = ET.fromstring(tiff.ome_metadata or "")  # noqa: S314
    except ET.ParseError:
        return
    images, planes = 0, 0.0
    for element in root.iter():
        images += element.tag.endswith("Pixels")
        planes = max(planes, *_planes(element), 0.0)
    if images > MAX_PAGES:
        raise _refusal(name, slide_id, f"an OME-XML of {images} images")
    if planes > MAX_PLANES:
        raise _refusal(name, slide_id, f"an OME-XML of {planes:.6g} planes")


def _refusal(name: str, slide_id: str, what: str) -> UnsupportedSlideError:
    return UnsupportedSlideError(
        f"{name}: {what}, not one RGB image; the file is damaged or a stack: copy it again from its source, "
        "or extract one plane",
        slide_id=slide_id,
    )


def _planes(element: ET.Element) -> Iterator[float]:
    """For how many planes tifffile would make room because of this element."""
    if element.tag.endswith("Pixels"):
        yield math.prod(_number(element, f"Size{axis}", 1.0) for axis in "CTZ")
    elif element.tag.endswith("TiffData"):
        yield from (_number(element, key, 0.0) for key in ("PlaneCount", "NumPlanes"))
    elif element.tag[:-1].endswith("Along"):
        step = abs(_number(element, "Step", 1.0)) or 1.0
        yield (_number(element, "End", 0.0) - _number(element, "Start", 0.0)) / step


def _number(element: ET.Element, key: str, default: float) -> float:
    """A stated number; what is none is left to tifffile, which refuses it."""
    try:
        return float(element.get(key, default))
    except ValueError:
        return default
