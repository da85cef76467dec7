"""``wsi-pipeline plan`` and ``convert``, of one slide or many: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from wsi_pipeline.runs.settings import RunConfig

__all__ = ["ConfigOpt", "LogOpt", "SetOpt", "convert", "plan"]

SlideArg = Annotated[str, typer.Argument(metavar="SLIDE", help="Slide file, OME-Zarr folder, image or URL.")]
ConfigOpt = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML settings, or the manifest.json of an output.")
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. tiling.overlap=96."),
]
MppOpt = Annotated[
    float | None, typer.Option(help="Pixel size of the slide in µm per pixel; overrides the file.")
]
GeneratorOpt = Annotated[
    str | None, typer.Option("--generator", "-g", help="A name from `wsi-pipeline models`.")
]
WeightsOpt = Annotated[
    Path | None,
    typer.Option(
        help="A bundle from `wsi-pipeline models import`; generator lora_turbo unless one is named."
    ),
]
DeviceOpt = Annotated[
    str | None, typer.Option(help="Of a learned generator: auto, cpu, cuda or cuda:N \\[default: auto].")
]
VramOpt = Annotated[
    float | None, typer.Option("--max-vram", metavar="GIB", help="GPU memory that its batches may take.")
]
RoiOpt = Annotated[str | None, typer.Option(help="Y,X,HEIGHT,WIDTH in level-0 pixels, or a GeoJSON file.")]
MaskOpt = Annotated[
    str | None, typer.Option(help="Tissue: detect, whole, or a GeoJSON file of hand-corrected tissue.")
]
LogOpt = Annotated[
    Literal["text", "json"], typer.Option(help="text, or json for one JSON object a line on stdout.")
]
SlidesArg = Annotated[
    str,
    typer.Argument(
        metavar="SLIDE|DIR|CSV|GLOB",
        help="Slide file, OME-Zarr folder, image or URL; or a folder, a table or a quoted pattern of slides.",
    ),
]
OutOpt = Annotated[
    str, typer.Option("--out", "-o", help="NAME.ome.zarr or NAME.ome.tif; of many slides a folder or URL.")
]
BackgroundOpt = Annotated[
    Literal["matched", "source", "white"] | None,
    typer.Option(help="What stands where no tissue is \\[default: matched]."),
]
WorkersOpt = Annotated[int | None, typer.Option(help="Processes.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
RestartOpt = Annotated[
    bool, typer.Option("--restart", help="Throw away what is half done instead of continuing it.")
]
SeamsOpt = Annotated[
    bool, typer.Option("--seams", help="Measure seam figures and put them into the manifest.")
]
MANY = "Many slides"
FormatOpt = Annotated[
    Literal["zarr", "tiff"] | None,
    typer.Option("--format", help="Of the outputs \\[default: zarr].", rich_help_panel=MANY),
]
ExecutorOpt = Annotated[
    Literal["auto", "inline", "processes", "dask"] | None,
    typer.Option(help="Where slides are converted \\[default: auto].", rich_help_panel=MANY),
]
SchedulerOpt = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS|FILE", help="Of a dask cluster.", rich_help_panel=MANY),
]
MaxRamOpt = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Of all processes, e.g. 16GB.", rich_help_panel=MANY)
]
MaxDiskOpt = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Of outputs and work.", rich_help_panel=MANY)
]
DeadlineOpt = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="End by then: 06:30, 8h or a date and time.", rich_help_panel=MANY),
]
StageOpt = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Local disk to copy each slide to first.", rich_help_panel=MANY),
]
RunDirOpt = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Records and report, where -o is a URL.", rich_help_panel=MANY),
]
RetryOpt = Annotated[
    bool, typer.Option("--retry-failed", help="Try again what failed before.", rich_help_panel=MANY)
]
StrictOpt = Annotated[
    bool, typer.Option("--strict", help="Files of unknown kinds are errors.", rich_help_panel=MANY)
]
WatchOpt = Annotated[
    bool,
    typer.Option(
        "--watch", help="Convert what appears in the folder, until Ctrl-C or deadline.", rich_help_panel=MANY
    ),
]


def plan(
    slide: SlideArg,
    config: ConfigOpt = None,
    settings: SetOpt = None,
    mpp: MppOpt = None,
    generator: GeneratorOpt = None,
    weights: WeightsOpt = None,
    device: DeviceOpt = None,
    max_vram: VramOpt = None,
    roi: RoiOpt = None,
    mask: MaskOpt = None,
    overlay: Annotated[
        Path | None, typer.Option(help="PNG to write \\[default: SLIDE.overlay.png here].")
    ] = None,
    geojson: Annotated[
        Path | None, typer.Option(help="Also write the tissue as GeoJSON, to correct it by hand.")
    ] = None,
    log_format: LogOpt = "text",
) -> None:
    """Dry run: pixel size, tissue, tiles, bytes and time; writes an overlay picture, no output."""
    from wsi_pipeline import api
    from wsi_pipeline.console import show_plan

    named: dict[str, Any] = {"input.mpp": mpp, "input.roi": roi, "input.mask": mask}
    resolved = _configured(config, settings, named | _generator(config, generator, weights, device, max_vram))
    picture = overlay or Path(f"{Path(slide).name}.overlay.png")
    show_plan(api.plan(slide, resolved.conversion, overlay=picture, geojson=geojson), log_format)


def convert(
    slide: SlidesArg,
    out: OutOpt,
    config: ConfigOpt = None,
    settings: SetOpt = None,
    mpp: MppOpt = None,
    generator: GeneratorOpt = None,
    weights: WeightsOpt = None,
    device: DeviceOpt = None,
    max_vram: VramOpt = None,
    roi: RoiOpt = None,
    mask: MaskOpt = None,
    background: BackgroundOpt = None,
    workers: WorkersOpt = None,
    overwrite: OverwriteOpt = False,
    restart: RestartOpt = False,
    seams: SeamsOpt = False,
    output: FormatOpt = None,
    executor: ExecutorOpt = None,
    scheduler: SchedulerOpt = None,
    max_ram: MaxRamOpt = None,
    max_disk: MaxDiskOpt = None,
    deadline: DeadlineOpt = None,
    stage: StageOpt = None,
    run_dir: RunDirOpt = None,
    retry_failed: RetryOpt = False,
    strict: StrictOpt = False,
    watch: WatchOpt = False,
    log_format: LogOpt = "text",
) -> None:
    """Convert a whole slide, or many; run the same command again to continue an interrupted run.

    A run over many slides exits with 0 all done, 3 some failed or were left, 2 nothing could start, and
    tells all of them in report.html.
    """
    from wsi_pipeline import api
    from wsi_pipeline.console import Console
    from wsi_pipeline.runs.inputs import is_many

    named: dict[str, Any] = {"input.mpp": mpp, "input.roi": roi, "input.mask": mask}
    named |= {"output.background": background, "run.workers": workers}
    many: dict[str, Any] = {"format": output, "executor": executor, "scheduler": scheduler}
    many |= {"max_ram": max_ram, "max_disk": max_disk, "deadline": deadline}
    many |= {"stage": None if stage is None else str(stage), "seams": seams or None}
    many |= {"retry_failed": retry_failed or None, "strict": strict or None, "watch": watch or None}
    named |= {f"directory.{key}": value for key, value in many.items()}
    resolved = _configured(config, settings, named | _generator(config, generator, weights, device, max_vram))
    again = {"overwrite": overwrite, "restart": restart}
    with Console(log_format) as console:
        if is_many(slide):
            run = api.convert_many(slide, out, resolved, run_dir=run_dir, emit=console.emit, **again)
            console.ran(run)
            raise typer.Exit(run.exit_code)
        result = api.convert(slide, out, resolved.conversion, seams=seams, emit=console.emit, **again)
        console.converted(result)


def _configured(path: Path | None, settings: list[str] | None, named: dict[str, Any]) -> RunConfig:
    """The configuration with the named options laid over it; ``--set`` has the last word."""
    from wsi_pipeline.config import load_run_config

    given = {key: value for key, value in named.items() if value is not None}
    return load_run_config(path, settings or [], given)


def _generator(
    path: Path | None, name: str | None, weights: Path | None, device: str | None, max_vram: float | None
) -> dict[str, Any]:
    """The options that speak of the generator, as settings."""
    return {
        "generator.name": name or _implied(path, weights),
        "generator.options.weights": None if weights is None else str(weights),
        "generator.options.device": device,
        "generator.options.max_vram": max_vram,
    }


def _implied(path: Path | None, weights: Path | None) -> str | None:
    """The generator that ``--weights`` means, unless the configuration file names another."""
    if weights is None:
        return None
    from wsi_pipeline.config import load_config
    from wsi_pipeline.translators.bundle import is_translator

    default = load_config().generator.name
    if path is not None and load_config(path).generator.name != default:
        return None
    return "translator" if is_translator(weights) else "lora_turbo"
