"""SlideTransform and what reads through it: resampled once, the same however it is cut, no wrong file."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.transform import SlideTransform, fit_affine, pull_back
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.readers.warped import WarpedSlide, load_pair, on_lattice

TURN = np.array([[0.98, -0.17, 310.0], [0.19, 1.01, -120.0]])


def bent(height: int = 40, width: int = 44, um: float = 16.0, peak: float = 20.0) -> SlideTransform:
    y, x = (np.indices((height, width)) + 0.5) * um
    field = peak * np.stack([np.sin(x / 160), np.cos(y / 130)])
    return SlideTransform(affine_23=TURN, field_2HW=field.astype(np.float32), field_um_per_px=um)


def wave(y_um: Any, x_um: Any) -> Any:
    """sin(x) cos(y) in units of 240 µm."""
    return np.sin(x_um / 240) * np.cos(y_um / 240)


def test_s1_a_wave_through_affine_and_field_comes_out_where_it_belongs() -> None:
    transform, mpp = bent(), (2.0, 2.0)
    y, x = ((np.arange(700) + 0.5) * 2.0 for _ in range(2))
    image = wave(y[:, None], x[None, :]).astype(np.float32)
    region = Region(30, 90, 180, 200)
    rows, columns = ((np.arange(a, b) + 0.5) * 2.0 for a, b in ((30, 210), (90, 290)))
    grid = np.meshgrid(rows, columns, indexing="ij")
    # The truth is written out: affine, then the field as a formula and not as nodes.
    to_y = TURN[0, 0] * grid[0] + TURN[0, 1] * grid[1] + TURN[0, 2] + 20 * np.sin(grid[1] / 160)
    to_x = TURN[1, 0] * grid[0] + TURN[1, 1] * grid[1] + TURN[1, 2] + 20 * np.cos(grid[0] / 130)
    at_2HW = transform.grid(region, mpp)
    assert at_2HW.min() > 0 and at_2HW.max() < 1400
    np.testing.assert_allclose(at_2HW, [to_y, to_x], atol=0.05)
    error = np.abs(pull_back(image, at_2HW, mpp) - wave(to_y, to_x)).max()
    assert error <= 1e-3


def test_a_point_does_not_depend_on_the_others() -> None:
    transform = bent()
    whole = transform.grid(Region(0, 0, 90, 77), (3.7, 4.1))
    part = transform.grid(Region(13, 22, 31, 9), (3.7, 4.1))
    np.testing.assert_array_equal(part, whole[:, 13:44, 22:31])


def test_an_affine_map_comes_back_from_its_points() -> None:
    points = np.random.default_rng(0).uniform(0, 640, (40, 2))
    affine = SlideTransform(affine_23=TURN)
    np.testing.assert_allclose(fit_affine(points, affine.points(points)), TURN, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"affine_23": np.eye(3)}, "2 x 3"),
        ({"affine_23": np.full((2, 3), np.nan)}, "finite"),
        ({"affine_23": np.ones((2, 3))}, "flattens"),
        ({"affine_23": TURN, "field_2HW": np.zeros((3, 4, 4), np.float32)}, "field"),
        ({"affine_23": TURN, "field_2HW": np.full((2, 4, 4), np.inf, np.float32)}, "field"),
        ({"affine_23": TURN, "field_um_per_px": 0.0}, "distance"),
    ],
)
def test_what_is_no_transform_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SlideTransform(**values)


# ---- reading through it ----------------------------------------------------------------------------------


def smooth_slide(height: int = 620, width: int = 700) -> ArraySlide:
    """Waves of 75 to 150 px, which interpolation follows to far less than a grey level; two levels."""
    y, x = ((np.arange(side) + 0.5) * 0.5 for side in (height, width))
    planes = [wave(y[:, None] * k, x[None, :] * k) for k in (40, 30, 20)]
    base = np.rint(127.5 + 100 * np.stack(planes, axis=-1)).astype(np.uint8)
    half = np.rint(base.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))).astype(np.uint8)
    return ArraySlide([base, half], mpp=0.5)


def write_pair(path: Path, slide: ArraySlide, transform: SlideTransform, **changes: Any) -> Path:
    about = {
        "version": 1,
        "from": "a",
        "to": "b",
        "units": "micrometer",
        "axes": "yx",
        "affine": transform.affine_23.tolist(),
        "field": None,
        "field_um_per_px": transform.field_um_per_px,
        "from_identity": "f" * 64,
        "from_size": [530, 610],
        "from_mpp": [0.5, 0.5],
        "to_identity": slide.identity,
        "to_mpp": [0.5, 0.5],
    }
    if transform.field_2HW is not None:
        about["field"] = "pair.field.zarr"
        zarr.save_array(path.parent / "pair.field.zarr", transform.field_2HW)
    path.write_text(json.dumps(about | changes))
    return path


def slight(um: float = 8.0) -> SlideTransform:
    y, x = (np.indices((34, 40)) + 0.5) * um
    field = 3 * np.stack([np.sin(x / 60), np.cos(y / 50)])
    affine = np.array([[0.99, -0.05, 14.0], [0.06, 1.0, 3.0]])
    return SlideTransform(affine_23=affine, field_2HW=field.astype(np.float32), field_um_per_px=um)


@pytest.fixture
def warped(tmp_path: Path) -> WarpedSlide:
    slide = smooth_slide()
    return WarpedSlide(slide, load_pair(write_pair(tmp_path / "pair.json", slide, slight())))


def test_a_pair_comes_back_from_its_file(warped: WarpedSlide) -> None:
    again, truth = warped.pair.transform, slight()
    np.testing.assert_array_equal(again.affine_23, truth.affine_23)
    np.testing.assert_array_equal(again.field_2HW, truth.field_2HW)
    assert again.field_um_per_px == 8.0


@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.6])
def test_a_tile_shows_the_moving_slide_at_the_mapped_points(warped: WarpedSlide, mpp: float) -> None:
    """Against the formula, so that half a pixel's shift would show: a pixel is up to 8 grey levels."""
    view = SlideView(on_lattice(warped, (mpp, mpp)), (mpp, mpp))
    region = Region(40, 50, 120, 110)
    y, x = warped.pair.transform.grid(region, (mpp, mpp))
    truth = 127.5 + 100 * np.stack([wave(y * k, x * k) for k in (40, 30, 20)], axis=-1)
    error = np.abs(view.read(region) - truth)
    assert error.max() < 2.0 and error.mean() < 0.6
    assert np.abs(np.diff(truth, axis=1)).max() > 6  # it can fail


