"""Stain science in optical density: Macenko's stain vectors, the colour of the glass, and stain transfer.

Optical density is ``OD = ln(I0 / I)`` per channel (Beer-Lambert, natural logarithm, ``I0`` = colour of the
empty glass). A pixel of an H&E slide is close to ``OD = c_H * h + c_E * e`` with unit vectors h, e of the
stains and non-negative concentrations c.

Sources: M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009
(stain vectors); A. C. Ruifrok and D. A. Johnston, Anal. Quant. Cytol. Histol. 23, 2001 (standard vectors);
J. A. van der Laak et al., "Hue-saturation-density (HSD) model", Cytometry 39, 2000 (chroma of a density).

Why not textbook Macenko on a slide: it keeps a pixel only if *all* channels exceed beta, which throws away
pale eosin (it hardly absorbs red) and turns the eosin vector purple; here the *mean* density decides. It
also fixes I0 at 240, while the glass of frozen sections may be pink or grey; here I0 is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsi_pipeline.core.protocols import U8_HWC

__all__ = [
    "STANDARD_HE",
    "F64",
    "Rgb",
    "StainProfile",
    "concentrations",
    "estimate_profile",
    "estimate_white",
    "hsd_chroma",
    "macenko_stains",
    "map_density",
    "optical_density",
    "stained_density",
    "transfer_matrix",
]

F64 = npt.NDArray[np.float64]
Rgb = tuple[float, float, float]

STANDARD_HE: tuple[Rgb, Rgb] = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105))
"""Haematoxylin and eosin of Ruifrok & Johnston 2001, unit length, (R, G, B)."""

BETA = 0.15  # Macenko 2009: fainter pixels carry no reliable hue
ALPHA = 1.0  # percentile of the hue angle that is taken as a pure stain
STRENGTH_PERCENTILE = 99.0

MIN_PIXELS = 400  # at 8 um/px: 0.026 mm2; the 1st percentile of the angle then rests on 4 pixels
MIN_ANGLE_DEG = 6.0  # H and E closer than this: unmixing would amplify noise more than 9 times
# Farther from the standard vectors: not the stain that it is called. Met in 50 real H&E images: at most 20
# degrees for haematoxylin (29 where there is eosin only, 36 with green pen) and 35 for eosin.
MAX_DEVIATION_DEG = (25.0, 40.0)
FOREIGN_CHROMA = 0.0  # HSD c_y below this: brown, green or yellow (pigment, erythrocytes, pen), not H&E
MAX_GAIN = 2.5  # a stain that is hardly there must not be amplified into noise
OPAQUE = 8  # grey levels; darker pixels (folds, ink, dirt) hold no colour

GLASS_MARGIN_PX = 3  # thumbnail pixels next to tissue are mixed with it
MIN_GLASS = 200
GLASS_TOLERANCE = 12.0  # grey levels; tissue that is brighter than "glass" shows that it is not glass
GLASS_FLOOR = 120.0  # the darkest glass met (Visium, grey) is near 150
CHUNK = 1 << 16  # pixels: three float32 planes stay in the second-level cache
LOG_255 = np.float32(np.log(255.0))
DEFAULT_WHITE: Rgb = (240.0, 240.0, 240.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StainProfile:
    """How a slide is stained.

    ``stains``: unit OD vectors (R, G, B) of haematoxylin and eosin; ``strengths``: 99th percentile of their
    concentrations (OD); ``white``: colour of the empty glass in grey levels; ``pixels``: tissue pixels that
    the estimate rests on; ``fallback``: why standard values stand in for measured ones, "" if they do not.
    """

    stains: tuple[Rgb, Rgb]
    strengths: tuple[float, float]
    white: Rgb
    pixels: int = 0
    fallback: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain lists and floats."""
        return {
            "stains": [list(vector) for vector in self.stains],
            "strengths": list(self.strengths),
            "white": list(self.white),
            "pixels": self.pixels,
            "fallback": self.fallback,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StainProfile:
        """Inverse of ``to_json``; raises KeyError, TypeError or ValueError on anything else."""
        (h, e), (c_h, c_e) = data["stains"], data["strengths"]
        return cls(
            stains=(_rgb(h), _rgb(e)),
            strengths=(float(c_h), float(c_e)),
            white=_rgb(data["white"]),
            pixels=int(data.get("pixels", 0)),
            fallback=str(data.get("fallback", "")),
        )


def _rgb(values: Any) -> Rgb:
    r, g, b = (float(value) for value in values)
    return r, g, b


def optical_density(pixels: npt.NDArray[Any], white: Rgb | float) -> F64:
    """Natural-log density ``ln(white / pixel)`` of [..., 3] grey levels, float64; 0 counts as 1 level.

    Pixels brighter than ``white`` have negative density, so that glass noise keeps its mean.
    """
    grey = np.maximum(pixels.astype(np.float64), 1.0)
    return np.asarray(np.log(np.asarray(white, dtype=np.float64)) - np.log(grey), dtype=np.float64)


def hsd_chroma(od_N3: F64) -> tuple[F64, F64]:
    """Chroma (c_x, c_y) of the HSD model, each [N], independent of how much stain there is.

    ``c_x`` > 0: red is absorbed most (blue, green); ``c_y`` > 0: green is absorbed more than blue (pink,
    purple, blue), ``c_y`` < 0: brown, yellow, green. Grey is (0, 0).
    """
    mean = np.maximum(od_N3.mean(axis=1), 1e-6)
    return od_N3[:, 0] / mean - 1.0, (od_N3[:, 1] - od_N3[:, 2]) / (np.sqrt(3.0) * mean)


def macenko_stains(od_N3: F64, *, alpha: float = ALPHA) -> tuple[F64, F64]:
    """Unit OD vectors (haematoxylin, eosin) of stained pixels [N, 3], after Macenko et al. 2009.

    The pixels are projected on the plane of their two largest principal directions; the ``alpha`` and
    ``100 - alpha`` percentiles of the angle in that plane are the stains. Haematoxylin is the one that
    absorbs more red. The caller leaves out faint pixels (``BETA``); at least 3 pixels are needed.
    """
    _, directions = np.linalg.eigh(np.cov(od_N3, rowvar=False))
    plane_32 = directions[:, [2, 1]]
    # Eigenvectors have no sign: point them at positive density, or the angles wrap around.
    plane_32 = plane_32 * np.where(plane_32.sum(axis=0) < 0, -1.0, 1.0)
    projected_N2 = od_N3 @ plane_32
    angle_N = np.arctan2(projected_N2[:, 1], projected_N2[:, 0])
    low, high = np.percentile(angle_N, [alpha, 100.0 - alpha])
    first, second = (plane_32 @ np.array([np.cos(a), np.sin(a)]) for a in (low, high))
    return (first, second) if first[0] > second[0] else (second, first)


def concentrations(od_N3: F64, stains: tuple[Rgb, Rgb] | tuple[F64, F64]) -> F64:
    """Least-squares concentrations [N, 2] of the two stains; may be negative."""
    return np.asarray(od_N3 @ np.linalg.pinv(np.array(stains).T).T, dtype=np.float64)


def estimate_white(thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_]) -> Rgb:
    """Colour of the empty glass in grey levels: the most frequent bright colour away from tissue.

    The mode, not the mean: stain halos, pen, dirt and fiducial marks are many but differ from each other.
    Pure 255 white is ignored where other glass exists, because it is what readers put outside the scan.
    Without glass the brightest pixels count (lumina), and if they are stained too, neutral 240.
    """
    away_HW = ~ndimage.binary_dilation(tissue_HW, iterations=GLASS_MARGIN_PX)
    glass_N3 = thumbnail_HWC[away_HW]
    scanned_N3 = glass_N3[(glass_N3 < 255).any(axis=1)]
    if len(scanned_N3) >= max(MIN_GLASS, len(glass_N3) // 20):
        glass_N3 = scanned_N3
    if len(glass_N3) >= MIN_GLASS:
        white = _mode_colour(glass_N3)
        green = thumbnail_HWC[..., 1][tissue_HW]  # both stains absorb green most
        darker = green.size > 0 and np.percentile(green, 99.0) <= white[1] + GLASS_TOLERANCE
        if min(white) >= GLASS_FLOOR and (darker or green.size == 0):
            return white
    everything_N3 = thumbnail_HWC.reshape(-1, 3)
    if len(everything_N3) == 0:
        return DEFAULT_WHITE
    brightness_N = everything_N3.min(axis=1)
    brightest_N3 = everything_N3[brightness_N >= np.percentile(brightness_N, 99.5)]
    lumen = _rgb(np.median(brightest_N3, axis=0))
    return lumen if min(lumen) >= 200.0 else DEFAULT_WHITE


def _mode_colour(glass_N3: npt.NDArray[np.uint8]) -> Rgb:
    """Mean of the pixels within 4 grey levels of the most frequent brightness."""
    brightness_N = glass_N3.astype(np.float64).mean(axis=1)
    counts = np.bincount(np.rint(brightness_N).astype(np.int64), minlength=256).astype(np.float64)
    mode = int(np.argmax(ndimage.uniform_filter1d(counts, size=5, mode="constant")))
    return _rgb(glass_N3[np.abs(brightness_N - mode) <= 4.0].mean(axis=0))


def estimate_profile(
    thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], *, white: Rgb | None = None
) -> StainProfile:
    """Stain vectors, strengths and glass colour of a slide from its thumbnail and tissue mask.

    ``white`` is given where the glass is known better than the thumbnail shows it. Never fails: where the
    tissue does not allow an estimate, standard vectors stand in, ``fallback`` says why, and the strengths
    are 0, which means unknown.
    """
    white = white or estimate_white(thumbnail_HWC, tissue_HW)
    pixels_N3 = thumbnail_HWC[tissue_HW]
    od_N3 = stained_density(pixels_N3, white)
    if len(od_N3) < MIN_PIXELS:
        reason = f"{len(od_N3)} stained pixels, at least {MIN_PIXELS} needed"
        return _standard(white, len(od_N3), reason)
    h, e = macenko_stains(od_N3)
    reason = _doubt(h, e)
    if reason:
        return _standard(white, len(od_N3), reason)
    stains = (_unit(h), _unit(e))
    c_h, c_e = np.percentile(concentrations(od_N3, stains), STRENGTH_PERCENTILE, axis=0)
    return StainProfile(stains=stains, strengths=(float(c_h), float(c_e)), white=white, pixels=len(od_N3))


