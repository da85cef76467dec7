"""The structure of a TIFF slide: which pages are its levels, where their tiles lie, what they claim.

tifffile parses tags and groups pages into series; nothing here decodes a pixel. What we do not understand
structurally is left to another reader (``NotThisReaderError``); what nobody should convert, such as 16-bit
or fluorescence stacks, is refused for good with the reason (``UnsupportedSlideError``).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from wsi_pipeline.core.geometry import Size, ceil_div
from wsi_pipeline.errors import UnsupportedSlideError
from wsi_pipeline.readers._base import NotThisReaderError
from wsi_pipeline.readers._tiff_limits import refuse_absurd_counts
from wsi_pipeline.readers.mpp import (
    MppClaim,
    mpp_from_length,
    mpp_from_objective,
    mpp_from_resolution,
    parse_number,
)

__all__ = ["PageLevel", "TiffStructure", "parse_tiff"]

# tifffile reports oddities of a file through logging; a program that sets up no logging stays quiet.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# Stitching, overlaps or private geometry: OpenSlide knows these formats, their pages alone do not tell.
_VENDOR_FLAGS = ("is_ndpi", "is_scn", "is_bif", "is_philips", "is_lsm", "is_stk", "is_sis")
# none, LZW, JPEG, deflate (two numbers), packbits, JPEG 2000 (RGB), Zstandard, WebP, JPEG XL
_CODECS = frozenset({1, 5, 7, 8, 32946, 32773, 33005, 34712, 50000, 50001, 50002})
_IMAGE_CODECS = frozenset({7, 33005, 34712, 50001, 50002})
_MAX_SEGMENT_BYTES = 1 << 30
_MAX_ASPECT_ERROR = 0.05
# Sparse files lack tiles of glass; a large image that lacks all but one of so many was damaged.
_SPARSE_PIXELS = 1 << 26
_SPARSE_TILES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLevel:
    """One page: a grid of segments (tiles, or strips as wide as the image), row-major, plane after plane.

    ``decode(data, index, jpegtables=...)`` is tifffile's decoder of this page; ``planes`` is 3 or 4 where
    the channels are stored apart, else 1; ``samples`` counts the channels.
    """

    size: Size
    segment: Size
    grid: Size
    planes: int
    samples: int
    compression: int
    alpha: bool
    inverted: bool
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    decode: Callable[..., Any]
    jpegtables: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TiffStructure:
    levels: tuple[PageLevel, ...]
    claims: tuple[MppClaim, ...]
    icc_profile: bytes | None


def parse_tiff(tiff: tifffile.TiffFile, name: str, slide_id: str) -> TiffStructure:
    """Levels, mpp claims and ICC profile of the largest image in the file.

    Raises NotThisReaderError (another reader may try), UnsupportedSlideError (nobody should), and whatever
    tifffile throws at a damaged file.
    """
    refuse_absurd_counts(tiff, name, slide_id)
    page = tiff.pages.first
    for flag in _VENDOR_FLAGS:
        if getattr(tiff, flag, False) or getattr(page, flag, False):
            raise NotThisReaderError(f"{name}: tiff: left to OpenSlide ({flag[3:]})", slide_id=slide_id)
    if str(page.software).startswith("MedScan"):
        raise NotThisReaderError(f"{name}: tiff: left to OpenSlide (trestle)", slide_id=slide_id)
    index, series = max(enumerate(tiff.series), key=lambda item: math.prod(item[1].keyframe.shape))
    base = series.keyframe
    if len(series.pages) > 1:
        raise UnsupportedSlideError(
            f"{name}: a stack of {len(series.pages)} images ({series.axes}), not one RGB image; write H&E as "
            "interleaved RGB (bioformats2raw/raw2ometiff: --rgb) or extract one plane",
            slide_id=slide_id,
        )
    levels = [_page_level(base, name, slide_id)]
    for level in series.levels[1:]:
        page_level = _reduced_level(levels, level.keyframe, name, slide_id)
        if page_level is not None:
            levels.append(page_level)
    return TiffStructure(
        levels=tuple(levels),
        claims=tuple(_claims(tiff, base, index)),
        icc_profile=base.tags.valueof(34675),
    )


def _reduced_level(levels: list[PageLevel], page: Any, name: str, slide_id: str) -> PageLevel | None:
    """The page as a further level, or None where it shows something else (thumbnail, label)."""
    base, last = levels[0].size, levels[-1].size
    height, width = int(page.imagelength), int(page.imagewidth)
    if not (0 < height <= last.height and 0 < width <= last.width and height * width < last.area):
        return None
    stretch = (base.height / height) / (base.width / width)
    slack = _MAX_ASPECT_ERROR + 1 / height + 1 / width  # rounding of small levels
    if abs(stretch - 1) > slack:
        return None
    try:
        return _page_level(page, name, slide_id)
    except UnsupportedSlideError:
        return None


def _page_level(page: Any, name: str, slide_id: str) -> PageLevel:
    _refuse_foreign_pixels(page, name, slide_id)
    size = Size(int(page.imagelength), int(page.imagewidth))
    if page.is_tiled:
        segment = Size(int(page.tilelength), int(page.tilewidth))
    else:
        segment = Size(min(int(page.rowsperstrip), size.height), size.width)
    samples = int(page.samplesperpixel)
    planes = samples if page.planarconfig == 2 and samples > 1 else 1
    if min(segment.height, segment.width, size.height, size.width) < 1:
        raise NotThisReaderError(f"{name}: tiff: an image or tile without extent", slide_id=slide_id)
    if segment.area * samples > _MAX_SEGMENT_BYTES:
        raise UnsupportedSlideError(
            f"{name}: one strip or tile of {segment.height} x {segment.width} px would decode to "
            f"{segment.area * samples >> 20} MiB; convert it first: vips tiffsave IN OUT.tif --tile "
            "--pyramid --compression jpeg --bigtiff",
            slide_id=slide_id,
        )
    grid = Size(ceil_div(size.height, segment.height), ceil_div(size.width, segment.width))
    offsets, counts = page.dataoffsets, page.databytecounts
    if min(len(offsets), len(counts)) < grid.area * planes:
        # Final: OpenSlide would show what is not listed as white.
        raise UnsupportedSlideError(
            f"{name}: {grid.area * planes} tiles expected for {size.height} x {size.width} px, only "
            f"{min(len(offsets), len(counts))} listed; the file is damaged, copy it again from its source",
            slide_id=slide_id,
        )
    stored = int(np.count_nonzero(counts))
    if size.area > _SPARSE_PIXELS and stored * _SPARSE_TILES < grid.area * planes:
        raise UnsupportedSlideError(
            f"{name}: of {grid.area * planes} tiles for {size.height} x {size.width} px, {stored} hold data; "
            "the file is damaged, copy it again from its source",
            slide_id=slide_id,
        )
    return PageLevel(
        size=size,
        segment=segment,
        grid=grid,
        planes=planes,
        samples=samples,
        compression=int(page.compression),
        alpha=samples in (2, 4) and any(int(kind) in (1, 2) for kind in page.extrasamples),
        inverted=int(page.photometric) == 0,
        offsets=np.asarray(offsets, np.int64),
        counts=np.asarray(counts, np.int64),
        decode=page.decode,
        jpegtables=page.jpegtables,
    )


def _refuse_foreign_pixels(page: Any, name: str, slide_id: str) -> None:
    """Raise where the page is no 8-bit RGB or grey image that we can decode."""
    bits, samples, photometric = page.bitspersample, int(page.samplesperpixel), int(page.photometric)
    orientation = page.tags.valueof(274, default=1)
    compression = int(page.compression)
    if page.dtype is not None and (page.dtype != np.uint8 or bits != 8):
        problem = f"{bits}-bit {page.dtype} pixels; the pipeline takes 8-bit brightfield images"
    elif photometric == 5:
        problem = "CMYK pixels; convert to RGB first (vips icc_transform IN OUT.tif srgb)"
    elif samples > 4:
        problem = f"{samples} channels; the pipeline takes RGB brightfield images"
    elif orientation not in (0, 1):
        problem = f"Orientation tag {orientation} (rotated or mirrored); rewrite it: vips autorot IN OUT.tif"
    elif int(page.imagedepth) != 1 or (page.is_tiled and int(page.tiledepth) != 1):
        problem = "a volume, not an image"
    else:
        known = {0: (1,), 1: (1, 2), 2: (3, 4), 6: (3,)}.get(photometric, ())
        # YCbCr outside JPEG, and JPEG 2000 in YCbCr (33003), need a transform that tifffile leaves undone.
        if (
            compression not in _CODECS
            or samples not in known
            or (photometric == 6 and compression not in _IMAGE_CODECS)
        ):
            raise NotThisReaderError(
                f"{name}: tiff: compression {compression} with photometric {photometric} and {samples} "
                "channels is not supported",
                slide_id=slide_id,
            )
        return
    raise UnsupportedSlideError(f"{name}: {problem}", slide_id=slide_id)


def _claims(tiff: tifffile.TiffFile, page: Any, image: int) -> Iterator[MppClaim]:
    """Statements on the pixel size, the vendor's first."""
    description = str(page.description or "")
    fields = _aperio_fields(description) if page.is_svs else {}
    if page.is_svs:
        if "MPP" in fields:
            mpp = parse_number(fields["MPP"])
            yield MppClaim("aperio.MPP", (mpp, mpp))
    elif tiff.is_ome:
        yield from ome_claims(tiff.ome_metadata or "", image)
    unit = {2: "inch", 3: "centimeter", 4: "millimeter", 5: "micrometer"}.get(
        int(page.tags.valueof(296, default=2)), "none"
    )
    x, y = (_rational(page.tags.valueof(code)) for code in (282, 283))
    if not (math.isnan(x) or math.isnan(y)):
        origin = "TIFF resolution" if unit != "none" else "TIFF resolution without unit"
        yield MppClaim(origin, (mpp_from_resolution(y, unit), mpp_from_resolution(x, unit)))
    if "AppMag" in fields:
        mpp = mpp_from_objective(parse_number(fields["AppMag"]))
        yield MppClaim("objective power", (mpp, mpp), nominal=True)