@settings(max_examples=40, deadline=None)
@given(st.integers(-20, 560), st.integers(-20, 640), st.integers(1, 90), st.integers(1, 90))
def test_any_part_equals_the_same_part_of_the_whole(y: int, x: int, height: int, width: int) -> None:
    """Noise, not waves: every pixel counts."""
    whole, slide = _whole()
    part = Region(y, x, height, width)
    frame = Region(-40, -40, 800, 860)
    np.testing.assert_array_equal(slide.read_level(0, part), whole[part.slices(frame)])


_KEPT: list[Any] = []


def _whole() -> tuple[Any, WarpedSlide]:
    if not _KEPT:
        import tempfile

        noise = np.random.default_rng(0).integers(0, 256, (620, 700, 3), np.uint8)
        moving = ArraySlide(noise, mpp=0.5)
        with tempfile.TemporaryDirectory() as folder:
            pair = load_pair(write_pair(Path(folder) / "pair.json", moving, slight()))
        slide = WarpedSlide(moving, pair)
        _KEPT.extend((slide.read_level(0, Region(-40, -40, 800, 860)), slide))
    return _KEPT[0], _KEPT[1]


def test_strips_are_invisible(warped: WarpedSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = warped.read_level(0, Region(0, 0, 530, 610))
    monkeypatch.setattr("wsi_pipeline.readers.warped._STRIP_PIXELS", 5000)
    np.testing.assert_array_equal(warped.read_level(0, Region(0, 0, 530, 610)), whole)


def test_outside_is_white_and_the_mask_says_where(tmp_path: Path) -> None:
    slide = smooth_slide()
    away = SlideTransform(affine_23=np.array([[1.0, 0.0, -60.0], [0.0, 1.0, 200.0]]))
    warped = WarpedSlide(slide, load_pair(write_pair(tmp_path / "pair.json", slide, away)))
    region = Region(0, 0, 530, 610)
    pixels, inside = warped.read_level(0, region), warped.inside(region)
    assert inside.sum() == (530 - 120) * (700 - 400)  # rows from 60 µm on, columns up to 150 µm
    assert (pixels[~inside][:, 0] == 255).mean() > 0.99  # cubic taps reach 2 px over the edge
    assert (warped.read_level(0, Region(-50, -50, 40, 40)) == 255).all()
    assert (pixels[inside] < 240).all()


def test_another_transform_is_another_slide_and_it_pickles(warped: WarpedSlide, tmp_path: Path) -> None:
    other = write_pair(tmp_path / "other.json", smooth_slide(), SlideTransform(affine_23=np.eye(2, 3)))
    assert WarpedSlide(smooth_slide(), load_pair(other)).identity != warped.identity
    copy = pickle.loads(pickle.dumps(warped))  # noqa: S301  our own
    assert copy.identity == warped.identity
    region = Region(5, 7, 30, 40)
    np.testing.assert_array_equal(copy.read_level(1, region), warped.read_level(1, region))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version"),
        ({"units": "pixel"}, "units"),
        ({"affine": [[1, 0], [0, 1]]}, "2 x 3"),
        ({"affine": "x"}, "cannot be read"),
        ({"field": "../pair.field.zarr"}, "beside"),
        ({"field": "none.zarr"}, "cannot be read"),
        ({"from_size": [10]}, "extent"),
        ({"from_mpp": [0.5, -1]}, "pixel sizes"),
        ({"field_um_per_px": None}, "cannot be read"),
        ({"from_size": [float("inf"), 9]}, "cannot be read"),
        ({"from_size": [1e30, 9]}, "cannot be read"),
        ({"from_mpp": [float("inf"), 0.5]}, "pixel sizes"),
        ({"to_mpp": [0.5, 1e-9]}, "pixel sizes"),
        ({"affine": [[1, 0, 0], [0, -1, 0]]}, "mirrors"),
        ({"affine": [[1e300, 0, 0], [0, 1e300, 0]]}, "deforms"),
        ({"affine": [[1, 0, 1e300], [0, 1, 0]]}, "deforms"),
        ({"register": {"cells": ["012", "01"], "um_per_cell": 256}}, "cannot be read"),
        ({"register": {"cells": ["013"], "um_per_cell": 256}}, "cells"),
        ({"register": {"cells": ["012"], "um_per_cell": float("inf")}}, "cells"),
        ({"register": [1]}, "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_pair(tmp_path / "pair.json", smooth_slide(), slight(), **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        load_pair(path)
    assert "pair.json" in str(caught.value) and "\n" not in str(caught.value)


def test_only_regions_with_tissue_in_register_serve_and_they_decide_the_identity(tmp_path: Path) -> None:
    slide = smooth_slide()
    cells = {"cells": ["2210", "2110"], "um_per_cell": 64}
    pair = load_pair(write_pair(tmp_path / "pair.json", slide, slight(), register=cells))
    regions_N4 = np.array([[0, x, 64, 64] for x in (0, 32, 64, 96, 128)])  # at 1 µm per pixel
    assert pair.in_register(regions_N4, (1.0, 1.0)).tolist() == [True, True, True, False, False]
    assert pair.in_register(regions_N4 * 2, (0.5, 0.5)).tolist() == [True, True, True, False, False]
    assert not pair.in_register(np.array([[0, 192, 64, 64], [0, 64, 128, 64]]), (1.0, 1.0)).any()
    silent = replace(pair, cells_HW=None)
    assert silent.in_register(regions_N4, (1.0, 1.0)).all() and silent.digest != pair.digest


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"version": 1')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    for name in ("cut.json", "absent.json", "deep.json", "list.json"):
        with pytest.raises(ConfigError, match=name):
            load_pair(tmp_path / name)


@pytest.mark.parametrize("changes", [{"to_identity": "0" * 64}, {"to_mpp": [0.25, 0.25]}])
def test_a_transform_of_another_slide_or_scale_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    slide = smooth_slide()
    pair = load_pair(write_pair(tmp_path / "pair.json", slide, slight(), **changes))
    with pytest.raises(ConfigError, match="register it as it is now"):
        WarpedSlide(slide, pair)
