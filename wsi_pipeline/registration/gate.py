"""Whether a registration can be trusted: figures that two unrelated slides do not reach by chance.

Every block of tissue is looked for within 16 px of where the transform puts it, on 33 x 33 places, so a block
that shows something else agrees (within 3 px) in 3 of 100 cases. On real pairs 75 to 100 of 100 agree; on
other slides, mirror images and noise in the shape of the tissue, 0 to 10. The limit lies between.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from wsi_pipeline.registration.estimate import Section, plausible
from wsi_pipeline.registration.refine import AGREE_PX, Fitted

__all__ = ["GATES", "measured", "refusals"]

GATES: Mapping[str, float] = MappingProxyType(
    {"tested": 8, "agreeing": 0.6, "placed": 0.35, "overlap": 0.25, "stretch": 0.4}
)
"""Least value of each figure that is gated."""
WORDS = (
    "held-out blocks found",
    "share in place",
    "share of common tissue found in place",
    "overlap",
    "least stretch of area",
)
_CELL = 4  # working pixels between the places where the stretch is measured


def measured(fixed: Section, moving: Section, fitted: Fitted) -> dict[str, float]:
    """The figures of a transform on two sections.

    ``tested``: held-out blocks that were found; ``agreeing``: share of them within 3 working pixels;
    ``placed``: share of all blocks on common tissue that were found and agree, so that a part that fits does
    not speak for the rest; ``overlap``: share of the fixed tissue that lands on moving tissue; ``stretch``:
    least local change of area (1 = none, below 0 = a fold); ``ncc``: median correlation of the tested blocks;
    ``median_um``, ``p90_um``: their errors (absent for none).
    """
    errors_N = fitted.tested.errors(fitted.transform)
    at_2HW = fitted.transform.grid(fixed.frame, (fixed.mpp, fixed.mpp))
    landed_HW = moving.warped(moving.tissue_HW.astype(np.float32), at_2HW) > 0.5
    overlap = float(landed_HW[fixed.tissue_HW].mean())
    agree = int((errors_N <= AGREE_PX * fixed.mpp).sum())
    placed = fitted.agreeing(fixed.mpp) + agree / max(fitted.blocks, 1)
    (yy, yx), (xy, xx) = (np.gradient(plane[::_CELL, ::_CELL], fixed.mpp * _CELL) for plane in at_2HW)
    stretch = (yy * xx - yx * xy)[fixed.tissue_HW[::_CELL, ::_CELL]]
    figures = {
        "tested": len(errors_N),
        "agreeing": agree / max(len(errors_N), 1),
        "placed": min(placed / max(overlap, 1e-6), 1.0),
        "overlap": overlap,
        "stretch": stretch.min(initial=1.0),
    }
    if len(errors_N):
        figures |= {"ncc": np.median(fitted.tested.ncc_N), "median_um": np.median(errors_N)}
        figures |= {"p90_um": np.quantile(errors_N, 0.9)}
    return {name: round(float(value), 3) for name, value in figures.items()}


def refusals(figures: Mapping[str, float], fitted: Fitted) -> list[str]:
    """Every gate that was not passed, in words with both numbers; empty: the transform can be used."""
    missed = [
        f"{words} {figures[name]:g}, at least {limit:g} needed"
        for words, (name, limit) in zip(WORDS, GATES.items(), strict=True)
        if figures[name] < limit
    ]
    if not plausible(fitted.transform.affine_23):
        missed.append("the affine map mirrors or deforms more than sections do")
    return missed
