"""The seams: what a slide, a generator and a writer are, and the values that pass between them.

Array names carry their axes: ``H`` rows, ``W`` columns, ``C`` channels (R, G, B), ``B`` batch. Pixels
are uint8 everywhere; torch, files and clocks never show at a seam.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import BlockIndex, Mpp, Region, Size, TileIndex

__all__ = [
    "LABEL_CELL",
    "WHITE",
    "Block",
    "Context",
    "Generator",
    "GeneratorSpec",
    "Level",
    "Slide",
    "Tile",
    "TileBatch",
    "U8_BHWC",
    "U8_HW",
    "U8_HWC",
    "View",
]

U8_HW: TypeAlias = npt.NDArray[np.uint8]
U8_HWC: TypeAlias = npt.NDArray[np.uint8]
U8_BHWC: TypeAlias = npt.NDArray[np.uint8]

Context: TypeAlias = Mapping[str, Any]
"""Slide-level facts that a generator computed once; JSON-serialisable, part of the plan.

``notices``, if there is one, is a list of sentences that the user has to see.
"""

WHITE = 255
"""Grey level of glass that nothing covers, and of everything outside a slide."""

LABEL_CELL = 32
"""Lattice pixels along a side of one pixel of the ``tissue`` and ``disagreement`` labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One native pyramid level; ``downsample`` is (y, x) relative to level 0, ``(1.0, 1.0)`` there."""

    size: Size
    downsample: tuple[float, float]


@runtime_checkable
class Slide(Protocol):
    """Native pixels of one slide file.

    Implementations hold a path and options only, open their handle on first use in each process, and
    pickle. ``levels`` run from large to small. Reading is thread-safe.
    """

    @property
    def slide_id(self) -> str:
        """Name for people: the file name without its ending."""

    @property
    def identity(self) -> str:
        """Digest of the content (not of the path); equal files have equal identities."""

    @property
    def mpp(self) -> Mpp:
        """Micrometres per level-0 pixel, (y, x)."""

    @property
    def mpp_origin(self) -> str:
        """Which source the mpp came from, e.g. ``--mpp``, ``aperio.MPP``, ``TIFF resolution``."""

    @property
    def levels(self) -> tuple[Level, ...]: ...

    @property
    def icc_profile(self) -> bytes | None:
        """Embedded ICC profile of the level-0 image, if any."""

    @property
    def reader(self) -> str:
        """Name of the reader, as in ``READERS``."""

    def read_level(self, level: int, region: Region) -> U8_HWC:
        """Pixels of ``region`` (in pixels of that level), [H, W, 3] uint8; outside the level is white.

        Raises CorruptRegionError where the file cannot be decoded.
        """

    def close(self) -> None:
        """Release the handle of this process; the slide may be used again afterwards."""


class View(Protocol):
    """A slide on the lattice: what tiling, tissue detection and background see."""

    @property
    def size(self) -> Size: ...

    @property
    def mpp(self) -> Mpp: ...

    def read(self, region: Region) -> U8_HWC:
        """Pixels of a lattice region; ``read(A | B)`` equals the join of ``read(A)`` and ``read(B)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The unit of generation: ``read`` is what the generator sees, ``write`` what it may change."""

    index: TileIndex
    read: Region
    write: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class TileBatch:
    """Tiles with their pixels. ``pixels_BHWC`` has a constant B; the tail repeats its last tile.

    ``tiles`` may be shorter than B: only the first ``len(tiles)`` results count. ``noise_key``: for
    ``core.noise.lattice_normal``; one number for the whole slide, another for each slide and seed.
    """

    tiles: tuple[Tile, ...]
    pixels_BHWC: U8_BHWC
    noise_key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorSpec:
    """What the planner must know about a generator.

    ``tile``: side of the square input in pixels; ``halo``: border that is read and thrown away;
    ``align``: the tile stride must be a multiple of it; ``mpp``: resolution that it was made for
    ((y, x), None = the slide's own); ``batch``: constant batch size; ``digest``: identifies code,
    options and weights; ``exact``: results are bit-identical whatever else is in the batch;
    ``stain``: ``"h&e"`` or ``"any"``, the staining that it accepts; ``overlap``: pixels that it asks
    neighbouring tiles to blend over, unless the user says otherwise; ``cell``: side of the cells into
    which it cuts a tile internally, from the tile's corner (None: it does not), where seam figures
    look for lines too.
    """

    kind: str
    tile: int
    halo: int
    align: int
    mpp: Mpp | None
    batch: int
    digest: str
    exact: bool
    stain: str = "h&e"
    overlap: int = 64
    cell: int | None = None


@runtime_checkable
class Generator(Protocol):
    """Tiles in, tiles out. Picklable; expensive state is built on first use in each process."""

    @property
    def spec(self) -> GeneratorSpec: ...

    def prepare(self, thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], mpp: Mpp) -> Context:
        """Slide-level facts from a thumbnail, its tissue mask and its mpp; JSON-serialisable."""

    def __call__(self, batch: TileBatch, context: Context) -> U8_BHWC:
        """Translated pixels, same shape and dtype as ``batch.pixels_BHWC``."""

    def background(self, pixels_HWC: U8_HWC, context: Context) -> U8_HWC:
        """Source pixels that no tile covers, in the colours that this generator gives to glass.

        Pointwise. Why: a generator that whitens pink glass would otherwise leave a staircase of tile
        borders around the tissue.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The unit of commit. ``pixels_HWC`` is cropped to the level's extent.

    ``disagreement_HW`` (level 0 only): how far overlapping tiles differ before blending, in grey
    levels, the largest sample in each cell of ``LABEL_CELL`` x ``LABEL_CELL`` lattice pixels.
    """

    level: int
    index: BlockIndex
    pixels_HWC: U8_HWC
    disagreement_HW: U8_HW | None = None
