"""The quality-control picture: source, tissue, output and disagreement side by side, with a scale bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wsi_pipeline.core.annotations import mask_to_geojson
from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.overlay import draw_overlay
from wsi_pipeline.core.protocols import U8_HW, U8_HWC, Slide
from wsi_pipeline.pipeline.outputs import mapped, sidecar
from wsi_pipeline.pipeline.planning import Survey
from wsi_pipeline.readers.lattice import IccMode, SlideView
from wsi_pipeline.writers.manifest import SYNTHETIC
from wsi_pipeline.writers.omezarr import read_label

__all__ = ["write_geojson", "write_overlay", "write_qc"]

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

PANEL_SIDE = 460
MARGIN = 14
INK = (30, 30, 30)
STRONG_DISAGREEMENT = 16
"""Grey levels at which the disagreement panel is fully red."""


def write_qc(found: Survey, slide: Slide, output: Slide, store: Path, path: Path) -> None:
    """Four panels of one finished conversion; raises OutputError where the PNG cannot be written."""
    mpp = _panel_mpp(found)
    source = _panel(slide, mpp, found.plan.settings["icc"])
    overlay = _resize(draw_overlay(found.thumbnail_HWC, found.tissue), found.thumbnail_mpp, mpp)
    panels = [
        ("Source", source),
        ("Tissue (green), excluded (other colours)", overlay),
        (f"Output: {found.plan.generator.kind}", _panel(output, mpp, "ignore")),
        _disagreement(read_label(store, "disagreement"), source.shape, found.plan.grid.overlap),
    ]
    title = (
        f"{found.plan.slide_id}   tissue {found.tissue.tissue.area_mm2:.2f} mm2   "
        f"{found.plan.tile_count} tiles   {found.plan.mpp[1]:.4g} um/px   {SYNTHETIC}"
    )
    _save(_sheet(title, panels, mpp), path)


def write_overlay(found: Survey, path: Path) -> None:
    """Source and tissue overlay of a plan, also where there is no tissue."""
    mpp = _panel_mpp(found, side=900)
    panels = [
        ("Source", _resize(found.thumbnail_HWC, found.thumbnail_mpp, mpp)),
        (
            "Tissue (green), excluded (other colours)",
            _resize(draw_overlay(found.thumbnail_HWC, found.tissue), found.thumbnail_mpp, mpp),
        ),
    ]
    reason = f"   no tissue: {found.tissue.reason}" if found.tissue.reason else ""
    title = f"{found.plan.slide_id}   tissue {found.tissue.tissue.area_mm2:.2f} mm2{reason}"
    _save(_sheet(title, panels, mpp), path)


def write_geojson(found: Survey, slide_mpp: Mpp, path: Path) -> None:
    """The tissue outline in level-0 pixels, to be corrected by hand and given back as a mask."""
    fresh = sidecar(path, ".partial")
    with mapped(path):
        fresh.write_text(json.dumps(mask_to_geojson(found.tissue.tissue, slide_mpp)), encoding="utf-8")
        fresh.replace(path)


def _panel(slide: Slide, mpp: Mpp, icc: IccMode) -> U8_HWC:
    view = SlideView(slide, mpp, icc=icc)
    return view.read(Region.of(view.size))


def _panel_mpp(found: Survey, side: int = PANEL_SIDE) -> Mpp:
    height, width = found.thumbnail_HWC.shape[:2]
    finest = max(found.thumbnail_mpp[0] * height, found.thumbnail_mpp[1] * width) / side
    return (finest, finest)


def _resize(pixels_HWC: U8_HWC, mpp: Mpp, target: Mpp) -> U8_HWC:
    height = max(1, round(pixels_HWC.shape[0] * mpp[0] / target[0]))
    width = max(1, round(pixels_HWC.shape[1] * mpp[1] / target[1]))
    return np.asarray(Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.BOX))


def _disagreement(disagreement_HW: U8_HW, shape: tuple[int, ...], overlap: int) -> tuple[str, U8_HWC]:
    largest = int(disagreement_HW.max())
    words = f"at most {largest} grey levels" if largest else "none: tiles agree exactly"
    words = words if overlap else "not measured: they do not overlap"
    return f"Disagreement of tiles, {words}", _heat(disagreement_HW, shape)


def _heat(disagreement_HW: U8_HW, shape: tuple[int, ...]) -> U8_HWC:
    """White where tiles agree, red where they differ by ``STRONG_DISAGREEMENT`` grey levels or more."""
    image = Image.fromarray(disagreement_HW)
    image = image.resize((shape[1], shape[0]), Image.Resampling.BOX if image.width > shape[1] else 0)
    strength = np.clip(np.asarray(image) / STRONG_DISAGREEMENT, 0, 1)[..., None]
    red = np.array([200, 30, 30])
    return np.asarray(255 + strength * (red - 255.0), np.uint8)


def _sheet(title: str, panels: list[tuple[str, U8_HWC]], mpp: Mpp) -> Image.Image:
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    cell = max(220, *(pixels.shape[1] for _, pixels in panels))
    height = max(pixels.shape[0] for _, pixels in panels)
    width = max(MARGIN + len(panels) * (cell + MARGIN), int(font.getlength(title)) + 2 * MARGIN)
    sheet = Image.new("RGB", (width, height + 110), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 10), title, INK, font)
    for i, (caption, pixels) in enumerate(panels):
        x = MARGIN + i * (cell + MARGIN)
        draw.text((x, 42), caption, INK, small)
        sheet.paste(Image.fromarray(pixels), (x, 64))
        draw.rectangle((x - 1, 63, x + pixels.shape[1], 64 + pixels.shape[0]), outline=(190, 190, 190))
    _scale_bar(draw, height + 78, mpp[1], small)
    return sheet


def _scale_bar(draw: ImageDraw.ImageDraw, y: int, mpp_x: float, font: Font) -> None:
    """A round length of about a quarter of a panel."""
    target = mpp_x * PANEL_SIDE / 4
    power = 10.0 ** np.floor(np.log10(target))
    length = max(step * power for step in (1, 2, 5) if step * power <= target)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    draw.rectangle((MARGIN, y, MARGIN + round(length / mpp_x), y + 5), fill=INK)
    draw.text((MARGIN, y + 9), text, INK, font)


def _save(sheet: Image.Image, path: Path) -> None:
    fresh = sidecar(path, ".partial")
    with mapped(path):
        sheet.save(fresh, format="PNG")
        fresh.replace(path)
