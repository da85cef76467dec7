"""``wsi-pipeline evaluate``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from wsi_pipeline.evaluation.result import EvaluationResult
    from wsi_pipeline.evaluation.settings import Event

__all__ = ["evaluate"]

_SIDE = "a folder of tiles, a tile index (.parquet), a slide or .ome.zarr, or statistics (.npz)"

GeneratedArg = Annotated[str, typer.Argument(metavar="GENERATED", help=f"What is judged: {_SIDE}.")]
ReferenceOpt = Annotated[str | None, typer.Option(help=f"Real tiles that it should look like: {_SIDE}.")]
SourceOpt = Annotated[
    str | None, typer.Option(help="What the tiles were made from: tells how well structure was kept.")
]
PairedOpt = Annotated[
    bool | None, typer.Option("--paired", help="The reference holds the true picture of each generated tile.")
]
ExtractorOpt = Annotated[
    Literal["tiny", "inception", "inception_spatial", "inception_logits", "timm", "open_clip", "dino"] | None,
    typer.Option(help="Network of FID and KID \\[default: inception with --weights, else tiny]."),
]
WeightsOpt = Annotated[str | None, typer.Option(help="Its weights file, e.g. inception-2015-12-05.pt.")]
ModelOpt = Annotated[str | None, typer.Option(help="Its name in timm or open_clip.")]
TrustOpt = Annotated[
    bool | None,
    typer.Option("--trust-weights", help="Run the code of a TorchScript file that is not the known one."),
]
FidOpt = Annotated[bool | None, typer.Option("--fid/--no-fid", help="Frechet distance \\[default: yes].")]
KidOpt = Annotated[bool | None, typer.Option("--kid/--no-kid", help="Kernel distance \\[default: yes].")]
LpipsOpt = Annotated[
    str | None, typer.Option(help="VGG16 weights for LPIPS \\[default: those in torch's cache, if any].")
]
DinoOpt = Annotated[str | None, typer.Option(help="dino_vitbase8_pretrain.pth, for DINO-structure.")]
TranslatorOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[=WEIGHTS]", help="Generator to try on turned source tiles, e.g. translator=F."
    ),
]
SegmenterOpt = Annotated[
    str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes tissue maps of tiles, for their F1.")
]
ReportOpt = Annotated[
    Path | None, typer.Option(metavar="OUT.html", help="Report to write; OUT.png and OUT.json beside it.")
]
StatsOpt = Annotated[
    Path | None, typer.Option(metavar="FILE.npz", help="Keep GENERATED's statistics as a later reference.")
]
SplitOpt = Annotated[str | None, typer.Option(help="Of tile indices: train, val or test \\[default: all].")]
TileOpt = Annotated[
    int | None, typer.Option(help="Side in px of tiles that are cut from slides \\[default: 512].")
]
DrawsOpt = Annotated[
    int | None, typer.Option(help="Resamples of patients for each interval, 0: none \\[default: 200].")
]
SeedOpt = Annotated[
    int | None, typer.Option(help="Of KID's subsets, resamples, chosen tiles \\[default: 0].")
]
DeviceOpt = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N \\[default: auto].")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another setting, e.g. limit=2000, min_tissue=0.2."),
]
MppOpt = Annotated[
    float | None, typer.Option(help="µm per pixel of slides that state none, e.g. a JPEG that was converted.")
]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]
LogOpt = Annotated[
    Literal["text", "json"], typer.Option(help="text, or json for one JSON object a line on stdout.")
]


def evaluate(
    generated: GeneratedArg,
    reference: ReferenceOpt = None,
    source: SourceOpt = None,
    paired: PairedOpt = None,
    extractor: ExtractorOpt = None,
    weights: WeightsOpt = None,
    model: ModelOpt = None,
    trust_weights: TrustOpt = None,
    fid: FidOpt = None,
    kid: KidOpt = None,
    lpips_vgg: LpipsOpt = None,
    dino: DinoOpt = None,
    translator: TranslatorOpt = None,
    segmenter: SegmenterOpt = None,
    report: ReportOpt = None,
    save_stats: StatsOpt = None,
    split: SplitOpt = None,
    tile: TileOpt = None,
    mpp: MppOpt = None,
    draws: DrawsOpt = None,
    seed: SeedOpt = None,
    device: DeviceOpt = None,
    settings: SetOpt = None,
    overwrite: OverwriteOpt = False,
    log_format: LogOpt = "text",
) -> None:
    """Judge generated tiles: FID and KID against real ones, structure kept of their source, with a report."""
    from wsi_pipeline.config import load_settings
    from wsi_pipeline.console import Console
    from wsi_pipeline.evaluation.evaluate import evaluate as run
    from wsi_pipeline.evaluation.settings import EvaluateConfig

    named: dict[str, Any] = {
        "source": source,
        "paired": paired,
        "extractor": extractor,
        "weights": weights,
        "model": model,
    }
    named |= {"trust_weights": trust_weights, "fid": fid, "kid": kid, "lpips_vgg": lpips_vgg, "dino": dino}
    named |= {"translator": translator, "segmenter": segmenter}
    named |= {"split": split, "tile": tile, "mpp": mpp, "draws": draws, "seed": seed, "device": device}
    given = {key: value for key, value in named.items() if value is not None}
    config = load_settings(EvaluateConfig, None, settings or [], given)
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
    people = "patient" if side.patients == 1 else "patients"
    patients = f", {side.patients} {people} ({side.group_rule})" if side.patients else ""
    return f"{side.role:10} {side.tiles or 'unknown number of'} tiles{size}{mpp}, {side.encoding}{patients}"
