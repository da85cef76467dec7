"""The quality page of a tile index: one HTML file that a pathologist can look through and send on.

Every slide with its tissue, the tiles that serve and those that do not and why, and tiles from the blurriest
to the sharpest; above them the counts of the cohort and the distributions on which thresholds act. All is in
the file, nothing is fetched. Names of slides are in it, patients and vendors' metadata are not.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsi_pipeline.cohorts.manifest import CohortSlide
from wsi_pipeline.cohorts.slide_tiles import Part
from wsi_pipeline.core.protocols import U8_HWC

__all__ = ["SHOWN_SCORES", "Finding", "is_page", "write_page"]

SHOWN_SCORES: Mapping[str, tuple[str, float]] = {
    "tissue": ("share of tissue", 1.0),
    "white": ("share of glass", 1.0),
    "sharpness": ("sharpness", 1.6),
}
"""Scores of which the page shows the distribution: their words, and the end of the axis."""
KINDS: Sequence[tuple[str, str, tuple[int, int, int]]] = (
    ("", "serves", (0, 150, 60)),
    ("tissue", "too little tissue", (150, 150, 150)),
    ("pen", "pen", (255, 140, 0)),
    ("white", "glass, holes", (0, 190, 255)),
    ("black", "black", (30, 30, 30)),
    ("colour", "colour outside the window", (255, 225, 0)),
    ("blur", "out of focus", (220, 0, 60)),
)
"""Reasons in the order of ``index_file.REASONS``: their words and colours."""
HEAD = (
    "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='generator' content='wsi-pipeline tile'>"
)
"""What a page begins with, by which it is known again."""
BINS = 40
TINT = 0.45
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em;
  color: #222; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 1.6em 0 .4em; }
table { border-collapse: collapse; } td, th { padding: .25em .8em; text-align: right;
  border-bottom: 1px solid #ddd; } td:first-child, th:first-child { text-align: left; }
article { border-top: 1px solid #ccc; padding: 1em 0; }
article h3 { margin: 0 0 .3em; font-size: 1em; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
figure { margin: .5em 0 0; } figcaption, .note { color: #555; font-size: .9em; }
img { max-width: 100%; border: 1px solid #ddd; display: block; }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 1em; vertical-align: -.1em; }
.bad { color: #a00; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One slide as the page shows it: its part, regions [N, 4], the number of each tile's reason, scores."""

    slide: CohortSlide
    part: Part
    region_N4: npt.NDArray[np.int32]
    reason_N: npt.NDArray[np.int8]
    scores: Mapping[str, npt.NDArray[np.float32]]

    @property
    def kept(self) -> int:
        """Tiles that serve."""
        return int((self.reason_N == 0).sum())


def write_page(
    path: Path, about: Mapping[str, Any], findings: Sequence[Finding], failed: Mapping[str, str]
) -> None:
    """Write the page at once; raises OSError where it cannot be written."""
    kept = sum(finding.kept for finding in findings)
    tiles = sum(len(finding.reason_N) for finding in findings)
    title = f"Tiles of {about['cohort']}"
    parts = [
        f"{HEAD}<title>{escape(title)}</title>",
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{kept:,} of {tiles:,} tiles serve, from {len(findings)} slides; {about['tile']} px at "
        f"{about['mpp']:g} µm per pixel. The index holds all of them; the filters below only mark.</p>",
        _failures(failed),
        _counts(findings),
        _reasons(findings, tiles),
        _distributions(findings, about["config"]["filters"]),
        _legend(),
        *(_slide(finding) for finding in sorted(findings, key=_place)),
        f"<details><summary>wsi-pipeline {escape(about['wsi_pipeline'])}, settings</summary>"
        f"<pre>{escape(json.dumps(about['config'], indent=2))}</pre></details></html>",
    ]
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_text("\n".join(parts), encoding="utf-8")
    fresh.replace(path)


