"""A made-up frozen H&E section of any size: the demo slide, the giant-slide tests and the benchmarks.

A pixel is a function of (parameters, level, coordinate) and nothing else; memory does not grow with the size.

Why blocks: every read evaluates whole blocks of 256 x 256 level pixels on a fixed grid and crops them, so
any split of a region gives the same bytes, whatever the arithmetic inside. Why signed distances: tissue
outline, tissue kinds and a fold are coarse grids of signed distances (at most 1024 nodes a side),
interpolated linearly; the result stays within the nodes' range, so most blocks are known to be all glass or
all one tissue kind from a few nodes, and then they are a plain copy from a wrap-around texture. Why no matrix
product in a block: it wakes BLAS threads, which wait for each other on a busy machine (15 times slower).
"""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp, Region, Size
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Level
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers.synthetic_texture import PERIOD, build_textures, halve

__all__ = ["SyntheticSlide"]

_BLOCK = 256
_MAX_NODES = 1024
_PITCH = 8
"""Least distance of nodes in pixels of the level that is read."""
_COARSEST = 512
_KINDS = ("stroma", "bundle", "oedema", "fold")  # over "cellular", in this order
_BORDERS = {
    "outline": (5.0, 24.0),
    "stroma": (14.0, 30.0),
    "bundle": (14.0, 30.0),
    "oedema": (14.0, 30.0),
    "fold": (8.0, 7.0),
}
"""Of each layer: width of its soft border in pixels, and how far it frays in micrometres."""
_VERSION = 1  # part of the identity: another drawing is another slide
_F32_HW = npt.NDArray[np.float32]
_Texture = npt.NDArray[Any]  # uint8 colours or float32 noise
_Mips = dict[str, list[tuple[_Texture, int]]]
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticSlide:
    """A pale frozen H&E section on pink-grey glass; implements ``Slide``.

    ``size``: level-0 pixels; ``mpp``: micrometres per pixel (y, x); ``tissue_share``: part of the area that
    tissue covers, 0 to 1; ``level_count``: number of factor-2 levels, None = until no side exceeds 512.
    A level is nearly, not exactly, the 2x2 mean of the one above. Raises ConfigError.
    """

    size: Size
    mpp: Mpp = (0.5, 0.5)
    seed: int = 0
    tissue_share: float = 0.3
    level_count: int | None = None

    def __post_init__(self) -> None:
        if self.size.height < 1 or self.size.width < 1:
            raise ConfigError(
                f"synthetic slide: size {self.size.height} x {self.size.width} must be positive"
            )
        if not all(math.isfinite(m) and m > 0 for m in self.mpp):
            raise ConfigError(f"synthetic slide: mpp {self.mpp} must be two positive numbers")
        if not 0 <= self.tissue_share <= 1:
            raise ConfigError(f"synthetic slide: tissue share {self.tissue_share} must be from 0 to 1")
        if self.seed < 0 or (self.level_count is not None and self.level_count < 1):
            raise ConfigError("synthetic slide: give a seed of 0 or more and at least one level")

    @property
    def slide_id(self) -> str:
        return f"synthetic-{self.size.width}x{self.size.height}-seed{self.seed}"

    @property
    def identity(self) -> str:
        return hashlib.sha256(f"synthetic {_VERSION} {self!r}".encode()).hexdigest()

    @property
    def mpp_origin(self) -> str:
        return "synthetic"

    @property
    def icc_profile(self) -> bytes | None:
        return None

    @property
    def reader(self) -> str:
        return "synthetic"

    @property
    def levels(self) -> tuple[Level, ...]:
        levels = [Level(size=self.size, downsample=(1.0, 1.0))]
        while True:
            size, number = levels[-1].size, len(levels)
            if number == self.level_count:
                break
            if self.level_count is None and max(size.height, size.width) <= _COARSEST:
                break
            levels.append(Level(size=size.halved(), downsample=(2.0**number, 2.0**number)))
        return tuple(levels)

    def read_level(self, level: int, region: Region) -> U8_HWC:
        """Pixels of ``region`` (pixels of that level), [H, W, 3] uint8; outside the level is white."""
        pixels_HWC = np.full((region.height, region.width, 3), WHITE, np.uint8)
        inside = Region.of(self.levels[level].size).intersect(region)
        if inside is None:
            return pixels_HWC
        with _LOCK:  # so that the first readers wait for one scene and do not build one each
            scene = _scene(self)
        for row in range(inside.y // _BLOCK, (inside.bottom - 1) // _BLOCK + 1):
            for col in range(inside.x // _BLOCK, (inside.right - 1) // _BLOCK + 1):
                block = Region(row * _BLOCK, col * _BLOCK, _BLOCK, _BLOCK)
                part = block.intersect(inside)
                if part is not None:
                    pixels_HWC[part.slices(region)] = scene.block(level, block)[part.slices(block)]
        return pixels_HWC

    def close(self) -> None:
        """Nothing to release: textures are shared by all slides of a process and bounded."""


class _Scene:
    """Textures and coarse signed distances of one slide."""

    def __init__(self, slide: SyntheticSlide) -> None:
        um_per_px = math.sqrt(slide.mpp[0] * slide.mpp[1])
        self._textures = _mips(slide.seed, um_per_px)
        self._fields = _Fields(slide, um_per_px)
        self._um_per_px = um_per_px

    def block(self, level: int, block: Region) -> U8_HWC:
        """One block of the fixed grid; may be a view of a texture, so it is for copying only."""
        outline = self._alpha("outline", level, block)
        if outline is None:
            return self._texture("glass", level, block)
        pixels_HWC = self._texture("cellular", level, block)
        for kind in _KINDS:
            over = self._alpha(kind, level, block)
            if over is not None:
                pixels_HWC = _blend(pixels_HWC, self._texture(kind, level, block), over)
        return _blend(self._texture("glass", level, block), pixels_HWC, outline)

    def _alpha(self, kind: str, level: int, block: Region) -> _F32_HW | float | None:
        """Cover of a layer: None where absent, 1.0 where complete, else [256, 256] in 0 to 1."""
        window = self._fields.window(kind, level, block)
        softness, ragged_um = _BORDERS[kind]
        width, rag_px = max(softness, float(1 << level)), ragged_um / self._um_per_px
        if window.nodes.max() + rag_px < -width / 2:
            return None
        if window.nodes.min() - rag_px > width / 2:
            return 1.0
        rag = self._texture("rag", level, block)
        inside_HW = (window.pixels() + np.float32(rag_px) * rag) / np.float32(width) + np.float32(0.5)
        return np.asarray(np.clip(inside_HW, 0, 1), np.float32)

    def _texture(self, name: str, level: int, block: Region) -> _Texture:
        texture, period = self._textures[name][min(level, len(self._textures[name]) - 1)]
        y, x = block.y % period, block.x % period
        return texture[y : y + _BLOCK, x : x + _BLOCK]


class _Fields:
    """Signed distances in level-0 pixels, positive inside, on node grids that halve with the levels."""

    def __init__(self, slide: SyntheticSlide, um_per_px: float) -> None:
        longest = max(slide.size.height, slide.size.width)
        self._spacing = _PITCH
        while longest > self._spacing * _MAX_NODES:
            self._spacing *= 2
        self._grids: dict[str, list[_F32_HW]] = {}
        for kind, grid in _draw(slide, self._spacing, um_per_px).items():
            grids = [grid]
            while max(grids[-1].shape) > 1:
                odd = [(0, side % 2) for side in grids[-1].shape]
                even = np.pad(grids[-1], odd, mode="edge")
                grids.append(cv2.resize(even, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
            self._grids[kind] = grids

    def window(self, kind: str, level: int, block: Region) -> _Window:
        """Nodes that a block depends on."""
        pitch, step = self._spacing, level  # in pixels of the level between nodes
        while step and pitch > _PITCH:
            pitch, step = pitch // 2, step - 1
        grid = self._grids[kind][min(step, len(self._grids[kind]) - 1)]
        first_y, first_x = block.y // pitch - 1, block.x // pitch - 1
        rows = np.arange(first_y, (block.bottom - 1) // pitch + 2)
        columns = np.arange(first_x, (block.right - 1) // pitch + 2)
        nodes = grid.take(rows, axis=0, mode="clip").take(columns, axis=1, mode="clip")
        return _Window(nodes, pitch, block.y - first_y * pitch, block.x - first_x * pitch)


class _Window(NamedTuple):
    """Nodes around a block: ``pitch`` pixels apart, the block's first pixel at (y, x) after enlarging."""

    nodes: _F32_HW
    pitch: int
    y: int
    x: int

    def pixels(self) -> _F32_HW:
        # Node i lies at pixel (i + 1/2) * pitch, which is where cv2.resize puts it.
        wide = cv2.resize(self.nodes, None, fx=self.pitch, fy=self.pitch, interpolation=cv2.INTER_LINEAR)
        return np.asarray(wide[self.y : self.y + _BLOCK, self.x : self.x + _BLOCK], np.float32)


def _blend(below: U8_HWC, above: U8_HWC, cover: _F32_HW | float) -> U8_HWC:
    if isinstance(cover, float):
        return above
    return np.asarray(cv2.blendLinear(below, above, 1 - cover, cover), np.uint8)


@lru_cache(maxsize=2)
def _scene(slide: SyntheticSlide) -> _Scene:
    return _Scene(slide)


@lru_cache(maxsize=2)
def _mips(seed: int, um_per_px: float) -> _Mips:
    """Each texture at each level with its period there, repeated so that any block is one slice."""
    textures = build_textures(seed, um_per_px)
    mips: _Mips = {}
    for name in ("glass", "cellular", *_KINDS, "rag"):
        texture: _Texture = getattr(textures, name)
        mips[name] = []
        for level in range(PERIOD.bit_length()):
            period = PERIOD >> level
            copies = math.ceil((period + _BLOCK) / period)
            layout = (copies, copies) + (1,) * (texture.ndim - 2)
            wide = np.tile(texture, layout)[: period + _BLOCK, : period + _BLOCK]
            mips[name].append((np.ascontiguousarray(wide), period))
            texture = halve(texture)
    return mips


def _draw(slide: SyntheticSlide, spacing: int, um_per_px: float) -> dict[str, _F32_HW]:
    """Where tissue lies and of which kind: signed distances on the node grid, in level-0 pixels."""
    rng = np.random.default_rng([slide.seed, 2])
    shape = (-(-slide.size.height // spacing), -(-slide.size.width // spacing))
    y, x = (np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5) / np.reshape(shape, (2, 1, 1))
    broad = max(shape) / 9
    fine = 150 / um_per_px / spacing  # 150 micrometres in nodes

    pieces = np.full(shape, -np.inf)
    centres = ((0.36, 0.30), (0.60, 0.67), (0.84, 0.22)) + rng.uniform(-0.04, 0.04, (3, 2))
    for (centre_y, centre_x), radius in zip(centres, (1.0, 1.15, 0.42), strict=True):
        tilt = rng.uniform(-0.6, 0.6)
        dy, dx = (y - centre_y) * 1.35, x - centre_x
        along, across = dx * math.cos(tilt) + dy * math.sin(tilt), dy * math.cos(tilt) - dx * math.sin(tilt)
        pieces = np.maximum(pieces, radius - 3.1 * np.hypot(along * 0.95, across * 1.1))
    pieces = pieces + 0.10 * _smooth(rng, shape, broad) + 0.03 * _smooth(rng, shape, broad / 4)
    pieces -= 0.5 * (_smooth(rng, shape, min(fine, broad / 3)) > 3.1)  # a few tears
    inside = pieces > np.quantile(pieces, 1 - slide.tissue_share)
    if slide.tissue_share in (0.0, 1.0):
        inside[:] = slide.tissue_share == 1.0

    kinds = 0.8 * _smooth(rng, shape, broad / 2.5) + 0.6 * _smooth(rng, shape, min(fine, broad / 4))
    course = _smooth(rng, shape, broad / 2.5)
    damage = _smooth(rng, shape, broad) + 0.6 * _smooth(rng, shape, min(fine, broad / 3))
    bend = centres[1][1] - 0.16 + 0.05 * np.sin(9 * y) + 0.02 * np.sin(23 * y + 1)
    reach = np.where(np.abs(y - centres[1][0]) < 0.2, np.abs(x - bend) * shape[1], np.inf)
    fold = reach < max(1.0, 16 / um_per_px / spacing)
    fibres = kinds > 0.2
    masks = {
        "outline": inside,
        "stroma": fibres,
        "bundle": fibres & (course > 0.1),
        "oedema": damage > 1.0,
        "fold": fold,
    }
    return {kind: _signed_distance(mask) * np.float32(spacing) for kind, mask in masks.items()}


def _smooth(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> _F32_HW:
    """Gaussian noise of unit variance that is smooth over ``sigma`` nodes."""
    coarse = max(1, int(sigma / 4))  # drawn on a coarser grid: a wide filter would cost seconds
    margin = 4
    small = (shape[0] // coarse + 2 * margin, shape[1] // coarse + 2 * margin)
    field = rng.standard_normal(small, np.float32)
    field = cv2.GaussianBlur(field, (0, 0), sigmaX=max(sigma / coarse, 0.3), borderType=cv2.BORDER_REFLECT)
    field = cv2.resize(field, (small[1] * coarse, small[0] * coarse), interpolation=cv2.INTER_CUBIC)
    field = field[margin * coarse // 2 :, margin * coarse // 2 :][: shape[0], : shape[1]]
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), np.float32)


def _signed_distance(inside: npt.NDArray[np.bool_]) -> _F32_HW:
    """Distance to the border in nodes, positive inside; far away where there is no border at all."""
    far = np.float32(inside.size)
    if inside.all() or not inside.any():
        return np.full(inside.shape, far if inside.all() else -far, np.float32)
    within = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5)
    beyond = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, 5)
    # A pixel's centre lies half a node from its edge.
    return np.asarray(np.where(inside, within - 0.5, 0.5 - beyond), np.float32)
