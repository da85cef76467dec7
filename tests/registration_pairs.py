"""Serial sections whose transform is known: made tissue or a real picture, moved, bent and stained anew."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.core.tissue import TissueConfig, detect_tissue
from wsi_pipeline.core.transform import SlideTransform, pull_back
from wsi_pipeline.registration.estimate import Section, make_section

MPP = 8.0
H, E = np.array([0.650, 0.704, 0.286]), np.array([0.072, 0.990, 0.105])
DAB = np.array([0.268, 0.570, 0.776])


def tissue(side: int = 448, seed: int = 0) -> U8_HWC:
    """A piece of made tissue at 8 µm: nuclei in clusters (H) in bundles of stroma (E), an uneven outline."""
    rng = np.random.default_rng(seed)

    def field(sigma: float) -> npt.NDArray[np.float32]:
        plane = cv2.GaussianBlur(rng.normal(size=(side, side)).astype(np.float32), (0, 0), sigma)
        return np.asarray(plane / plane.std(), np.float32)

    y, x = (np.indices((side, side)) - side / 2) / side
    inside = cv2.GaussianBlur((np.hypot(y * 1.15, x) + 0.02 * field(30) < 0.39).astype(np.float32), (0, 0), 1)
    nuclei = (field(1.6) + 0.8 * field(9) > 0.9) * 0.9 + 0.1
    stroma = 0.25 + 0.5 * (field(5) > 0) + 0.08 * field(1.2)
    density = (nuclei[..., None] * H + stroma[..., None] * E) * inside[..., None] + 0.01
    return np.clip(244 * np.exp(-density), 0, 255).astype(np.uint8)


def restained(rgb_HWC: U8_HWC, seed: int = 0, *, hole: bool = True) -> U8_HWC:
    """The same section with DAB for eosin, weaker nuclei, noise, and a piece that was torn out."""
    rng = np.random.default_rng(seed)
    density = -np.log(np.maximum(rgb_HWC, 1) / 244.0)
    normal = np.cross(H, E) / np.linalg.norm(np.cross(H, E))
    unmixed = density @ np.linalg.inv(np.stack([H, E, normal]))
    mixed = unmixed @ np.stack([0.8 * H, 0.9 * DAB, normal])
    picture = 248 * np.exp(-mixed) + rng.normal(0, 5, rgb_HWC.shape)
    picture_HWC = np.clip(picture, 0, 255).astype(np.uint8)
    if hole:
        height, width = rgb_HWC.shape[:2]
        cv2.circle(picture_HWC, (int(width * 0.55), int(height * 0.58)), height // 20, (246, 246, 246), -1)
    return picture_HWC


def known(
    side: tuple[int, int], degrees: float, scale: float, shift_px: tuple[float, float], peak_px: float
) -> SlideTransform:
    """A rotation about the middle, a scale, a shift, and a smooth field with the given peak."""
    rng = np.random.default_rng(5)
    angle = np.deg2rad(degrees)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array(side) * MPP / 2
    affine = np.column_stack([turn, middle - turn @ middle + np.array(shift_px) * MPP])
    noise = rng.normal(size=(2, -(-side[0] // 2), -(-side[1] // 2))).astype(np.float32)
    field = np.stack([cv2.GaussianBlur(plane, (0, 0), 22) for plane in noise])
    field *= peak_px * MPP / max(float(np.abs(field).max()), 1e-6)
    return SlideTransform(affine_23=affine, field_2HW=field.astype(np.float32), field_um_per_px=2 * MPP)


def through(rgb_HWC: U8_HWC, transform: SlideTransform) -> U8_HWC:
    """What the fixed slide shows where ``transform`` is the truth and ``rgb_HWC`` the moving one."""
    frame = Region(0, 0, *rgb_HWC.shape[:2])
    return pull_back(rgb_HWC, transform.grid(frame, (MPP, MPP)), (MPP, MPP), fill=244)


def section(rgb_HWC: U8_HWC) -> Section:
    return make_section(rgb_HWC, detect_tissue(rgb_HWC, (MPP, MPP), TissueConfig()).tissue.mask_HW, MPP)


def landmark_errors_px(
    found: SlideTransform, truth: SlideTransform, fixed: Section, moving: Section
) -> npt.NDArray[np.float64]:
    """Distances in working pixels at every ninth tissue pixel that both sections have."""
    at_2HW = truth.grid(fixed.frame, (MPP, MPP))
    both = fixed.tissue_HW & (moving.warped(moving.tissue_HW.astype(np.float32), at_2HW) > 0.5)
    both &= (np.indices(both.shape) % 3 == 1).all(axis=0)
    points = (np.argwhere(both) + 0.5) * MPP
    return np.asarray(np.linalg.norm(found.points(points) - truth.points(points), axis=1) / MPP)