def _standard(white: Rgb, pixels: int, reason: str) -> StainProfile:
    return StainProfile(stains=STANDARD_HE, strengths=(0.0, 0.0), white=white, pixels=pixels, fallback=reason)


def stained_density(pixels_N3: npt.NDArray[np.uint8], white: Rgb) -> F64:
    """Densities [M, 3] of the pixels [N, 3] that carry H&E: not faint, not opaque, not of a foreign hue."""
    od_N3 = optical_density(pixels_N3, white)
    _, c_y = hsd_chroma(od_N3)
    keep_N = (od_N3.mean(axis=1) >= BETA) & (c_y > FOREIGN_CHROMA) & (pixels_N3.max(axis=1) > OPAQUE)
    return np.asarray(od_N3[keep_N], dtype=np.float64)


def transfer_matrix(source: StainProfile, target: StainProfile) -> F64:
    """Matrix M [3, 3] with ``OD_target = M @ OD_source``, densities relative to each profile's own white.

    Unmix, scale each stain to the target's strength, remix. The part of a density that is in neither stain
    (pigment, erythrocytes, ink) lies along the normal of the stain plane and is carried over unscaled, so
    that M is invertible and no colour is lost. Gains stay within ``MAX_GAIN``.

    Where the source was not measured (``fallback``), the standard vectors stand in on *both* sides, which is
    the identity: only the glass changes colour. Why: standard vectors taken as the source alone were tried,
    and mapped every bluish section to brown, because no scanner has their blue channel; strengths measured
    along them turned nuclei green.
    """
    if source.fallback:
        return np.eye(3)
    gains = [
        float(np.clip(wanted / max(found, 1e-3), 1.0 / MAX_GAIN, MAX_GAIN))
        for found, wanted in zip(source.strengths, target.strengths, strict=True)
    ]
    scaled_33 = _basis(target.stains) * np.array([*gains, 1.0])
    return np.asarray(scaled_33 @ np.linalg.inv(_basis(source.stains)), dtype=np.float64)


