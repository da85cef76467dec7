"""What freezing and cryosectioning do to an H&E section: a physical model, applied to a paraffin picture.

It makes pixel-aligned pairs (simulated frozen, true FFPE) from FFPE pictures alone. Real pairs do not exist:
a piece of tissue is either frozen or embedded, and neighbouring sections do not match cell by cell.

Everything happens where physics puts it. Dyes act in optical density (Beer-Lambert, ``core.stain``): density
is split into haematoxylin, eosin and the rest, and ice, smear, thickness and stain change these planes. Light
acts after that: glass, defocus, the camera's noise, JPEG. Order:

    density -> (h, e, rest) -> chromatin -> ice -> section (thickness) -> stain -> light

Lengths are micrometres and fields belong to the picture, so a picture looks the same at any resolution, and
one call is one slide: each parameter is drawn once, only fields vary over the picture. ``severity`` scales
every parameter's distance from "nothing happened" under the same random numbers; 0 is the identity.

Alignment. Cutting shortens a section along the blade's path, by up to a tenth. As a warp this would destroy
the pairs, so only its *appearance* is applied: volume is kept, so a shorter section is thicker and denser,
and its holes are flattened. Who wants the geometry too squeezes the FFPE picture before the call: then source
and target share it.

What it is not: tissue is never torn, folded or displaced, fat does not run, red cells do not burst. Ranges
and their sources are in ``core.frozen_model``.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from wsi_pipeline.core.frozen_model import Chromatin, FrozenModel, Ice, Light, Range, Section, Stain
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.core.random_field import F32_HW, oriented_field, slow_field
from wsi_pipeline.core.stain import F64, Rgb

__all__ = ["FrozenModel", "simulate_frozen", "simulate_pair"]

F32_HWC = npt.NDArray[np.float32]

PARAFFIN: tuple[Rgb, Rgb] = ((0.562, 0.705, 0.432), (0.211, 0.890, 0.403))
"""Haematoxylin and eosin of FFPE sections at 0.5 um/px, as in the palette of ``stain_transfer``."""

WHITE: Rgb = (243.0, 241.0, 242.0)  # the palette's glass
BLUE = (0.87, 0.48, 0.12)  # direction of a haematoxylin that looks blue, as met in her2st
NUCLEAR = (0.4, 0.75)  # of dense haematoxylin: what is surely not, and surely, a nucleus
DENSE = ((0.8, 2.5), (0.25, 1.5))
"""Limits of what counts as dense haematoxylin and eosin (98th percentile): a picture may hold no nuclei."""
GAINS = (0.4, 2.4)  # more would show the picture's own noise
SLOPE = 1.8  # mean slope of a field of unit length and deviation: turns the width of an edge into a step
LOG_255 = float(np.log(255.0))
CLOSED_UM = 1.2  # radius of pale centres that belong to a nucleus
CELL_UM, CELL_GAIN = 2.5, 2.0  # how far a nucleus holds cytoplasm around it together, against ice
WET_UM = 2.0  # pale spots of this size within tissue freeze, too
ROUGH = 0.18  # of the fine field in the coarse one: how ragged holes are
TISSUE_OD = (0.06, 0.16)  # mean density that surely is not, and surely is, more than unclean glass
DENSEST = 5.0  # optical density; darker is black in 8 bits


class _Dial:
    """Draws the parameters of one family of artefacts, scaled by severity."""

    def __init__(self, seed: int, severity: float, probability: float) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.severity = severity
        self.on = self.chance(probability)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def size(self, values: Range) -> float:
        """A value that severity does not touch: a length, a shape."""
        return float(values[0] + (values[1] - values[0]) * self.rng.random())

    def amount(self, values: Range, nothing: float = 0.0) -> float:
        """A value whose distance from ``nothing`` grows with severity."""
        return nothing + self.severity * (self.size(values) - nothing)

    def angle(self) -> float:
        return float(np.pi * self.rng.random())


def simulate_frozen(
    pixels_HWC: U8_HWC, mpp: float, model: FrozenModel, rng: np.random.Generator, *, white: Rgb = WHITE
) -> U8_HWC:
    """The FFPE picture [H, W, 3] uint8 at ``mpp`` um/px as a frozen section: same size, aligned to the pixel.

    One call is one slide: ``rng`` decides everything, and takes one draw from it. ``white``: colour of the
    picture's empty glass. 128 x 128 px take one core some 6 ms. Raises ValueError for other arrays or mpp.
    """
    return simulate_pair(pixels_HWC, mpp, model, rng, white=white)[0]


def simulate_pair(
    pixels_HWC: U8_HWC, mpp: float, model: FrozenModel, rng: np.random.Generator, *, white: Rgb = WHITE
) -> tuple[U8_HWC, U8_HWC]:
    """The frozen section of ``simulate_frozen``, and what a generator shall make of it: FFPE with its holes.

    In the second picture large ice holes are glass, as in the first; fine ones are healed. Why: what was in a
    hole is gone, and a lumen looks like a hole. A network that was trained to fill holes painted all glass
    pink, that of lumina and of real frozen tiles, too.
    """
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or not mpp > 0:
        raise ValueError(
            f"{pixels_HWC.dtype} {pixels_HWC.shape} at {mpp} um/px: need [H, W, 3] uint8, mpp > 0"
        )
    blade_seed, *seeds = (int(seed) for seed in rng.integers(1 << 62, size=6))
    if model.severity <= 0.0 or not pixels_HWC.size:
        return pixels_HWC.copy(), pixels_HWC.copy()
    blade = _Dial(blade_seed, 1.0, 1.0).angle()
    chances = [
        part.probability for part in (model.chromatin, model.ice, model.section, model.stain, model.light)
    ]
    dials = [_Dial(s, model.severity, chance) for s, chance in zip(seeds, chances, strict=True)]
    h_HW, e_HW, rest_HW, tissue_HW = _unmixed(pixels_HWC, white)
    dense = (_dense(h_HW, DENSE[0]), _dense(e_HW, DENSE[1]))
    nuclei_HW = _nuclei(h_HW, dense[0], mpp)
    if dials[0].on:
        h_HW = _smudge(h_HW, nuclei_HW, mpp, model.chromatin, dials[0], blade)
    density_HW, wanted_HWC = np.ones_like(h_HW), pixels_HWC.copy()
    if dials[1].on:
        wet_HW = np.minimum(2.0 * _blur(tissue_HW, WET_UM / mpp), 1.0)
        density_HW, holes_HW = _freeze(nuclei_HW, mpp, model.ice, dials[1])
        density_HW = 1.0 + wet_HW * (density_HW - 1.0)
        wanted_HWC = _emptied(pixels_HWC, wet_HW * holes_HW, white)
    if dials[2].on:
        density_HW = density_HW * _cut(h_HW.shape, mpp, model.section, dials[2], blade)
    planes = [plane * density_HW for plane in (h_HW, e_HW, rest_HW)]
    light_HWC = _lit(planes, tissue_HW, dense, white, model.stain, dials[3])
    return _photographed(light_HWC, mpp, model.light, dials[4]), wanted_HWC


def _unmixed(pixels_HWC: U8_HWC, white: Rgb) -> tuple[F32_HW, F32_HW, F32_HW, F32_HW]:
    """Density along haematoxylin, eosin and the normal of their plane, each [H, W]; and where tissue is.

    Glass is not quite clean, and its dirt is no tissue: it neither freezes nor takes more dye.
    """
    grey = np.maximum(np.arange(256.0), 1.0)[:, None]
    table = (np.log(white) - np.log(grey)).astype(np.float32).reshape(256, 1, 3)
    od_HWC = cv2.LUT(np.ascontiguousarray(pixels_HWC), table)
    low, high = TISSUE_OD
    tissue_HW = np.clip((cv2.transform(od_HWC, np.full((1, 3), 1.0 / 3.0)) - low) / (high - low), 0.0, 1.0)
    h_HW, e_HW, rest_HW = cv2.split(cv2.transform(od_HWC, np.linalg.inv(_basis(*np.array(PARAFFIN)))))
    return h_HW, e_HW, rest_HW, tissue_HW.astype(np.float32)


def _smudge(
    h_HW: F32_HW, nuclei_HW: F32_HW, mpp: float, spec: Chromatin, dial: _Dial, blade: float
) -> F32_HW:
    """Haematoxylin with flat, smeared, swollen nuclei."""
    flat, pallor = min(dial.amount(spec.flat), 1.0), dial.amount(spec.pallor, 1.0)
    smudge, smear = dial.amount(spec.smudge_um) / mpp, dial.amount(spec.smear_um) / mpp
    swell, leak = dial.amount(spec.swell_um) / mpp, min(dial.amount(spec.leak), 0.5)
    inside_HW = nuclei_HW * h_HW
    # Averaged among nuclear pixels only: chromatin goes flat, the nucleus keeps its outline.
    texture = spec.texture_um / mpp
    mean_HW = _blur(inside_HW, texture) / np.maximum(_blur(nuclei_HW, texture), 1e-3)
    h_HW += flat * nuclei_HW * (mean_HW - h_HW)
    h_HW *= 1.0 + max(pallor - 1.0, -0.9) * nuclei_HW
    if swell > 0.05:
        h_HW = _dilate(h_HW, swell)
    spread_HW = _blur(h_HW * nuclei_HW, spec.leak_um / mpp)
    h_HW = h_HW * (1.0 - leak * nuclei_HW) + leak * spread_HW
    return _drag(h_HW, smudge, smear, blade)


def _freeze(nuclei_HW: F32_HW, mpp: float, spec: Ice, dial: _Dial) -> tuple[F32_HW, F32_HW]:
    """Factor on density, below 1 in holes, above 1 in their rims; and how empty large holes are, 0 to 1."""
    share, depth = min(dial.amount(spec.share), 0.8), dial.size(spec.depth)
    size, stretch, edge = dial.size(spec.size_um), dial.size(spec.stretch), dial.size(spec.edge_um)
    spare, cluster, rim = dial.size(spec.spare), dial.size(spec.cluster), dial.amount(spec.rim)
    fine_share, fine_size = min(dial.amount(spec.fine_share), 0.8), dial.size(spec.fine_size_um)
    fine_depth, angle = dial.size(spec.fine_depth), dial.angle()
    shape = nuclei_HW.shape
    cells_HW = np.minimum(np.maximum(CELL_GAIN * _blur(nuclei_HW, CELL_UM / mpp), nuclei_HW), 1.0)
    front_HW = cluster * slow_field(shape, mpp, spec.region_um, dial.rng)
    grains_HW = oriented_field(shape, mpp, size, dial.rng, stretch=stretch, angle=angle)
    fine_HW = oriented_field(shape, mpp, fine_size, dial.rng)
    deviation = float(np.hypot(1.0, cluster))
    grains_HW = (grains_HW + ROUGH * fine_HW) * np.float32(np.hypot(1.0, ROUGH) ** -1)
    holes_HW = _above(grains_HW + front_HW - spare * cells_HW, share, deviation, SLOPE * edge / size)
    foam_HW = _above(fine_HW + front_HW - spare * nuclei_HW, fine_share, deviation, SLOPE * 0.7 / fine_size)
    rim_HW = np.maximum(_blur(holes_HW, 1.5 / mpp) - holes_HW, 0.0)
    holes_HW *= depth
    return (1.0 - holes_HW) * (1.0 - fine_depth * foam_HW) * (1.0 + 2.0 * rim * rim_HW), holes_HW


def _emptied(pixels_HWC: U8_HWC, holes_HW: F32_HW, white: Rgb) -> U8_HWC:
    """The picture with density only where there are no holes; unchanged beside them."""
    share = holes_HW[..., None]
    log_HWC = cv2.log(np.maximum(pixels_HWC, 1).astype(np.float32)) * (1.0 - share)
    emptied_HWC = np.rint(cv2.exp(log_HWC + share * np.log(white).astype(np.float32)))
    return np.where(share > 0.0, np.clip(emptied_HWC, 0, 255).astype(np.uint8), pixels_HWC)


def _cut(shape: tuple[int, int], mpp: float, spec: Section, dial: _Dial, blade: float) -> F32_HW:
    """Factor on density from the section's thickness."""
    gain, uneven = dial.amount(spec.gain, 1.0), dial.amount(spec.uneven)
    chatter, period = dial.amount(spec.chatter), dial.size(spec.chatter_um)
    chatter *= dial.chance(spec.chatter_probability)
    gain /= 1.0 - min(dial.amount(spec.compression), 0.5)
    slow_HW = slow_field(shape, mpp, spec.uneven_um, dial.rng)
    relative_HW = 1.0 + uneven * slow_HW
    if chatter:
        y, x = np.ogrid[: shape[0], : shape[1]]
        path_HW = (np.float32(np.cos(blade) * mpp) * x + np.float32(np.sin(blade) * mpp) * y) / period
        relative_HW += chatter * np.sin(2.0 * np.pi * path_HW + slow_HW)
    return np.asarray(max(gain, 0.1) * np.maximum(relative_HW, 0.2), np.float32)


