"""Does a picture contain another one, scaled and coded again? Normalised cross-correlation in two steps.

Coarse: each template in grey at six sizes of one octave (the root of its area is 24 to 48 px) and four turns,
correlated by FFT with windows of 256 px of each octave of the picture. Fine: where the coarse correlation
is high, the template at up to four times that size is held against the picture's finer pixels, at sizes
around the one found. Both without slow changes of brightness.

Why two steps: at 24 px any dark blob beside a bright one looks like any other; at 96 px a label is itself
and nothing else. Measured on a QC picture with the label and macro of a real slide pasted in at 0.11 to 1 of
their size, JPEG quality 50 to 95: the best fine correlation of a copy is 0.80 to 0.97, of anything else in
that picture and in 15 tiles of other slides 0.38 to 0.70; the threshold is 0.72.
Source: J. P. Lewis, Fast normalized cross-correlation, 1995.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import scipy.fft

from wsi_pipeline.audit.pictures import SidePicture
from wsi_pipeline.core.protocols import U8_HWC

__all__ = ["LEAST_SIDE", "STRIDE", "WINDOW", "Likeness", "Match", "from_octaves", "grey", "halved"]

WINDOW, STRIDE = 256, 208
LEAST_SIDE = 48
"""Root of the area in pixels of the smallest copy that is found in a picture."""
_SIDES = tuple(round(24 * 2 ** (step / 6), 1) for step in range(6))
_SHORT = 6
_COARSE, _FINE = 0.6, 0.72
_FINE_SIDE = 96
_BEST = 3
_FLAT = 4.0
_BLUR = 5.0
_ELONGATED = 1.8

F32_HW: TypeAlias = npt.NDArray[np.float32]
Finer: TypeAlias = Callable[[float, float, float, float, float], F32_HW | None]
"""(y, x, height, width, factor) in pixels of the octave that was searched, factor: how much finer; None where
the picture has no finer pixels. Returns grey pixels of that place, at that size times the factor."""


@dataclass(frozen=True, slots=True)
class Match:
    """A copy of picture ``name`` at (y, x), pixels of the searched octave, with its correlation."""

    name: str
    score: float
    y: float
    x: float
    height: float
    width: float


@dataclass(frozen=True, slots=True)
class _Template:
    name: str
    source_HW: F32_HW
    shape: tuple[int, int]


def grey(pixels_HWC: U8_HWC) -> F32_HW:
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels_HWC), cv2.COLOR_RGB2GRAY), np.float32)


def halved(pixels_HW: F32_HW) -> F32_HW:
    """2 x 2 means; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in pixels_HW.shape)
    even = pixels_HW[:height, :width]
    return np.asarray((even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4, np.float32)


class Likeness:
    """Searches for all of ``pictures``; where none is the label, slide-shaped ones also by their two ends."""

    def __init__(self, pictures: Sequence[SidePicture]) -> None:
        self._templates: list[_Template] = []
        labelled = any("label" in picture.name.lower() for picture in pictures)
        for picture in pictures:
            for name, pixels_HW in _views(picture, ends=not labelled):
                if pixels_HW.std() > _FLAT:
                    self._templates += _templates(name, _not_larger(pixels_HW))
        self.names = tuple(dict.fromkeys(template.name for template in self._templates))
        spectra = [np.conj(scipy.fft.rfft2(_unit(t), (WINDOW, WINDOW))) for t in self._templates]
        self._spectra = np.array(spectra, np.complex64)

    def without(self, names: Sequence[str]) -> Likeness:
        """The same search without some templates."""
        rest = Likeness(())
        keep = [i for i, template in enumerate(self._templates) if template.name not in names]
        rest._templates = [self._templates[i] for i in keep]
        rest._spectra = self._spectra[keep]
        rest.names = tuple(name for name in self.names if name not in names)
        return rest

    def in_picture(self, pixels_HWC: U8_HWC, least: float = _FINE) -> list[Match]:
        """Copies in a whole picture in memory, from ``LEAST_SIDE`` px on; places in pixels of an octave.

        ``least``: fine correlation that makes a copy.
        """
        octaves = [grey(pixels_HWC)]
        while min(octaves[-1].shape) >= 2 * _SHORT:
            octaves.append(halved(octaves[-1]))
        found = []
        for number in range(1, len(octaves)):
            found += self.in_octave(octaves[number], from_octaves(octaves, number), least)
        return found

    def in_octave(self, octave_HW: F32_HW, finer: Finer, least: float = _FINE) -> list[Match]:
        """Copies of 24 to 48 px in one octave, confirmed on finer pixels; the best of each template name."""
        best: dict[str, Match] = {}
        for y, x, window in _windows(octave_HW):
            for candidate, template in self._coarse(window):
                moved = Match(
                    template.name, candidate[0], candidate[1] + y, candidate[2] + x, *template.shape
                )
                match = _confirmed(moved, template, finer, least)
                if match is not None and (match.name not in best or best[match.name].score < match.score):
                    best[match.name] = match
        return list(best.values())

    def _coarse(self, window: F32_HW) -> Iterator[tuple[tuple[float, int, int], _Template]]:
        if not self._templates or window.std() < _FLAT:
            return
        padded = np.zeros((WINDOW, WINDOW), np.float32)
        padded[: window.shape[0], : window.shape[1]] = _sharp(window, _BLUR)
        maps = scipy.fft.irfft2(scipy.fft.rfft2(padded)[None] * self._spectra, (WINDOW, WINDOW))
        norms: dict[tuple[int, int], F32_HW] = {}
        peaks = []
        for number, template in enumerate(self._templates):
            height, width = template.shape
            rows, cols = window.shape[0] - height + 1, window.shape[1] - width + 1
            if rows < 1 or cols < 1:
                continue
            if template.shape not in norms:
                norms[template.shape] = _norm(padded, height, width)
            score = maps[number, :rows, :cols] * norms[template.shape][:rows, :cols]
            at = int(score.argmax())
            peaks.append((float(score.flat[at]), *divmod(at, cols), number))
        by_name: dict[str, int] = {}
        for value, y, x, number in sorted(peaks, reverse=True):
            template = self._templates[number]
            by_name[template.name] = by_name.get(template.name, 0) + 1
            if value >= _COARSE and by_name[template.name] <= _BEST:
                yield (value, y, x), template


def _views(picture: SidePicture, *, ends: bool) -> Iterator[tuple[str, F32_HW]]:
    pixels_HW = grey(picture.pixels_HWC)
    yield picture.name, pixels_HW
    height, width = pixels_HW.shape
    if ends and max(height, width) >= _ELONGATED * min(height, width):
        side = min(height, width)
        yield f"{picture.name} (one end)", pixels_HW[:side, :side]
        yield f"{picture.name} (other end)", pixels_HW[-side:, -side:]


def _not_larger(pixels_HW: F32_HW) -> F32_HW:
    """At most the size that the fine step needs: resizing is what costs time there."""
    while pixels_HW.size > 16 * _FINE_SIDE**2:
        pixels_HW = halved(pixels_HW)
    return pixels_HW


def _templates(name: str, pixels_HW: F32_HW) -> Iterator[_Template]:
    for turn in range(4 if "end)" not in name else 1):
        turned = np.ascontiguousarray(np.rot90(pixels_HW, turn))
        for side in _SIDES:
            scale = side / np.sqrt(turned.size)
            shape = tuple(max(_SHORT, round(v * scale)) for v in turned.shape)
            yield _Template(name, turned, (shape[0], shape[1]))


def _resized(pixels_HW: F32_HW, shape: tuple[int, int]) -> F32_HW:
    smaller = shape[0] < pixels_HW.shape[0]
    kind = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels_HW, (shape[1], shape[0]), interpolation=kind), np.float32)


