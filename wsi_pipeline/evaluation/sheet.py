"""The summary as one picture: figures on top, example tiles below; for a mail, a slide or a notebook."""

from __future__ import annotations

from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from wsi_pipeline.evaluation.pictures import Pictures, Row
from wsi_pipeline.evaluation.result import SYNTHETIC, EvaluationResult
from wsi_pipeline.evaluation.summary import in_short, side_names

__all__ = ["draw_sheet"]

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

TILE = 300
MARGIN = 18
LINE = 24
WIDTH = 3 * TILE + 4 * MARGIN
INK, SOFT, ACCENT, RED = (28, 36, 48), (91, 102, 117), (59, 91, 146), (122, 31, 43)


def draw_sheet(result: EvaluationResult, pictures: Pictures | None) -> Image.Image:
    """The picture, RGB. Its font knows Latin letters only; others show as boxes."""
    rows = [] if pictures is None else [*pictures.examples[:3], *pictures.worst[:1]]
    titles = ["example"] * (len(rows) - bool(pictures and pictures.worst)) + ["worst structure"]
    heights = [_row_height(row) for row in rows]
    texts = [(line, INK) for text in in_short(result) for line in _wrapped(text)]
    texts += [(line, RED) for text in result.warnings for line in _wrapped(f"! {text}")]
    top = MARGIN + 90 + LINE * (len(result.figures) + len(texts))
    sheet = Image.new("RGB", (WIDTH, top + sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    y = _heading(draw, result)
    y = _figures(draw, result, y) + 10
    for text, colour in texts:
        draw.text((MARGIN, y), text, colour, _font(14))
        y += LINE
    y += 8
    for row, title, height in zip(rows, titles, heights, strict=False):
        _draw_row(sheet, draw, row, title, y)
        y += height
    return sheet


def _heading(draw: ImageDraw.ImageDraw, result: EvaluationResult) -> int:
    name = side_names(result).get("generated", "")
    draw.text((MARGIN, MARGIN), _fit(f"Evaluation of {name}", _font(22), WIDTH - 2 * MARGIN), INK, _font(22))
    draw.text((MARGIN, MARGIN + 30), SYNTHETIC[:1].upper() + SYNTHETIC[1:], RED, _font(15))
    return MARGIN + 60


def _figures(draw: ImageDraw.ImageDraw, result: EvaluationResult, y: int) -> int:
    for figure in result.figures:
        draw.text((MARGIN, y), figure.explained.label, INK, _font(16))
        draw.text((MARGIN + 340, y), figure.text, ACCENT, _font(16))
        said = [f"95 %: {figure.interval_text}"] if figure.interval_text else []
        interval = "; ".join([*said, figure.note] if figure.note else said)
        draw.text((MARGIN + 470, y), _fit(interval, _font(15), 270), SOFT, _font(15))
        draw.text((MARGIN + 750, y), f"{figure.explained.better} is better", SOFT, _font(15))
        y += LINE
    return y


def _row_height(row: Row) -> int:
    return max(_scaled(panel.pixels_HWC.shape) for panel in row.panels) + 52


def _scaled(shape: tuple[int, ...]) -> int:
    return max(1, round(shape[0] * TILE / shape[1]))


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, title: str, y: int) -> None:
    draw.text((MARGIN, y), _fit(f"{title}: {row.name}", _font(14), WIDTH - 2 * MARGIN), INK, _font(14))
    for number, panel in enumerate(row.panels[:3]):
        x = MARGIN + number * (TILE + MARGIN)
        height = _scaled(panel.pixels_HWC.shape)
        picture = Image.fromarray(panel.pixels_HWC).resize((TILE, height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x, y + 20))
        draw.text((x, y + height + 23), panel.caption, SOFT, _font(13))


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _wrapped(text: str) -> list[str]:
    """The text in lines that fit the sheet."""
    lines = [""]
    for word in text.replace("µ", "u").split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(14).getlength(longer) <= WIDTH - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _fit(text: str, font: Font, width: int) -> str:
    """As much of the text as fits, with an ellipsis where some is left out."""
    text = text.replace("µ", "u").replace("\n", " ")
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