def _aperio_fields(description: str) -> dict[str, str]:
    """``KEY = value`` between bars. Split, not matched: a pattern needs minutes for a long run of spaces."""
    parts = (part.partition("=") for part in description.split("|")[1:])
    return {key.strip(): value.strip() for key, equals, value in parts if equals}


def ome_claims(xml: str, image: int) -> Iterator[MppClaim]:
    """PhysicalSizeY/X of the ``image``-th Pixels element of an OME-XML text, its unit applied (default um).

    Why a pattern and no XML parser: four attributes of one tag are all that is wanted from a text of unknown
    origin, and the standard parsers expand entity bombs.
    """
    elements = re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", xml)
    if image >= len(elements):
        return
    attributes = dict(re.findall(r"(PhysicalSize[XY](?:Unit)?)\s*=\s*[\"']([^\"']*)[\"']", elements[image]))
    if "PhysicalSizeX" in attributes and "PhysicalSizeY" in attributes:
        y, x = (
            mpp_from_length(
                parse_number(attributes[f"PhysicalSize{axis}"]),
                _unescape(attributes.get(f"PhysicalSize{axis}Unit", "um")),
            )
            for axis in "YX"
        )
        yield MppClaim("OME-XML PhysicalSize", (y, x))


def _unescape(text: str) -> str:
    return re.sub(r"&(#181|#xB5|micro);", "\u00b5", text, flags=re.IGNORECASE)


def _rational(value: Any) -> float:
    try:
        return float(value[0]) / float(value[1])
    except (TypeError, IndexError, ZeroDivisionError):
        return math.nan
