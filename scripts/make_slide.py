"""Write a made-up frozen H&E section as a pyramidal, tiled JPEG TIFF that every slide reader opens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wsi_pipeline.core.geometry import Size
from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.writers.ometiff import TiffConfig, export_ometiff


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the slide to write, for example demo.tif")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(4096, 6144), help="pixels")
    parser.add_argument("--mpp", type=float, default=0.5, help="micrometres per pixel")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another section")
    parser.add_argument("--tissue", type=float, default=0.3, help="share of the area that tissue covers")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = parser.parse_args()
    try:
        slide = SyntheticSlide(
            size=Size(*args.size), mpp=(args.mpp, args.mpp), seed=args.seed, tissue_share=args.tissue
        )
        notes = {"source": f"procedural drawing, seed {args.seed}", "stain": "H&E, frozen section, imitated"}
        export_ometiff(slide, args.out, TiffConfig(), description=notes, overwrite=args.overwrite)
    except WsiPipelineError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
