"""A whole slide at a glance: the picture on which tissue is looked for, and on which generators prepare."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.core.tissue import THUMBNAIL_MPP
from wsi_pipeline.errors import UnsupportedSlideError
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.lattice import IccMode, SlideView

__all__ = ["halvings", "near_own", "read_overview", "reduce_overview"]

OVERVIEW_PIXELS = 4e6
OVERVIEW_MPP = 2.0
"""The overview has about this many pixels, but is no finer than this, in µm."""
OVERVIEW_STRIP = 128
LARGEST_FLAT = 1 << 35
"""Pixels of a level that are read for an overview, a few minutes; a pyramid has a smaller level."""
NEAR_ENOUGH = 0.1
"""A pixel size that is off by this share is not worth a resampling."""


def read_overview(slide: Slide, *, icc: IccMode, threads: int = 1) -> tuple[U8_HWC, Mpp]:
    """The whole slide at about ``OVERVIEW_PIXELS``, read once, in strips on all threads.

    The generator prepares on it and tissue detection on a reduction of it. Why finer than detection
    needs: at 8 µm nuclei average out, so their stain is underestimated and comes out pale (her2st C2:
    99th percentile of haematoxylin 0.73 of the palette's from 8 µm, 0.95 from 2 µm). Raises
    UnsupportedSlideError where no level is small enough to be read whole.
    """
    finest = max(math.sqrt(_area_um2(slide) / OVERVIEW_PIXELS), OVERVIEW_MPP)
    view = SlideView(slide, halvings(slide.mpp, finest), icc=icc)
    flat = slide.levels[view.level].size
    if flat.area > LARGEST_FLAT:
        raise UnsupportedSlideError(
            f"{slide.slide_id}: {flat.height} x {flat.width} px without a reduced level to look at; convert "
            "it first: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff",
            slide_id=slide.slide_id,
        )
    overview_HWC = np.empty((view.size.height, view.size.width, 3), np.uint8)

    def read(y: int) -> None:
        strip = Region(y, 0, min(OVERVIEW_STRIP, view.size.height - y), view.size.width)
        overview_HWC[y : strip.bottom] = view.read(strip)

    with ThreadPoolExecutor(threads, "overview") as pool:
        deque(pool.map(read, range(0, view.size.height, OVERVIEW_STRIP)), maxlen=0)
    return overview_HWC, view.mpp


def reduce_overview(slide: Slide, overview_HWC: U8_HWC, mpp: Mpp) -> tuple[U8_HWC, Mpp]:
    """The overview of a slide at the resolution of tissue detection, and its (y, x) mpp."""
    target = max(THUMBNAIL_MPP, math.sqrt(_area_um2(slide) / OVERVIEW_PIXELS))
    view = SlideView(ArraySlide(overview_HWC, mpp=mpp), halvings(mpp, target), icc="ignore")
    return view.read(Region.of(view.size)), view.mpp


def halvings(mpp: Mpp, target: float) -> Mpp:
    """The pixel size halved so often that it comes closest to ``target``, never finer than ``mpp``.

    Whole halvings fall on pyramid levels, or are plain means; anything else costs a resampling.
    """
    steps = max(0, round(math.log2(target / max(mpp))))
    return (mpp[0] * 2**steps, mpp[1] * 2**steps)


def near_own(own: Mpp, wanted: Mpp, tolerance: float = NEAR_ENOUGH) -> Mpp | None:
    """A pixel size halved some times, where it then lies near the wanted one; else None.

    Why: to resample 0.499 to 0.5 µm costs sharpness and time, and no network tells the two apart.
    """
    halved = halvings(own, max(wanted))
    near = all(abs(a / b - 1) <= tolerance for a, b in zip(halved, wanted, strict=True))
    return halved if near else None


def _area_um2(slide: Slide) -> float:
    return slide.levels[0].size.area * slide.mpp[0] * slide.mpp[1]