def map_density(
    pixels: npt.NDArray[np.uint8], matrix_33: F64, white_in: Rgb, white_out: Rgb
) -> npt.NDArray[np.uint8]:
    """Pixels whose densities are ``matrix_33`` times those of ``pixels``; [..., 3] uint8 in and out.

    ``white_in`` becomes ``white_out``, smoothly on both sides of it. Pointwise and bit-exact: a result does
    not depend on neighbours, position or the array's shape. Tables and elementwise float32 only, because a
    matrix product (BLAS, ``cv2.transform``) may round by position in the array.
    """
    grey = np.arange(256)[:, None].repeat(3, axis=1)
    table = optical_density(grey, white_in).astype(np.float32).reshape(256, 1, 3)
    matrix, log_white = matrix_33.astype(np.float32), np.log(white_out).astype(np.float32)
    flat = np.ascontiguousarray(pixels).reshape(-1, 1, 3)
    mapped = np.empty_like(flat)
    for start in range(0, len(flat), CHUNK):
        planes = cv2.split(cv2.LUT(flat[start : start + CHUNK], table))
        cv2.merge(
            [_out_plane(planes, matrix[c], log_white[c]) for c in range(3)],
            dst=mapped[start : start + CHUNK],
        )
    return np.asarray(mapped.reshape(pixels.shape), dtype=np.uint8)


