"""Two generators side by side: on simulated frozen sections with known truth, and on real frozen tiles.

    python scripts/judge_mini.py --out FOLDER --weights ffpe_mini.safetensors \\
        --held-out lung.jpg@0.516 CMU-1-Small-Region.svs --draws 4 --real frozen.tif@0.25

``FILE@MPP`` gives the um per pixel where the file does not know it; FILE may be a pattern. Every held-out
picture is frozen as a
whole (``wsi_pipeline/core/frozen.py``), once for each of ``--draws``; both generators prepare on the whole
slide and translate one field of it. Writes ``figures.json``, ``simulated.png`` (frozen, both outputs, truth)
and ``real.png`` (frozen, both outputs). Intervals are 95 %, by picture where there are several, else by
simulated slide.
"""

from __future__ import annotations

import argparse
import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from wsi_pipeline.core.frozen import FrozenModel
from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.protocols import U8_HWC, Generator, Slide
from wsi_pipeline.evaluation.judge import (
    Closeness,
    closeness,
    freeze_slide,
    prepare_slide,
    summarise,
    tissue_field,
    translate_field,
)
from wsi_pipeline.generators import make_generator
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.lattice import SlideView

MPP: Mpp = (0.5, 0.5)
SHOWN = 384  # px of a panel
REAL_SIDE = 480
LINE = 22

Panel = tuple[str, U8_HWC]


def opened(texts: list[str]) -> list[Slide]:
    found = []
    for text in texts:
        path, _, mpp = text.partition("@")
        names = sorted(glob.glob(path)) or [path]
        found.extend(open_slide(name, mpp=float(mpp) if mpp else None) for name in names)
    return found


def generators(options: argparse.Namespace) -> dict[str, Generator]:
    mini = {"device": options.device} | ({"weights": options.weights} if options.weights else {})
    return {
        "stain_transfer": make_generator("stain_transfer", {}),
        "ffpe_mini": make_generator("ffpe_mini", mini),
    }


def translated(slide: Slide, region: Region, models: Mapping[str, Generator]) -> dict[str, U8_HWC]:
    return {
        name: translate_field(slide, MPP, region, model, prepare_slide(slide, model))
        for name, model in models.items()
    }


def judge_simulated(
    options: argparse.Namespace, models: Mapping[str, Generator]
) -> Iterator[tuple[str, dict[str, list[Closeness]], list[Panel]]]:
    """For each simulated slide: its group, figures by generator (``frozen``: untouched), and pictures."""
    model = FrozenModel(severity=options.severity)
    slides = opened(options.held_out)
    for slide in slides:
        view = SlideView(slide, MPP)
        truth_HWC = view.read(Region.of(view.size))
        for draw in range(options.draws):
            frozen = freeze_slide(truth_HWC, MPP[0], model, options.seed + draw, f"{slide.slide_id} {draw}")
            region = tissue_field(truth_HWC, options.side, options.seed + draw)
            wanted_HWC = truth_HWC[region.y : region.bottom, region.x : region.right]
            made = {"frozen": frozen.read_level(0, region)} | translated(frozen, region, models)
            rows = {name: closeness(wanted_HWC, pixels_HWC) for name, pixels_HWC in made.items()}
            group = slide.slide_id if len(slides) > 1 else frozen.slide_id
            yield group, rows, [*made.items(), ("truth", wanted_HWC)]


def judge_real(options: argparse.Namespace, models: Mapping[str, Generator]) -> Iterator[list[Panel]]:
    for slide in opened(options.real):
        view = SlideView(slide, MPP)
        region = middle_of_tissue(view)
        yield [(slide.slide_id, view.read(region)), *translated(slide, region, models).items()]


def middle_of_tissue(view: SlideView) -> Region:
    """A square with much tissue; looked for at 16 px, so that a whole section is no burden."""
    small = SlideView(view.slide, (view.mpp[0] * 16, view.mpp[1] * 16))
    found = tissue_field(small.read(Region.of(small.size)), REAL_SIDE // 16, 0)
    side = min(REAL_SIDE, view.size.height, view.size.width)
    y = min(found.y * 16, view.size.height - side)
    return Region(y, min(found.x * 16, view.size.width - side), side, side)


def sheet(rows: list[list[Panel]]) -> Image.Image:
    width = max(len(row) for row in rows)
    picture = Image.new("RGB", (width * SHOWN, len(rows) * (SHOWN + LINE)), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        for j, (name, pixels_HWC) in enumerate(row):
            cut = Image.fromarray(np.ascontiguousarray(pixels_HWC[:SHOWN, :SHOWN]))
            picture.paste(cut, (j * SHOWN, i * (SHOWN + LINE) + LINE))
            draw.text((j * SHOWN + 4, i * (SHOWN + LINE) + 4), name[:52], "black")
    return picture


def figures(groups: list[str], rows: Mapping[str, list[Closeness]]) -> dict[str, Any]:
    """Means of each generator, and of mini minus stain transfer, window by window."""
    found = {name: summarise(values, groups) for name, values in rows.items()}
    found["ffpe_mini - stain_transfer"] = summarise(rows["ffpe_mini"], groups, against=rows["stain_transfer"])
    return {name: {key: asdict(value) for key, value in entry.items()} for name, entry in found.items()}


def report(found: Mapping[str, Any]) -> str:
    lines = []
    for key in next(iter(found.values())):
        cells = []
        for name, entry in found.items():
            interval = entry[key]["interval"]
            text = f" [{interval['low']:.3f}, {interval['high']:.3f}]" if interval else ""
            cells.append(f"{name} {entry[key]['value']:.3f}{text}")
        lines.append(f"{key:16s} " + "   ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", help="bundle; the packaged one without it")
    parser.add_argument("--held-out", nargs="*", default=[], metavar="FILE[@MPP]")
    parser.add_argument("--real", nargs="*", default=[], metavar="FILE[@MPP]")
    parser.add_argument("--draws", type=int, default=4, help="simulated slides of each picture")
    parser.add_argument("--side", type=int, default=1024, help="px of the field that is translated")
    parser.add_argument("--severity", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    models = generators(options)
    groups: list[str] = []
    rows: dict[str, list[Closeness]] = {}
    pictures = []
    for group, found, panels in judge_simulated(options, models):
        for name, values in found.items():
            rows.setdefault(name, []).extend(values)
        groups.extend([group] * len(found["frozen"]))
        pictures.append(panels)
    if pictures:
        result = figures(groups, rows)
        (options.out / "figures.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        sheet(pictures).save(options.out / "simulated.png")
        print(report(result))
    if options.real:
        sheet(list(judge_real(options, models))).save(options.out / "real.png")


if __name__ == "__main__":
    main()
