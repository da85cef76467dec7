"""Looks for the side pictures of a slide in the decoded pixels of an output.

Two searches. *Exact runs*: ``_RUN`` pixels of a row of the side picture, in every level and picture; where
these are stored without loss, any part that holds one such run unscaled is found. *Likeness*: scaled and
coded copies of the whole picture, in every picture and level (``likeness``). In a large level the smallest
copy that is found grows with the level; ``least_copy`` says to what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from wsi_pipeline.audit.likeness import F32_HW, STRIDE, WINDOW, Likeness, Match, from_octaves, grey, halved
from wsi_pipeline.audit.pictures import SidePicture
from wsi_pipeline.audit.search import Searcher
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC, Slide

__all__ = ["PixelSearch", "least_copy"]

_RUN, _DIVERSE, _RUNS_A_PICTURE = 24, 8, 256
_IN_MEMORY = 4_000_000
_FACTORS = ((256_000_000, 4), (4_000_000_000, 8))
_HUGE = 16
_ALIKE = 0.6
"""Correlation with the scan itself from which a view says nothing; below that of a copy, to be safe."""
_PANEL, _MARGIN = 460, 14


def least_copy(area: int) -> int:
    """Root of the area, in level pixels, of the smallest scaled copy that is found in a level."""
    return 48 if area <= _IN_MEMORY else 24 * _factor(area)


class PixelSearch:
    """Searches for ``pictures``; ``pixels`` counts what was looked at.

    What the scan itself shows cannot be told from a copy (a macro shows the tissue too): views that look a
    little like ``scan``, on paper as in a QC picture, are left out; ``left_out`` names them.
    """

    def __init__(self, pictures: Sequence[SidePicture], scan: Slide) -> None:
        self.pixels = 0
        self._runs = [(p.name, run) for p in pictures for run in _exact_runs(p.pixels_HWC)]
        self._searcher = Searcher([run[:, 1].tobytes() for _, run in self._runs])
        likeness = Likeness(pictures)
        own = _overview(scan)
        shown = likeness.in_picture(own, _ALIKE) + likeness.in_picture(_on_paper(own), _ALIKE)
        self.left_out = tuple(sorted({match.name for match in shown}))
        self._likeness = likeness.without(self.left_out)

    def in_picture(self, pixels_HWC: U8_HWC) -> Iterator[tuple[str, str]]:
        """(picture, how it was found) in one decoded picture, [H, W, 3] uint8."""
        self.pixels += pixels_HWC.shape[0] * pixels_HWC.shape[1]
        yield from self._exact(pixels_HWC)
        yield from _described(self._likeness.in_picture(pixels_HWC))

    def in_level(self, slide: Slide, level: int) -> Iterator[tuple[str, str]]:
        """The same in one level of a slide, window by window; raises SlideError where it cannot be read.

        Nothing is read where there is nothing to search for.
        """
        if self._runs or self._likeness.names:
            yield from self._scaled(slide, level)

    def _exact(self, pixels_HWC: U8_HWC) -> Iterator[tuple[str, str]]:
        green = np.ascontiguousarray(pixels_HWC[..., 1]).tobytes()
        flat = pixels_HWC.reshape(-1, 3)
        for hit in self._searcher.find(green):
            name, run = self._runs[hit.pattern]
            if np.array_equal(flat[hit.start : hit.stop], run):
                yield name, "pixel for pixel"

    def _scaled(self, slide: Slide, level: int) -> Iterator[tuple[str, str]]:
        size = slide.levels[level].size
        if size.area <= _IN_MEMORY:
            yield from self.in_picture(slide.read_level(level, Region.of(size)))
            return
        factor = _factor(size.area)
        shape = (-(-size.height // factor), -(-size.width // factor))
        whole = np.full(shape, 255, np.uint8)
        for y in range(0, size.height, STRIDE * factor):
            for x in range(0, size.width, STRIDE * factor):
                frame = Region(y, x, WINDOW * factor, WINDOW * factor)
                pixels_HWC = slide.read_level(level, frame)
                self.pixels += (STRIDE * factor) ** 2
                yield from self._exact(pixels_HWC)
                octaves = _octaves(pixels_HWC, factor)
                yield from _described(
                    self._likeness.in_octave(octaves[-1], from_octaves(octaves, len(octaves) - 1))
                )
                target = whole[y // factor : y // factor + WINDOW, x // factor : x // factor + WINDOW]
                target[:] = octaves[-1][: target.shape[0], : target.shape[1]]
        coarse = [np.asarray(whole, np.float32)]
        while min(coarse[-1].shape) >= 16:
            coarse.append(halved(coarse[-1]))
            number = len(coarse) - 1
            yield from _described(self._likeness.in_octave(coarse[number], from_octaves(coarse, number)))


def _factor(area: int) -> int:
    return next((factor for limit, factor in _FACTORS if area <= limit), _HUGE)


def _octaves(pixels_HWC: U8_HWC, factor: int) -> list[F32_HW]:
    """Grey at a quarter of the factor, then halved: what the fine step needs."""
    first = max(factor // 4, 1)
    height, width = pixels_HWC.shape[0] // first, pixels_HWC.shape[1] // first
    small = cv2.resize(grey(pixels_HWC), (width, height), interpolation=cv2.INTER_AREA)
    octaves = [np.asarray(small, np.float32)]
    for _ in range(int(np.log2(factor // first))):
        octaves.append(halved(octaves[-1]))
    return octaves


def _described(matches: Sequence[Match]) -> Iterator[tuple[str, str]]:
    for match in matches:
        yield match.name, f"scaled, correlation {match.score:.2f}"


def _overview(scan: Slide) -> U8_HWC:
    """The scan, at most ``_PANEL`` px long, from the coarsest level that has so many."""
    sizes = [level.size for level in scan.levels]
    level = max((i for i, s in enumerate(sizes) if max(s.height, s.width) >= _PANEL), default=0)
    size = sizes[level]
    factor = max(1, -(-max(size.height, size.width) // _PANEL))
    strip = max(1, _IN_MEMORY // (size.width * factor)) * factor
    rows = []
    for y in range(0, size.height - factor + 1, strip):
        height = min(strip, size.height - y) // factor
        pixels_HWC = scan.read_level(level, Region(y, 0, height * factor, size.width))
        rows.append(cv2.resize(pixels_HWC, (size.width // factor, height), interpolation=cv2.INTER_AREA))
    return np.concatenate(rows)


def _on_paper(picture_HWC: U8_HWC) -> U8_HWC:
    """Two copies side by side on white paper, framed by a thin line, as in our QC pictures."""
    framed = np.pad(picture_HWC, ((1, 1), (1, 1), (0, 0)), constant_values=190)
    gap = ((_MARGIN // 2,) * 2,) * 2
    single = np.pad(framed, (*gap, (0, 0)), constant_values=255)
    margin = ((2 * _MARGIN,) * 2,) * 2
    return np.pad(np.concatenate([single, single], axis=1), (*margin, (0, 0)), constant_values=255)


def _exact_runs(pixels_HWC: U8_HWC) -> list[U8_HWC]:
    """Pieces of rows, [_RUN, 3], with at least ``_DIVERSE`` different greens, evenly over the picture."""
    height, width = pixels_HWC.shape[:2]
    found = [
        pixels_HWC[y, x : x + _RUN]
        for y in range(0, height, max(1, height // 128))
        for x in range(0, width - _RUN + 1, max(_RUN, width // 16))
        if len(np.unique(pixels_HWC[y, x : x + _RUN, 1])) >= _DIVERSE
    ]
    return found[:: max(1, len(found) // _RUNS_A_PICTURE)]
