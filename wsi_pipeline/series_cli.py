"""``wsi-pipeline series``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_pipeline.convert_cli import ConfigOpt, LogOpt, MaskOpt, MppOpt, RestartOpt, RoiOpt, SetOpt

__all__ = ["series"]


def series(
    slide: Annotated[Path, typer.Argument(metavar="SLIDE", help="The slide.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.ome.zarr, with a t axis.")],
    weights: Annotated[Path, typer.Option(help="Weights of a translator that takes several steps.")],
    stops: Annotated[
        str | None, typer.Option(metavar="0,2,5", help="Show the state after so many steps of the sampler.")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(help="Draw so often, with a label of the spread at each pixel.")
    ] = None,
    mpp: MppOpt = None,
    roi: RoiOpt = None,
    mask: MaskOpt = None,
    config: ConfigOpt = None,
    settings: SetOpt = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    restart: RestartOpt = False,
    log_format: LogOpt = "text",
) -> None:
    """Convert one slide several times: the way from one stain to the other, or how sure the translator is."""
    from wsi_pipeline.config import load_run_config
    from wsi_pipeline.console import Console
    from wsi_pipeline.errors import ConfigError
    from wsi_pipeline.pipeline.planning import open_configured
    from wsi_pipeline.pipeline.series import convert_series

    if (stops is None) == (runs is None):
        raise ConfigError("series: give either --stops or --runs")
    try:
        values = list(range(runs)) if stops is None else [int(part) for part in stops.split(",")]  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"--stops {stops}: give numbers of steps with commas, e.g. 0,2,5") from error
    named = {"input.mpp": mpp, "input.roi": roi, "input.mask": mask, "generator.name": "translator"}
    given = {key: value for key, value in named.items() if value is not None}
    given |= {"generator.options.weights": str(weights)}
    resolved = load_run_config(config, settings or [], given).conversion
    with Console(log_format) as console:
        option: Literal["run", "stop_after"] = "run" if stops is None else "stop_after"
        made = convert_series(
            open_configured(slide, resolved),
            out,
            resolved,
            option,
            values,
            overwrite=overwrite,
            restart=restart,
            emit=console.emit,
        )
        status = "no_tissue" if made is None else "converted"
        said = f"Wrote {made}: {len(values)} pictures along t" if made else f"{slide}: no tissue"
        console.result({"status": status, "path": str(made)}, said)
