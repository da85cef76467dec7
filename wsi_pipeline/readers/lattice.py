"""A slide on the lattice: the only resampler of the package.

Lattice pixel i covers [i, i + 1) * mpp micrometres from the slide's corner; its centre is (i + 0.5) * mpp.
The lattice has as many pixels as have their centre on the slide; outside is white.

How a pixel is computed. From the coarsest native level that is not coarser than the lattice, with r =
lattice mpp / level mpp (r >= 1 but for up-sampling): (1) where r is a whole number, the mean over aligned
r x r native pixels and nothing else, as in our own pyramids; (2) otherwise, where r >= 4, the mean over
k x k, k = floor(r / 2), leaves a ratio in [2, 4); (3) a separable Catmull-Rom kernel (Keys 1981, a = -1/2),
stretched by the ratio against aliasing, its taps clamped to the slide; (4) rounding to uint8.

Why ``read(A | B)`` equals the join of ``read(A)`` and ``read(B)`` bit for bit. Taps and weights of a pixel
are functions of its global index and nothing else; weights are integers (they sum to a power of two); blocks
of the mean are counted from the slide's corner. The sums are formed by matrix products in float32, which is
integer arithmetic here: every partial sum is an integer below 2^24, so each is exact, in whatever order a
BLAS adds.
A crop that is resized on its own has its own phase instead: that is how seams are born.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Slide
from wsi_pipeline.core.pyramid import halve
from wsi_pipeline.readers.icc import to_srgb

__all__ = ["IccMode", "SlideView"]

IccMode = Literal["srgb", "keep", "ignore"]

F32 = npt.NDArray[np.float32]

_LEVEL_TOLERANCE = 1e-3
_COPY_TOLERANCE = 1e-6
_BOX_FROM = 4.0
# Bits of the weights of the first (rows) and second (columns) pass, and of the fraction kept in between.
# Largest sums: 255 * 2^14 * 1.3 (negative lobes) < 2^24, and 255 * 2^3 * 2^12 * 1.3 < 2^24.
_ROW_BITS, _COLUMN_BITS, _FRACTION_BITS = 14, 12, 3
_STRIP_PIXELS = 4 << 20


class SlideView:
    """Pixels of a slide at any working mpp; implements ``View``, pickles, and is thread-safe.

    ``mpp``: (y, x) of the lattice, None = the slide's own; ``icc``: ``"srgb"`` converts from the slide's
    embedded profile, ``"keep"`` and ``"ignore"`` leave the numbers alone (they differ in what a writer does
    with the profile). Raises ValueError for an mpp that is not positive.
    """

    def __init__(self, slide: Slide, mpp: Mpp | None = None, icc: IccMode = "srgb") -> None:
        if icc not in ("srgb", "keep", "ignore"):
            raise ValueError(f"icc is srgb, keep or ignore, not {icc!r}")
        self.slide = slide
        self.icc: IccMode = icc
        self.mpp: Mpp = slide.mpp if mpp is None else (float(mpp[0]), float(mpp[1]))
        if not all(math.isfinite(value) and value > 0 for value in self.mpp):
            raise ValueError(f"the mpp of a lattice is positive, not {self.mpp}")
        base = slide.levels[0].size
        self.size = Size(
            _centres_inside(base.height * slide.mpp[0] / self.mpp[0]),
            _centres_inside(base.width * slide.mpp[1] / self.mpp[1]),
        )
        self.level, self._ratio = _choose_level(slide, self.mpp)
        self._whole = _whole_ratio(self._ratio)

    def read(self, region: Region) -> U8_HWC:
        """Pixels of a lattice region, [H, W, 3] uint8; outside the lattice is white.

        Raises CorruptRegionError where the slide cannot be decoded.
        """
        inside = region.intersect(Region.of(self.size))
        if inside is None:
            return np.full((region.height, region.width, 3), WHITE, np.uint8)
        pixels_HWC = self._read_inside(inside)
        profile = self.slide.icc_profile if self.icc == "srgb" else None
        if profile:
            pixels_HWC = to_srgb(pixels_HWC, profile, slide_id=self.slide.slide_id)
        if inside == region:
            return pixels_HWC
        canvas_HWC = np.full((region.height, region.width, 3), WHITE, np.uint8)
        canvas_HWC[inside.slices(region)] = pixels_HWC
        return canvas_HWC

    def _read_inside(self, region: Region) -> U8_HWC:
        if self._ratio == (1.0, 1.0):
            return self.slide.read_level(self.level, region)
        if self._whole is not None:
            return self._blocks(region, *self._whole)
        extent = self.slide.levels[self.level].size
        rows, columns = _Axis(self._ratio[0], extent.height), _Axis(self._ratio[1], extent.width)
        # Strips bound the memory; weights belong to the rows, so strips are invisible.
        left, right = columns.span(region.x, region.right)
        height = max(int(_STRIP_PIXELS / ((right - left) * rows.scale)), 1)
        result_HWC = np.empty((region.height, region.width, 3), np.uint8)
        for y in range(region.y, region.bottom, height):
            strip = Region(y, region.x, min(height, region.bottom - y), region.width)
            self._resample(strip, rows, columns, result_HWC[strip.slices(region)])
        return result_HWC

    def _resample(self, region: Region, rows: _Axis, columns: _Axis, result_HWC: U8_HWC) -> None:
        top, bottom = rows.span(region.y, region.bottom)
        left, right = columns.span(region.x, region.right)
        pixels_HWC = self._blocks(Region(top, left, bottom - top, right - left), rows.box, columns.box)
        width = pixels_HWC.shape[1]
        partial = np.empty((region.height, width * 3), np.float32)
        for at, band, matrix in rows.bands(region.y, region.bottom, top, _ROW_BITS):
            values = pixels_HWC[band].reshape(-1, width * 3).astype(np.float32)
            _round(
                np.matmul(matrix, values, out=partial[at]), _ROW_BITS - _FRACTION_BITS, 255 << _FRACTION_BITS
            )
        for at, band, matrix in columns.bands(region.x, region.right, left, _COLUMN_BITS):
            # Channels stay interleaved: the matrix acts on each of the three alike.
            interleaved = np.kron(matrix.T, np.eye(3, dtype=np.float32))
            sums = partial[:, 3 * band.start : 3 * band.stop] @ interleaved
            _round(sums, _COLUMN_BITS + _FRACTION_BITS, 255)
            result_HWC[:, at] = sums.reshape(region.height, -1, 3)

    def _blocks(self, blocks: Region, box_y: int, box_x: int) -> U8_HWC:
        """Means over box_y x box_x native pixels; ``blocks`` counts boxes from the slide's corner."""
        if box_y == box_x == 1:
            return self._clamped(blocks)
        mean_HWC = np.empty((blocks.height, blocks.width, 3), np.uint8)
        step = max(_STRIP_PIXELS // (box_y * box_x * blocks.width), 1)
        for row in range(0, blocks.height, step):
            stop = min(row + step, blocks.height)
            native = Region(
                (blocks.y + row) * box_y, blocks.x * box_x, (stop - row) * box_y, blocks.width * box_x
            )
            mean_HWC[row:stop] = _box_mean(self._clamped(native), box_y, box_x)
        return mean_HWC

    def _clamped(self, native: Region) -> U8_HWC:
        """Native pixels, those outside the level repeated from its edge."""
        extent = Region.of(self.slide.levels[self.level].size)
        inside = native.intersect(extent) or extent  # blocks are clamped: there is a common part
        pixels_HWC = self.slide.read_level(self.level, inside)
        if inside == native:
            return pixels_HWC
        before = (inside.y - native.y, inside.x - native.x)
        after = (native.bottom - inside.bottom, native.right - inside.right)
        return np.pad(pixels_HWC, (*zip(before, after, strict=True), (0, 0)), mode="edge")


class _Axis:
    """Taps and weights along one axis; positions are in blocks of ``box`` native pixels."""

    def __init__(self, ratio: float, extent: int) -> None:
        self.box = int(ratio // 2) if ratio >= _BOX_FROM else 1
        self._ratio = ratio / self.box
        self.scale = max(self._ratio, 1.0)
        self._last = -(-extent // self.box) - 1
        self._taps = math.ceil(4 * self.scale) + 1

    def _first(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        centre = (index + 0.5) * self._ratio
        first: npt.NDArray[np.int64] = np.floor(centre - 2 * self.scale).astype(np.int64)
        return first

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Half-open range of the blocks that pixels ``start .. stop - 1`` touch, clamped to the slide."""
        first, last = self._first(np.array([start, stop - 1]))
        return (
            int(min(max(first, 0), self._last)),
            int(min(max(last + self._taps - 1, 0), self._last)) + 1,
        )

    def weights(
        self, start: int, stop: int, bits: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Positions (clamped) and integer weights, both [pixels, taps]; each row sums to ``2**bits``."""
        index = np.arange(start, stop, dtype=np.int64)
        centre = ((index + 0.5) * self._ratio)[:, None]
        position = self._first(index)[:, None] + np.arange(self._taps)
        weight = _catmull_rom((position + 0.5 - centre) / self.scale)
        total = weight[:, 0].copy()
        for tap in range(1, self._taps):  # one by one: numpy's order of summation may depend on the shape
            total += weight[:, tap]
        integer = np.rint(weight / total[:, None] * (1 << bits)).astype(np.int64)
        integer[np.arange(len(index)), weight.argmax(axis=1)] += (1 << bits) - integer.sum(axis=1)
        return np.clip(position, 0, self._last), integer

    def bands(self, start: int, stop: int, origin: int, bits: int) -> Iterator[tuple[slice, slice, F32]]:
        """Pieces of the resampling as small dense matrices [pixels, blocks] of integers in float32.

        Each comes with the slices of the pixels (from ``start``) and of the blocks (from ``origin``) that it
        connects. Few pixels a piece: the matrix is zero outside its diagonal band.
        """
        step = max(int(24 / self.scale), 4)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            positions, weights = self.weights(begin, end, bits)
            low, high = int(positions.min()), int(positions.max()) + 1
            matrix = np.zeros((end - begin, high - low), np.float32)
            np.add.at(matrix, (np.arange(end - begin)[:, None], positions - low), weights)
            yield slice(begin - start, end - start), slice(low - origin, high - origin), matrix


def _round(sums: F32, shift: int, top: int) -> None:
    """In place: ``floor(sum / 2**shift + 1/2)``, clipped to 0 .. ``top``."""
    sums += float(1 << (shift - 1))
    sums *= 2.0**-shift
    np.floor(sums, out=sums)
    np.clip(sums, 0, top, out=sums)


def _catmull_rom(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cubic convolution kernel with a = -1/2 (Keys 1981, eq. 15), zero from distance 2 on."""
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _box_mean(pixels_HWC: U8_HWC, rows: int, columns: int) -> U8_HWC:
    """Mean over rows x columns blocks, half up; the extent is a multiple of both.

    Even factors are halved as long as possible, as our pyramids are: fast, and equal to a level of them.
    """
    while rows % 2 == 0 and columns % 2 == 0:
        pixels_HWC, rows, columns = halve(pixels_HWC), rows // 2, columns // 2
    if rows == columns == 1:
        return pixels_HWC
    height, width = pixels_HWC.shape[:2]
    kind = np.uint16 if rows <= 256 else np.uint32
    tall = np.zeros((height // rows, width, 3), kind)
    for row in range(rows):
        tall += pixels_HWC[row::rows]
    total = np.zeros((height // rows, width // columns, 3), np.uint32)
    for column in range(columns):
        total += tall[:, column::columns]
    area = rows * columns
    return ((total + area // 2) // area).astype(np.uint8)


def _centres_inside(extent: float) -> int:
    """How many pixel centres i + 0.5 lie on an extent (in lattice pixels); at least one."""
    return max(math.ceil(extent - 0.5 - 1e-9 * max(extent, 1.0)), 1)


def _whole_ratio(ratio: tuple[float, float]) -> tuple[int, int] | None:
    """The ratio as integers where both axes are whole numbers, else None."""
    whole = (round(ratio[0]), round(ratio[1]))
    exact = all(abs(r - k) <= _COPY_TOLERANCE for r, k in zip(ratio, whole, strict=True))
    return whole if exact and min(whole) >= 1 else None


def _choose_level(slide: Slide, mpp: Mpp) -> tuple[int, tuple[float, float]]:
    """The coarsest level that is not coarser than the lattice, and the (y, x) ratio to it."""
    chosen, ratios = 0, (mpp[0] / slide.mpp[0], mpp[1] / slide.mpp[1])
    for index, level in enumerate(slide.levels):
        ratio_y, ratio_x = (mpp[axis] / (slide.mpp[axis] * level.downsample[axis]) for axis in (0, 1))
        if min(ratio_y, ratio_x) >= 1 - _LEVEL_TOLERANCE:
            chosen, ratios = index, (ratio_y, ratio_x)
    if all(abs(ratio - 1) <= _COPY_TOLERANCE for ratio in ratios):
        ratios = (1.0, 1.0)
    return chosen, ratios