def _dyed(dense: tuple[float, float], spec: Stain, dial: _Dial) -> tuple[list[float], F64, F64]:
    """Factors on haematoxylin and eosin, the frozen section's dyes [3, 3] as columns, and its veil [3]."""
    haematoxylin, ratios = dial.size(spec.haematoxylin), (dial.size(spec.eosin), dial.size(spec.washed_eosin))
    eosin = haematoxylin * ratios[dial.chance(spec.wash_out)]
    gains = [haematoxylin / dense[0], eosin / dense[1]]
    gains = [max(1.0 + dial.severity * (float(np.clip(g, *GAINS)) - 1.0), 0.05) for g in gains]
    h, e = (_turned(np.array(v), np.radians(dial.amount(spec.turn_deg)), dial.rng) for v in PARAFFIN)
    blue = min(dial.amount(spec.blue), 1.0) * dial.chance(spec.blue_probability)
    h = (1.0 - blue) * h + blue * np.array(BLUE)
    veil, share = dial.amount(spec.veil), dial.rng.random()
    return gains, _basis(h / np.linalg.norm(h), e), veil * (share * h + (1.0 - share) * e)


def _lit(
    planes: list[F32_HW],
    tissue_HW: F32_HW,
    dense: tuple[float, float],
    white: Rgb,
    spec: Stain,
    dial: _Dial,
) -> F32_HWC:
    """Transmitted light in grey levels, through the section's dyes and glass."""
    basis, veil, light = _basis(*np.array(PARAFFIN)), np.zeros(3), np.array(white)
    if dial.on:
        gains, basis, veil = _dyed(dense, spec, dial)
        for plane_HW, gain in zip(planes, gains, strict=False):
            plane_HW *= 1.0 + (gain - 1.0) * tissue_HW
        light = light * dial.amount(spec.glass, 1.0) * (1.0, 1.0 - dial.amount(spec.pink), 1.0)
    od_HWC = cv2.transform(cv2.merge(planes), np.column_stack([basis, veil]))
    log_light = np.log(np.minimum(light, 255.0)).astype(np.float32)
    return np.asarray(cv2.exp(np.clip(log_light - od_HWC, -DENSEST, LOG_255)), np.float32)


