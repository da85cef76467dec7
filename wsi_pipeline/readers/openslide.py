"""Slides through OpenSlide: SVS, NDPI, MRXS, SCN, BIF, Philips, Ventana, DICOM, CZI, generic TIFF.

Why cells. ``read_region`` takes level-0 coordinates. On a level whose downsample is no integer, the
corner of a region then falls between level pixels, and OpenSlide interpolates: the same level pixel would
come out with other bytes in another region. So levels above 0 are read in fixed cells (the whole level,
where it is small: then nothing is interpolated at all), and regions are cut from the cached cells.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import ImageCms

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import CorruptRegionError
from wsi_pipeline.readers._base import (
    FOREIGN_ERRORS,
    Facts,
    Handle,
    LazySlide,
    NotThisReaderError,
    composite,
    reason,
)
from wsi_pipeline.readers._cache import TILE_CACHE, cache_token
from wsi_pipeline.readers._source import file_name, is_remote, open_source, sampled_digest
from wsi_pipeline.readers.mpp import MppClaim, mpp_from_objective, mpp_from_resolution, parse_number

__all__ = ["OpenSlideSlide"]

_CELL = 1024
_WHOLE_LEVEL = 2048 * 2048
# OpenSlide's own tile cache, shared by all its slides; ours above it holds finished cells.
_NATIVE_CACHE_BYTES = 64 << 20
# These vendors copy the calibration into the TIFF resolution; in the others it means something else.
_RESOLUTION_VENDORS = ("aperio", "generic-tiff", "hamamatsu", "trestle")

_native_cache_lock = threading.Lock()
_native_cache: list[Any] = []


class OpenSlideSlide(LazySlide):
    """Slide through the OpenSlide library; alpha is composited over the slide's background or white."""

    reader = "openslide"

    def _open(self) -> Handle:
        return _OpenSlideHandle(self._path, self.slide_id)


