"""Masks to GeoJSON and back: exact where it can be, and one clear error for anything malformed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.annotations import geojson_to_mask, mask_to_geojson
from wsi_pipeline.core.geometry import Size
from wsi_pipeline.core.mask import TissueMask
from wsi_pipeline.errors import ConfigError

MPP = (8.0, 8.0)
SLIDE = (0.5, 0.5)


def feature(coordinates: Any, name: str | None = "Tissue", kind: str = "Polygon") -> dict[str, Any]:
    properties = {} if name is None else {"classification": {"name": name}}
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]


def read(obj: Any, height: int = 160, width: int = 160) -> npt.NDArray[np.bool_]:
    return geojson_to_mask(obj, Size(height, width), SLIDE, MPP).mask_HW


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_mask_comes_back_bit_for_bit(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = TissueMask(mask_HW=np.array(bits, np.bool_).reshape(height, width), mpp=(8.0, 6.0))
    obj = json.loads(json.dumps(mask_to_geojson(mask, SLIDE)))
    assert geojson_to_mask(obj, Size(height * 16, width * 12), SLIDE, (8.0, 6.0)) == mask


def test_outline_is_what_qupath_reads() -> None:
    bits = np.zeros((6, 8), np.bool_)
    bits[1:5, 2:7] = True
    bits[2:4, 3:5] = False
    obj = mask_to_geojson(TissueMask(mask_HW=bits, mpp=MPP), SLIDE)
    assert obj["type"] == "FeatureCollection"
    (found,) = obj["features"]
    assert found["type"] == "Feature"
    assert found["geometry"]["type"] == "Polygon"
    assert found["properties"]["objectType"] == "annotation"
    assert found["properties"]["classification"]["name"] == "Tissue"
    outer, hole = found["geometry"]["coordinates"]
    assert outer[0] == outer[-1] and hole[0] == hole[-1]
    assert sorted(map(tuple, outer[:-1])) == [(32, 16), (32, 80), (112, 16), (112, 80)]  # (x, y), level 0
    assert sorted(map(tuple, hole[:-1])) == [(48, 32), (48, 64), (80, 32), (80, 64)]


def test_pieces_that_meet_at_a_corner_are_two_simple_polygons() -> None:
    bits = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], np.bool_)
    features = mask_to_geojson(TissueMask(mask_HW=bits, mpp=MPP), SLIDE)["features"]
    assert [len(item["geometry"]["coordinates"]) for item in features] == [1, 1]
    assert len(features[0]["geometry"]["coordinates"][0]) == 5
    assert features[0]["geometry"]["coordinates"][0][0] != features[1]["geometry"]["coordinates"][0][0]


def test_tissue_inside_a_hole_is_its_own_piece() -> None:
    bits = np.ones((9, 9), np.bool_)
    bits[2:7, 2:7] = False
    bits[4, 4] = True
    features = mask_to_geojson(TissueMask(mask_HW=bits, mpp=MPP), SLIDE)["features"]
    assert [len(item["geometry"]["coordinates"]) for item in features] == [2, 1]


def test_outline_is_clipped_to_the_slide() -> None:
    mask = TissueMask(mask_HW=np.ones((3, 3), np.bool_), mpp=MPP)
    obj = mask_to_geojson(mask, SLIDE, slide_size=Size(40, 45))
    points = np.array(obj["features"][0]["geometry"]["coordinates"][0])
    assert points.max(axis=0).tolist() == [45, 40]
    assert geojson_to_mask(obj, Size(40, 45), SLIDE, MPP).mask_HW.shape == (3, 3)


def test_empty_mask_is_an_empty_collection_and_back() -> None:
    obj = mask_to_geojson(TissueMask(mask_HW=np.zeros((4, 4), np.bool_), mpp=MPP), SLIDE)
    assert obj == {"type": "FeatureCollection", "features": []}
    assert not read(obj).any()


@pytest.mark.parametrize("name", ["Ignore*", "ignore", "Exclude", "EXCLUDED", "Background", " background"])
def test_subtracted_classes(name: str) -> None:
    obj = collection(feature([box(32, 32, 32, 32)], name), feature([box(0, 0, 160, 160)]))
    found = read(obj)
    assert not found[2:4, 2:4].any()
    assert found.sum() == 100 - 4


@pytest.mark.parametrize("name", ["Tissue", "Tumor", None])
def test_all_other_classes_are_tissue(name: str | None) -> None:
    assert read(collection(feature([box(0, 0, 80, 80)], name))).sum() == 25


def test_multipolygon_holes_single_feature_and_bare_geometry() -> None:
    parts = [[box(0, 0, 64, 64), box(16, 16, 16, 16)], [box(96, 96, 32, 32)]]
    expected = np.zeros((10, 10), np.bool_)
    expected[:4, :4] = True
    expected[1, 1] = False
    expected[6:8, 6:8] = True
    whole = feature(parts, kind="MultiPolygon")
    for obj in (collection(whole), whole, whole["geometry"]):
        assert np.array_equal(read(obj), expected)


def test_x_comes_before_y_and_what_lies_outside_the_slide_is_cut() -> None:
    found = read(collection(feature([box(-50, 16, 114, 16)])), 160, 320)
    assert found.shape == (10, 20)
    assert np.argwhere(found).tolist() == [[1, 0], [1, 1], [1, 2], [1, 3]]
    assert not read(collection(feature([box(1000, 1000, 50, 50)]))).any()
    assert not read(collection(feature([box(-900, -900, 50, 50)]))).any()


def test_area_of_a_slanted_polygon() -> None:
    triangle = [[0, 0], [1600, 0], [0, 1600], [0, 0]]
    found = read(collection(feature([triangle])), 1600, 1600)
    assert found.sum() == pytest.approx(100 * 100 / 2, rel=0.02)
    unclosed = read(collection(feature([triangle[:-1]])), 1600, 1600)
    assert np.array_equal(found, unclosed)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([], "FeatureCollection"),
        ({"type": "FeatureCollection"}, "FeatureCollection"),
        ({"type": "Point", "coordinates": [1, 2]}, "FeatureCollection"),
        (collection("text"), "feature 0"),
        (collection(feature([box(0, 0, 9, 9)]), {"type": "Feature"}), "feature 1: geometry is None"),
        (collection(feature([1, 2], kind="Point")), "'Point'"),
        (collection(feature([])), "without rings"),
        (collection(feature("abc")), "without rings"),
        (collection(feature("abc", kind="MultiPolygon")), "list of coordinates"),
        (collection(feature([[[0, 0], [1, 1]]])), "at least 3"),
        (collection(feature([[[0, 0], [1, float("nan")], [2, 2]]])), "finite"),
        (collection(feature([[["a", 0], [1, 1], [2, 2]]])), "numbers"),
        (collection(feature([[[0], [1, 1], [2, 2]]])), "numbers"),
        (collection(feature([[0, 1, 2]])), "numbers"),
        (collection(feature([None])), "numbers"),
        (collection({**feature([box(0, 0, 9, 9)]), "properties": [1]}), "properties"),
        (collection(feature([box(0, 0, 9, 9)], 3)), "no text"),  # type: ignore[arg-type]
    ],
)
def test_malformed_input_is_one_clear_error(obj: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(obj)
    assert str(caught.value).startswith("annotations")
    assert "\n" not in str(caught.value)
