"""OME-Zarr 0.4 (Zarr v2) and 0.5 (Zarr v3, sharded) as slides; what the pipeline writes it reads.

Why cells. A region is cut from whole chunks that are decoded once and kept in the process's tile cache: Zarr
decodes whole chunks anyway, and a chunk [3, 512, 512] is turned to [512, 512, 3] only once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import FsspecStore

from wsi_pipeline.core.geometry import Region, Size, ceil_div
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import CorruptRegionError, SlideError, UnsupportedSlideError
from wsi_pipeline.readers import _zarr_codecs  # noqa: F401  takes the place of zarr's Blosc
from wsi_pipeline.readers._base import FOREIGN_ERRORS, Facts, Handle, LazySlide, NotThisReaderError, reason
from wsi_pipeline.readers._cache import TILE_CACHE, cache_token
from wsi_pipeline.readers._source import file_name, is_remote, remote_errors
from wsi_pipeline.readers._zarr_store import CheckedStore, read_small, regular_size
from wsi_pipeline.readers.mpp import MppClaim, mpp_from_length

__all__ = ["OmeZarrSlide"]

_MIN_CELL = 256
_MAX_CHUNK_BYTES = 1 << 30
_SAMPLED_FILES = 64
_SAMPLED_BYTES = 4096
_MAX_STRETCH = 0.05
_SPARSE_CHUNKS = 1000
"""Sparse stores lack chunks; one that lacks all but one of so many was damaged."""


class OmeZarrSlide(LazySlide):
    """Slide in an OME-Zarr multiscale: uint8, y and x, a channel axis of three, t and z of length 1.

    The mpp comes from the scale of dataset 0 and the units of its axes. A folder that ends in ``.partial`` is
    an unfinished output and refused.
    """

    reader = "omezarr"

    def _open(self) -> Handle:
        return _OmeZarrHandle(self._path, self.slide_id)


class _OmeZarrHandle:
    def __init__(self, path: str, slide_id: str) -> None:
        self._token = cache_token()
        self._name, self._slide_id = file_name(path), slide_id
        if self._name.endswith(".partial"):
            raise UnsupportedSlideError(
                f"{self._name}: an unfinished output; run its conversion again to finish it, then read that",
                slide_id=slide_id,
            )
        try:
            store = (
                FsspecStore.from_url(path, read_only=True)
                if is_remote(path)
                else CheckedStore(path, read_only=True)
            )
            group = zarr.open_group(store, mode="r")
            attributes = dict(group.attrs)
            multiscale = _multiscale(attributes)
            self._arrays = [group[str(dataset["path"])] for dataset in multiscale["datasets"]]
            axes = [_axis(axis) for axis in multiscale["axes"]]
            claims = tuple(_claims(multiscale, axes))
            identity = _identity(path, attributes, self._arrays)
            profile = _profile(path)
        except SlideError:
            raise
        except (*FOREIGN_ERRORS, *remote_errors()) as error:
            raise NotThisReaderError(f"{self._name}: omezarr: {reason(error)}", slide_id=slide_id) from error
        self._names = [name for name, _ in axes]
        for array in self._arrays:
            self._refuse_foreign_pixels(array)
        y, x = self._names.index("y"), self._names.index("x")
        self._cells = [
            Size(*(chunk * ceil_div(_MIN_CELL, chunk) for chunk in (array.chunks[y], array.chunks[x])))
            for array in self._arrays
        ]
        sizes = tuple(Size(array.shape[y], array.shape[x]) for array in self._arrays)
        self._refuse_foreign_levels(sizes)
        if not is_remote(path):
            self._refuse_empty(path)
        self.facts = Facts(
            sizes=sizes,
            claims=claims,
            identity=identity,
            icc_profile=profile,
        )

    def _refuse_foreign_pixels(self, array: Any) -> None:
        shape = dict(zip(self._names, array.shape, strict=False)) if isinstance(array, zarr.Array) else {}
        problem = None
        if len(shape) != getattr(array, "ndim", -1) or not {"y", "x"} <= set(shape):
            problem = f"axes {self._names} do not describe its arrays"
        elif array.dtype != np.uint8 or shape.get("c") != 3:
            problem = f"{array.dtype} with {shape.get('c', 1)} channel(s); the pipeline takes uint8 RGB"
        elif any(length != 1 for name, length in shape.items() if name not in "cyx"):
            problem = f"a stack {shape}; extract one plane"
        elif min(shape.values()) < 1:
            problem = f"an empty array {shape}"
        elif min(array.chunks) < 1:
            problem = f"chunks {array.chunks} without extent"
        elif math.prod(array.chunks) > _MAX_CHUNK_BYTES:
            problem = f"chunks {array.chunks} of over a gigabyte; rewrite it with chunks of 512 or 1024"
        if problem is not None:
            raise UnsupportedSlideError(f"{self._name}: {problem}", slide_id=self._slide_id)

    def _refuse_foreign_levels(self, sizes: tuple[Size, ...]) -> None:
        """Levels show the same picture, each smaller than the one before; a damaged shape shows here."""
        base = sizes[0]
        for last, size in pairwise(sizes):
            stretch = (base.height / size.height) / (base.width / size.width)
            slack = _MAX_STRETCH + 1 / size.height + 1 / size.width  # rounding of small levels
            shrinks = size.area < last.area or size.area == 1
            if not shrinks or abs(stretch - 1) > slack:
                raise UnsupportedSlideError(
                    f"{self._name}: a level of {size.height} x {size.width} px does not follow one of "
                    f"{last.height} x {last.width}; the metadata are damaged, copy it again from its source",
                    slide_id=self._slide_id,
                )

    def _refuse_empty(self, path: str) -> None:
        for array in self._arrays:
            stored = getattr(array, "shards", None) or array.chunks
            claimed = math.prod(map(ceil_div, array.shape, stored))
            if claimed > _SPARSE_CHUNKS:
                folder = os.path.join(path, array.path)
                found = sum(len(files) for _, _, files in os.walk(folder))
                if found * _SPARSE_CHUNKS < claimed:
                    raise UnsupportedSlideError(
                        f"{self._name}: {claimed} chunks are claimed, {found} files are there; the metadata "
                        "are damaged or the copy is incomplete, copy it again from its source",
                        slide_id=self._slide_id,
                    )

    def read(self, level: int, region: Region) -> U8_HWC:
        cell = self._cells[level]
        rows = range(region.y // cell.height, ceil_div(region.bottom, cell.height))
        columns = range(region.x // cell.width, ceil_div(region.right, cell.width))
        extent = Region.of(self.facts.sizes[level])
        pixels_HWC = np.empty((region.height, region.width, 3), np.uint8)
        for row in rows:
            for column in columns:
                frame = Region(row * cell.height, column * cell.width, cell.height, cell.width).intersect(
                    extent
                )
                shared = None if frame is None else frame.intersect(region)
                if frame is None or shared is None:
                    continue
                pixels_HWC[shared.slices(region)] = self._cell(level, frame)[shared.slices(frame)]
        return pixels_HWC

    def _cell(self, level: int, frame: Region) -> U8_HWC:
        key = (self._token, "omezarr", level, frame.y, frame.x)
        return TILE_CACHE.get(key, lambda: self._decode(level, frame))

    def _decode(self, level: int, frame: Region) -> U8_HWC:
        spans = {"y": slice(frame.y, frame.bottom), "x": slice(frame.x, frame.right), "c": slice(None)}
        try:
            values = np.asarray(self._arrays[level][tuple(spans.get(name, 0) for name in self._names)])
        except (*FOREIGN_ERRORS, *remote_errors()) as error:
            raise CorruptRegionError(
                f"{self._name}: level {level}, {frame} cannot be decoded ({reason(error)}); "
                "copy the slide again from its source",
                slide_id=self._slide_id,
                region=frame,
            ) from error
        kept = [name for name in self._names if name in spans]
        return np.ascontiguousarray(values.transpose([kept.index(name) for name in "yxc"]))


def _profile(path: str) -> bytes | None:
    """NGFF has no place for an ICC profile; the pipeline's own outputs carry it as a file of this name."""
    try:
        return None if is_remote(path) else read_small(Path(path) / "profile.icc")
    except FileNotFoundError:
        return None