class _OpenSlideHandle:
    def __init__(self, path: str, slide_id: str) -> None:
        self._token = cache_token()
        name = file_name(path)
        if is_remote(path):
            raise NotThisReaderError(
                f"{name}: OpenSlide reads local files only; copy it here first", slide_id=slide_id
            )
        self._path = path
        self._slide_id = slide_id
        self._lock = threading.Lock()
        try:
            self._slide: openslide.OpenSlide | None = self._connect()
            self.facts = self._gather(self._slide)
        except (openslide.OpenSlideError, *FOREIGN_ERRORS) as error:
            raise NotThisReaderError(f"{name}: OpenSlide: {reason(error)}", slide_id=slide_id) from error
        colour = dict(self._slide.properties).get(openslide.PROPERTY_NAME_BACKGROUND_COLOR) or "FFFFFF"
        self._background = (
            tuple(bytes.fromhex(colour.lstrip("#"))) if len(colour.lstrip("#")) == 6 else (255,) * 3
        )

    def _connect(self) -> openslide.OpenSlide:
        slide = openslide.OpenSlide(self._path)
        with _native_cache_lock:
            if not _native_cache:
                _native_cache.append(openslide.OpenSlideCache(_NATIVE_CACHE_BYTES))
        slide.set_cache(_native_cache[0])
        return slide

    def _gather(self, slide: openslide.OpenSlide) -> Facts:
        properties = dict(slide.properties)
        self._downsamples = tuple(float(value) for value in slide.level_downsamples)
        sizes = tuple(Size(height, width) for width, height in slide.level_dimensions)
        try:
            parsed = slide.color_profile
            profile = None if parsed is None else bytes(parsed.tobytes())
        except ImageCms.PyCMSError:
            # Not "no profile": whoever converts colours is told, whoever ignores profiles goes on.
            profile = b"damaged"
        return Facts(
            sizes=sizes,
            claims=_claims(properties),
            identity=_identity(self._path, properties),
            icc_profile=profile,
        )

    def read(self, level: int, region: Region) -> U8_HWC:
        if level == 0:
            return self._read_native(0, region)
        size = self.facts.sizes[level]
        cell = max(size.height, size.width) if size.area <= _WHOLE_LEVEL else _CELL
        pixels_HWC = np.empty((region.height, region.width, 3), np.uint8)
        for row in range(region.y // cell, (region.bottom - 1) // cell + 1):
            for col in range(region.x // cell, (region.right - 1) // cell + 1):
                frame = Region(row * cell, col * cell, cell, cell).intersect(Region.of(size))
                shared = None if frame is None else frame.intersect(region)
                if frame is None or shared is None:
                    continue
                cell_HWC = self._cell(level, frame)
                pixels_HWC[shared.slices(region)] = cell_HWC[shared.slices(frame)]
        return pixels_HWC

    def _cell(self, level: int, frame: Region) -> U8_HWC:
        key = (self._token, "openslide", level, frame.y, frame.x)
        return TILE_CACHE.get(key, lambda: self._read_native(level, frame))

    def _read_native(self, level: int, region: Region) -> U8_HWC:
        factor = self._downsamples[level]
        corner = (round(region.x * factor), round(region.y * factor))
        with self._lock:
            slide = self._slide
        try:
            if slide is None:
                # After its first error OpenSlide answers every call with that error: start afresh.
                with self._lock:
                    slide = self._slide = self._connect()
            pixels = slide.read_region(corner, level, (region.width, region.height))
        except (openslide.OpenSlideError, *FOREIGN_ERRORS) as error:
            with self._lock:
                self._slide = None
            raise CorruptRegionError(
                f"{file_name(self._path)}: level {level}, {region} cannot be decoded ({reason(error)}); "
                "copy the file again from its source",
                slide_id=self._slide_id,
                region=region,
            ) from error
        return composite(np.asarray(pixels), self._background)


def _claims(properties: dict[str, str]) -> tuple[MppClaim, ...]:
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
    claims = []
    if "aperio.MPP" in properties:
        mpp = parse_number(properties["aperio.MPP"])
        claims.append(MppClaim("aperio.MPP", (mpp, mpp)))
    x, y = (properties.get(key) for key in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
    if x is not None and y is not None and vendor != "generic-tiff":
        claims.append(MppClaim("openslide.mpp", (parse_number(y), parse_number(x))))
    unit = properties.get("tiff.ResolutionUnit")
    if unit is not None and vendor in _RESOLUTION_VENDORS:
        y_x = (parse_number(properties.get(f"tiff.{axis}Resolution", "nan")) for axis in "YX")
        resolution_y, resolution_x = (mpp_from_resolution(value, unit) for value in y_x)
        origin = "TIFF resolution" if unit != "none" else "TIFF resolution without unit"
        claims.append(MppClaim(origin, (resolution_y, resolution_x)))
    power = properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    # MIRAX states the lens alone; its camera adapter (1.6x on some) makes 20x slides of 0.23 um.
    if power is not None and not (vendor == "mirax" and claims):
        mpp = mpp_from_objective(parse_number(power))
        claims.append(MppClaim("objective power", (mpp, mpp), nominal=True))
    return tuple(claims)


def _identity(path: str, properties: dict[str, str]) -> str:
    """Content of the main file; for slides of several files, of the others too."""
    content = sampled_digest(open_source(path))
    others = hashlib.sha256(content.encode())
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR)
    if vendor == "mirax":
        for entry in sorted(os.scandir(Path(path).with_suffix("")), key=lambda item: item.name):
            others.update(f"{entry.name}\0{entry.stat().st_size}\n".encode())
    elif vendor == "dicom" or path.lower().endswith((".vms", ".vmu")):
        others.update(properties.get(openslide.PROPERTY_NAME_QUICKHASH1, "").encode())
    else:
        return content
    return others.hexdigest()