def _sharp(pixels_HW: F32_HW, sigma: float) -> F32_HW:
    """Without slow changes of brightness: illumination and blobs make any two pictures alike."""
    return np.asarray(pixels_HW - cv2.GaussianBlur(pixels_HW, (0, 0), sigma), np.float32)


def _unit(template: _Template) -> F32_HW:
    small = _sharp(_resized(template.source_HW, template.shape), _BLUR)
    centred = small - small.mean()
    return np.asarray(centred / (np.linalg.norm(centred) + 1e-6), np.float32)


def _norm(padded: F32_HW, height: int, width: int) -> F32_HW:
    """One over the norm of each centred window, anchored at its corner; 0 where it is flat."""
    options = {"normalize": False, "anchor": (0, 0), "borderType": cv2.BORDER_CONSTANT}
    total = cv2.boxFilter(padded, cv2.CV_64F, (width, height), **options)  # type: ignore[call-overload]
    square = cv2.boxFilter(padded * padded, cv2.CV_64F, (width, height), **options)  # type: ignore[call-overload]
    energy = square - total * total / (height * width)
    return np.asarray(np.where(energy > height * width, 1 / np.sqrt(np.maximum(energy, 1)), 0), np.float32)


def _windows(octave_HW: F32_HW) -> Iterator[tuple[int, int, F32_HW]]:
    height, width = octave_HW.shape
    for y in range(0, max(height - (WINDOW - STRIDE), 1), STRIDE):
        for x in range(0, max(width - (WINDOW - STRIDE), 1), STRIDE):
            yield y, x, octave_HW[y : y + WINDOW, x : x + WINDOW]


def from_octaves(octaves: Sequence[F32_HW], number: int) -> Finer:
    """Finer pixels for a search in ``octaves[number]``."""

    def finer(y: float, x: float, height: float, width: float, factor: float) -> F32_HW | None:
        steps = min(number, round(math.log2(factor)))
        source, k = octaves[number - steps], 2**steps
        top, left = max(int(y * k), 0), max(int(x * k), 0)
        return source[top : int((y + height) * k), left : int((x + width) * k)]

    return finer


def _confirmed(found: Match, template: _Template, finer: Finer, least: float) -> Match | None:
    """The match with its fine correlation, None where the finer pixels do not bear it out."""
    margin = 0.12 * max(found.height, found.width) + 1
    for factor in (4.0, 2.0):
        place = finer(
            found.y - margin, found.x - margin, found.height + 2 * margin, found.width + 2 * margin, factor
        )
        if place is None or min(place.shape) < 2 * _SHORT:
            continue
        factor = max(place.shape) / (max(found.height, found.width) + 2 * margin)
        score = max(
            _fine_score(place, template.source_HW, found.height * factor * s, found.width * factor * s)
            for s in (0.9, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1)
        )
        if score >= least:
            return Match(found.name, score, found.y, found.x, found.height, found.width)
        return None
    return None


def _fine_score(place: F32_HW, source_HW: F32_HW, height: float, width: float) -> float:
    shape = (round(height), round(width))
    if shape[0] > place.shape[0] or shape[1] > place.shape[1] or min(shape) < _SHORT:
        return 0.0
    small = _resized(source_HW, shape)
    sigma = max(shape) / 12
    sharp_template, sharp_place = _sharp(small, sigma), _sharp(place, sigma)
    if sharp_template.std() < 1 or sharp_place.std() < 1:
        return 0.0
    scores = cv2.matchTemplate(sharp_place, sharp_template, cv2.TM_CCOEFF_NORMED)
    return float(np.nan_to_num(scores, nan=0.0, posinf=0.0).max())
