"""The report of an evaluation: one HTML page that needs nothing else, a picture and a JSON file beside it.

Why no scripts and no outside resources: the page has to open in ten years, in a hospital, without a network.
Whatever comes from files (names, paths) is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import OutputError
from wsi_pipeline.evaluation.figures import Figure
from wsi_pipeline.evaluation.pictures import Pictures, Row
from wsi_pipeline.evaluation.result import LIMITS, EvaluationResult, SideFacts
from wsi_pipeline.evaluation.sheet import draw_sheet
from wsi_pipeline.evaluation.style import CSS
from wsi_pipeline.evaluation.summary import in_short, side_names

__all__ = ["render_page", "write_report"]

_LARGEST = 512  # px along a side of an embedded picture
_SHOWN = 330  # px along a side on the page; zooming in shows the rest
_BINS = 25

_BETTER = {"lower": "lower is better", "higher": "higher is better"}


def write_report(result: EvaluationResult, pictures: Pictures | None) -> None:
    """Write page, picture and JSON, each replaced in one step; OutputError where that fails."""
    sheet = draw_sheet(result, pictures)
    _replace(result.files["report"], lambda file: file.write(render_page(result, pictures).encode("utf-8")))
    _replace(result.files["picture"], lambda file: sheet.save(file, format="PNG"))
    document = json.dumps(result.to_json(with_tiles=True), indent=1, allow_nan=False)
    _replace(result.files["json"], lambda file: file.write(document.encode("utf-8") + b"\n"))


def _replace(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    fresh = path.with_name(f".{path.name}.partial")
    try:
        with fresh.open("wb") as file:
            write(file)
        fresh.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); check permissions and space", path=path
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def render_page(result: EvaluationResult, pictures: Pictures | None) -> str:
    """The whole HTML page."""
    examples, worst = (pictures.examples, pictures.worst) if pictures is not None else ((), ())
    parts = [
        _head(result),
        _short(in_short(result)),
        _warnings(result.warnings),
        _table(result),
        _histogram(result),
        _rows("Examples", f"Chosen at random, from as many patients as possible{_extent(result)}.", examples),
        _rows(
            "Worst structure",
            "The tiles with the lowest haematoxylin similarity, worst first. Look here for nuclei that were "
            "removed (red) or invented (blue). Fine red and blue at every outline is a change of sharpness.",
            worst,
        ),
        _facts(result),
        _limits(),
    ]
    title = f"Evaluation of {side_names(result).get('generated', '')}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _head(result: EvaluationResult) -> str:
    names = side_names(result)
    roles = [role for role in ("reference", "source") if role in names]
    others = [f"{role} <b>{html.escape(names[role])}</b>" for role in roles]
    generated = html.escape(names.get("generated", ""))
    against = f" against {' and '.join(others)}" if others else ""
    return (
        f"<h1>Evaluation of generated tiles</h1><p class=lead>Generated <b>{generated}</b>{against}</p>"
        "<p class=synthetic>The generated tiles are synthetic. This report describes pictures; "
        "it is not for diagnosis.</p>"
    )


def _short(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in sentences)
    return f"<section class=short><h2>In short</h2><ul>{items}</ul></section>" if items else ""


def _warnings(warnings: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(text[:1].upper() + text[1:])}</li>" for text in warnings)
    return (
        f"<section class=warnings><h2>Before you read the figures</h2><ul>{items}</ul></section>"
        if items
        else ""
    )


def _table(result: EvaluationResult) -> str:
    if not result.figures:
        return ""
    rows = "".join(_figure_row(figure) for figure in result.figures)
    return (
        "<section><h2>Figures</h2><table class=figures><thead><tr><th>Figure</th><th>Value</th><th>95 % "
        "interval<br><small>over patients</small></th><th>Tiles</th><th>What it means</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _extent(result: EvaluationResult) -> str:
    """How much tissue a tile shows, where the pixel size is stated."""
    side = result.side("generated")
    if side is None or side.size is None or side.mpp is None:
        return ""
    return f"; each shows {side.size[1] * side.mpp[1]:.0f} µm across"


def _figure_row(figure: Figure) -> str:
    how = figure.explained
    note = f"<br><small>{html.escape(figure.note)}</small>" if figure.note else ""
    interval = html.escape(figure.interval_text) or "&ndash;"
    return (
        f"<tr><td>{html.escape(how.label)}<br><small>{_BETTER[how.better]}</small></td>"
        f"<td class=value>{html.escape(figure.text)}</td><td class=interval>{interval}{note}</td>"
        f"<td>{figure.tiles}</td><td class=meaning>{html.escape(how.meaning)}</td></tr>"
    )


def _histogram(result: EvaluationResult) -> str:
    """How similarity is spread over tiles: a mean hides a few ruined tiles."""
    values = None if result.tiles is None else result.tiles.values.get("structure_ssim")
    if values is None or not np.isfinite(values).any():
        return ""
    kept = np.clip(values[np.isfinite(values)], 0.0, 1.0)
    counts, _ = np.histogram(kept, bins=_BINS, range=(0.0, 1.0))
    width, height, step = 500, 90, 500 / _BINS
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{height - height * count / counts.max():.1f}" '
        f'width="{step - 2:.1f}" height="{height * count / counts.max():.1f}"/>'
        for i, count in enumerate(counts.tolist())
        if count
    )
    ticks = "".join(
        f'<text x="{tick * width:.0f}" y="{height + 16}" text-anchor="{anchor}">{tick:g}</text>'
        for tick, anchor in (
            (0.0, "start"),
            (0.25, "middle"),
            (0.5, "middle"),
            (0.75, "middle"),
            (1.0, "end"),
        )
    )
    low = float(np.quantile(kept, 0.05))
    return (
        "<section><h2>Haematoxylin similarity of every tile</h2>"
        f'<svg viewBox="0 0 {width} {height + 22}" width="{width}" role="img" aria-label="histogram">'
        f'{bars}<line x1="0" y1="{height}" x2="{width}" y2="{height}"/>{ticks}</svg>'
        f"<p><small>{len(kept)} tiles; lowest {kept.min():.3f}, a twentieth of them below {low:.3f}. "
        "Tiles of glass are left out.</small></p></section>"
    )


def _rows(title: str, words: str, rows: tuple[Row, ...]) -> str:
    if not rows:
        return ""
    shown = "".join(_row(row) for row in rows)
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>{shown}</section>"


def _row(row: Row) -> str:
    panels = "".join(_panel(panel.caption, panel.pixels_HWC) for panel in row.panels)
    figures = html.escape(" · ".join(row.figures))
    return (
        f"<div class=row><div class=panels>{panels}</div>"
        f"<p class=rowname>{html.escape(row.name)}<br><small>{figures}</small></p></div>"
    )


def _panel(caption: str, pixels_HWC: U8_HWC) -> str:
    text = html.escape(caption)
    return (
        f'<figure><img src="{_embedded(pixels_HWC)}" width="{_SHOWN}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _embedded(pixels_HWC: U8_HWC) -> str:
    picture = Image.fromarray(pixels_HWC)
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _facts(result: EvaluationResult) -> str:
    rows = "".join(_side_row(side) for side in result.sides)
    table = (
        "<table class=facts><thead><tr><th>Side</th><th>Tiles</th><th>Size</th><th>Pixel size</th>"
        f"<th>Encoding</th><th>Patients</th><th>From</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    lines = [f"Seed {result.seed}; wsi-pipeline {html.escape(result.to_json()['version'])}."]
    if result.extractor is not None:
        network = result.extractor
        lines.insert(
            0,
            f"Extractor of FID and KID: {html.escape(network.name)}, {network.dims} features; resize: "
            f"{html.escape(network.resize)}; SHA-256 of its weights "
            f"<code>{html.escape(network.digest)}</code>.",
        )
    return f"<section><h2>How it was measured</h2>{table}<p>{'<br>'.join(lines)}</p></section>"


def _side_row(side: SideFacts) -> str:
    size = "&ndash;" if side.size is None else f"{side.size[0]} &times; {side.size[1]} px"
    mpp = "not stated" if side.mpp is None else f"{side.mpp[1]:.4g} µm"
    patients = "not stated" if side.patients is None else str(side.patients)
    rule = f"<br><small>{html.escape(side.group_rule)}</small>" if side.group_rule else ""
    tiles = str(side.tiles) if side.tiles else "not stated"
    return (
        f"<tr><td>{html.escape(side.role)}</td><td>{tiles}</td><td>{size}</td><td>{mpp}</td>"
        f"<td>{html.escape(side.encoding)}</td><td>{patients}{rule}</td>"
        f"<td class=origin>{html.escape(side.origin)}</td></tr>"
    )


def _limits() -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in LIMITS)
    return f"<section class=limits><h2>Limits</h2><ul>{items}</ul></section>"
