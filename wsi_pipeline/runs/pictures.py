"""Small pictures of a slide before and after its conversion, for the run's report."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.pipeline.outputs import mapped
from wsi_pipeline.readers import open_slide
from wsi_pipeline.runs.whole_files import write_whole

__all__ = ["PICTURES", "SIDE", "after_thumbnail", "picture_name", "write_pictures"]

PICTURES = ".wsi_run/pictures"
"""Where pictures lie, relative to the folder of the report."""
SIDE = 320
"""Pixels along the longer side of a picture, at most."""
QUALITY = 85


def picture_name(key: str, which: str) -> str:
    """Name of a picture of one file of a run; ``which`` is ``before`` or ``after``."""
    return f"{key}.{which}.jpg"


def write_pictures(folder: Path, key: str, before_HWC: U8_HWC, after_HWC: U8_HWC | None) -> None:
    """Write both pictures of the slide ``key`` below ``folder``, the folder of the report.

    ``after_HWC`` is None where nothing was converted; an earlier picture then goes. Pixels are sRGB. The
    JPEGs carry pixels and nothing else. Raises OutputError.
    """
    pictures = folder / PICTURES
    with mapped(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
    for which, pixels_HWC in (("before", before_HWC), ("after", after_HWC)):
        path = pictures / picture_name(key, which)
        if pixels_HWC is not None:
            write_whole(path, _jpeg(pixels_HWC))
            continue
        with mapped(path):
            path.unlink(missing_ok=True)


def after_thumbnail(store: Path) -> U8_HWC:
    """The smallest level of a finished OME-Zarr that still has ``SIDE`` pixels; level 0 where none has.

    The numbers as they are stored, no profile applied. Raises SlideError where it cannot be read.
    """
    slide = open_slide(store)
    try:
        large = [i for i, one in enumerate(slide.levels) if max(one.size.height, one.size.width) >= SIDE]
        level = large[-1] if large else 0
        return slide.read_level(level, Region.of(slide.levels[level].size))
    finally:
        slide.close()


def _jpeg(pixels_HWC: U8_HWC) -> bytes:
    picture = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()