def _photographed(light_HWC: F32_HWC, mpp: float, spec: Light, dial: _Dial) -> U8_HWC:
    """Grey levels after focus, haze, noise and JPEG."""
    worst = dial.amount(spec.blur_um)
    best, haze = worst * dial.size(spec.blur_least), min(dial.amount(spec.haze), 0.9)
    haze_um, shot, read = dial.size(spec.haze_um), dial.amount(spec.shot), dial.amount(spec.read)
    quality, coded = dial.amount(spec.quality, 100.0), dial.chance(spec.jpeg_probability)
    if dial.on:
        focus_HW = np.clip(0.5 + 0.6 * slow_field(light_HWC.shape[:2], mpp, spec.focus_um, dial.rng), 0, 1)
        sharp_HWC, soft_HWC = _blur(light_HWC, best / mpp), _blur(light_HWC, worst / mpp)
        hazy_HWC = _blur(light_HWC, haze_um / mpp)
        light_HWC = sharp_HWC + (soft_HWC - sharp_HWC) * focus_HW[..., None]
        light_HWC += haze * (hazy_HWC - light_HWC)
        noise_HWC = dial.rng.standard_normal(light_HWC.shape, dtype=np.float32)
        light_HWC += noise_HWC * cv2.sqrt(read**2 + light_HWC * (shot**2 / 255.0))
    pixels_HWC = np.clip(np.rint(light_HWC), 0, 255).astype(np.uint8)
    return _jpeg(pixels_HWC, int(np.clip(quality, 5, 100))) if dial.on and coded else pixels_HWC


