"""Whether a registration can be trusted: figures that two unrelated slides do not reach by chance.

Every block of tissue is looked for within 16 px of where the transform puts it, on 33 x 33 places, so a block
that shows something else agrees (within 3 px) in 3 of 100 cases. On real pairs 75 to 100 of 100 agree; on
other slides, mirror images and noise in the shape of the tissue, 0 to 10. The limit lies between.

Why places, too: pieces of tissue move on their own between two sections, and one transform cannot follow them
all. What is astray cannot be seen in the errors of the blocks that were found, so every cell of tissue must
show, by most of the blocks around it, that it is in register; elsewhere no tiles are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.transform import plausible
from wsi_pipeline.readers.warped import ASTRAY, TRUSTED
from wsi_pipeline.registration.estimate import Section
from wsi_pipeline.registration.refine import AGREE_PX, Fitted

__all__ = ["GATES", "measured", "refusals", "tissue_that_is", "trust_map"]

GATES: Mapping[str, float] = MappingProxyType({"tested": 8, "agreeing": 0.6, "trusted": 0.5})
"""Least value of each figure that is gated."""
WORDS = ("held-out blocks found", "share in place", "share of the tissue in register")
_MOST, _ALMOST, _PIECE, _EVIDENCE = 0.5, 0.75, 0.35, 4
"""Least share of blocks in place around a cell (whose own is not), in a whole piece; how many blocks tell."""
_STRAIN, _PARTS = 0.2, 4
"""Largest gradient of the field in a cell, read at 4 x 4 places: sections of one block reach 0.17, a field
that follows a tear 0.25 and more."""


def trust_map(fixed: Section, fitted: Fitted) -> npt.NDArray[np.uint8]:
    """Cells of ``fixed.stride`` working pixels, uint8 [h, w]: 0 glass, 1 tissue astray, 2 tissue in register.

    A cell is in register where most blocks of the 3 x 3 cells around it (5 x 5, where those are hardly any)
    were found where the transform puts them, so were some in its piece of tissue as a whole, and the field is
    not torn. A block that was not found, or lands on glass, is out of place.
    """
    cell, mpp, transform = fixed.stride, fixed.mpp, fitted.transform
    tissue_HW = np.pad(fixed.tissue_HW, [(0, -side % cell) for side in fixed.tissue_HW.shape])
    height, width = (side // cell for side in tissue_HW.shape)
    here_HW = tissue_HW.reshape(height, cell, width, cell).any(axis=(1, 3))
    found = [part.take(part.errors(transform) <= AGREE_PX * mpp) for part in (fitted.used, fitted.tested)]
    placed_N2 = np.concatenate([part.fixed_N2 for part in found])
    count, pieces_HW = cv2.connectedComponents(fixed.tissue_HW.astype(np.uint8))
    piece_N, piece_M = (pieces_HW[tuple((at / mpp).astype(int).T)] for at in (placed_N2, fitted.blocks_N2))
    share_P = np.bincount(piece_N, minlength=count) / np.maximum(np.bincount(piece_M, minlength=count), 1)
    placed_N2 = placed_N2[share_P[piece_N] >= _PIECE]
    planes_HW2 = np.zeros((height, width, 2), np.float32)
    for plane, at in enumerate((placed_N2, fitted.blocks_N2)):
        np.add.at(planes_HW2[..., plane], tuple((at / (mpp * cell)).astype(int).T), 1)
    limit_HW = np.where(planes_HW2[..., 0] > 0, _MOST, _ALMOST)
    trusted_HW = np.zeros((height, width), np.bool_)
    for size in ((5, 5), (3, 3)):
        near_HW2 = cv2.boxFilter(planes_HW2, -1, size, normalize=False, borderType=cv2.BORDER_CONSTANT)
        good_HW, every_HW = near_HW2[..., 0], near_HW2[..., 1]
        tells_HW = every_HW >= _EVIDENCE
        trusted_HW[tells_HW] = (good_HW >= limit_HW * every_HW)[tells_HW]
    step = cell * mpp / _PARTS
    places = Region(0, 0, height * _PARTS, width * _PARTS)
    rest_2HW = transform.grid(places, (step, step))
    rest_2HW -= replace(transform, field_2HW=None).grid(places, (step, step))
    strain_HW = np.linalg.norm(np.gradient(rest_2HW, step, axis=(1, 2)), axis=(0, 1))
    torn_HW = strain_HW.reshape(height, _PARTS, width, _PARTS).max(axis=(1, 3)) > _STRAIN
    return np.asarray(here_HW * (ASTRAY + (trusted_HW & ~torn_HW)), np.uint8)


def tissue_that_is(state: int, fixed: Section, fitted: Fitted) -> npt.NDArray[np.bool_]:
    """Pixels of the fixed tissue in cells of this state, bool [H, W]."""
    (height, width), cell = fixed.tissue_HW.shape, np.ones((fixed.stride, fixed.stride), np.bool_)
    return np.asarray(np.kron(trust_map(fixed, fitted) == state, cell)[:height, :width] & fixed.tissue_HW)


def measured(fixed: Section, fitted: Fitted) -> dict[str, float]:
    """The figures of a transform between two sections.

    ``tested``: held-out blocks that were found; ``agreeing``: share of them within 3 working pixels;
    ``trusted``: share of the fixed tissue that is in register, see ``trust_map``; ``ncc``: median correlation
    of the tested blocks; ``median_um``, ``p90_um``: their errors (absent for none), of those that were found
    alone.
    """
    errors_N = fitted.tested.errors(fitted.transform)
    trusted_HW = tissue_that_is(TRUSTED, fixed, fitted)
    figures = {
        "tested": len(errors_N),
        "agreeing": (errors_N <= AGREE_PX * fixed.mpp).sum() / max(len(errors_N), 1),
        "trusted": trusted_HW.sum() / max(fixed.tissue_HW.sum(), 1),
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