def _out_plane(
    planes: Sequence[npt.NDArray[Any]], weights: npt.NDArray[np.float32], log_white: np.float32
) -> npt.NDArray[np.uint8]:
    """One output channel, ``white * exp(-weights . density)`` rounded to the nearest grey level."""
    total = planes[0] * weights[0]
    total += planes[1] * weights[1]
    total += planes[2] * weights[2]
    np.subtract(log_white, total, out=total)
    np.minimum(total, LOG_255, out=total)  # before exp: no overflow, and brighter than 255 is white
    np.exp(total, out=total)
    total += np.float32(0.5)
    return np.asarray(total.astype(np.uint8))


def _basis(stains: tuple[Rgb, Rgb]) -> F64:
    """Columns: haematoxylin, eosin, and the unit normal of their plane."""
    h, e = np.array(stains)
    normal = np.cross(h, e)
    return np.stack([h, e, normal / np.linalg.norm(normal)], axis=1)


def _unit(vector_3: F64) -> Rgb:
    return _rgb(vector_3 / np.linalg.norm(vector_3))


def _angle_deg(a: Any, b: Any) -> float:
    cosine = float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    return float(np.degrees(np.arccos(min(max(cosine, -1.0), 1.0))))


def _doubt(h: F64, e: F64) -> str:
    """Why these vectors cannot be haematoxylin and eosin, or "" if they can."""
    if not (np.isfinite(h).all() and np.isfinite(e).all()):
        return "stain vectors are not finite"
    if _angle_deg(h, e) < MIN_ANGLE_DEG:
        return f"stain vectors are only {_angle_deg(h, e):.1f} degrees apart"
    named = zip(("haematoxylin", "eosin"), (h, e), STANDARD_HE, MAX_DEVIATION_DEG, strict=True)
    for name, vector, standard, limit in named:
        if _angle_deg(vector, standard) > limit:
            return f"{name} vector is {_angle_deg(vector, standard):.0f} degrees from the standard one"
    return ""
