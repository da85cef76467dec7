"""Tissue masks as GeoJSON, for QuPath to show and for a person to correct; pure functions on dicts.

Coordinates are (x, y) in level-0 pixels, as QuPath writes them. Outlines follow the pixel edges, so a mask
that is written and read at the same mpp comes back bit for bit. Reading takes a mask pixel as tissue if its
centre lies inside (even-odd rule, so rings inside a ring are holes; RFC 7946, section 3.1.6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp, Size
from wsi_pipeline.core.mask import TissueMask
from wsi_pipeline.errors import ConfigError

__all__ = ["geojson_to_mask", "mask_to_geojson"]

_COLOUR = (0, 170, 60)
_SUBTRACTED = ("ignore", "exclude", "background")

Ring = npt.NDArray[np.float64]


def mask_to_geojson(
    mask: TissueMask, slide_mpp: Mpp, *, slide_size: Size | None = None, classification: str = "Tissue"
) -> dict[str, Any]:
    """A FeatureCollection with one Polygon (holes kept) per piece of tissue, largest first.

    ``slide_mpp``: µm per level-0 pixel; ``slide_size``: level-0 extent, to which outlines are clipped, for
    the last row of a mask may reach beyond the slide. Coordinates are rounded to 1/100 pixel.
    """
    scale = np.array([mask.mpp[1] / slide_mpp[1], mask.mpp[0] / slide_mpp[0]])
    limit = np.array([slide_size.width, slide_size.height]) if slide_size else np.array([np.inf, np.inf])
    features: list[dict[str, Any]] = []
    for rings in _pieces(mask.mask_HW):
        coordinates = [np.minimum(np.round(ring * scale, 2), limit).tolist() for ring in rings]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": coordinates},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": classification, "color": list(_COLOUR)},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def geojson_to_mask(obj: Mapping[str, Any], slide_size: Size, slide_mpp: Mpp, mask_mpp: Mpp) -> TissueMask:
    """The mask that the (hand-corrected) annotations describe, at ``mask_mpp``, over the whole slide.

    ``obj``: FeatureCollection, Feature or geometry with Polygon or MultiPolygon, level-0 pixels. Features
    whose class begins with Ignore, Exclude or Background are subtracted; all others are tissue.
    Raises ConfigError for anything malformed, naming the feature.
    """
    shape = (
        max(1, math.ceil(slide_size.height * slide_mpp[0] / mask_mpp[0] - 1e-6)),
        max(1, math.ceil(slide_size.width * slide_mpp[1] / mask_mpp[1] - 1e-6)),
    )
    scale = np.array([slide_mpp[1] / mask_mpp[1], slide_mpp[0] / mask_mpp[0]])
    tissue_HW, removed_HW = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for number, feature in enumerate(_features(obj)):
        where = f"annotations: feature {number}"
        target_HW = removed_HW if _is_subtracted(feature, where) else tissue_HW
        for rings in _polygons(feature.get("geometry"), where):
            _fill(target_HW, [ring * scale for ring in rings])
    return TissueMask(mask_HW=tissue_HW & ~removed_HW, mpp=mask_mpp)


def _features(obj: object) -> Sequence[Mapping[str, Any]]:
    if isinstance(obj, Mapping):
        kind = obj.get("type")
        if kind == "FeatureCollection" and isinstance(obj.get("features"), list):
            features = obj["features"]
            for number, feature in enumerate(features):
                if not isinstance(feature, Mapping) or feature.get("type") != "Feature":
                    raise ConfigError(f"annotations: feature {number} is no GeoJSON Feature; export it again")
            return list(features)
        if kind == "Feature":
            return [obj]
        if kind in ("Polygon", "MultiPolygon"):
            return [{"type": "Feature", "geometry": obj}]
    raise ConfigError(
        "annotations: not a GeoJSON FeatureCollection of polygons; export annotations from QuPath as GeoJSON"
    )


def _is_subtracted(feature: Mapping[str, Any], where: str) -> bool:
    properties = feature.get("properties") or {}
    if not isinstance(properties, Mapping):
        raise ConfigError(f"{where}: its properties are no JSON object; export it again")
    classification = properties.get("classification") or {}
    name = classification.get("name") if isinstance(classification, Mapping) else classification
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{where}: the name of its classification is no text; export it again")
    return (name or "").strip().lower().startswith(_SUBTRACTED)


def _polygons(geometry: object, where: str) -> list[list[Ring]]:
    kind = geometry.get("type") if isinstance(geometry, Mapping) else None
    if not isinstance(geometry, Mapping) or kind not in ("Polygon", "MultiPolygon"):
        raise ConfigError(
            f"{where}: geometry is {kind!r}; only Polygon and MultiPolygon make a mask, delete it"
        )
    coordinates = geometry.get("coordinates")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(polygons, list):
        raise ConfigError(f"{where}: it has no list of coordinates; export it again")
    return [_rings(polygon, where) for polygon in polygons]


def _rings(polygon: object, where: str) -> list[Ring]:
    if not isinstance(polygon, list) or not polygon:
        raise ConfigError(f"{where}: a polygon without rings; delete it or export it again")
    rings = []
    for points in polygon:
        try:
            ring = np.array([[point[0], point[1]] for point in points], np.float64)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise ConfigError(f"{where}: a ring is no list of (x, y) numbers; export it again") from error
        if ring.ndim != 2 or len(ring) < 3 or not np.isfinite(ring).all():
            raise ConfigError(f"{where}: a ring needs at least 3 finite points, got {len(ring)}; delete it")
        rings.append(ring)
    return rings


def _fill(mask_HW: npt.NDArray[np.bool_], rings: list[Ring]) -> None:
    """Set the pixels whose centres an odd number of rings encloses; (x, y) in pixels, the corner is 0.

    Each edge crosses the centre lines of some rows; a crossing flips all pixels to the right of it.
    """
    height, width = mask_HW.shape
    everything = np.concatenate(rings)
    top = int(np.clip(np.floor(everything[:, 1].min()), 0, height))
    bottom = int(np.clip(np.ceil(everything[:, 1].max()), top, height))
    flips_HW = np.zeros((bottom - top, width + 1), np.uint8)
    for ring in rings:
        x0, y0 = ring[:, 0], ring[:, 1]
        x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
        first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), top, bottom).astype(np.int64)
        last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), top, bottom).astype(np.int64)
        count = last - first
        edge = np.repeat(np.arange(len(ring)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        slope = (x1 - x0)[edge] / (y1 - y0)[edge]
        x = x0[edge] + (row + 0.5 - y0[edge]) * slope
        col = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        np.add.at(flips_HW, (row - top, col), 1)  # wraps at 256, which is even
    inside = np.cumsum(flips_HW[:, :width], axis=1, dtype=np.uint8) & 1
    mask_HW[top:bottom] |= inside.view(np.bool_)


def _pieces(mask_HW: npt.NDArray[np.bool_]) -> list[list[Ring]]:
    """Closed outlines along the pixel edges by 4-connected piece, outer ring first, largest piece first.

    Tissue lies on the right of each directed edge (y down); where two pixels meet at a corner only, the walk
    turns right, so 4-connected pieces stay apart and a ring never crosses itself.
    """
    count, labels_HW, stats, _ = cv2.connectedComponentsWithStats(mask_HW.view(np.uint8), connectivity=4)
    pieces: list[list[Ring]] = [[] for _ in range(count)]
    for label, ring in _outlines(mask_HW, labels_HW):
        pieces[label].append(ring)
    order = sorted(range(1, count), key=lambda label: (-int(stats[label, cv2.CC_STAT_AREA]), label))
    return [sorted(pieces[label], key=_extent, reverse=True) for label in order]


def _extent(ring: Ring) -> float:
    return float(np.prod(np.ptp(ring, axis=0)))


# Directions in the order of a right turn with y down: east, south, west, north.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def _outlines(mask_HW: npt.NDArray[np.bool_], labels_HW: npt.NDArray[np.int32]) -> list[tuple[int, Ring]]:
    edges = _directed_edges(mask_HW, labels_HW)
    result = []
    while edges:
        start = next(iter(edges))
        (x, y, heading), label = start, edges[start]
        points = [(x, y)]
        while (x, y, heading) in edges:
            del edges[x, y, heading]
            x, y = x + _STEPS[heading][0], y + _STEPS[heading][1]
            turned = next((turn for turn in (1, 0, 3) if (x, y, (heading + turn) % 4) in edges), None)
            if turned is None:
                break
            if turned:
                points.append((x, y))
            heading = (heading + turned) % 4
        if points[-1] != points[0]:
            points.append(points[0])
        result.append((label, np.array(points, np.float64)))
    return result


def _directed_edges(
    mask_HW: npt.NDArray[np.bool_], labels_HW: npt.NDArray[np.int32]
) -> dict[tuple[int, int, int], int]:
    """(x, y, heading) -> label for each pixel side between tissue and not tissue, tissue on its right."""
    padded = np.pad(mask_HW, 1)
    sides = (  # neighbour that is no tissue, start corner, heading
        (padded[:-2, 1:-1], (0, 0), 0),
        (padded[1:-1, 2:], (1, 0), 1),
        (padded[2:, 1:-1], (1, 1), 2),
        (padded[1:-1, :-2], (0, 1), 3),
    )
    edges: dict[tuple[int, int, int], int] = {}
    for neighbour_HW, (dx, dy), heading in sides:
        rows, cols = np.nonzero(mask_HW & ~neighbour_HW)
        labels = labels_HW[rows, cols].tolist()
        for row, col, label in zip(rows.tolist(), cols.tolist(), labels, strict=True):
            edges[col + dx, row + dy, heading] = label
    return edges
