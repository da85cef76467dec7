"""Measuring how two sections lie to each other: structure, a rough start, and matches of blocks.

Structure is the density of red light, less its local mean and over its local spread, inside the tissue.
Why: haematoxylin absorbs red, eosin hardly and DAB little, so nuclei and glands are there in H&E and IHC
alike; and without the local level neither the staining's strength nor the tissue's outline is left to match.

Sources: D. Lowe, "Distinctive image features from scale-invariant keypoints", IJCV 60, 2004 (SIFT, ratio
test).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.core.stain import F64, estimate_white, optical_density
from wsi_pipeline.core.transform import SlideTransform, plausible, pull_back

__all__ = ["BLOCK", "REACH", "Matches", "Section", "make_section", "match_blocks", "starts"]

F32_HW: TypeAlias = npt.NDArray[np.float32]

LEVEL_PX = 16.0
"""Sigma of the neighbourhood whose level and spread are taken away."""
LINE_PX, LINE_SPREAD = 64, 0.45
"""Tissue in a row, in working pixels, that can show a line; share of the spread that rows of a pattern have
in common (layers of cortex 0.41, lines that are 25 % darker 0.53)."""
BLOCK, REACH = 32, 16
"""Side of a block, and how far it is looked for, in working pixels."""
MAX_BLOCKS, MIN_NCC, RETURN_PX = 3000, 0.25, 1.5
RATIO, MIN_INLIERS, SIFT_PX, KEYPOINTS = 0.85, 8, 8.0, 8000
COARSE, ANGLES, COARSE_STARTS = 8, 72, 3
"""Working pixels along a pixel of the rough search, its directions, and how many of its answers are tried."""


class Section(NamedTuple):
    """A slide at ``mpp`` µm a pixel on both axes: ``rgb_HWC`` uint8, tissue bool [H, W], structure [H, W]."""

    rgb_HWC: U8_HWC
    tissue_HW: npt.NDArray[np.bool_]
    structure_HW: F32_HW
    mpp: float

    @property
    def frame(self) -> Region:
        """All of it."""
        return Region(0, 0, *self.tissue_HW.shape)

    @property
    def stride(self) -> int:
        """Working pixels from one block to the next."""
        return max(BLOCK, int(np.sqrt(self.tissue_HW.sum() / MAX_BLOCKS)))

    def warped(self, plane: npt.NDArray[Any], at_2HW: F64, *, fill: float = 0.0) -> npt.NDArray[Any]:
        """One of its pictures at other places (µm)."""
        return pull_back(plane, at_2HW, (self.mpp, self.mpp), fill=fill)


def make_section(rgb_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], mpp: float) -> Section:
    """Section of a picture [H, W, 3] uint8 and its tissue."""
    density_HWC = optical_density(rgb_HWC, estimate_white(rgb_HWC, tissue_HW))
    red_HW = _blur(np.clip(density_HWC[..., 0], -0.1, 2.0).astype(np.float32), 1.0)
    weight_HW = tissue_HW.astype(np.float32)
    area_HW = _blur(weight_HW, LEVEL_PX) + 1e-3
    mean_HW = _blur(red_HW * weight_HW, LEVEL_PX) / area_HW
    red_HW -= _lines(red_HW - mean_HW, tissue_HW)[:, None]
    red_HW -= _lines((red_HW - mean_HW).T, tissue_HW.T)
    mean_HW = _blur(red_HW * weight_HW, LEVEL_PX) / area_HW
    square_HW = _blur(red_HW * red_HW * weight_HW, LEVEL_PX) / area_HW
    spread_HW = np.sqrt(np.maximum(square_HW - mean_HW * mean_HW, 0.0)) + 0.03
    structure_HW = np.clip((red_HW - mean_HW) / spread_HW, -3, 3) * _blur(weight_HW, 2.0) * weight_HW
    return Section(rgb_HWC, tissue_HW, structure_HW.astype(np.float32), mpp)


def _blur(plane_HW: F32_HW, sigma: float) -> F32_HW:
    return np.asarray(cv2.GaussianBlur(plane_HW, (0, 0), sigma), np.float32)


def _lines(rest_HW: F32_HW, tissue_HW: npt.NDArray[np.bool_]) -> F32_HW:
    """What the tissue of each row has in common, [H]; 0 where that is no pattern.

    The lines of a scanner's stitching lie alike on every slide, and would be in register on any two.
    """
    some = np.s_[:, :: max(tissue_HW.shape[1] // 512, 1)]
    long_N = tissue_HW.sum(axis=1) >= LINE_PX
    long_N &= tissue_HW[some].any(axis=1)
    lines_N = np.zeros(len(long_N), np.float32)
    if long_N.any():
        rest_NM = np.where(tissue_HW, rest_HW, np.nan)[some][long_N]
        lines_N[long_N] = np.nanmedian(rest_NM, axis=1)
        lines_N *= lines_N.std() > LINE_SPREAD * np.nanstd(rest_NM)
    return lines_N


class Matches(NamedTuple):
    """Blocks that were found again: points (y, x) in µm on both slides, [N, 2], and their correlation [N]."""

    fixed_N2: F64
    moving_N2: F64
    ncc_N: F64

    def take(self, keep_N: npt.NDArray[np.bool_]) -> Matches:
        """Some of them."""
        return Matches(*(values[keep_N] for values in self))

    def errors(self, transform: SlideTransform) -> F64:
        """Distance [N] in µm between where a block was found and where the transform puts it."""
        return np.asarray(np.linalg.norm(transform.points(self.fixed_N2) - self.moving_N2, axis=1))


def starts(fixed: Section, moving: Section) -> Iterator[SlideTransform]:
    """Rough transforms, the likeliest first: from key points, then from all directions of the tissue."""
    affine = _by_keypoints(fixed, moving)
    if affine is not None and plausible(affine):
        yield SlideTransform(affine_23=affine)
    yield from _by_directions(fixed, moving)


def _by_keypoints(fixed: Section, moving: Section) -> F64 | None:
    """Similarity [2, 3] through the key points of both sections; None where too few agree."""
    places, descriptors = [], []
    for section in (fixed, moving):
        grey_HW = np.clip(section.structure_HW * 40 + 128, 0, 255).astype(np.uint8)
        keys, values = cv2.SIFT.create(KEYPOINTS).detectAndCompute(
            grey_HW, section.tissue_HW.astype(np.uint8)
        )
        if len(keys) < MIN_INLIERS:
            return None
        places.append((np.array([key.pt[::-1] for key in keys]) + 0.5) * section.mpp)
        descriptors.append(values)
    nearest = cv2.BFMatcher().knnMatch(descriptors[0], descriptors[1], 2)
    pairs_N2 = np.array([(a.queryIdx, a.trainIdx) for a, b in nearest if a.distance < RATIO * b.distance])
    if len(pairs_N2) < MIN_INLIERS:
        return None
    points = [places[side][pairs_N2[:, side]] for side in (0, 1)]
    affine, inlier = cv2.estimateAffinePartial2D(
        points[0], points[1], ransacReprojThreshold=SIFT_PX * fixed.mpp, maxIters=20000, confidence=0.9999
    )
    return affine if affine is not None and inlier.sum() >= MIN_INLIERS else None


def _by_directions(fixed: Section, moving: Section) -> Iterator[SlideTransform]:
    """The moving section turned through all directions and laid where its tissue correlates best."""
    step = fixed.mpp * COARSE
    still, turning = (_dense(section, step) for section in (fixed, moving))
    frame = int(np.ceil(np.hypot(*turning.shape)))
    side = cv2.getOptimalDFTSize(frame + max(still.shape))
    spectrum = np.fft.rfft2(still, (side, side))
    answers = []
    for angle in np.arange(ANGLES) * (2 * np.pi / ANGLES):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        offset = np.array(turning.shape) * step / 2 - turn @ np.full(2, frame * step / 2)
        turned = SlideTransform(affine_23=np.column_stack([turn, offset]))
        laid = pull_back(turning, turned.grid(Region(0, 0, frame, frame), (step, step)), (step, step))
        energy = float(np.linalg.norm(laid)) or 1.0
        peaks = np.fft.irfft2(spectrum * np.conj(np.fft.rfft2(laid, (side, side))), (side, side)) / energy
        place = np.array(np.unravel_index(int(peaks.argmax()), peaks.shape))
        shift = np.where(place < max(still.shape), place, place - side) * step
        answers.append((float(peaks.max()), np.column_stack([turn, offset - turn @ shift])))
    for _, affine in sorted(answers, key=lambda answer: -answer[0])[:COARSE_STARTS]:
        yield SlideTransform(affine_23=affine)


def _dense(section: Section, step: float) -> F32_HW:
    """Darkness inside the tissue at ``step`` µm a pixel, 0 .. 1, 0 outside."""
    height, width = (max(round(side * section.mpp / step), 8) for side in section.tissue_HW.shape)
    dark_HW = (255.0 - section.rgb_HWC.mean(axis=2, dtype=np.float32)) * section.tissue_HW / 255.0
    return np.asarray(cv2.resize(dark_HW, (width, height), interpolation=cv2.INTER_AREA), np.float32)


def match_blocks(
    fixed: Section, moving: Section, transform: SlideTransform, reach: int = REACH
) -> tuple[Matches, F64]:
    """Blocks of the fixed section's tissue, found again near where ``transform`` puts them; and where all
    blocks of its tissue lie, [N, 2] µm.

    A block counts as found where its best correlation is at least ``MIN_NCC``, does not lie on the rim of the
    search, and leads back: what was found, searched for in the fixed section, is the block again. None of
    this asks whether the transform is right, so the distances of matches to it are an unbiased measurement.
    """
    at_2HW = transform.grid(fixed.frame, (fixed.mpp, fixed.mpp))
    there_HW = moving.warped(moving.tissue_HW.astype(np.float32), at_2HW)
    warped_HW = moving.warped(moving.structure_HW, at_2HW)
    found, blocks = [], []
    for y in range(0, fixed.frame.height - BLOCK + 1, fixed.stride):
        for x in range(0, fixed.frame.width - BLOCK + 1, fixed.stride):
            here = np.s_[y : y + BLOCK, x : x + BLOCK]
            if fixed.tissue_HW[here].mean() < 0.7:
                continue
            blocks.append((y + BLOCK / 2, x + BLOCK / 2))
            shift, ncc = _found(fixed.structure_HW, warped_HW, y, x, reach)
            if shift is None or there_HW[here].mean() < 0.5:
                continue
            back_y, back_x = round(y + shift[0]), round(x + shift[1])
            back, _ = _found(warped_HW, fixed.structure_HW, back_y, back_x, reach)
            if back is not None and np.abs(back + (back_y - y, back_x - x)).max() < RETURN_PX:
                found.append((y + BLOCK / 2, x + BLOCK / 2, *shift, ncc))
    values = np.array(found, np.float64).reshape(-1, 5)
    points_N2 = values[:, :2] * fixed.mpp
    moving_N2 = transform.points(points_N2 + values[:, 2:4] * fixed.mpp)
    return Matches(points_N2, moving_N2, values[:, 4]), np.reshape(blocks, (-1, 2)) * fixed.mpp


def _found(pattern_HW: F32_HW, searched_HW: F32_HW, y: int, x: int, reach: int) -> tuple[F64 | None, float]:
    """Shift (y, x) in pixels, to parts of them, at which a block of one image is found in the other."""
    top, left = max(y - reach, 0), max(x - reach, 0)
    area = searched_HW[top : y + BLOCK + reach, left : x + BLOCK + reach]
    block = pattern_HW[max(y, 0) : y + BLOCK, max(x, 0) : x + BLOCK]
    if block.shape != (BLOCK, BLOCK) or min(area.shape) < BLOCK + 2 or block.std() < 1e-3:
        return None, 0.0
    score = cv2.matchTemplate(area, block, cv2.TM_CCOEFF_NORMED)
    _, peak, _, (column, row) = cv2.minMaxLoc(score)
    if peak < MIN_NCC or not (0 < row < score.shape[0] - 1 and 0 < column < score.shape[1] - 1):
        return None, peak
    parts = []
    for low, middle, high in (score[row - 1 : row + 2, column], score[row, column - 1 : column + 2]):
        bend = low - 2 * middle + high
        parts.append(0.5 * (low - high) / bend if bend < 0 else 0.0)
    return np.array([top + row - y + parts[0], left + column - x + parts[1]]), peak
