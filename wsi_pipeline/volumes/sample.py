"""A folder of drawn images: PNG tiles or volumes by class, a table of them, and a picture of all.

``OUT/images/CLASS/CLASS_00012.png`` (no class: ``images/00012.png``) can be trained on as it is: the folder
names the class, and so does ``OUT/samples.csv`` (slide, label, seed). ``OUT/mosaic.png`` lies outside.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, PngImagePlugin

from wsi_pipeline.errors import OutputError, OutputExistsError
from wsi_pipeline.volumes.draw import Drawer, draw_images
from wsi_pipeline.volumes.files import Volume, write_volume
from wsi_pipeline.writers.manifest import SYNTHETIC

__all__ = ["sample_folder"]

MOSAIC = 64
"""Images that the mosaic shows at the most."""
BATCH = 8
"""Tiles that a GPU draws at once."""


def sample_folder(
    drawer: Drawer,
    out: Path,
    *,
    count: int,
    seed: int = 0,
    mosaic: bool = False,
    depth: int | None = None,
    z_um: float | None = None,
    ending: Literal["nii.gz", "ome.zarr"] = "nii.gz",
) -> list[Path]:
    """Draw images 0 to ``count`` - 1 into a new folder; the files, without table and mosaic.

    ``z_um``: between planes of a volume, by default as pixels are wide. Raises OutputExistsError,
    OutputError, and ConfigError for what cannot be drawn.
    """
    if out.exists():
        raise OutputExistsError(f"{out}: is there already; name a new folder", path=out)
    spec = drawer.spec
    um = (spec.mpp if z_um is None else z_um, spec.mpp, spec.mpp)
    drawer.parts.representation.config.check_spacing(*um[:2])
    batch = BATCH if drawer.device.type == "cuda" and spec.axes == "yx" else 1
    files, rows, shown = list[Path](), [["slide", "label", "seed"]], list[Image.Image]()
    try:
        for start in range(0, count, batch):
            numbers = range(start, min(start + batch, count))
            for number, image in zip(numbers, draw_images(drawer, numbers, seed, depth).numpy(), strict=True):
                path, label = _place(drawer, out / "images", number)
                path.parent.mkdir(parents=True, exist_ok=True)
                if spec.axes == "zyx":
                    path = path.with_name(f"{path.name}.{ending}")
                    write_volume(path, Volume(values_CDHW=image, um=um))
                    image = image[:, image.shape[1] // 2]
                picture = Image.fromarray(np.rint(255 * image.transpose(1, 2, 0)).astype(np.uint8).squeeze())
                if spec.axes == "yx":
                    path = path.with_name(f"{path.name}.png")
                    _save(picture, path)
                files.append(path)
                rows.append([path.name, label, str(seed)])
                shown += [picture] if len(shown) < MOSAIC else []
        with (out / "samples.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        if mosaic:
            _save(_mosaic(shown), out / "mosaic.png")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})", path=out) from error
    return files


def _place(drawer: Drawer, folder: Path, number: int) -> tuple[Path, str]:
    """Where an image goes, without its ending, and its class."""
    if not drawer.labels:
        return folder / f"{number:05d}", ""
    place = drawer.labels[number % len(drawer.labels)]
    label = drawer.spec.classes[place] if drawer.spec.classes else str(place)
    name = re.sub(r"[^\w-]+", "_", label)
    return folder / name / f"{name}_{number:05d}", label


def _save(picture: Image.Image, path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", SYNTHETIC)
    picture.save(path, pnginfo=info)


def _mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """All of them, row by row, at 256 px at the most."""
    width, height = (min(256, side) for side in pictures[0].size)
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + 4) - 4, rows * (height + 4) - 4), "white")
    for number, picture in enumerate(pictures):
        place = (number % columns * (width + 4), number // columns * (height + 4))
        sheet.paste(picture.convert("RGB").resize((width, height)), place)
    return sheet
