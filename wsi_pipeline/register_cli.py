"""``wsi-pipeline register``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wsi_pipeline.convert_cli import LogOpt

__all__ = ["register"]


def register(
    fixed: Annotated[str, typer.Argument(metavar="FIXED", help="The slide on whose lattice tiles lie.")],
    moving: Annotated[
        str, typer.Argument(metavar="MOVING", help="A serial section, or the section restained.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.json")],
    mpp: Annotated[float, typer.Option(help="µm per pixel at which sections are compared.")] = 8.0,
    elastic: Annotated[
        bool, typer.Option("--elastic/--no-elastic", help="A displacement field, where it helps.")
    ] = True,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="NAME.png: before, after, landmarks.")
    ] = True,
    from_valis: Annotated[
        Path | None,
        typer.Option(
            "--from-valis",
            metavar="POINTS.csv",
            help="Points of another program (fixed_x, fixed_y, moving_x, moving_y; level-0 pixels).",
            show_default=False,
        ),
    ] = None,
    fixed_mpp: Annotated[float | None, typer.Option(help="µm per pixel of FIXED, over the file's.")] = None,
    moving_mpp: Annotated[float | None, typer.Option(help="µm per pixel of MOVING, over the file's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    log_format: LogOpt = "text",
) -> None:
    """Find how a section lies to its neighbour; refuse (exit 5) where that cannot be trusted."""
    from wsi_pipeline.console import show_result
    from wsi_pipeline.registration.run import register_slides

    about = register_slides(
        fixed,
        moving,
        out,
        mpp=mpp,
        elastic=elastic,
        picture=picture,
        points=from_valis,
        mpps=(fixed_mpp, moving_mpp),
        overwrite=overwrite,
    )
    error, figures, drawing = about["landmark_error_um"], about["figures"], out.with_suffix(".png").name
    text = (
        f"Wrote {out}: error {error['median']:.1f} µm (median), {error['p90']:.1f} µm (90 %), measured on "
        f"{error['n']:.0f} blocks that were found and not fitted; {figures['agreeing']:.0%} of them in "
        f"place; {figures['trusted']:.0%} of the tissue in register"
    )
    if figures["trusted"] < 0.995:
        red = f" (red in {drawing})" if picture else ""
        lost = f"{1 - figures['trusted']:.0%} of the tissue is not in register{red}"
        text += f"\nWarning: {lost}: no tiles will be read there"
    text += f"\nLook at {out.with_suffix('.png')}" if picture else ""
    show_result({"status": "registered", "path": str(out), **figures}, text, log_format)
