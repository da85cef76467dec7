"""Measure the FFPE reference palette: ``python scripts/measure_palette.py FOLDER > ffpe_palette.json``.

FOLDER holds images of routine paraffin H&E sections whose licence allows redistribution of facts measured on
them. Each image is averaged to a ladder of resolutions; on each rung every image is profiled by the code that
profiles a slide, so that whatever pixel averaging does to an estimate happens to both sides of the transfer.

Directions: mean of the images' unit vectors, each weighted by how strongly its image holds that stain.
Strengths: 99th percentile of the images' concentrations, pooled with the same weight for each image.
White: median over the images that show empty glass.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_pipeline.core.stain import (
    STRENGTH_PERCENTILE,
    Rgb,
    concentrations,
    estimate_profile,
    optical_density,
    stained_density,
)

NATIVE_MPP = 0.516  # mean of the recorded 0.506 and 0.526; two images record none, nuclei have the same size
RUNGS = (1, 2, 4, 8, 16, 32)  # averaging factors: 0.5 to 16.5 um/px
QUANTILES = np.linspace(0.0, 100.0, 2001)  # equal numbers from each image, without random drawing
TISSUE_OD = 0.12


def lumen_white(image_HWC: np.ndarray) -> Rgb:
    """Median colour of the brightest hundredth: glass at the border of tissue, or lumina inside it."""
    darkest_N = image_HWC.min(axis=2)
    r, g, b = np.median(image_HWC[darkest_N >= np.percentile(darkest_N, 99.0)], axis=0)
    return float(r), float(g), float(b)


def averaged(image_HWC: np.ndarray, factor: int) -> np.ndarray:
    """Area average by an integer factor, uint8; a remainder at the right and bottom is left out."""
    rows, cols = image_HWC.shape[0] // factor, image_HWC.shape[1] // factor
    cells = image_HWC[: rows * factor, : cols * factor].reshape(rows, factor, cols, factor, 3)
    return np.rint(cells.mean(axis=(1, 3))).astype(np.uint8)


def measure(images: dict[str, np.ndarray], whites: dict[str, Rgb], factor: int) -> dict[str, object]:
    """One rung: directions and strengths of all images at ``factor`` times the native pixel size."""
    vectors, strengths, pooled = [], [], []
    for name, image in images.items():
        pixels_HWC = averaged(image, factor)
        tissue_HW = optical_density(pixels_HWC, whites[name]).mean(axis=2) > TISSUE_OD
        profile = estimate_profile(pixels_HWC, tissue_HW, white=whites[name])
        assert not profile.fallback, f"{name}: {profile.fallback}"
        od_N3 = stained_density(pixels_HWC[tissue_HW], whites[name])
        vectors.append(profile.stains)
        strengths.append(profile.strengths)
        pooled.append(np.percentile(concentrations(od_N3, profile.stains), QUANTILES, axis=0))
    mean_23 = (np.array(vectors) * np.array(strengths)[:, :, None]).sum(axis=0)
    unit_23 = mean_23 / np.linalg.norm(mean_23, axis=1, keepdims=True)
    top_2 = np.percentile(np.concatenate(pooled), STRENGTH_PERCENTILE, axis=0)
    return {
        "mpp": round(NATIVE_MPP * factor, 3),
        "stains": np.round(unit_23, 4).tolist(),
        "strengths": np.round(top_2, 4).tolist(),
    }


def main(folder: Path) -> None:
    images = {path.name: np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))}
    assert images, f"{folder}: no .jpg images"
    # Lumina are white at full resolution only; averaging mixes them with their walls.
    whites = {name: lumen_white(image) for name, image in images.items()}
    rungs = [measure(images, whites, factor) for factor in RUNGS]
    palette = {
        "description": "H&E of routine FFPE sections; see scripts/measure_palette.py for how it was measured",
        "licence": "MIT, (c) 2022 Pathology Atlas; measured facts only, no pixels",
        "sources": [
            {"name": f"pathologyatlas/{path.name}", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(folder.glob("*.jpg"))
        ],
        "white": [round(float(v), 1) for v in np.median(np.array(list(whites.values())), axis=0)],
        "rungs": rungs,
    }
    json.dump(palette, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
