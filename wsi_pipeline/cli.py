"""The command line: parse, call one library function, render events, map errors to exit codes.

Only typer is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_pipeline import (
    audit_cli,
    cohort_cli,
    convert_cli,
    evaluate_cli,
    models_cli,
    register_cli,
    sample_cli,
    series_cli,
    study_cli,
    train_cli,
)
from wsi_pipeline._version import __version__
from wsi_pipeline.convert_cli import ConfigOpt, LogOpt, SetOpt

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
app.add_typer(study_cli.app, name="study")
app.command("plan")(convert_cli.plan)
app.command("convert")(convert_cli.convert)
app.command("series")(series_cli.series)
app.command("tile")(cohort_cli.tile)
app.command("register")(register_cli.register)
app.command("train")(train_cli.train)
app.command("sample")(sample_cli.sample)
app.command("evaluate")(evaluate_cli.evaluate)
app.command("audit")(audit_cli.audit)


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
    from wsi_pipeline.config import load_run_config, to_yaml

    typer.echo(to_yaml(load_run_config(config, settings or [])), nl=False)


@app.command()
def doctor(log_format: LogOpt = "text") -> None:
    """Check versions, devices, readers and disk; say what is missing and how to get it."""
    from wsi_pipeline.console import show_doctor

    show_doctor(log_format)


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
