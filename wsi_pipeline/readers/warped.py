"""A slide read through a registration: it shows the moving section on the lattice of the fixed one.

``pair.json`` (written by ``wsi-pipeline register``) holds an affine map and, in a Zarr array beside it, a
field of displacements, both in µm, y before x, from a point of the slide ``from`` to the point of the slide
``to`` where the pixel is read. It names both files by the digest of their content and states the pixel sizes
with which it was measured, so that a transform is never applied to another slide or scale.

How a pixel is computed: its centre goes through the transform; the part of the moving slide that the region
touches is read as a mean over 2^k x 2^k native pixels (a pyramid level, where there is one), the coarsest
that is not coarser than the lattice; then comes one bicubic interpolation. ``at`` gives a slide whose own
pixels are those of the wanted lattice: a view that resampled it would be the second to do so.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.mask import TissueMask
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Level, Slide
from wsi_pipeline.core.transform import SlideTransform, plausible, pull_back
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers._base import native_levels
from wsi_pipeline.readers.lattice import SlideView

__all__ = ["ASTRAY", "PAIR_VERSION", "SectionPair", "TRUSTED", "WarpedSlide", "load_pair", "on_lattice"]

PAIR_VERSION = 1
ASTRAY, TRUSTED = 1, 2
"""States of a cell of the fixed slide's tissue; 0: no tissue."""
_MAX_ASTRAY, _MIN_TRUSTED = 0.05, 0.25
_DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    ConfigError,
)
_SMALLEST, _STRIP_PIXELS, _MARGIN = 256, 4 << 20, 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SectionPair:
    """What a ``pair.json`` says: the transform, the extent and pixel size of the fixed slide, the names and
    digests (of the content) of both, the moving slide's pixel size, and where the tissue is in register:
    states of cells of the fixed slide, uint8 [h, w], and their side in µm (None: the file does not say)."""

    path: Path
    transform: SlideTransform
    names: tuple[str, str]
    identities: tuple[str, str]
    from_size: Size
    from_mpp: Mpp
    to_mpp: Mpp
    cells_HW: npt.NDArray[np.uint8] | None = None
    um_per_cell: float = 1.0

    @property
    def digest(self) -> str:
        """Of everything that decides a pixel."""
        affine, um = self.transform.affine_23.tolist(), (self.transform.field_um_per_px, self.um_per_cell)
        decides = repr((self.identities, self.from_size, self.from_mpp, affine, um)).encode()
        for array in (self.transform.field_2HW, self.cells_HW):
            decides += b"" if array is None else array.tobytes()
        return hashlib.sha256(decides).hexdigest()

    def in_register(self, regions_N4: npt.NDArray[np.int64], mpp: Mpp) -> npt.NDArray[np.bool_]:
        """Which regions (y, x, height, width) of a lattice of the fixed slide show tissue in register."""
        if self.cells_HW is None:
            return np.ones(len(regions_N4), np.bool_)
        side = (self.um_per_cell, self.um_per_cell)
        astray_N, trusted_N = (
            TissueMask(mask_HW=self.cells_HW == state, mpp=side).covers_many(regions_N4, mpp)
            for state in (ASTRAY, TRUSTED)
        )
        return np.asarray((astray_N <= _MAX_ASTRAY) & (trusted_N >= _MIN_TRUSTED))


def load_pair(path: str | Path) -> SectionPair:
    """Read a ``pair.json`` and its field; raises ConfigError that names the file and what is wrong."""
    import zarr

    path = Path(path)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if (about["version"], about["units"], about["axes"]) != (PAIR_VERSION, "micrometer", "yx"):
            raise ValueError("it is of another version, or in other units")
        name, mpps = about["field"], np.array([about["from_mpp"], about["to_mpp"]], np.float64)
        if name is not None and Path(name).name != name:
            raise ValueError("its field does not lie beside it")
        size_2 = np.array(about["from_size"], np.int64)
        if mpps.shape != (2, 2) or not ((mpps > 1e-3) & (mpps < 1e3)).all():
            raise ValueError("its pixel sizes are none")
        if size_2.shape != (2,) or not ((size_2 > 0) & (size_2 < 1 << 31)).all():
            raise ValueError("its extent is none")
        affine_23 = np.array(about["affine"], np.float64)
        if affine_23.shape == (2, 3) and np.isfinite(affine_23).all() and not plausible(affine_23):
            raise ValueError("its affine map mirrors or deforms more than sections do")
        cells_HW, um_per_cell = _cells(about)
        return SectionPair(
            path=path,
            transform=SlideTransform(
                affine_23=affine_23,
                field_2HW=None
                if name is None
                else np.asarray(zarr.open_array(path.parent / name, mode="r")[:]),
                field_um_per_px=float(about["field_um_per_px"]),
            ),
            names=(str(about["from"]), str(about["to"])),
            identities=(str(about["from_identity"]), str(about["to_identity"])),
            from_size=Size(*size_2.tolist()),
            from_mpp=tuple(mpps[0].tolist()),
            to_mpp=tuple(mpps[1].tolist()),
            cells_HW=cells_HW,
            um_per_cell=um_per_cell,
        )
    except _DAMAGED as error:
        told = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ConfigError(
            f"{path}: cannot be read as a transform ({told}); make it again with wsi-pipeline register"
        ) from error


