"""``wsi-pipeline evaluate``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from wsi_pipeline.evaluation.result import EvaluationResult
    from wsi_pipeline.evaluation.settings import Event

__all__ = ["evaluate"]

SideText = "a folder of tiles, a tile index (.parquet), a slide or .ome.zarr, or statistics (.npz)"


def evaluate(
    generated: Annotated[str, typer.Argument(metavar="GENERATED", help=f"What is judged: {SideText}.")],
    reference: Annotated[
        str | None, typer.Option(help=f"Real tiles that it should look like: {SideText}.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="What the tiles were made from: figures on how structure was kept.")
    ] = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="The reference holds the true picture of each generated tile.")
    ] = False,
    extractor: Annotated[
        Literal["tiny", "inception", "timm", "open_clip", "dino"] | None,
        typer.Option(help="Network of FID and KID [default: inception with --weights, else tiny]."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Its weights file, e.g. inception-2015-12-05.pt.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its name in timm or open_clip.")] = None,
    trust_weights: Annotated[
        bool,
        typer.Option("--trust-weights", help="Run the code of a TorchScript file that is not the known one."),
    ] = False,
    fid: Annotated[bool, typer.Option(help="Frechet distance of the two sets.")] = True,
    kid: Annotated[bool, typer.Option(help="Kernel distance of the two sets.")] = True,
    lpips_vgg: Annotated[
        str | None, typer.Option(help="VGG16 weights for LPIPS [default: those in torch's cache, if any].")
    ] = None,
    dino: Annotated[str | None, typer.Option(help="dino_vitbase8_pretrain.pth, for DINO-structure.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="Report to write; OUT.png and OUT.json beside it.")
    ] = None,
    save_stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Keep GENERATED's statistics as a later reference."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of tile indices: train, val or test.")] = None,
    domain: Annotated[str | None, typer.Option(help="Of GENERATED, if a tile index [default: FF].")] = None,
    reference_domain: Annotated[
        str | None, typer.Option(help="Of the reference, if a tile index [default: FFPE].")
    ] = None,
    source_domain: Annotated[
        str | None, typer.Option(help="Of the source, if a tile index [default: FF].")
    ] = None,
    tile: Annotated[int, typer.Option(help="Side in px of tiles cut from slides.")] = 512,
    min_tissue: Annotated[float, typer.Option(help="Share of such a tile that is tissue.")] = 0.5,
    limit: Annotated[int | None, typer.Option(help="At most so many tiles of a side, at random.")] = None,
    draws: Annotated[int, typer.Option(help="Resamples of patients for each interval; 0: none.")] = 200,
    seed: Annotated[int, typer.Option(help="Of KID's subsets, resamples and chosen tiles.")] = 0,
    batch: Annotated[int, typer.Option(help="Tiles that the network gets at once.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="text, or json for one JSON object a line on stdout.")
    ] = "text",
) -> None:
    """Judge generated tiles: FID and KID against real ones, structure kept of their source, with a report."""
    from wsi_pipeline.console import Console
    from wsi_pipeline.evaluation.evaluate import evaluate as run
    from wsi_pipeline.evaluation.settings import EvaluateConfig

    config = EvaluateConfig(
        source=source,
        paired=paired,
        extractor=extractor,
        weights=weights,
        model=model,
        trust_weights=trust_weights,
        fid=fid,
        kid=kid,
        lpips_vgg=lpips_vgg,
        dino=dino,
        split=split,
        domain=domain,
        reference_domain=reference_domain,
        source_domain=source_domain,
        tile=tile,
        min_tissue=min_tissue,
        limit=limit,
        draws=draws,
        seed=seed,
        batch=batch,
        device=device,
    )
    with Console(log_format) as console:
        result = run(
            generated,
            reference,
            config,
            report=report,
            save_stats=save_stats,
            overwrite=overwrite,
            emit=lambda event: console.emit(_as_rendered(event)),
        )
        console.result({"status": "evaluated", **result.to_json()}, _text(result))


def _as_rendered(event: Event) -> Any:
    """The event as the console knows it."""
    from wsi_pipeline.evaluation import settings
    from wsi_pipeline.pipeline import events

    match event:
        case settings.Stage():
            return events.Stage(slide_id="evaluate", stage=event.stage[:1].upper() + event.stage[1:])
        case settings.Progress():
            return events.Progress(slide_id="evaluate", done=event.done, total=event.total)
        case _:
            return events.Notice(slide_id="Note", message=event.message)


def _text(result: EvaluationResult) -> str:
    """The closing lines: both sides, the network, the figures, the files."""
    lines = [_side(side) for side in result.sides]
    if result.extractor is not None:
        network = result.extractor
        lines.append(
            f"{'extractor':10} {network.name}, {network.dims} features, resize {network.resize}, "
            f"SHA-256 {network.digest[:16]}…, seed {result.seed}"
        )
    width = max((len(figure.explained.label) for figure in result.figures), default=0)
    for figure in result.figures:
        interval = f"  [95 %: {figure.interval_text}]" if figure.interval_text else ""
        note = f"  ({figure.note})" if figure.note else ""
        lines.append(f"{figure.explained.label:{width}}  {figure.text:>10}{interval}{note}")
    lines += [f"Wrote {path}" for path in result.files.values()]
    return "\n".join(lines)


def _side(side: Any) -> str:
    size = f" of {side.size[0]} x {side.size[1]} px" if side.size else ""
    mpp = f" at {side.mpp[1]:.4g} µm" if side.mpp else ""
    patients = f", {side.patients} patients by {side.group_rule}" if side.patients else ""
    return f"{side.role:10} {side.tiles or 'unknown number of'} tiles{size}{mpp}, {side.encoding}{patients}"
