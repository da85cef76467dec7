"""Wrap-around textures of a pale frozen H&E section: what ``readers/synthetic.py`` looks up.

A texture is made once, in optical density: haematoxylin and eosin maps in [H, W] float32, turned into RGB by
Beer-Lambert (haematoxylin vector of Ruifrok and Johnston 2001, eosin of Macenko et al. 2009). Every step
wraps, so a texture repeats without a seam. Sizes are in micrometres, drawn at the slide's own resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.protocols import U8_HWC

__all__ = ["PERIOD", "Textures", "build_textures", "halve"]

PERIOD = 1024
"""Side of a texture in level-0 pixels; a power of two, so that it wraps at each pyramid level."""

_F32_HW = npt.NDArray[np.float32]
_Float_HW = npt.NDArray[np.floating[Any]]

_HAEMATOXYLIN = np.array((0.65, 0.70, 0.29), np.float32)
_EOSIN = np.array((0.2159, 0.8012, 0.5581), np.float32)
_GLASS = np.array((243, 238, 242), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Textures:
    """``glass`` and the tissue kinds, [PERIOD, PERIOD, 3] uint8; ``rag``: unit-bounded noise for borders."""

    glass: U8_HWC
    cellular: U8_HWC
    stroma: U8_HWC
    bundle: U8_HWC
    oedema: U8_HWC
    fold: U8_HWC
    rag: _F32_HW


def build_textures(seed: int, um_per_px: float) -> Textures:
    """All textures of a seed; ``um_per_px`` is the level-0 pixel size in micrometres."""
    rng = np.random.default_rng([seed, 1])
    scale = float(np.clip(1.0 / um_per_px, 0.5, 8.0))  # pixels in a micrometre, kept drawable
    glass = np.full((PERIOD, PERIOD, 3), _GLASS, np.float32)
    glass += 1.2 * _noise(rng, 60.0)[..., None] + 0.5 * _noise(rng, 1.2)[..., None]
    cellular_h, cellular_e = _cellular(rng, scale)
    stroma_h, stroma_e = _stroma(rng, scale)
    oedema_h, oedema_e = _oedema(rng, scale)
    rag = 0.55 * _noise(rng, 9.0 * scale) + 0.3 * _noise(rng, 3.0 * scale) + 0.15 * _noise(rng, 1.0 * scale)
    return Textures(
        glass=_to_u8(glass),
        cellular=_stained(rng, cellular_h, cellular_e),
        stroma=_stained(rng, stroma_h, stroma_e),
        bundle=_stained(rng, *(_slanted(field) for field in (stroma_h, stroma_e))),
        oedema=_stained(rng, oedema_h, oedema_e),
        fold=_stained(
            rng,
            _blur(1.1 * cellular_h + np.roll(stroma_h, 311, axis=0), 1.2 * scale),
            _blur(cellular_e + np.roll(stroma_e, 311, axis=0), 1.2 * scale),
        ),
        rag=np.clip(rag / 2.0, -1.0, 1.0),
    )


def halve(texture: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """2x2 mean: rounded half up for uint8, exact for float; a single pixel stays as it is."""
    if texture.shape[0] == 1:
        return texture
    wide = texture.astype(np.uint16) if texture.dtype == np.uint8 else texture
    total = wide[0::2, 0::2] + wide[1::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 1::2]
    mean = (total + 2) >> 2 if texture.dtype == np.uint8 else total / 4
    return np.asarray(mean, texture.dtype)


def _cellular(rng: np.random.Generator, scale: float) -> tuple[_Float_HW, _Float_HW]:
    """Crowded nuclei in thin bluish-pink cytoplasm, torn apart by freezing clefts."""
    nuclei = _nuclei(
        rng, spacing=11.5 * scale, radius=(3.0 * scale, 5.0 * scale), aspect=(1.0, 1.9), keep=0.84
    )
    away = _distance(nuclei < 60)
    cleft = _step(away - (5.0 + 1.8 * _noise(rng, 5 * scale)) * scale, 1.3 * scale)
    cleft = np.maximum(cleft, _step(_noise(rng, 7 * scale) - 1.55, 0.25))
    cytoplasm = 1.0 - 0.93 * cleft
    grain = 1 + 0.16 * _noise(rng, 0.8 * scale) + 0.12 * _noise(rng, 3 * scale)
    h = _chromatin(rng, nuclei, scale) * 0.85 + 0.13 * cytoplasm * grain
    e = cytoplasm * (0.15 + 0.04 * _noise(rng, 14 * scale)) * grain
    return h, e


def _stroma(rng: np.random.Generator, scale: float) -> tuple[_Float_HW, _Float_HW]:
    """Wavy eosinophilic fibres with spindle nuclei along them and slit-like gaps."""
    fibre = _noise(rng, 0.8 * scale, 11 * scale)
    coarse = _noise(rng, 2.4 * scale, 30 * scale)
    nuclei = _nuclei(rng, spacing=21 * scale, radius=(2.0 * scale, 3.0 * scale), aspect=(2.4, 4.2), keep=0.8)
    slit = _step(_noise(rng, 2.2 * scale, 14 * scale) - 1.35, 0.3)
    rows, columns = np.mgrid[0:PERIOD, 0:PERIOD].astype(np.float32)
    turn = np.float32(2 * np.pi / PERIOD)
    wave = 34 * np.sin(turn * columns) + 14 * np.sin(2 * turn * columns + 1.7 + np.sin(turn * rows))
    bent = rows + np.float32(scale / 2) * (wave + 9 * _noise(rng, 22 * scale)).astype(np.float32)
    fibre, coarse, slit, nuclei = (
        cv2.remap(
            field.astype(np.float32), columns, bent % PERIOD, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
        )
        for field in (fibre, coarse, slit, nuclei.astype(np.float32))
    )
    matrix = np.clip(0.27 + 0.06 * fibre + 0.07 * coarse + 0.03 * _noise(rng, 0.7 * scale), 0.04, None) * (
        1 - 0.9 * slit
    )
    h = _chromatin(rng, nuclei, scale) * 0.8 + 0.08 * matrix
    return h, matrix


def _slanted(field: _Float_HW) -> _Float_HW:
    """Turned by a quarter and sheared by a whole period, which keeps it wrapping."""
    turned = field.T[::-1]
    return np.stack([np.roll(turned[row], row) for row in range(PERIOD)])


def _oedema(rng: np.random.Generator, scale: float) -> tuple[_Float_HW, _Float_HW]:
    """Loose pale tissue riddled with the rounded holes that ice crystals leave."""
    nuclei = _nuclei(rng, spacing=17 * scale, radius=(2.6 * scale, 4.2 * scale), aspect=(1.0, 2.0), keep=0.75)
    hole = _step(_noise(rng, 4.2 * scale) + 0.5 * _noise(rng, 2.0 * scale) - 0.55, 0.22)
    hole = hole * (1.0 - _step(nuclei.astype(np.float32) / 255 - 0.3, 0.2))
    mesh = (1 - 0.95 * hole) * (1 + 0.25 * _noise(rng, 1.0 * scale) + 0.15 * _noise(rng, 8 * scale))
    h = _chromatin(rng, nuclei, scale) * 0.75 + 0.06 * mesh
    return h, 0.15 * mesh


def _nuclei(
    rng: np.random.Generator,
    *,
    spacing: float,
    radius: tuple[float, float],
    aspect: tuple[float, float],
    keep: float,
) -> npt.NDArray[np.uint8]:
    """Bulged ellipses on a jittered lattice, 0 to 255 by stain intensity; density varies slowly."""
    count = max(2, round(PERIOD / spacing))
    margin = int(radius[1] * aspect[1] * 1.5) + 4
    canvas = np.zeros((PERIOD + 2 * margin, PERIOD + 2 * margin), np.uint8)
    crowd = _noise(rng, 30.0)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    cells = np.indices((count, count)).reshape(2, -1).T
    centres = (cells + 0.5 + rng.uniform(-0.42, 0.42, cells.shape)) * (PERIOD / count) % PERIOD
    for y, x in centres:
        if rng.random() > keep + 0.12 * crowd[int(y), int(x)]:
            continue
        size, ratio = rng.uniform(*radius), np.sqrt(rng.uniform(*aspect))
        two, three = rng.uniform(0, 2 * np.pi, 2)
        bulge = 1 + 0.10 * np.sin(2 * angles + two) + 0.07 * np.sin(3 * angles + three)
        across, along = size / ratio * bulge * np.sin(angles), size * ratio * bulge * np.cos(angles)
        tilt = rng.normal(0, 0.25) if aspect[0] > 2 else rng.uniform(0, np.pi)
        points = np.stack(
            [
                x + margin + along * np.cos(tilt) - across * np.sin(tilt),
                y + margin + along * np.sin(tilt) + across * np.cos(tilt),
            ],
            axis=-1,
        )
        cv2.fillPoly(
            canvas, [np.round(points * 16).astype(np.int32)], int(rng.uniform(110, 255)), cv2.LINE_AA, 4
        )
    return _wrap(canvas, margin)


def _wrap(canvas: npt.NDArray[np.uint8], margin: int) -> npt.NDArray[np.uint8]:
    """Fold what was drawn beyond the borders back to the other side."""
    for _axis in range(2):
        inner = canvas[margin:-margin].copy()
        np.maximum(inner[:margin], canvas[-margin:], out=inner[:margin])
        np.maximum(inner[-margin:], canvas[:margin], out=inner[-margin:])
        canvas = inner.T
    return np.ascontiguousarray(canvas)


def _chromatin(rng: np.random.Generator, nuclei: npt.NDArray[np.generic], scale: float) -> _F32_HW:
    """Haematoxylin inside nuclei: clumped, with a denser rim, softened as a frozen section is."""
    body = nuclei.astype(np.float32) / 255
    rim = np.clip(body - _blur(body, 1.3 * scale), 0, None)
    clumps = 1 + 0.20 * _noise(rng, 0.7 * scale) + 0.12 * _noise(rng, 1.8 * scale)
    return _blur(np.clip(body * clumps + 0.5 * rim, 0, None), 0.45 * scale)


def _stained(rng: np.random.Generator, h: _Float_HW, e: _Float_HW) -> U8_HWC:
    density = h[..., None] * _HAEMATOXYLIN + e[..., None] * _EOSIN
    rgb = _GLASS * np.power(np.float32(10), -np.clip(density, 0, 1.2))
    return _to_u8(rgb + 1.3 * _noise(rng, 0.6)[..., None])


def _noise(rng: np.random.Generator, sigma_y: float, sigma_x: float | None = None) -> _F32_HW:
    """Wrap-around Gaussian noise of unit variance, smooth over ``sigma`` pixels."""
    sigma_x = sigma_y if sigma_x is None else sigma_x
    step_y, step_x = _coarseness(sigma_y), _coarseness(sigma_x)
    field = rng.standard_normal((PERIOD // step_y, PERIOD // step_x), np.float32)
    field = np.pad(_blur(field, sigma_y / step_y, sigma_x / step_x), 2, mode="wrap")
    field = cv2.resize(field, None, fx=step_x, fy=step_y, interpolation=cv2.INTER_CUBIC)
    field = field[2 * step_y : -2 * step_y, 2 * step_x : -2 * step_x]
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def _coarseness(sigma: float) -> int:
    """Power of two by which a grid may be coarser and still carry this smoothness."""
    step = 1
    while sigma / (2 * step) >= 3:
        step *= 2
    return step


def _blur(field: _Float_HW, sigma_y: float, sigma_x: float | None = None) -> _F32_HW:
    sigma_x = sigma_y if sigma_x is None else sigma_x
    pad_y, pad_x = int(3 * sigma_y) + 1, int(3 * sigma_x) + 1
    wide = np.pad(field, ((pad_y, pad_y), (pad_x, pad_x)), mode="wrap")
    wide = cv2.GaussianBlur(wide, (0, 0), sigmaX=sigma_x, sigmaY=sigma_y)
    return np.asarray(wide[pad_y:-pad_y, pad_x:-pad_x], np.float32)


def _distance(free: npt.NDArray[np.bool_]) -> _F32_HW:
    """Distance of each free pixel to the nearest other one, in pixels, wrapping."""
    pad = 64
    wide = cv2.distanceTransform(np.pad(free, pad, mode="wrap").astype(np.uint8), cv2.DIST_L2, 5)
    return np.asarray(wide[pad:-pad, pad:-pad], np.float32)


def _step(field: _Float_HW, width: float) -> _F32_HW:
    return np.asarray(np.clip(field / width + 0.5, 0, 1), np.float32)


def _to_u8(rgb: npt.NDArray[np.float32]) -> U8_HWC:
    return np.asarray(np.clip(rgb + 0.5, 0, 255), np.uint8)
