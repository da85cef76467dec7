"""Simulated frozen sections of FFPE pictures, beside their sources, to see what ffpe_mini learns from:

    python scripts/simulate_frozen.py PICTURE_OR_FOLDER OUT_FOLDER --mpp 0.5 --copies 3 --severity 1

Writes ``NAME.truth.png``, ``NAME.frozen0.png`` and ``NAME.wanted0.png`` (large ice holes stay glass), ...
What is simulated: ``wsi_pipeline/core/frozen.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_pipeline.core.frozen import FrozenModel, simulate_pair

KINDS = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="an FFPE picture, or a folder of them")
    parser.add_argument("out", type=Path)
    parser.add_argument("--mpp", type=float, required=True, help="um per pixel of the pictures")
    parser.add_argument("--copies", type=int, default=1, help="frozen sections of each picture")
    parser.add_argument("--severity", type=float, default=1.0, help="0: nothing happens; 1: as real; up to 2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = options.source.iterdir() if options.source.is_dir() else [options.source]
    options.out.mkdir(parents=True, exist_ok=True)
    model, rng = FrozenModel(severity=options.severity), np.random.default_rng(options.seed)
    for path in sorted(path for path in found if path.suffix.lower() in KINDS):
        truth_HWC = np.asarray(Image.open(path).convert("RGB"))
        Image.fromarray(truth_HWC).save(options.out / f"{path.stem}.truth.png")
        for copy in range(options.copies):
            pair = simulate_pair(truth_HWC, options.mpp, model, rng)
            for name, pixels_HWC in zip(("frozen", "wanted"), pair, strict=True):
                Image.fromarray(pixels_HWC).save(options.out / f"{path.stem}.{name}{copy}.png")


if __name__ == "__main__":
    main()