def _multiscale(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    namespace = attributes.get("ome", attributes)  # 0.5 wraps, 0.4 does not
    multiscales = namespace.get("multiscales") if isinstance(namespace, Mapping) else None
    if not multiscales:
        raise ValueError("a Zarr group without OME multiscales metadata")
    multiscale: Mapping[str, Any] = multiscales[0]
    return multiscale


def _axis(axis: Mapping[str, Any] | str) -> tuple[str, str]:
    if isinstance(axis, str):  # 0.3
        return axis, ""
    return str(axis["name"]), str(axis.get("unit", ""))


def _claims(multiscale: Mapping[str, Any], axes: list[tuple[str, str]]) -> list[MppClaim]:
    scale = [1.0] * len(axes)
    stated = False
    transformations = [
        *multiscale["datasets"][0].get("coordinateTransformations", ()),
        *multiscale.get("coordinateTransformations", ()),
    ]
    for transformation in transformations:
        if transformation.get("type") == "scale":
            stated = True
            scale = [
                total * float(factor) for total, factor in zip(scale, transformation["scale"], strict=True)
            ]
    by_name = {name: (value, unit) for value, (name, unit) in zip(scale, axes, strict=True)}
    if not stated or not {"y", "x"} <= set(by_name):
        return []
    y, x = (mpp_from_length(*by_name[name]) for name in "yx")
    origin = "OME-Zarr scale" if by_name["x"][1] else "OME-Zarr scale without unit"
    return [MppClaim(origin, (y, x))]


def _identity(path: str, attributes: Mapping[str, Any], arrays: list[Any]) -> str:
    """Metadata of the group and its arrays, sampled chunk files, and, of our outputs, every checksum.

    Of a remote store only the metadata count.
    """
    digest = hashlib.sha256(json.dumps(attributes, sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(json.dumps(array.metadata.to_dict(), sort_keys=True, default=str).encode())
    if not is_remote(path):
        names = sorted(
            os.path.relpath(os.path.join(folder, name), path)
            for array in arrays
            for folder, _, files in os.walk(os.path.join(path, array.path))
            for name in files
        )
        digest.update(f"{len(names)}\n".encode())
        for name in names[:: max(len(names) // _SAMPLED_FILES, 1)]:
            regular_size(os.path.join(path, name))
            with open(os.path.join(path, name), "rb") as file:
                digest.update(f"{name}\0{os.fstat(file.fileno()).st_size}\n".encode())
                digest.update(file.read(_SAMPLED_BYTES))
        ledger = os.path.join(path, "ledger", "ledger.jsonl")
        if os.path.exists(ledger):
            regular_size(ledger)
            with open(ledger, "rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
    return digest.hexdigest()
