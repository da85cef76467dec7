"""Is this an H&E brightfield image? Refuses what a frozen-H&E translator must not be fed, and little else.

The test is on hue in the HSD model (van der Laak et al., Cytometry 39, 2000): the chroma of an optical
density, which does not depend on how much stain there is, so that pale, faded and dark sections look alike.
Haematoxylin and eosin, and so any mixture of them, absorb green more than blue (c_y > 0); diaminobenzidine
(DAB) is brown because it absorbs blue most (c_y < 0). A false refusal costs a user a good slide, a false
acceptance a strange-looking image: the limits lean towards acceptance.

Limits and where real images lie (50 H&E images: frozen, paraffin, thumbnails with pen, grey and pink glass):
share of density with c_y > 0.05: H&E 0.90 to 1.00 (0.58 with a pen ring), IHC 0.05; the limit is 0.05.
Brown share: H&E at most 0.09 (pen), IHC 0.91. Dark pixels: H&E at most 0.08, fluorescence 0.76.

What it cannot see: stains whose hue lies between pink and blue (PAS, Giemsa, fast red, parts of trichromes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.core.stain import BETA, F64, OPAQUE, estimate_white, hsd_chroma, optical_density

__all__ = ["HueShares", "StainKind", "StainVerdict", "assess_stain", "darkness", "hue_shares"]

StainKind = Literal["h&e", "fluorescence", "ihc-dab", "grey", "other", "unknown"]

MIN_PIXELS = 200  # stained pixels; fewer carry no verdict

DARK_LEVEL = 64  # brightest channel below this: no light came through, or none was emitted
LIGHT_LEVEL = 96  # darkest channel above this: glass or thin tissue in transmitted light
MIN_DARK = 0.30
MAX_LIGHT = 0.10

GREY_CHROMA = 0.10  # HSD radius; the palest H&E lies at 0.3
MIN_GREY = 0.80
HE_CHROMA = 0.05  # c_y above: pink, purple, blue
MIN_HE = 0.05
BROWN_CHROMA = -0.05  # c_y below, and red absorbed least: brown, yellow
MIN_BROWN = 0.15
PINK_CX = -0.30  # c_x below: pink to red, which a DAB slide with its blue counterstain lacks
BROWN_PER_PINK = 3.0  # pigment, erythrocytes and saffron are brown beside pink


@dataclass(frozen=True, slots=True, kw_only=True)
class StainVerdict:
    """``kind`` and, for people, the ``reason`` with its figures. ``"unknown"`` is no reason to refuse."""

    kind: StainKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HueShares:
    """Parts, 0 to 1, of all density that are of an H&E hue, pink (part of it), brown, or grey."""

    he: float
    pink: float
    brown: float
    grey: float


def assess_stain(thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_]) -> StainVerdict:
    """What kind of image a thumbnail shows, from its uint8 pixels and its tissue mask."""
    dark, light = darkness(thumbnail_HWC)
    if dark >= MIN_DARK and light < MAX_LIGHT:
        return StainVerdict(
            kind="fluorescence",
            reason=f"{dark:.0%} of the image is dark and only {light:.0%} of the rest light",
        )
    pixels_N3 = thumbnail_HWC[tissue_HW]
    od_N3 = optical_density(pixels_N3, estimate_white(thumbnail_HWC, tissue_HW))
    od_N3 = od_N3[(od_N3.mean(axis=1) >= BETA) & (pixels_N3.max(axis=1) > OPAQUE)]
    if len(od_N3) < MIN_PIXELS:
        reason = f"only {len(od_N3)} stained thumbnail pixels, {MIN_PIXELS} needed"
        return StainVerdict(kind="unknown", reason=reason)
    shares = hue_shares(od_N3)
    kind = _kind(shares)
    reason = f"stain is {shares.he:.0%} pink to blue, {shares.brown:.0%} brown, {shares.grey:.0%} grey"
    if kind == "other":
        reason += ", the rest green or yellow as pen ink is"
    return StainVerdict(kind=kind, reason=reason)


def _kind(shares: HueShares) -> StainKind:
    if shares.grey >= MIN_GREY:
        return "grey"
    if shares.brown >= MIN_BROWN and shares.brown > BROWN_PER_PINK * shares.pink:
        return "ihc-dab"
    return "h&e" if shares.he >= MIN_HE else "other"


def darkness(image_HWC: U8_HWC) -> tuple[float, float]:
    """Share of dark pixels, and the share of light pixels among those that are not black; both 0 to 1.

    Black is left out of the second, because scanners may fill with it what they did not scan.
    """
    if image_HWC.size == 0:
        return 0.0, 1.0
    brightest_HW = image_HWC.max(axis=2)
    dark = float((brightest_HW < DARK_LEVEL).mean())
    lit_N3 = image_HWC[brightest_HW >= DARK_LEVEL // 2]
    light = float((lit_N3.min(axis=1) >= LIGHT_LEVEL).mean()) if len(lit_N3) else 0.0
    return dark, light


def hue_shares(od_N3: F64) -> HueShares:
    """Shares of hues, each pixel weighted by its mean density; [N, 3] densities relative to the glass."""
    c_x, c_y = hsd_chroma(od_N3)
    weight_N = od_N3.mean(axis=1)
    total = float(weight_N.sum())

    def share(chosen_N: npt.NDArray[np.bool_]) -> float:
        return float(weight_N[chosen_N].sum()) / total

    return HueShares(
        he=share(c_y > HE_CHROMA),
        pink=share((c_y > HE_CHROMA) & (c_x < PINK_CX)),
        brown=share((c_y < BROWN_CHROMA) & (c_x < GREY_CHROMA)),
        grey=share(np.hypot(c_x, c_y) < GREY_CHROMA),
    )
