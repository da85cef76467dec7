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

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree

from wsi_pipeline.core.stain import F64
from wsi_pipeline.core.transform import SlideTransform, fit_affine
from wsi_pipeline.registration.estimate import BLOCK, Matches, Section, match_blocks, plausible, starts

__all__ = ["AGREE_PX", "Fitted", "measure", "register", "smooth_field"]

AGREE_PX = 3.0
"""A block agrees with a transform that puts it this near, in working pixels."""
REACHES, ROUNDS = (40, 16), 3
"""How far blocks are looked for while the affine map settles, and rounds of matching for the field."""
AFFINE_PX, MIN_POINTS = 8.0, 6
NEIGHBOURS, ODD_PX, SMOOTHING = 8, 3.0, 0.3
MAX_KNOTS = 1500
KEEP_FIELD = 0.9
"""The field stays where it brings the median held-out error below this share of the affine map's."""
GOOD_START = 0.3
"""Where this share of all blocks is found and agrees, no other start is tried."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A transform, the matches that were fitted, those that were held out, and how many blocks of tissue
    there were."""

    transform: SlideTransform
    used: Matches
    tested: Matches
    blocks: int

    def agreeing(self, mpp: float) -> float:
        """Share of all blocks of tissue that were found, fitted, and agree."""
        return float((self.used.errors(self.transform) <= AGREE_PX * mpp).sum()) / max(self.blocks, 1)


def register(fixed: Section, moving: Section, *, elastic: bool) -> Fitted | None:
    """The best transform of all starts; None where no start leads to any.

    Starts are compared by the blocks that were fitted, so that the held-out ones stay a measurement.
    """
    best: Fitted | None = None
    for start in starts(fixed, moving):
        transform: SlideTransform | None = start
        for reach in REACHES:
            if transform is not None:
                transform = _affine(measure(fixed, moving, transform, reach=reach).used, fixed.mpp)
        if transform is None:
            continue
        fitted = measure(fixed, moving, transform)
        fitted = _elastic(fixed, moving, fitted) if elastic else fitted
        if best is None or fitted.agreeing(fixed.mpp) > best.agreeing(fixed.mpp):
            best = fitted
        if best.agreeing(fixed.mpp) >= GOOD_START:
            break
    return best


def measure(
    fixed: Section, moving: Section, transform: SlideTransform, *, reach: int = 16, all_out: bool = False
) -> Fitted:
    """Match blocks through a transform; ``all_out``: it was not made from blocks, so all of them test it."""
    matches, blocks = match_blocks(fixed, moving, transform, reach=reach)
    row_N, column_N = np.floor(matches.fixed_N2 / (fixed.mpp * BLOCK)).T
    out_N = (row_N * 0.7548776662 + column_N * 0.5698402910) % 1.0 < (1.0 if all_out else 0.25)
    return Fitted(transform=transform, used=matches.take(~out_N), tested=matches.take(out_N), blocks=blocks)


def _affine(matches: Matches, mpp: float) -> SlideTransform | None:
    """Affine map through most matches; None where hardly any agree on one that sections may have."""
    if len(matches) < MIN_POINTS:
        return None
    affine, inlier = cv2.estimateAffine2D(
        matches.fixed_N2, matches.moving_N2, ransacReprojThreshold=AFFINE_PX * mpp, maxIters=5000
    )
    if affine is None or inlier.sum() < MIN_POINTS:
        return None
    near = matches.take(inlier[:, 0] > 0)
    affine = fit_affine(near.fixed_N2, near.moving_N2)
    return SlideTransform(affine_23=affine) if plausible(affine) else None


def _elastic(fixed: Section, moving: Section, plain: Fitted) -> Fitted:
    """With a field, matched anew through it some times; without, where that does not help."""
    bent = plain
    for _ in range(ROUNDS):
        transform = _bent(bent.used, plain.transform.affine_23, fixed)
        if transform is None:
            return plain
        bent = measure(fixed, moving, transform)
    if not len(bent.tested):
        return plain
    before, after = (float(np.median(bent.tested.errors(fit.transform))) for fit in (plain, bent))
    return bent if after <= KEEP_FIELD * before else plain


def _bent(matches: Matches, affine_23: F64, fixed: Section) -> SlideTransform | None:
    """The affine map and a smooth field through the matches that agree with their neighbours."""
    if len(matches) < 2 * NEIGHBOURS:
        return None
    rest_N2 = matches.moving_N2 - SlideTransform(affine_23=affine_23).points(matches.fixed_N2)
    _, near_NK = cKDTree(matches.fixed_N2).query(matches.fixed_N2, NEIGHBOURS + 1)
    odd_N = np.linalg.norm(rest_N2 - np.median(rest_N2[near_NK[:, 1:]], axis=1), axis=1)
    keep_N = odd_N <= ODD_PX * fixed.mpp
    if keep_N.sum() < 2 * NEIGHBOURS:
        return None
    return smooth_field(matches.fixed_N2[keep_N], rest_N2[keep_N], affine_23, fixed)


def smooth_field(points_N2: F64, rest_N2: F64, affine_23: F64, fixed: Section) -> SlideTransform:
    """An affine map and the smoothing spline of what it leaves, [N, 2] µm, on nodes 2 working pixels apart.

    The spline is evaluated twice a block and enlarged; nowhere does it reach farther than the points do.
    """
    every = -(-len(points_N2) // MAX_KNOTS)
    knots_N2, rest_N2 = points_N2[::every] / (BLOCK * fixed.mpp), rest_N2[::every]
    spline = RBFInterpolator(knots_N2, rest_N2, kernel="thin_plate_spline", smoothing=SMOOTHING)
    rows, columns = (-(-2 * side // BLOCK) for side in fixed.tissue_HW.shape)
    at = np.meshgrid((np.arange(rows) + 0.5) / 2, (np.arange(columns) + 0.5) / 2, indexing="ij")
    coarse = spline(np.stack(at, axis=-1).reshape(-1, 2)).reshape(rows, columns, 2)
    coarse = np.clip(coarse, rest_N2.min(axis=0), rest_N2.max(axis=0)).astype(np.float32)
    factor = BLOCK // 4
    fine = cv2.resize(coarse, (columns * factor, rows * factor), interpolation=cv2.INTER_CUBIC)
    field: npt.NDArray[np.float32] = np.ascontiguousarray(fine.transpose(2, 0, 1))
    return SlideTransform(affine_23=affine_23, field_2HW=field, field_um_per_px=2 * fixed.mpp)