def _dense(plane_HW: F32_HW, limits: Range) -> float:
    """98th percentile of some thousand pixels, within limits."""
    step = max(1, int(np.sqrt(plane_HW.size / 4096)))
    return float(np.clip(np.percentile(plane_HW[::step, ::step], 98.0), *limits))


def _nuclei(h_HW: F32_HW, dense: float, mpp: float) -> F32_HW:
    """Where nuclei are, 0 to 1, pale centres included."""
    low, high = NUCLEAR
    h_HW = cv2.morphologyEx(h_HW, cv2.MORPH_CLOSE, _disc(round(CLOSED_UM / mpp)))
    return np.asarray(np.clip((h_HW / dense - low) / (high - low), 0.0, 1.0), np.float32)


def _above(field_HW: F32_HW, share: float, deviation: float, width: float) -> F32_HW:
    """Where a field of this standard deviation is among its highest ``share``: 0 to 1 over ``width``."""
    threshold = deviation * float(ndtri(1.0 - max(share, 1e-9)))
    return np.asarray(np.clip((field_HW - threshold) / width + 0.5, 0.0, 1.0), np.float32)


def _blur(values: npt.NDArray[np.float32], sigma_px: float) -> npt.NDArray[np.float32]:
    if sigma_px < 0.15:  # the kernel would be a single pixel
        return values
    return np.asarray(cv2.GaussianBlur(values, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT), np.float32)


