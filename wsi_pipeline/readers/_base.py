"""What all slide adapters share: a path, options, and a handle that opens on first use in each process.

An adapter is a ``LazySlide`` with one method, ``_open``, that returns a ``Handle``: the facts of the file
and a function that decodes pixels inside a level. Everything else (mpp court, outside is white, pickling,
reopening, level geometry) lives here once.
"""

from __future__ import annotations

import abc
import os
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Level
from wsi_pipeline.errors import UnsupportedSlideError
from wsi_pipeline.readers._source import file_name, is_remote
from wsi_pipeline.readers.mpp import MppClaim, settle_mpp

__all__ = [
    "FOREIGN_ERRORS",
    "Facts",
    "Handle",
    "LazySlide",
    "NotThisReaderError",
    "composite",
    "native_levels",
    "read_clipped",
    "reason",
    "slide_name",
]

# What decoders and parsers throw at damaged files. No ``except Exception``: a bug of ours shall show.
# SyntaxError is what XML parsers raise; MemoryError comes from absurd sizes in damaged headers.
FOREIGN_ERRORS: tuple[type[BaseException], ...] = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError,
    EOFError, MemoryError, SyntaxError, AssertionError, BufferError, struct.error, zlib.error,
)  # fmt: skip

MAX_SIDE = 1 << 20
MAX_AREA = 1 << 38
"""No glass slide has more pixels along a side, or in all, at 0.1 um a pixel; damaged headers claim more."""

_COMPOUND_ENDINGS = (".ome.tif", ".ome.tiff", ".ome.btf", ".ome.zarr")


class NotThisReaderError(UnsupportedSlideError):
    """This reader does not take the file, another one may; a plain UnsupportedSlideError is final."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a file states about itself; ``claims`` in order of trust."""

    sizes: tuple[Size, ...]
    claims: tuple[MppClaim, ...]
    identity: str
    icc_profile: bytes | None = None


class Handle(Protocol):
    """An open file. Its resources are released when the last reference to it goes."""

    @property
    def facts(self) -> Facts: ...

    def read(self, level: int, region: Region) -> U8_HWC:
        """Pixels of a region that lies inside the level, [H, W, 3] uint8; raises CorruptRegionError."""


class LazySlide(abc.ABC):
    """Base of the file-backed slides: implements the ``Slide`` protocol over ``_open``.

    ``path`` is a local path or a URL; ``mpp`` an override that wins over the file's own claims. Construction
    touches no file; the first use in each process opens it and raises SlideError where that fails.
    """

    reader: ClassVar[str]

    def __init__(self, path: str | Path, *, mpp: MppClaim | None = None) -> None:
        text = str(path)
        self._path = text if is_remote(text) else os.path.abspath(text)
        self._override = mpp
        self._lock = threading.Lock()
        self._handle: tuple[int, Handle] | None = None

    @abc.abstractmethod
    def _open(self) -> Handle:
        """Open the file; raises UnsupportedSlideError, NotThisReaderError or CorruptRegionError."""

    def _opened(self) -> Handle:
        handle = self._handle
        if handle is None or handle[0] != os.getpid():
            with self._lock:
                handle = self._handle
                if handle is None or handle[0] != os.getpid():
                    opened = self._open()
                    self._refuse_absurd_extents(opened.facts.sizes)
                    handle = self._handle = (os.getpid(), opened)
        return handle[1]

    def _refuse_absurd_extents(self, sizes: Sequence[Size]) -> None:
        """Memory and time follow the extent, whatever the file holds; raises UnsupportedSlideError."""
        for index, size in enumerate(sizes):
            sides = (size.height, size.width)
            if min(sides) < 1 or max(sides) > MAX_SIDE or size.area > MAX_AREA:
                raise UnsupportedSlideError(
                    f"{file_name(self._path)}: level {index} claims {size.height} x {size.width} px, as no "
                    "slide has; the file is damaged, copy it again from its source",
                    slide_id=self.slide_id,
                )

    @property
    def path(self) -> str:
        return self._path

    @property
    def slide_id(self) -> str:
        return slide_name(self._path)

    @property
    def identity(self) -> str:
        return self._opened().facts.identity

    @property
    def mpp(self) -> Mpp:
        return self._settled()[0]

    @property
    def mpp_origin(self) -> str:
        return self._settled()[1]

    def _settled(self) -> tuple[Mpp, str]:
        return settle_mpp(self._opened().facts.claims, override=self._override, slide_id=self.slide_id)

    @property
    def levels(self) -> tuple[Level, ...]:
        return native_levels(self._opened().facts.sizes)

    @property
    def icc_profile(self) -> bytes | None:
        return self._opened().facts.icc_profile

    def read_level(self, level: int, region: Region) -> U8_HWC:
        """Native pixels of ``region`` of one level, [H, W, 3] uint8; outside is white; CorruptRegionError."""
        handle = self._opened()
        return read_clipped(handle, level, region)

    def close(self) -> None:
        """Let go of this process's handle; threads that are reading finish first, later use reopens."""
        with self._lock:
            self._handle = None

    def __getstate__(self) -> tuple[str, MppClaim | None]:
        return self._path, self._override

    def __setstate__(self, state: tuple[str, MppClaim | None]) -> None:
        self._path, self._override = state
        self._lock = threading.Lock()
        self._handle = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._path!r})"


