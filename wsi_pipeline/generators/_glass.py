"""What a network makes of glass, so that the background can be given the same colour.

Networks were not trained to keep glass as it is. What one makes of a tile of this slide's glass colour is
measured once, and the slide's background is scaled alike, so that no staircase of tile borders shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC, Context, GeneratorSpec
from wsi_pipeline.errors import GeneratorError

__all__ = ["measure_glass", "scaled"]

SPREAD = 12
"""Grey levels between the 5th and 95th percentile of translated glass, above which it is no glass."""
MINIMUM = 200


def measure_glass(
    thumbnail_HWC: U8_HWC,
    tissue_HW: npt.NDArray[np.bool_],
    side: int,
    translate: Callable[[U8_BHWC], U8_BHWC],
) -> dict[str, Any]:
    """Median colour of what is not tissue, and by how much the network scales it in a tile of ``side`` px."""
    outside = thumbnail_HWC[~tissue_HW]
    same = {"source": None, "ratio": [1.0, 1.0, 1.0]}
    if not len(outside):
        return {**same, "reason": "no pixel outside tissue"}
    colour = np.median(outside, axis=0).astype(np.uint8)
    if colour.min() < MINIMUM:
        return {**same, "reason": "what is not tissue is not bright"}
    tile = np.empty((1, side, side, 3), np.uint8)
    tile[:] = colour
    made = translate(tile)[0].reshape(-1, 3)
    low, middle, high = np.percentile(made, [5, 50, 95], axis=0)
    if (high - low).max() > SPREAD or middle.min() < MINIMUM:
        return {**same, "reason": "the generator does not make bright, even glass of it"}
    ratio = (np.rint(middle) / colour).round(6)
    return {"source": colour.tolist(), "ratio": ratio.tolist(), "reason": ""}


def scaled(pixels_HWC: U8_HWC, context: Context, spec: GeneratorSpec) -> U8_HWC:
    """Pixels of the background with each channel scaled as ``measure_glass`` found; GeneratorError where the
    context has no such facts."""
    try:
        ratio = np.array(context["glass"]["ratio"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise GeneratorError(
            f"generator {spec.kind}: no glass in the context ({error!r}); run prepare again", spec=spec
        ) from error
    levels = np.arange(256)[:, None] * ratio
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    scaled_HWC: U8_HWC = table[pixels_HWC, np.arange(3)]
    return scaled_HWC
