"""The command line: parse, call one library function, render events, map errors to exit codes.

Only typer is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wsi_pipeline import cohort_cli, evaluate_cli, models_cli, train_cli
from wsi_pipeline._version import __version__

if TYPE_CHECKING:
    from wsi_pipeline.pipeline.settings import ConvertConfig

EXIT_CODES = """
Exit codes: 0 done (also: no tissue found, nothing to convert) · 1 unexpected error, please report ·
2 wrong settings or arguments, nothing started · 3 the slide cannot be read or is not H&E ·
4 the generator failed · 5 the output cannot be written, continued or trusted · 130 stopped by Ctrl-C,
run the same command again to continue.
"""

app = typer.Typer(
    name="wsi-pipeline",
    help="Turn fresh-frozen whole-slide images into FFPE-style slides (synthetic; not for diagnosis).",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(models_cli.app, name="models")
app.command("tile")(cohort_cli.tile)
app.command("train")(train_cli.train)
app.command("evaluate")(evaluate_cli.evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


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
    str | None, typer.Option(help="Of a learned generator: auto, cpu, cuda or cuda:N [default: auto].")
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


@app.command()
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
        Path | None, typer.Option(help="PNG to write [default: SLIDE.overlay.png here].")
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
    show_plan(api.plan(slide, resolved, overlay=picture, geojson=geojson), log_format)


@app.command()
def convert(
    slide: SlideArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.ome.zarr or NAME.ome.tif.")],
    config: ConfigOpt = None,
    settings: SetOpt = None,
    mpp: MppOpt = None,
    generator: GeneratorOpt = None,
    weights: WeightsOpt = None,
    device: DeviceOpt = None,
    max_vram: VramOpt = None,
    roi: RoiOpt = None,
    mask: MaskOpt = None,
    background: Annotated[
        Literal["matched", "source", "white"] | None,
        typer.Option(help="What stands where no tissue is [default: matched]."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away a partial output instead of continuing it.")
    ] = False,
    seams: Annotated[
        bool, typer.Option("--seams", help="Measure seam figures and put them into the manifest.")
    ] = False,
    log_format: LogOpt = "text",
) -> None:
    """Convert a whole slide; run the same command again to continue an interrupted run."""
    from wsi_pipeline import api
    from wsi_pipeline.console import Console

    named: dict[str, Any] = {"input.mpp": mpp, "input.roi": roi, "input.mask": mask}
    named |= {"output.background": background, "run.workers": workers}
    resolved = _configured(config, settings, named | _generator(config, generator, weights, device, max_vram))
    with Console(log_format) as console:
        result = api.convert(
            slide, out, resolved, overwrite=overwrite, restart=restart, seams=seams, emit=console.emit
        )
        console.converted(result)


@app.command()
def export(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A finished .ome.zarr output.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.ome.tif")],
    jpeg: Annotated[Literal["4:2:0", "4:4:4"], typer.Option(help="Chroma subsampling.")] = "4:2:0",
    quality: Annotated[int, typer.Option(help="JPEG quality 1-100.")] = 90,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    log_format: LogOpt = "text",
) -> None:
    """Export a finished OME-Zarr to an OME-TIFF that OpenSlide, QuPath and TiffSlide open."""
    from wsi_pipeline import api
    from wsi_pipeline.config import load_config
    from wsi_pipeline.console import Console

    chosen = [f"output.tiff.subsampling='{jpeg}'", f"output.tiff.quality={quality}"]
    with Console(log_format) as console:
        path = api.export(store, out, load_config(None, chosen), overwrite=overwrite, emit=console.emit)
        console.result({"status": "exported", "path": str(path)}, f"Wrote {path}")


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A finished output.")],
    log_format: LogOpt = "text",
) -> None:
    """Hash an output again and compare it with its ledger."""
    from wsi_pipeline import api
    from wsi_pipeline.console import Console
    from wsi_pipeline.errors import LedgerCorruptError

    with Console(log_format) as console:
        result = api.verify(output, emit=console.emit)
        if not result.ok:
            raise LedgerCorruptError(
                f"{output}: {len(result.damaged)} parts differ from what was written "
                f"({', '.join(result.damaged[:5])}); convert the slide again",
                path=output,
            )
        console.result(
            {"status": "intact", "path": str(output), "blocks": result.blocks},
            f"{output}: every byte is as it was written",
        )


@app.command("config")
def show_config(config: ConfigOpt = None, settings: SetOpt = None) -> None:
    """Print all settings as YAML: the defaults, or what a file and overrides make of them."""
    from wsi_pipeline.config import load_config, to_yaml

    typer.echo(to_yaml(load_config(config, settings or [])), nl=False)


@app.command()
def doctor(log_format: LogOpt = "text") -> None:
    """Check versions, devices, readers and disk; say what is missing and how to get it."""
    from wsi_pipeline.console import show_doctor

    show_doctor(log_format)


def _configured(path: Path | None, settings: list[str] | None, named: dict[str, Any]) -> ConvertConfig:
    """The configuration with the named options laid over it; ``--set`` has the last word."""
    from wsi_pipeline.config import load_config

    given = {key: value for key, value in named.items() if value is not None}
    return load_config(path, settings or [], given)


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

    default = load_config().generator.name
    return "lora_turbo" if path is None or load_config(path).generator.name == default else None


def main() -> None:
    """Entry point: one line on stderr and the documented exit code for every error of ours.

    Ctrl-C is told by ``Console``; typer then exits with 130.
    """
    from wsi_pipeline.errors import WsiPipelineError

    # A scheduler's "terminate" is as orderly as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except WsiPipelineError as error:
        from wsi_pipeline.console import show_error

        show_error(error, json_lines=_wants_json(sys.argv))
        sys.exit(error.exit_code)


def _wants_json(arguments: list[str]) -> bool:
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return "--log-format=json" in arguments or ("--log-format", "json") in pairs


if __name__ == "__main__":
    main()
