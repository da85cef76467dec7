"""The pictures of a slide's file that are not the scan: label, macro, and whatever else lies beside it.

Decoded pixels come from OpenSlide's associated images and, where OpenSlide does not name them, from TIFF
pages outside the pyramid. OpenSlide's ``thumbnail`` is left out as a picture: it shows the scan itself, as
every output does. Its coded bytes are searched for as well: an output copies no coded bytes of its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openslide
import tifffile

from wsi_pipeline.audit.texts import tiff_pages
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.readers._base import FOREIGN_ERRORS, composite

__all__ = ["SidePicture", "SidePictures", "side_pictures"]

RUN = 32
"""Bytes of a coded run that is searched for."""
_RUNS_A_SEGMENT, _SEGMENTS_A_PAGE, _DIVERSE = 8, 64, 16
_LARGEST = 1 << 26
_LEAST = 8


@dataclass(frozen=True, slots=True)
class SidePicture:
    """A picture beside the scan, [H, W, 3] uint8."""

    name: str
    pixels_HWC: U8_HWC


@dataclass(frozen=True, slots=True, kw_only=True)
class SidePictures:
    """``runs``: (name, bytes) from the coded strips and tiles; ``remarks``: what could not be decoded."""

    pictures: tuple[SidePicture, ...]
    runs: tuple[tuple[str, bytes], ...]
    remarks: tuple[str, ...]


def side_pictures(path: str) -> SidePictures:
    """All side pictures of a local slide file; none for what neither OpenSlide nor tifffile opens."""
    pictures = list(_associated(path))
    runs: list[tuple[str, bytes]] = []
    remarks: list[str] = []
    known = {one.pixels_HWC.shape[:2] for one in pictures}
    try:
        with np.errstate(all="ignore"), tifffile.TiffFile(path) as tiff:
            for name, page in _beside_the_pyramid(tiff):
                runs += ((name, run) for run in _coded_runs(tiff, page))
                if tuple(page.shape[:2]) in known:
                    continue
                pixels_HWC = _decoded(page)
                if pixels_HWC is None:
                    remarks.append(f"{name} cannot be decoded: only its coded bytes were searched for")
                elif min(pixels_HWC.shape[:2]) >= _LEAST:
                    pictures.append(SidePicture(name, pixels_HWC))
    except FOREIGN_ERRORS:
        pass  # no TIFF
    shown = [one for one in pictures if one.name != "thumbnail"]
    return SidePictures(pictures=tuple(shown), runs=tuple(runs), remarks=tuple(remarks))


def _associated(path: str) -> Iterator[SidePicture]:
    try:
        with openslide.OpenSlide(path) as slide:
            for name, image in slide.associated_images.items():
                yield SidePicture(name, composite(np.asarray(image.convert("RGBA")), (255, 255, 255)))
    except (openslide.OpenSlideError, *FOREIGN_ERRORS):
        return


def _beside_the_pyramid(tiff: tifffile.TiffFile) -> Iterator[tuple[str, Any]]:
    """Pages whose pixels are no level of the largest image, each place in the file once."""
    largest = max(tiff.series, key=lambda series: math.prod(series.keyframe.shape))
    seen = {page.dataoffsets[0] for level in largest.levels for page in level.pages if page.dataoffsets}
    for number, page in enumerate(tiff_pages(tiff)):
        if page.dataoffsets and page.dataoffsets[0] not in seen:
            seen.add(page.dataoffsets[0])
            yield f"TIFF page {number}", page


def _decoded(page: Any) -> U8_HWC | None:
    try:
        if page.imagelength * page.imagewidth > _LARGEST:
            return None
        pixels = np.asarray(page.asarray())
    except FOREIGN_ERRORS:
        return None
    if pixels.dtype != np.uint8:
        return None
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    return pixels[..., :3] if pixels.ndim == 3 and pixels.shape[2] in (3, 4) else None


def _coded_runs(tiff: tifffile.TiffFile, page: Any) -> Iterator[bytes]:
    """Runs from evenly chosen segments: behind the headers, and diverse enough to be no chance."""
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    for offset, count in segments[:: max(1, len(segments) // _SEGMENTS_A_PAGE)]:
        tiff.filehandle.seek(offset)
        data = tiff.filehandle.read(min(count, _LARGEST))
        scan = data.rfind(b"\xff\xda") if data[:2] == b"\xff\xd8" else 0
        start = max(scan, 0) + _LEAST
        step = max(RUN, (len(data) - start - RUN) // _RUNS_A_SEGMENT)
        for at in range(start, len(data) - RUN + 1, step):
            if len(set(data[at : at + RUN])) >= _DIVERSE:
                yield data[at : at + RUN]
