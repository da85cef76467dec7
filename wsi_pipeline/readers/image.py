"""Plain pictures as slides: PNG, JPEG and what PIL reads of TIFF, with a pixel size that the user states.

Why the resolution in the file is ignored. The DPI of a PNG or JPEG is for printers; nearly every picture says
72. So there are no claims at all, and the mpp court asks for ``--mpp``.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC, WHITE
from wsi_pipeline.errors import CorruptRegionError, UnsupportedSlideError
from wsi_pipeline.readers._base import (
    FOREIGN_ERRORS,
    Facts,
    Handle,
    LazySlide,
    NotThisReaderError,
    composite,
    reason,
    slide_name,
)
from wsi_pipeline.readers._source import file_name, open_source, remote_errors, sampled_digest

__all__ = ["ImageSlide", "picture_size"]

MAX_PIXELS = 1 << 30
# A larger picture that packs its pixels this well is a bomb: tissue needs a byte for ten pixels or fewer.
_SUSPECT_PIXELS = 1 << 26
_SUSPECT_PIXELS_A_BYTE = 100
# Opened by their class: Image.open compares sizes with a process-wide limit of PIL (89 megapixels), ours is
# checked here, before a pixel is decoded.
_OPENERS: tuple[tuple[bytes, Callable[[IO[bytes]], ImageFile.ImageFile]], ...] = (
    (b"\x89PNG", PngImageFile),
    (b"\xff\xd8", JpegImageFile),
    (b"II", TiffImageFile),
    (b"MM", TiffImageFile),
)
_T = TypeVar("_T")
_WARNINGS_LOCK = threading.Lock()  # the filters belong to the process
_TO_RGB = frozenset({"1", "L", "P", "RGB"})
_TO_RGBA = frozenset({"LA", "PA", "RGBA"})


class ImageSlide(LazySlide):
    """One-level slide over a picture that is decoded once per process and kept until ``close``.

    Grey and palette become RGB, alpha is composited over white, the EXIF orientation is applied. 16-bit, CMYK
    and other modes, and pictures over a gigapixel, are UnsupportedSlideError.
    """

    reader = "image"

    def _open(self) -> Handle:
        return _ImageHandle(self._path, self.slide_id)


def picture_size(path: str | Path) -> Size:
    """Height and width of a picture as ``ImageSlide`` will show it, from its header; nothing is decoded.

    Raises UnsupportedSlideError for what is no picture, or one of a kind that is not read.
    """
    name, slide_id = file_name(str(path)), slide_name(str(path))
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(0)
            opener = next((opener for magic, opener in _OPENERS if head.startswith(magic)), None)
            picture = None if opener is None else _quietly(lambda: opener(file))
            if picture is None:
                raise UnsupportedSlideError(f"{name}: not a PNG, JPEG or TIFF", slide_id=slide_id)
            # Asked for its EXIF block, a PNG that has none before its pixels decodes them all.
            has_exif = not isinstance(picture, PngImageFile) or "exif" in picture.info
            turned = has_exif and picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except FOREIGN_ERRORS as error:
        raise UnsupportedSlideError(
            f"{name}: the picture cannot be opened ({reason(error)}); copy it again from its source",
            slide_id=slide_id,
        ) from error
    _refuse(picture, os.path.getsize(path), name, slide_id)
    width, height = picture.size
    return Size(width, height) if turned else Size(height, width)


class _ImageHandle:
    def __init__(self, path: str, slide_id: str) -> None:
        name = file_name(path)
        try:
            source = open_source(path)
            data = source.pread(0, source.size)
            identity = sampled_digest(source)
            picture = _quietly(lambda: _identify(data))
            if picture is None:
                raise NotThisReaderError(f"{name}: image: not a PNG, JPEG or TIFF", slide_id=slide_id)
        except (*FOREIGN_ERRORS, *remote_errors()) as error:
            raise NotThisReaderError(f"{name}: image: {reason(error)}", slide_id=slide_id) from error
        _refuse(picture, len(data), name, slide_id)
        profile = picture.info.get("icc_profile")
        try:
            self._pixels_HWC = _quietly(lambda: _decode(picture))
        except FOREIGN_ERRORS as error:
            raise CorruptRegionError(
                f"{name}: the picture cannot be decoded ({reason(error)}); copy it again from its source",
                slide_id=slide_id,
            ) from error
        self.facts = Facts(
            sizes=(Size(*self._pixels_HWC.shape[:2]),),
            claims=(),
            identity=identity,
            icc_profile=profile if picture.mode in ("RGB", "RGBA") else None,
        )

    def read(self, level: int, region: Region) -> U8_HWC:
        return self._pixels_HWC[region.slices(Region.of(self.facts.sizes[level]))].copy()


def _quietly(call: Callable[[], _T]) -> _T:
    """PIL warns of oddities that either do not matter or end in an error, which is then told once."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _identify(data: bytes) -> ImageFile.ImageFile | None:
    for magic, opener in _OPENERS:
        if data.startswith(magic):
            return opener(io.BytesIO(data))
    return None


def _refuse(picture: ImageFile.ImageFile, nbytes: int, name: str, slide_id: str) -> None:
    width, height = picture.size
    pixels = width * height
    problem = None
    if pixels > max(_SUSPECT_PIXELS, _SUSPECT_PIXELS_A_BYTE * nbytes):
        problem = (
            f"{height} x {width} px are claimed in {nbytes} bytes; the file is damaged, copy it again from "
            "its source"
        )
    elif pixels > MAX_PIXELS:
        problem = (
            f"{height} x {width} px is over the limit of a gigapixel for pictures that are decoded whole; "
            "convert it first: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff"
        )
    elif picture.mode not in _TO_RGB | _TO_RGBA:
        problem = f"pixels of mode {picture.mode}; the pipeline takes 8-bit RGB or grey pictures"
    if problem is not None:
        raise UnsupportedSlideError(f"{name}: {problem}", slide_id=slide_id)


def _decode(picture: ImageFile.ImageFile) -> U8_HWC:
    upright: Image.Image = picture
    if picture.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
        upright = ImageOps.exif_transpose(picture)
    has_alpha = upright.mode in _TO_RGBA or "transparency" in upright.info
    pixels_HWA: np.ndarray[Any, np.dtype[np.uint8]] = np.asarray(
        upright.convert("RGBA" if has_alpha else "RGB")
    )
    return composite(pixels_HWA, (WHITE,) * 3) if has_alpha else pixels_HWA
