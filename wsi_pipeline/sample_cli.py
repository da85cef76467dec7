"""``wsi-pipeline sample``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_pipeline.convert_cli import LogOpt

__all__ = ["sample"]

WeightsOpt = Annotated[Path, typer.Option(help="Weights of a translator that takes several steps.")]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="A new folder; with --source the file to write.")]
LabelOpt = Annotated[list[str] | None, typer.Option(help="Class, by name or number; several take turns.")]
SourceOpt = Annotated[list[Path] | None, typer.Option(help="Volume to translate (.nii.gz, .ome.zarr).")]
GuidanceOpt = Annotated[float | None, typer.Option(help="Weight of the class \\[default: of the weights].")]
NfeOpt = Annotated[int | None, typer.Option(min=1, help="Calls of the network \\[default: of the weights].")]
DepthOpt = Annotated[int | None, typer.Option(min=1, help="Planes of a drawn volume \\[default: as wide].")]
UmOpt = Annotated[float | None, typer.Option(help="µm between planes of a drawn volume \\[default: as x].")]


def sample(
    weights: WeightsOpt,
    out: OutOpt,
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 16,
    label: LabelOpt = None,
    source: SourceOpt = None,
    guidance: GuidanceOpt = None,
    nfe: NfeOpt = None,
    seed: Annotated[int, typer.Option(help="Another one draws other images.")] = 0,
    mosaic: Annotated[bool, typer.Option("--mosaic", help="Also one picture of all of them.")] = False,
    depth: DepthOpt = None,
    z_um: UmOpt = None,
    volumes: Annotated[
        Literal["nii.gz", "ome.zarr"], typer.Option(help="Format of drawn volumes.")
    ] = "nii.gz",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    log_format: LogOpt = "text",
) -> None:
    """Draw synthetic tiles or volumes of a class from noise, or translate a volume."""
    from wsi_pipeline.console import show_result
    from wsi_pipeline.generators._torch import choose_device
    from wsi_pipeline.volumes.draw import open_drawer, translate_file
    from wsi_pipeline.volumes.sample import sample_folder

    drawer = open_drawer(weights, label or (), nfe, guidance, choose_device(device))
    if source:
        translate_file(drawer, source, out, seed)
    else:
        sample_folder(
            drawer, out, count=count, seed=seed, mosaic=mosaic, depth=depth, z_um=z_um, ending=volumes
        )
    made = 1 if source else count
    text = f"Wrote {out}: {made} synthetic images, not for diagnosis"
    show_result({"status": "sampled", "path": str(out), "images": made, "seed": seed}, text, log_format)