def is_page(path: Path) -> bool:
    """Whether a file is such a page; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(HEAD)) == HEAD.encode()
    except OSError:
        return False


def _place(finding: Finding) -> tuple[str, str, str]:
    return finding.slide.domain, finding.slide.split, finding.slide.name


def _failures(failed: Mapping[str, str]) -> str:
    if not failed:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in failed.values())
    return f"<h2 class='bad'>Not in the index, for they failed: {len(failed)}</h2><ul>{items}</ul>"


def _counts(findings: Sequence[Finding]) -> str:
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.slide.domain, finding.slide.split].append(finding)
    rows = []
    for (domain, split), group in sorted(groups.items()):
        kept_by_patient: dict[str, int] = defaultdict(int)
        for finding in group:
            kept_by_patient[finding.slide.patient] += finding.kept
        spread = np.percentile(list(kept_by_patient.values()), (0, 50, 100)).astype(int)
        cells = (
            *(f"{domain} {split}", len(group), len(kept_by_patient), sum(len(f.reason_N) for f in group)),
            *(sum(f.kept for f in group), "{} / {} / {}".format(*spread)),
        )
        rows.append("".join(f"<td>{escape(str(cell))}</td>" for cell in cells))
    heads = ("", "slides", "patients", "tiles", "serving", "per patient: least / median / most")
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2>Domains and splits</h2><table><tr>{head}</tr>{body}</table>"


def _reasons(findings: Sequence[Finding], tiles: int) -> str:
    every_N = np.concatenate([finding.reason_N for finding in findings] or [np.zeros(0, np.int8)])
    count_K = np.bincount(every_N, minlength=len(KINDS))
    rows = [
        f"<tr><td>{words}</td><td>{count:,}</td><td>{100 * count / max(tiles, 1):.1f} %</td></tr>"
        for (_, words, _), count in zip(KINDS, count_K.tolist(), strict=True)
    ]
    return f"<h2>What became of the tiles</h2><table>{''.join(rows)}</table>"


def _distributions(findings: Sequence[Finding], filters: Mapping[str, Any]) -> str:
    """One histogram for each score and domain, with the threshold as a line."""
    lines = {"tissue": "min_tissue", "white": "max_white", "sharpness": "min_sharpness"}
    figures = []
    for name, (words, end) in SHOWN_SCORES.items():
        for domain in sorted({finding.slide.domain for finding in findings}):
            chosen = [finding.scores[name] for finding in findings if finding.slide.domain == domain]
            count_B, _ = np.histogram(np.clip(np.concatenate(chosen), 0, end), BINS, (0, end))
            threshold = float(filters[lines[name]])
            figures.append(
                f"<figure>{_histogram(count_B, threshold / end)}<figcaption>{escape(domain)}: {words}, "
                f"0 to {end:g}; {lines[name]} {threshold:g}</figcaption></figure>"
            )
    return f"<h2>Scores of all tiles</h2><div class='row'>{''.join(figures)}</div>"


def _histogram(count_B: npt.NDArray[np.int64], threshold: float) -> str:
    width, height = 6 * BINS, 80
    top = max(int(count_B.max()), 1)
    bars = "".join(
        f"<rect x='{6 * i}' y='{height - height * count / top:.1f}' width='5' "
        f"height='{height * count / top:.1f}' fill='#7a86b8'/>"
        for i, count in enumerate(count_B.tolist())
    )
    x = width * threshold
    line = f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height}' stroke='#a00' stroke-width='2'/>"
    return f"<svg width='{width}' height='{height}' style='border-bottom:1px solid #888'>{bars}{line}</svg>"


def _legend() -> str:
    keys = "".join(
        f"<span class='key' style='background:rgb{colour}'></span>{words}" for _, words, colour in KINDS
    )
    return (
        f"<h2>Slides</h2><p>{keys}</p><p class='note'>Left: detected tissue (green outline), excluded ink "
        "and edges tinted. Right: tiles that touch it. Below: some tiles that are mostly tissue, from the "
        "lowest sharpness to the highest.</p>"
    )


def _slide(finding: Finding) -> str:
    slide, part = finding.slide, finding.part
    facts = part.facts
    tissue = f"{facts['tissue_mm2']:.2f} mm² of tissue" if facts["reason"] is None else facts["reason"]
    if facts.get("astray"):
        tissue += f"; {facts['astray']:,} tiles not made, for they are not in register"
    wide = facts["width"] * facts["mpp"][1] / 1000
    caption = (
        f"{slide.domain} {slide.split}; {finding.kept:,} of {len(finding.reason_N):,} tiles serve; {tissue}; "
        f"{wide:.1f} mm wide, {facts['mpp'][1]:.4g} µm per pixel"
    )
    tiled = _encoded(_with_tiles(part.pictures["plain"], finding))
    samples = ""
    if part.pictures["samples"]:
        values = ", ".join(f"{value:.2f}" for value in facts["samples"])
        samples = (
            f"<figure>{_image(part.pictures['samples'])}<figcaption>sharpness {values}</figcaption></figure>"
        )
    return (
        f"<article><h3>{escape(slide.name)}</h3><p class='note'>{escape(caption)}</p>"
        f"<div class='row'>{_image(part.pictures['tissue'])}{_image(tiled)}</div>{samples}</article>"
    )


def _image(jpeg: bytes) -> str:
    return f"<img alt='' loading='lazy' src='data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}'>"


def _with_tiles(jpeg: bytes, finding: Finding) -> U8_HWC:
    """The slide with an outline around each tile that serves, and a tint over each that does not."""
    import imagecodecs

    canvas_HWC = np.array(imagecodecs.jpeg8_decode(jpeg), np.uint8)
    scale_y = canvas_HWC.shape[0] / finding.part.facts["height"]
    scale_x = canvas_HWC.shape[1] / finding.part.facts["width"]
    tinted_HWC = canvas_HWC.copy()
    boxes_N4 = finding.region_N4 * np.array([scale_y, scale_x, scale_y, scale_x])
    for (y, x, height, width), reason in zip(boxes_N4.tolist(), finding.reason_N.tolist(), strict=True):
        top, left, bottom, right = round(y), round(x), round(y + height), round(x + width)
        if reason:
            tinted_HWC[top:bottom, left:right] = KINDS[reason][2]
    canvas_HWC = np.asarray(cv2.addWeighted(canvas_HWC, 1 - TINT, tinted_HWC, TINT, 0), np.uint8)
    for y, x, height, width in boxes_N4[finding.reason_N == 0].tolist():
        corners = (round(x), round(y)), (round(x + width) - 1, round(y + height) - 1)
        cv2.rectangle(canvas_HWC, *corners, KINDS[0][2], 1)
    return canvas_HWC


def _encoded(pixels_HWC: U8_HWC) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpeg8_encode(pixels_HWC, level=85))
