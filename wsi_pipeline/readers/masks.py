"""Which part of a slide is tissue: detected, drawn by hand (GeoJSON), or all of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.annotations import geojson_to_mask
from wsi_pipeline.core.geometry import Mpp, Size, ceil_div
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.core.tissue import TissueConfig, TissueMask, TissueResult, detect_tissue, whole_slide
from wsi_pipeline.errors import ConfigError

__all__ = ["find_tissue", "mask_at_pixels", "read_geojson"]


def find_tissue(
    slide: Slide, thumbnail_HWC: U8_HWC, mpp: Mpp, *, mask: str, config: TissueConfig
) -> TissueResult:
    """Tissue of a slide on its thumbnail: ``mask`` is ``detect``, ``whole`` or a GeoJSON file.

    Raises ConfigError for a file that is none, or that has no area on the slide.
    """
    size = Size(*thumbnail_HWC.shape[:2])
    if mask == "whole":
        return whole_slide(size, mpp)
    detected = detect_tissue(thumbnail_HWC, mpp, config)
    if mask == "detect":
        return detected
    given = TissueMask(mask_HW=mask_at_pixels(read_geojson(mask, slide, mpp), size, mpp, 1), mpp=mpp)
    reason = None if given.mask_HW.any() else f"{mask} contains no tissue"
    return TissueResult(tissue=given, excluded={}, reason=reason, background_rgb=detected.background_rgb)


def read_geojson(path: str, slide: Slide, mpp: Mpp) -> TissueMask:
    """The areas of a GeoJSON file, in level-0 pixels of the slide, as a mask; ConfigError names the file."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        mask = geojson_to_mask(document, slide.levels[0].size, slide.mpp, mpp)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a GeoJSON file") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error}); export it as GeoJSON") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if document.get("features", True) and not mask.mask_HW.any():
        raise ConfigError(
            f"{path}: no area lies on the slide, or none larger than {mpp[0]:.3g} µm; coordinates are "
            "(x, y) in level-0 pixels"
        )
    return mask


def mask_at_pixels(tissue: TissueMask, size: Size, mpp: Mpp, cell: int) -> npt.NDArray[np.bool_]:
    """The mask pixel at the centre of every ``cell`` x ``cell`` pixels of a lattice."""
    height, width = ceil_div(size.height, cell), ceil_div(size.width, cell)
    rows = ((np.arange(height) + 0.5) * cell * mpp[0] / tissue.mpp[0]).astype(int)
    cols = ((np.arange(width) + 0.5) * cell * mpp[1] / tissue.mpp[1]).astype(int)
    limit = tissue.mask_HW.shape
    picked = tissue.mask_HW[np.ix_(rows.clip(max=limit[0] - 1), cols.clip(max=limit[1] - 1))]
    return np.asarray(picked)
