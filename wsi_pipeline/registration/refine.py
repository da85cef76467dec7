"""From matches to a transform: affine first, then a smooth field, each judged on blocks that it never saw.

A quarter of the blocks, chosen by their place alone, is held out: they share no pixel with those that are
fitted. The error that is reported is measured there, over all held-out blocks that were found, whether they
agree with the transform or not.

Why no dense optical flow: it sees every pixel, so nothing is left on which to measure it, and between stains
it follows brightness rather than tissue. A thin-plate spline through block matches has neither fault.

Sources: G. Wahba, "Spline models for observational data", SIAM 1990 (smoothing thin-plate splines);
M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018 (the R2 sequence).
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree

from wsi_pipeline.core.stain import F64
from wsi_pipeline.core.transform import SlideTransform, fit_affine, plausible
from wsi_pipeline.registration.estimate import BLOCK, REACH, Matches, Section, match_blocks, starts

__all__ = ["AGREE_PX", "Fitted", "measure", "register", "smooth_field"]

AGREE_PX = 3.0
"""A block agrees with a transform that puts it this near, in working pixels."""
REACHES, ROUNDS = (40, REACH), 3
"""How far blocks are looked for while the affine map settles, and rounds of matching for the field."""
AFFINE_PX, MIN_POINTS = 8.0, 6
NEIGHBOURS, ODD_PX, SMOOTHING, MAX_KNOTS = 8, 3.0, 0.3, 1500
KEEP_FIELD = 0.9
"""The field stays where it brings the median held-out error below this share of the affine map's."""
GOOD_START, HOPELESS = 0.3, 0.05
"""Share of all blocks that are found and agree: no other start is tried; no field is tried."""


class Fitted(NamedTuple):
    """A transform, the matches that were fitted, those that were held out, and where all blocks lie (µm)."""

    transform: SlideTransform
    used: Matches
    tested: Matches
    blocks_N2: F64

    def agreeing(self, mpp: float) -> float:
        """Share of all blocks of tissue that were found, fitted, and agree."""
        return float((self.used.errors(self.transform) <= AGREE_PX * mpp).sum()) / max(len(self.blocks_N2), 1)


def register(fixed: Section, moving: Section, *, elastic: bool) -> Fitted:
    """The best transform of all starts, which may be none that serves: ask the gates.

    Starts are compared by the blocks that were fitted, so that the held-out ones stay a measurement.
    """
    tried: list[Fitted] = []
    for start in starts(fixed, moving):
        transform: SlideTransform | None = start
        for reach in REACHES:
            if transform is not None:
                transform = _affine(measure(fixed, moving, transform, reach=reach).used, fixed.mpp)
        fitted = measure(fixed, moving, transform or start)
        if elastic and fitted.agreeing(fixed.mpp) > HOPELESS:
            fitted = _elastic(fixed, moving, fitted)
        tried.append(fitted)
        if fitted.agreeing(fixed.mpp) >= GOOD_START:
            break
    return max(tried, key=lambda fitted: fitted.agreeing(fixed.mpp))


def measure(
    fixed: Section, moving: Section, transform: SlideTransform, *, reach: int = REACH, held_out: float = 0.25
) -> Fitted:
    """Match blocks through a transform; ``held_out``: share of them that is set aside (1: all, for a
    transform that was not made of blocks)."""
    matches, blocks_N2 = match_blocks(fixed, moving, transform, reach)
    row_N, column_N = np.floor(matches.fixed_N2 / (fixed.mpp * BLOCK)).T
    out_N = (row_N * 0.7548776662 + column_N * 0.5698402910) % 1.0 < held_out
    return Fitted(transform, matches.take(~out_N), matches.take(out_N), blocks_N2)


def _affine(matches: Matches, mpp: float) -> SlideTransform | None:
    """Affine map through most matches; None where hardly any agree on one that sections may have."""
    if len(matches.ncc_N) < MIN_POINTS:
        return None
    points, far = (matches.fixed_N2, matches.moving_N2), AFFINE_PX * mpp
    affine, inlier = cv2.estimateAffine2D(*points, ransacReprojThreshold=far, maxIters=5000)
    if affine is None or inlier.sum() < MIN_POINTS:
        return None
    near = matches.take(inlier[:, 0] > 0)
    affine = fit_affine(near.fixed_N2, near.moving_N2)
    return SlideTransform(affine_23=affine) if plausible(affine) else None


def _elastic(fixed: Section, moving: Section, plain: Fitted) -> Fitted:
    """With a field, matched anew through it some times; without, where that does not help."""
    bent = plain
    for _ in range(ROUNDS):
        transform = _bent(bent.used, plain.transform, fixed)
        if transform is None:
            return plain
        bent = measure(fixed, moving, transform)
    before, after = (bent.tested.errors(fit.transform) for fit in (plain, bent))
    return bent if len(after) and np.median(after) <= KEEP_FIELD * np.median(before) else plain


def _bent(matches: Matches, affine: SlideTransform, fixed: Section) -> SlideTransform | None:
    """The affine map and a smooth field through the matches that agree with their neighbours."""
    if len(matches.ncc_N) < 2 * NEIGHBOURS:
        return None
    rest_N2 = matches.moving_N2 - affine.points(matches.fixed_N2)
    _, near_NK = cKDTree(matches.fixed_N2).query(matches.fixed_N2, NEIGHBOURS + 1)
    odd_N = np.linalg.norm(rest_N2 - np.median(rest_N2[near_NK[:, 1:]], axis=1), axis=1)
    even = matches.take(odd_N <= ODD_PX * fixed.mpp)
    if len(even.ncc_N) < 2 * NEIGHBOURS:
        return None
    return smooth_field(even.fixed_N2, even.moving_N2, affine, fixed)


def smooth_field(from_N2: F64, to_N2: F64, affine: SlideTransform, fixed: Section) -> SlideTransform:
    """An affine map and the smoothing spline of what it leaves between points [N, 2] µm.

    The spline is evaluated twice a block and enlarged to nodes 2 working pixels apart; nowhere does it reach
    farther than at the points.
    """
    every = slice(None, None, -(-len(from_N2) // MAX_KNOTS))
    knots_N2, rest_N2 = from_N2[every] / (BLOCK * fixed.mpp), (to_N2 - affine.points(from_N2))[every]
    spline = RBFInterpolator(knots_N2, rest_N2, kernel="thin_plate_spline", smoothing=SMOOTHING)
    rows, columns = (-(-2 * side // BLOCK) for side in fixed.tissue_HW.shape)
    at_2HW = (np.indices((rows, columns)) + 0.5) / 2
    coarse_HW2 = spline(at_2HW.reshape(2, -1).T).reshape(rows, columns, 2)
    coarse_HW2 = np.clip(coarse_HW2, rest_N2.min(axis=0), rest_N2.max(axis=0)).astype(np.float32)
    size = (columns * BLOCK // 4, rows * BLOCK // 4)
    field_HW2 = np.asarray(cv2.resize(coarse_HW2, size, interpolation=cv2.INTER_CUBIC), np.float32)
    field_2HW = np.ascontiguousarray(field_HW2.transpose(2, 0, 1))
    return SlideTransform(affine_23=affine.affine_23, field_2HW=field_2HW, field_um_per_px=2 * fixed.mpp)
