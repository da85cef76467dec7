"""Where the tissue is, on a thumbnail, with frozen sections in mind.

The measure is *stain*: optical density relative to the local glass (``glass.py``), green minus the lesser
of red and blue. Haematoxylin, eosin and any mixture of them absorb green most, so stain is positive for
tissue, zero for whatever is grey (shadow, glass edges, fiducials, dust, a lattice of printed spots) and
negative for green ink. Two thresholds with hysteresis, filters in µm and µm², ink and glass edges taken
out (``artefacts.py``): no step depends on what else is on the slide (as a global Otsu threshold would), so
a slide without tissue gives an empty mask and a picture full of tissue a full one.

Why 16 µm inside: nuclei and ice-crystal holes average out, and a slide costs a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.artefacts import (
    BOOL_HW,
    disc,
    find_border,
    find_coverslip,
    find_pen,
    keep_components,
    morph,
    touching,
)
from wsi_pipeline.core.geometry import Mpp, Size
from wsi_pipeline.core.glass import F32_HW, F32_HWC, Glass, estimate_glass, optical_density
from wsi_pipeline.core.mask import TissueMask
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import ConfigError

__all__ = [
    "PRESETS",
    "THUMBNAIL_MPP",
    "TissueConfig",
    "TissueMask",
    "TissueResult",
    "TissueSettings",
    "detect_tissue",
    "whole_slide",
]

THUMBNAIL_MPP = 8.0
"""µm per pixel at which tissue is detected."""

_WORKING_MPP = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueSettings:
    """What the detector is told; lengths in µm, areas in µm², stain and density as optical density (log10).

    ``low_od``, ``high_od``: stain above which a pixel may be, and is certainly, tissue; the first rises with
    the noise of the glass. ``texture_od``: least local standard deviation of density in tissue that is not
    strongly stained, for a halo or smear is smooth and a section is not. ``faint_od``: stain averaged over
    100 µm that makes loose tissue (fat, oedema) of a neighbourhood of twice that texture. ``smooth_um``:
    sigma of the Gaussian before the thresholds; texture is measured over four times that.
    ``min_speck_um2``: smaller specks (dust, fiducial spots, stain grains) go before gaps are closed.
    ``closing_um``: half the width of gaps that are bridged (ice crystals, fat cells of 80 to 100 µm).
    ``max_hole_um2``: holes up to this area are filled. ``min_tissue_um2``: smaller pieces are dropped.
    ``glass_cell_um``, ``glass_reach_um``: cell of the glass mesh, and how far a bare cell speaks for others.
    ``min_edge_um``: shortest coverslip edge or hair. ``min_pen_um2``: smallest pen mark.
    """

    low_od: float
    high_od: float
    faint_od: float
    texture_od: float
    smooth_um: float
    min_speck_um2: float
    closing_um: float
    max_hole_um2: float
    min_tissue_um2: float
    glass_cell_um: float
    glass_reach_um: float
    min_edge_um: float
    min_pen_um2: float


_FROZEN = TissueSettings(
    low_od=0.025,
    high_od=0.06,
    faint_od=0.008,
    texture_od=0.010,
    smooth_um=12.0,
    min_speck_um2=6_000.0,
    closing_um=48.0,
    max_hole_um2=60_000.0,
    min_tissue_um2=40_000.0,
    glass_cell_um=128.0,
    glass_reach_um=400.0,
    min_edge_um=1_500.0,
    min_pen_um2=60_000.0,
)

PRESETS: Mapping[str, TissueSettings] = MappingProxyType(
    {
        "frozen": _FROZEN,
        # Paraffin: crisper staining, cleaner glass, no ice crystals; a hole is a lumen.
        "ffpe": replace(_FROZEN, low_od=0.035, high_od=0.08, closing_um=32.0, max_hole_um2=20_000.0),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueConfig:
    """A preset and what differs from it; None means the preset's value. Fields: see ``TissueSettings``.

    Raises ConfigError for an unknown preset or a negative value, and where ``high_od`` is below ``low_od``.
    """

    preset: str = "frozen"
    low_od: float | None = None
    high_od: float | None = None
    faint_od: float | None = None
    texture_od: float | None = None
    smooth_um: float | None = None
    min_speck_um2: float | None = None
    closing_um: float | None = None
    max_hole_um2: float | None = None
    min_tissue_um2: float | None = None
    glass_cell_um: float | None = None
    glass_reach_um: float | None = None
    min_edge_um: float | None = None
    min_pen_um2: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"tissue.preset: {self.preset!r} is unknown; choose one of {sorted(PRESETS)}")
        settings = self.settings
        for name in (item.name for item in fields(settings)):
            value = getattr(settings, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"tissue.{name}: {value} is not possible; give a finite number >= 0")
        if settings.high_od < settings.low_od:
            raise ConfigError(
                f"tissue.high_od: {settings.high_od} is below tissue.low_od {settings.low_od}; raise high_od"
            )

    @property
    def settings(self) -> TissueSettings:
        """The preset with every explicit value put in."""
        base = PRESETS[self.preset]
        explicit = {item.name: getattr(self, item.name) for item in fields(base)}
        return replace(base, **{name: value for name, value in explicit.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TissueResult:
    """Tissue, and what was kept out of it.

    ``excluded``: class name (``pen``, ``coverslip``, ``border``) to a bool mask of the tissue mask's shape;
    only classes that occur. ``reason``: why there is no tissue, None where there is some.
    ``background_rgb``: typical colour of the glass (white where no glass is in view).
    """

    tissue: TissueMask
    excluded: Mapping[str, BOOL_HW]
    reason: str | None
    background_rgb: tuple[int, int, int]


def whole_slide(size: Size, mpp: Mpp) -> TissueResult:
    """Everything is tissue, on a mask of ``size`` pixels at ``mpp``."""
    mask = TissueMask(mask_HW=np.ones((size.height, size.width), np.bool_), mpp=mpp)
    return TissueResult(tissue=mask, excluded={}, reason=None, background_rgb=(255, 255, 255))


def detect_tissue(thumbnail_HWC: U8_HWC, mpp: Mpp, config: TissueConfig) -> TissueResult:
    """Tissue of a thumbnail, [H, W, 3] uint8 RGB at ``mpp`` µm per pixel (best: ``THUMBNAIL_MPP``).

    The mask has the thumbnail's size and mpp. A slide without tissue gives an empty mask and a reason.
    Raises ConfigError for an array of another kind or an mpp that is not positive.
    """
    _check(thumbnail_HWC, mpp)
    settings = config.settings
    size = Size(*thumbnail_HWC.shape[:2])
    pixels_HWC, step = _working_copy(thumbnail_HWC, mpp)
    white_od_HWC = optical_density(pixels_HWC)
    glass = estimate_glass(
        white_od_HWC, step, cell_um=settings.glass_cell_um, reach_um=settings.glass_reach_um
    )
    height, width = pixels_HWC.shape[:2]
    field_HWC = cv2.resize(glass.od_HWC, (width, height), interpolation=cv2.INTER_LINEAR)
    od_HWC = np.asarray(white_od_HWC - field_HWC, np.float32)
    smooth_HWC = _gaussian(od_HWC, settings.smooth_um, step)
    excluded = _artefacts(white_od_HWC, smooth_HWC, step, settings)
    stain_HW = _stain(smooth_HWC)
    low = _low_threshold(stain_HW, glass, settings)
    tissue_HW = _threshold(stain_HW, od_HWC[..., 1], low, step, settings)
    tissue_HW, reason = _clean(tissue_HW, excluded, step, settings)
    return TissueResult(
        tissue=TissueMask(mask_HW=_enlarge(tissue_HW, size), mpp=mpp),
        excluded={name: _enlarge(mask_HW, size) for name, mask_HW in excluded.items()},
        reason=reason,
        background_rgb=glass.rgb,
    )


def _check(thumbnail_HWC: U8_HWC, mpp: Mpp) -> None:
    if thumbnail_HWC.ndim != 3 or thumbnail_HWC.shape[2] != 3 or thumbnail_HWC.dtype != np.uint8:
        raise ConfigError(
            f"tissue: expected an [H, W, 3] uint8 thumbnail, got {thumbnail_HWC.dtype} {thumbnail_HWC.shape}"
        )
    if thumbnail_HWC.size == 0:
        raise ConfigError(f"tissue: the thumbnail is empty, {thumbnail_HWC.shape}")
    if not all(0 < step < float("inf") for step in mpp):
        raise ConfigError(f"tissue: mpp must be positive, got {mpp}; state the slide's µm per pixel")


def _working_copy(pixels_HWC: U8_HWC, mpp: Mpp) -> tuple[U8_HWC, Mpp]:
    """The thumbnail at about 16 µm per pixel (never enlarged), and its exact mpp."""
    height, width = pixels_HWC.shape[:2]
    rows = min(height, max(1, round(height * mpp[0] / _WORKING_MPP)))
    cols = min(width, max(1, round(width * mpp[1] / _WORKING_MPP)))
    small_HWC = cv2.resize(np.ascontiguousarray(pixels_HWC), (cols, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small_HWC, np.uint8), (mpp[0] * height / rows, mpp[1] * width / cols)


def _gaussian(values: npt.NDArray[np.float32], sigma_um: float, mpp: Mpp) -> npt.NDArray[np.float32]:
    sigma = [sigma_um / step for step in mpp]
    if max(sigma) < 0.3:
        return values
    blurred = cv2.GaussianBlur(values, (0, 0), sigmaX=max(sigma[1], 0.01), sigmaY=max(sigma[0], 0.01))
    return np.asarray(blurred, np.float32)


def _stain(od_HWC: F32_HWC) -> F32_HW:
    red, green, blue = od_HWC[..., 0], od_HWC[..., 1], od_HWC[..., 2]
    return np.asarray(green - np.minimum(red, blue), np.float32)


def _artefacts(
    white_od_HWC: F32_HWC, od_HWC: F32_HWC, mpp: Mpp, settings: TissueSettings
) -> dict[str, BOOL_HW]:
    border_HW = find_border(white_od_HWC, mpp)
    coverslip_HW = find_coverslip(od_HWC, mpp, min_length_um=settings.min_edge_um) & ~border_HW
    pen_HW = find_pen(od_HWC, mpp, edges_HW=coverslip_HW, min_area_um2=settings.min_pen_um2)
    pen_HW = pen_HW & ~border_HW & ~coverslip_HW
    found = {"pen": pen_HW, "coverslip": coverslip_HW, "border": border_HW}
    return {name: mask_HW for name, mask_HW in found.items() if mask_HW.any()}


def _low_threshold(stain_HW: F32_HW, glass: Glass, settings: TissueSettings) -> float:
    """Low threshold of the hysteresis: four robust standard deviations of bare glass, if above ``low_od``."""
    height, width = stain_HW.shape
    seen_HW = cv2.resize(glass.seen_HW.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    bare = stain_HW[seen_HW > 0][:: max(1, stain_HW.size // 200_000)]
    if bare.size < 16:
        return settings.low_od
    centre = float(np.median(bare))
    noise = 1.4826 * float(np.median(np.abs(bare - centre)))
    return float(np.clip(centre + 4 * noise, settings.low_od, settings.high_od))


def _threshold(stain_HW: F32_HW, green_HW: F32_HW, low: float, mpp: Mpp, settings: TissueSettings) -> BOOL_HW:
    """Stained pixels that are connected to a strongly stained, textured one."""
    wide_um = 4 * settings.smooth_um
    mean_HW = _gaussian(green_HW, wide_um, mpp)
    texture_HW = np.sqrt(np.maximum(_gaussian(green_HW * green_HW, wide_um, mpp) - mean_HW * mean_HW, 0))
    textured_HW = texture_HW > settings.texture_od
    strong_HW = stain_HW > settings.high_od
    # Loose tissue has some strongly stained cell within a few hundred µm; a lattice of spots has none.
    some_HW = _gaussian(strong_HW.astype(np.float32), 2 * wide_um, mpp) > 0.02
    # Clipped, so that a dark edge does not spread by more than the erosion takes back.
    faint_HW = _gaussian(np.clip(stain_HW, -2 * low, 2 * low), wide_um, mpp) > settings.faint_od
    loose_HW = faint_HW & some_HW & (texture_HW > 2 * settings.texture_od)
    loose_HW = morph(loose_HW, cv2.MORPH_ERODE, disc(1.75 * wide_um, mpp))
    return touching(strong_HW | (textured_HW & (stain_HW > low)) | loose_HW, strong_HW & textured_HW)


def _clean(
    tissue_HW: BOOL_HW, excluded: Mapping[str, BOOL_HW], mpp: Mpp, settings: TissueSettings
) -> tuple[BOOL_HW, str | None]:
    """Drop artefacts and specks, close gaps, fill holes, drop small pieces; the reason if nothing is left."""
    pixel_um2 = mpp[0] * mpp[1]
    beside = f" beside {' and '.join(excluded)}" if excluded else ""
    if not tissue_HW.any():
        return tissue_HW, f"no stained, textured area{beside} (stain above {settings.high_od} od)"
    artefact_HW = np.zeros(tissue_HW.shape, np.bool_)
    for mask_HW in excluded.values():
        artefact_HW |= mask_HW
    tissue_HW = keep_components(tissue_HW & ~artefact_HW, settings.min_speck_um2 / pixel_um2)
    tissue_HW = morph(tissue_HW, cv2.MORPH_CLOSE, disc(settings.closing_um, mpp)) & ~artefact_HW
    holes_HW = ~tissue_HW & ~artefact_HW
    if tissue_HW.any():
        tissue_HW |= holes_HW & ~keep_components(holes_HW, settings.max_hole_um2 / pixel_um2)
    tissue_HW = keep_components(tissue_HW, settings.min_tissue_um2 / pixel_um2)
    if not tissue_HW.any():
        return tissue_HW, f"no piece of tissue of {settings.min_tissue_um2:.0f} µm² or more{beside}"
    return tissue_HW, None


def _enlarge(mask_HW: BOOL_HW, size: Size) -> BOOL_HW:
    """Back to the thumbnail's size, with the steps of the outline smoothed."""
    if mask_HW.shape == (size.height, size.width):
        return mask_HW
    grey_HW = cv2.resize(
        mask_HW.view(np.uint8) * np.uint8(255), (size.width, size.height), interpolation=cv2.INTER_LINEAR
    )
    return np.asarray(grey_HW > 127, np.bool_)