def slide_name(path: str) -> str:
    """Name of a slide for people: the file name without its ending (``.ome.tif`` counts as one)."""
    name = file_name(path)
    for ending in _COMPOUND_ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return Path(name).stem


def reason(error: BaseException) -> str:
    """First line of a foreign error's text, for the middle of our own one-line message."""
    lines = str(error).strip().splitlines()
    return (lines[0][:160] if lines else "") or type(error).__name__


def native_levels(sizes: Sequence[Size]) -> tuple[Level, ...]:
    """Levels with per-axis downsamples from the true sizes, snapped to an integer where one explains them.

    A level made by halving has ``ceil`` or ``floor`` of the exact quotient as its size: 2967 px halved twice
    is 741 or 742 px, a ratio of 4.004 or 3.999. Taken literally, such a ratio shifts the far corner by up to
    ``k`` level-0 pixels, although the writer averaged exactly 4 x 4 pixels everywhere. So where one integer k
    explains both axes (``floor(W0 / k) <= W <= ceil(W0 / k)``), it is the downsample; otherwise the ratio
    of the sizes is, per axis. Corner (0, 0) is common to all levels.
    """
    base = sizes[0]
    levels = [Level(size=base, downsample=(1.0, 1.0))]
    for size in sizes[1:]:
        ratios = (base.height / size.height, base.width / size.width)
        whole = _integer_factor(base, size, ratios)
        levels.append(Level(size=size, downsample=ratios if whole is None else (whole, whole)))
    return tuple(levels)


def _integer_factor(base: Size, size: Size, ratios: tuple[float, float]) -> float | None:
    power_of_two = 1 << max(round(np.log2(max(ratios))), 0)
    for k in (power_of_two, round(ratios[0]), round(ratios[1])):
        pairs = ((base.height, size.height), (base.width, size.width))
        if k >= 1 and all(max(full // k, 1) <= part <= -(-full // k) for full, part in pairs):
            return float(k)
    return None


def read_clipped(handle: Handle, level: int, region: Region) -> U8_HWC:
    """Read what lies inside the level and paint the rest white.

    Raises ValueError for a level that does not exist or a negative extent: those are the caller's mistakes.
    """
    sizes = handle.facts.sizes
    if not 0 <= level < len(sizes) or region.height < 0 or region.width < 0:
        raise ValueError(f"level {level} of {len(sizes)}, {region}: no such level or a negative extent")
    inside = region.intersect(Region.of(sizes[level]))
    if inside == region:
        return handle.read(level, region)
    pixels_HWC = np.full((region.height, region.width, 3), WHITE, np.uint8)
    if inside is not None:
        pixels_HWC[inside.slices(region)] = handle.read(level, inside)
    return pixels_HWC


def composite(pixels_HWA: np.ndarray[Any, np.dtype[np.uint8]], background: Sequence[int]) -> U8_HWC:
    """RGB of straight RGBA over an opaque background, rounded half up."""
    alpha = pixels_HWA[..., 3:]
    if alpha.size == 0 or alpha.min() == 255:
        return np.ascontiguousarray(pixels_HWA[..., :3])
    wide = alpha.astype(np.uint32)
    mixed = pixels_HWA[..., :3] * wide + np.asarray(background, np.uint32) * (255 - wide)
    return ((mixed + 127) // 255).astype(np.uint8)
