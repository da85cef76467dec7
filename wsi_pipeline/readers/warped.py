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
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Level, Slide
from wsi_pipeline.core.transform import SlideTransform, pull_back
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers._base import native_levels
from wsi_pipeline.readers.lattice import SlideView

__all__ = ["PAIR_VERSION", "SectionPair", "WarpedSlide", "load_pair", "on_lattice"]

PAIR_VERSION = 1
_SMALLEST = 256
_STRIP_PIXELS = 4 << 20
_MARGIN = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SectionPair:
    """What a ``pair.json`` says that reading needs; ``about``: all of it, as JSON values."""

    path: str
    transform: SlideTransform
    from_size: Size
    from_mpp: Mpp
    to_mpp: Mpp
    about: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of everything that decides a pixel."""
        t, field = self.transform, self.transform.field_2HW
        names = [self.about["from_identity"], self.about["to_identity"]]
        text = repr((names, self.from_size, self.from_mpp, t.affine_23.tolist(), t.field_um_per_px))
        return hashlib.sha256(text.encode() + (b"" if field is None else field.tobytes())).hexdigest()


def load_pair(path: str | Path) -> SectionPair:
    """Read a ``pair.json`` and its field; raises ConfigError that names the file and what is wrong."""
    import zarr

    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        if about["version"] != PAIR_VERSION or about["units"] != "micrometer" or about["axes"] != "yx":
            raise ValueError("it is of another version, or in other units")
        field = None
        if about["field"] is not None:
            if Path(about["field"]).name != about["field"]:
                raise ValueError("its field does not lie beside it")
            field = np.asarray(zarr.open_array(Path(path).parent / about["field"], mode="r")[:], np.float32)
        transform = SlideTransform(
            affine_23=np.array(about["affine"], np.float64),
            field_2HW=field,
            field_um_per_px=float(about["field_um_per_px"]),
        )
        mpps = [(float(y), float(x)) for y, x in (about["from_mpp"], about["to_mpp"])]
        if not all(math.isfinite(value) and value > 0 for mpp in mpps for value in mpp):
            raise ValueError("its pixel sizes are none")
        height, width = about["from_size"]
        str(about["from_identity"] + about["to_identity"])
        size = Size(int(height), int(width))
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        told = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path}: cannot be read as a transform ({told.partition(chr(10))[0]}); make it again with "
            "wsi-pipeline register"
        ) from error
    return SectionPair(
        path=str(path), transform=transform, from_size=size, from_mpp=mpps[0], to_mpp=mpps[1], about=about
    )


class WarpedSlide:
    """The moving slide of a pair as if it lay where the fixed one lies; implements ``Slide``.

    Raises ConfigError where the slide is not the one that was registered, or has another pixel size.
    """

    reader, mpp_origin = "warped", "transform"

    def __init__(
        self, slide: Slide, pair: SectionPair, *, mpp: Mpp | None = None, size: Size | None = None
    ) -> None:
        if slide.identity != pair.about["to_identity"]:
            raise ConfigError(
                f"{slide.slide_id}: is not the slide that {pair.path} was made for ({pair.about['to']}); "
                "register it with wsi-pipeline register"
            )
        if not np.allclose(slide.mpp, pair.to_mpp, rtol=1e-3):
            raise ConfigError(
                f"{slide.slide_id}: has {slide.mpp[1]:g} µm per pixel here and had {pair.to_mpp[1]:g} in "
                f"{pair.path}; state the same mpp in both places"
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
        return WarpedSlide(self.slide, self.pair, mpp=mpp, size=SlideView(self, mpp).size)

    def read_level(self, level: int, region: Region) -> U8_HWC:
        """Pixels of a region, [H, W, 3] uint8; white outside the fixed slide and the moving one."""
        pixels_HWC = np.full((region.height, region.width, 3), WHITE, np.uint8)
        inside = region.intersect(Region.of(self._sizes[level]))
        if inside is None:
            return pixels_HWC
        step = max(_STRIP_PIXELS // inside.width, 1)
        for y in range(inside.y, inside.bottom, step):
            strip = Region(y, inside.x, min(step, inside.bottom - y), inside.width)
            self._draw(level, strip, pixels_HWC[strip.slices(region)])
        return pixels_HWC

    def _draw(self, level: int, region: Region, pixels_HWC: U8_HWC) -> None:
        mpp = (self.mpp[0] * 2**level, self.mpp[1] * 2**level)
        at_2HW = self.pair.transform.grid(region, mpp)
        finer = min(wanted / own for wanted, own in zip(mpp, self.slide.mpp, strict=True))
        halvings = max(math.floor(math.log2(finer) + 0.05), 0)
        view = SlideView(
            self.slide, (self.slide.mpp[0] * 2**halvings, self.slide.mpp[1] * 2**halvings), icc="ignore"
        )
        low, high = (
            [int(bound(plane) / mpp_s) for plane, mpp_s in zip(at_2HW, view.mpp, strict=True)]
            for bound in (np.min, np.max)
        )
        touched = Region(low[0], low[1], high[0] - low[0] + 1, high[1] - low[1] + 1).grown(_MARGIN + 1)
        if touched.intersect(Region.of(view.size)) is not None:
            origin = (touched.y, touched.x)
            pixels_HWC[:] = pull_back(view.read(touched), at_2HW, view.mpp, origin=origin, fill=WHITE)

    def inside(self, level: int, region: Region) -> npt.NDArray[np.bool_]:
        """Which pixels of a region show the moving slide, bool [H, W]; the others are white."""
        at_2HW = self.pair.transform.grid(region, (self.mpp[0] * 2**level, self.mpp[1] * 2**level))
        base = self.slide.levels[0].size
        limit = np.array([base.height * self.slide.mpp[0], base.width * self.slide.mpp[1]])[:, None, None]
        return np.asarray(((at_2HW >= 0) & (at_2HW < limit)).all(axis=0))

    def close(self) -> None:
        """Close the moving slide."""
        self.slide.close()


def on_lattice(slide: Slide, mpp: Mpp) -> Slide:
    """The slide for a view at ``mpp``: one that is read through a transform is drawn on that lattice."""
    return slide.at(mpp) if isinstance(slide, WarpedSlide) else slide
