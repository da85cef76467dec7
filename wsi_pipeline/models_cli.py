"""The commands under ``wsi-pipeline models``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.model_api import MPP, PROMPTS, SD_TURBO, TILE

if TYPE_CHECKING:
    from wsi_pipeline.models.layout import Direction

__all__ = ["app"]

app = typer.Typer(
    help="List the generators; import, export and show their weights; fetch the base model.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A .safetensors made by `models import`.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]
LogOpt = Annotated[
    Literal["text", "json"], typer.Option(help="text, or json for one JSON object a line on stdout.")
]


@app.callback()
def generators(context: typer.Context, log_format: LogOpt = "text") -> None:
    """List the generators; import, export and show their weights; fetch the base model."""
    if context.invoked_subcommand is None:
        list_generators(log_format)


@app.command("list")
def list_generators(log_format: LogOpt = "text") -> None:
    """List the generators and their options."""
    from wsi_pipeline.console import show_models

    show_models(log_format)


@app.command("import")
def import_weights(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="model.pkl of Diffusion-FFPE, or what --kind names.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.safetensors")],
    kind: Annotated[
        Literal["diffusion-ffpe", "adm", "i2sb", "pix2pix"],
        typer.Option(
            help="diffusion-ffpe (also img2img-turbo), adm (guided-diffusion), i2sb (latest.pt, or adm's "
            "file to begin training with), pix2pix (latest_net_G.pth)."
        ),
    ] = "diffusion-ffpe",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="What a file does not state. adm, i2sb: heads, head_width, new_attention_order, steps; "
            "adm: schedule, classes; i2sb: beta_max, ode, cond_x1; pix2pix: tanh.",
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(metavar="PATH_OR_HUB_ID", help="The base model that it was trained on.")
    ] = SD_TURBO,
    mpp: Annotated[float, typer.Option(help="µm per pixel that it was trained at.")] = MPP,
    tile: Annotated[
        int | None,
        typer.Option(
            help=f"Side in pixels of the tiles that it was trained on \\[default: {TILE}, or by --kind]."
        ),
    ] = None,
    prompt_a2b: Annotated[str, typer.Option(help="Caption, fresh-frozen to FFPE.")] = PROMPTS["a2b"],
    prompt_b2a: Annotated[str, typer.Option(help="Caption, FFPE to fresh-frozen.")] = PROMPTS["b2a"],
    overwrite: OverwriteOpt = False,
    log_format: LogOpt = "text",
) -> None:
    """Make one .safetensors of a published checkpoint and its base; nothing else is needed to convert."""
    from wsi_pipeline.console import show_imported
    from wsi_pipeline.model_api import import_foreign, import_model

    if kind == "diffusion-ffpe":
        if settings:
            raise ConfigError(f"--set {settings[0]}: is for other kinds; name one with --kind")
        prompts: dict[Direction, str] = {"a2b": prompt_a2b, "b2a": prompt_b2a}
        tile = TILE if tile is None else tile
        result = import_model(
            checkpoint, out, base=base, mpp=mpp, tile=tile, prompts=prompts, overwrite=overwrite
        )
    else:
        from wsi_pipeline.config import load_settings
        from wsi_pipeline.translators.importers import OPTIONS

        options = load_settings(OPTIONS[kind], None, settings or [])
        result = import_foreign(
            checkpoint, out, kind=kind, options=options, mpp=mpp, tile=tile, overwrite=overwrite
        )
    show_imported(result, log_format)


@app.command("export")
def export_weights(
    bundle: BundleArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="model.pkl")],
    form: Annotated[
        Literal["diffusion-ffpe"], typer.Option("--format", help="The program that shall load it.")
    ] = "diffusion-ffpe",
    overwrite: OverwriteOpt = False,
    log_format: LogOpt = "text",
) -> None:
    """Write weights as the published program saves them, so that it can run them."""
    from wsi_pipeline.console import show_result
    from wsi_pipeline.model_api import export_model

    path = export_model(bundle, out, overwrite=overwrite)
    show_result({"status": "exported", "path": str(path), "format": form}, f"Wrote {path}", log_format)


@app.command("fetch")
def fetch_base_model(
    hub_id: Annotated[str, typer.Argument(metavar="HUB_ID", help="A base model on the hub.")] = SD_TURBO,
    log_format: LogOpt = "text",
) -> None:
    """Download the base model into the Hugging Face cache (SD-Turbo: 5.2 GB)."""
    from wsi_pipeline.console import show_fetched
    from wsi_pipeline.model_api import fetch_model

    show_fetched(fetch_model(hub_id), log_format)


@app.command("show")
def show_weights(bundle: BundleArg, log_format: LogOpt = "text") -> None:
    """What a weights file is: directions or network, pixel size, digests, licence."""
    from wsi_pipeline.console import show_bundle
    from wsi_pipeline.model_api import show_model

    show_bundle(show_model(bundle), log_format)
