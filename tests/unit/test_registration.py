"""Registration of made sections: what is found, how honest its error is, and what the gates refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from registration_pairs import MPP, known, landmark_errors_px, restained, section, through, tissue

from wsi_pipeline.core.transform import SlideTransform, plausible
from wsi_pipeline.registration.estimate import match_blocks, starts
from wsi_pipeline.registration.gate import GATES, measured, refusals, trust_map
from wsi_pipeline.registration.refine import Fitted, measure, register


@pytest.fixture(scope="module")
def pair():  # type: ignore[no-untyped-def]
    """Fixed and moving section, the truth, and what was found."""
    moving_HWC = tissue()
    truth = known(moving_HWC.shape[:2], 25, 0.975, (12, -9), 5)
    fixed, moving = section(through(moving_HWC, truth)), section(restained(moving_HWC))
    return fixed, moving, truth, register(fixed, moving, elastic=True)


def test_landmarks_are_recovered_across_stains(pair) -> None:  # type: ignore[no-untyped-def]
    fixed, moving, truth, fitted = pair
    figures = measured(fixed, fitted)
    assert not refusals(figures, fitted)
    assert figures["trusted"] > 0.9 and figures["agreeing"] > 0.9
    errors = landmark_errors_px(fitted.transform, truth, fixed, moving)
    assert np.median(errors) <= 0.5 and np.quantile(errors, 0.9) <= 1.5
    straight = replace(fitted.transform, field_2HW=None)  # the field has earned its place
    assert np.median(landmark_errors_px(straight, truth, fixed, moving)) > 3 * np.median(errors)


def test_the_reported_error_is_neither_smaller_nor_much_larger_than_the_true_one(pair) -> None:  # type: ignore[no-untyped-def]
    fixed, moving, truth, fitted = pair
    told = measured(fixed, fitted)["median_um"] / MPP
    true = np.median(landmark_errors_px(fitted.transform, truth, fixed, moving))
    assert 0.7 * true <= told <= true + 0.5


def test_held_out_blocks_share_no_pixel_with_fitted_ones(pair) -> None:  # type: ignore[no-untyped-def]
    fitted = pair[3]
    apart = np.abs(fitted.used.fixed_N2[:, None] - fitted.tested.fixed_N2[None]).max(axis=-1)
    assert apart.min() >= 32 * MPP
    share = len(fitted.tested.ncc_N) / (len(fitted.tested.ncc_N) + len(fitted.used.ncc_N))
    assert 0.15 < share < 0.35


@pytest.mark.parametrize("wrong", ["half turn", "shift", "mirror"])
def test_a_wrong_transform_does_not_pass_whoever_made_it(pair, wrong: str) -> None:  # type: ignore[no-untyped-def]
    fixed, moving, truth, _ = pair
    middle = np.array(fixed.tissue_HW.shape) * MPP / 2
    turn = {"half turn": -np.eye(2), "shift": np.eye(2), "mirror": np.diag([1.0, -1.0])}[wrong]
    offset = middle - turn @ middle + (40 * MPP if wrong == "shift" else 0.0)
    first = np.vstack([np.column_stack([turn, offset]), [0.0, 0.0, 1.0]])
    bad = SlideTransform(affine_23=truth.affine_23 @ first)
    fitted = measure(fixed, moving, bad, held_out=1.0)
    assert refusals(measured(fixed, fitted), fitted)


def test_blocks_measure_a_transform_and_do_not_follow_it(pair) -> None:  # type: ignore[no-untyped-def]
    """Off by 4 px, every match says 4 px: the measurement owes nothing to the transform."""
    fixed, moving, truth, _ = pair
    off = replace(truth, affine_23=truth.affine_23 + [[0, 0, 4 * MPP], [0, 0, 0]])
    matches, blocks = match_blocks(fixed, moving, off)
    assert len(matches.ncc_N) > 0.7 * len(blocks)
    assert np.median(matches.errors(off)) / MPP == pytest.approx(4.0, abs=0.2)
    assert np.median(matches.errors(truth)) / MPP < 0.3


def test_a_mirrored_section_is_refused() -> None:
    moving_HWC = tissue(384, seed=3)
    fixed, moving = section(moving_HWC), section(np.ascontiguousarray(restained(moving_HWC)[:, ::-1]))
    fitted = register(fixed, moving, elastic=True)
    assert fitted is None or refusals(measured(fixed, fitted), fitted)


@pytest.mark.parametrize(("shift_px", "degrees"), [((60, 0), 0), ((0, 0), 15), ((0, 0), 180)])
def test_a_piece_that_moved_on_its_own_is_astray_and_the_other_is_not(
    shift_px: tuple[int, int], degrees: float
) -> None:
    """The figures are good in all cases: whatever lands elsewhere is never found. The map tells."""
    large, small = tissue(384, seed=1), tissue(256, seed=2)
    still = np.full((480, 720, 3), 244, np.uint8)
    still[40:424, 20:404] = large
    alone = np.full_like(still, 244)
    alone[110:366, 424:680] = small
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([238, 552]) * MPP
    moved = SlideTransform(
        affine_23=np.column_stack([turn, middle - turn @ middle + np.array(shift_px) * MPP])
    )
    fixed = section(np.minimum(still, through(alone, moved)))
    moving = section(restained(np.minimum(still, alone), hole=False))
    fitted = register(fixed, moving, elastic=True)
    figures = measured(fixed, fitted)
    assert not refusals(figures, fitted) and 0.55 < figures["trusted"] < 0.8
    cells_HW = trust_map(fixed, fitted)
    row, column = (np.argwhere(cells_HW == 2) * fixed.stride).T
    assert len(row) > 50 and column.max() < 404
    at_N2 = (np.column_stack([row, column]) + fixed.stride / 2) * MPP
    assert np.linalg.norm(fitted.transform.points(at_N2) - at_N2, axis=1).max() < 2 * MPP
    row, column = (np.argwhere(cells_HW == 1) * fixed.stride).T
    assert (column > 404).sum() > 30


def test_lines_of_stitching_on_both_slides_neither_pass_nor_hide_the_tissue() -> None:
    lines = np.where((np.indices((448, 448)) % 40 < 3).any(axis=0), 0.4, 1.0)[..., None]
    moving_HWC = tissue()
    truth = known(moving_HWC.shape[:2], 9, 1.0, (6, -8), 0)
    moving = section((restained(moving_HWC) * lines).astype(np.uint8))
    for picture_HWC, passes in ((through(moving_HWC, truth), True), (tissue(seed=4), False)):
        fixed = section((picture_HWC * lines).astype(np.uint8))
        fitted = register(fixed, moving, elastic=True)
        assert bool(refusals(measured(fixed, fitted), fitted)) is not passes
        if passes:
            assert np.median(landmark_errors_px(fitted.transform, truth, fixed, moving)) < 0.5


def test_a_field_that_follows_a_tear_is_astray_along_it(pair) -> None:  # type: ignore[no-untyped-def]
    fixed, _, _, fitted = pair
    middle = fixed.tissue_HW.shape[1] // 2 // fixed.stride
    for jump_px, share in ((0, 0.0), (12, 1.0)):
        field = fitted.transform.field_2HW.copy()  # type: ignore[union-attr]
        field[:, :, field.shape[2] // 2 :] += jump_px * MPP
        torn = replace(fitted.transform, field_2HW=field)
        parts = [part._replace(moving_N2=torn.points(part.fixed_N2)) for part in fitted[1:3]]
        cells_HW = trust_map(fixed, Fitted(torn, *parts, fitted.blocks_N2))  # every block agrees
        assert (cells_HW[5:-5, middle - 1 : middle + 1] == 1).any(axis=1).mean() == share
        assert (cells_HW[5:-5, 2 : middle - 1] == 2).mean() > 0.9


@pytest.mark.parametrize("degrees", [0, 90, 200])
def test_a_start_is_found_in_every_direction_without_key_points(
    degrees: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_pipeline.registration.estimate._by_keypoints", lambda *_: None)
    moving_HWC = tissue(384, seed=1)
    truth = known(moving_HWC.shape[:2], degrees, 1.0, (25, -18), 0)
    fixed, moving = section(through(moving_HWC, truth)), section(restained(moving_HWC))
    nearest = min(np.median(landmark_errors_px(s, truth, fixed, moving)) for s in starts(fixed, moving))
    assert nearest < 12.0  # within the reach of the first round, 40 px


def test_gates_and_plausibility_can_both_refuse(pair) -> None:  # type: ignore[no-untyped-def]
    fixed, moving, _, fitted = pair
    figures = measured(fixed, fitted)
    for name, limit in GATES.items():
        told = refusals(figures | {name: limit * 0.99}, fitted)
        assert len(told) == 1 and f"{limit:g}" in told[0]
    for affine in (np.diag([1.0, -1.0, 0])[:2], np.diag([1.4, 1.0, 0])[:2], np.diag([0.7, 0.7, 0])[:2]):
        assert not plausible(affine)