def _drag(h_HW: F32_HW, sigma_px: float, length_px: float, angle: float) -> F32_HW:
    """Blurred by ``sigma_px``, along ``angle`` by a path of ``length_px`` on top."""
    along, across = np.hypot(sigma_px, length_px / np.sqrt(12.0)), max(sigma_px, 0.15)
    reach = int(np.ceil(2.5 * max(along, across)))
    if along < 0.2:
        return h_HW
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kernel = np.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2)).astype(np.float32)
    kernel /= kernel.sum()
    return np.asarray(cv2.filter2D(h_HW, -1, kernel, borderType=cv2.BORDER_REFLECT), np.float32)


def _dilate(h_HW: F32_HW, radius_px: float) -> F32_HW:
    """Grey dilation by a disc; a radius between two whole ones is a mixture of both."""
    below = int(radius_px)
    discs = [cv2.dilate(h_HW, _disc(r)) if r else h_HW for r in (below, below + 1)]
    return np.asarray(discs[0] + (radius_px - below) * (discs[1] - discs[0]), np.float32)


def _disc(radius_px: int) -> npt.NDArray[np.uint8]:
    side = 2 * radius_px + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)


def _turned(vector: F64, angle: float, rng: np.random.Generator) -> F64:
    """A unit vector turned by ``angle`` in a random direction; densities stay positive."""
    away = np.cross(vector, rng.standard_normal(3))
    turned = np.cos(angle) * vector + np.sin(angle) * away / np.linalg.norm(away)
    turned = np.maximum(turned, 0.01)
    return np.asarray(turned / np.linalg.norm(turned))


def _basis(h: F64, e: F64) -> F64:
    """Columns: haematoxylin, eosin, and the unit normal of their plane."""
    normal = np.cross(h, e)
    return np.stack([h, e, normal / np.linalg.norm(normal)], axis=1)


def _jpeg(pixels_HWC: U8_HWC, quality: int) -> U8_HWC:
    _, code = cv2.imencode(
        ".jpg", cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality)
    )
    return np.asarray(cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)