def _cells(about: dict[str, Any]) -> tuple[npt.NDArray[np.uint8] | None, float]:
    """Where tissue is in register, as ``pair.json`` has it: a digit a cell; and the cells' side in µm."""
    told = about.get("register")
    if told is None:
        return None, 1.0
    cells_HW = np.array([[int(cell) for cell in row] for row in told["cells"]], np.uint8)
    um = float(told["um_per_cell"])
    if cells_HW.ndim != 2 or cells_HW.max(initial=0) > TRUSTED or not 0 < um < math.inf:
        raise ValueError("its cells are none")
    return cells_HW, um


class WarpedSlide:
    """The moving slide of a pair as if it lay where the fixed one lies; implements ``Slide``.

    ``mpp``, ``size``: of its own pixels, None = those of the fixed slide. Raises ConfigError where the slide
    is not the one that was registered, or has another pixel size.
    """

    reader, mpp_origin = "warped", "transform"

    def __init__(
        self, slide: Slide, pair: SectionPair, mpp: Mpp | None = None, size: Size | None = None
    ) -> None:
        if slide.identity != pair.identities[1] or not np.allclose(slide.mpp, pair.to_mpp, rtol=1e-3):
            raise ConfigError(
                f"{slide.slide_id}: is not {pair.names[1]} at {pair.to_mpp[1]:g} µm per pixel, for which "
                f"{pair.path} was made; register it as it is now with wsi-pipeline register"
            )
        self.slide, self.pair = slide, pair
        self.slide_id, self.icc_profile = slide.slide_id, slide.icc_profile
        self.mpp: Mpp = mpp or pair.from_mpp
        self._sizes = [size or pair.from_size]
        while min(self._sizes[-1].height, self._sizes[-1].width) > _SMALLEST:
            self._sizes.append(self._sizes[-1].halved())

    @property
    def identity(self) -> str:
        """Of the slide and the transform: another registration is another slide."""
        return hashlib.sha256(f"{self.slide.identity} {self.pair.digest}".encode()).hexdigest()

    @property
    def levels(self) -> tuple[Level, ...]:
        return native_levels(self._sizes)

    def at(self, mpp: Mpp) -> WarpedSlide:
        """The same slide with the pixels of another lattice as its own."""
        return WarpedSlide(self.slide, self.pair, mpp, SlideView(self, mpp).size)

    def read_level(self, level: int, region: Region) -> U8_HWC:
        """Pixels of a region, [H, W, 3] uint8; white outside the fixed slide and the moving one."""
        if not 0 <= level < len(self._sizes) or region.height < 0 or region.width < 0:
            raise ValueError(f"level {level} of {len(self._sizes)}, {region}: no such level or region")
        pixels_HWC = np.full((region.height, region.width, 3), WHITE, np.uint8)
        inside = region.intersect(Region.of(self._sizes[level])) or Region(0, 0, 0, 0)
        step = max(_STRIP_PIXELS // max(region.width, 1), 1)
        for y in range(inside.y, inside.bottom, step):
            strip = Region(y, inside.x, min(step, inside.bottom - y), inside.width)
            self._draw(level, strip, pixels_HWC[strip.slices(region)])
        return pixels_HWC

    def _draw(self, level: int, region: Region, pixels_HWC: U8_HWC) -> None:
        at_2HW = self._grid(level, region)
        finer = min(self.mpp[axis] * 2**level / self.slide.mpp[axis] for axis in (0, 1))
        halvings = max(math.floor(math.log2(finer) + 0.05), 0)
        mpp = (self.slide.mpp[0] * 2**halvings, self.slide.mpp[1] * 2**halvings)
        view = SlideView(self.slide, mpp, icc="ignore")
        low, high = (bound(at_2HW, axis=(1, 2)) // mpp for bound in (np.min, np.max))
        touched = Region(*low.astype(int).tolist(), *(high - low + 1).astype(int).tolist()).grown(_MARGIN)
        if touched.intersect(Region.of(view.size)):
            pixels_HWC[:] = pull_back(
                view.read(touched), at_2HW, mpp, origin=(touched.y, touched.x), fill=WHITE
            )

    def _grid(self, level: int, region: Region) -> npt.NDArray[np.float64]:
        return self.pair.transform.grid(region, (self.mpp[0] * 2**level, self.mpp[1] * 2**level))

    def inside(self, region: Region) -> npt.NDArray[np.bool_]:
        """Which pixels of a region of level 0 show the moving slide, bool [H, W]; the others are white."""
        size = self.slide.levels[0].size
        limit_2 = np.array([size.height, size.width]) * self.slide.mpp
        at_2HW = self._grid(0, region)
        return np.asarray(((at_2HW >= 0) & (at_2HW < limit_2[:, None, None])).all(axis=0))

    def close(self) -> None:
        """Close the moving slide."""
        self.slide.close()


def on_lattice(slide: Slide, mpp: Mpp | None) -> Slide:
    """The slide for a view at ``mpp``: one that is read through a transform is drawn on that lattice."""
    return slide.at(mpp) if isinstance(slide, WarpedSlide) and mpp is not None else slide
