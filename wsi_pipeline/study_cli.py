"""``wsi-pipeline study``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsi_pipeline.convert_cli import LogOpt

if TYPE_CHECKING:
    from wsi_pipeline.study.analyse import StudyResult
    from wsi_pipeline.study.statistics import Estimate

__all__ = ["app"]

app = typer.Typer(help="Reader studies: can an expert tell synthetic tiles?", no_args_is_help=True)

_TILES = "a folder of tiles or a tile index (.parquet)"
RealArg = Annotated[Path, typer.Argument(metavar="REAL", help=f"Real tiles: {_TILES}.")]
MadeArg = Annotated[Path, typer.Argument(metavar="SYNTHETIC", help=f"Synthetic tiles: {_TILES}.")]
PageOpt = Annotated[Path, typer.Option("--out", "-o", help="OUT.html; OUT.key.json is written beside it.")]
CountOpt = Annotated[int | None, typer.Option(help="Tiles of each kind \\[default: up to 108].")]
DomainOpt = Annotated[str | None, typer.Option(help="Of REAL: FF or FFPE \\[default: all].")]
SplitOpt = Annotated[str | None, typer.Option(help="Of REAL: train, val or test \\[default: all].")]
SeedOpt = Annotated[int | None, typer.Option(help="To make the study again \\[default: random].")]
KeyArg = Annotated[Path, typer.Argument(metavar="STUDY_KEY", help="The .key.json of the study.")]
AnswersArg = Annotated[list[Path], typer.Argument(metavar="ANSWERS.csv...", help="What readers saved.")]
MarginOpt = Annotated[float, typer.Option(help="An accuracy of 0.5 +- this counts as chance.")]
TableOpt = Annotated[Path | None, typer.Option("--out", "-o", help="OUT.csv, a row for each reader.")]


@app.command()
def pack(
    real: RealArg,
    synthetic: MadeArg,
    out: PageOpt,
    count: CountOpt = None,
    domain: DomainOpt = None,
    split: SplitOpt = None,
    seed: SeedOpt = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of all tiles, 1-100.")] = 90,
    log_format: LogOpt = "text",
) -> None:
    """Make a blinded web page of real and synthetic tiles, and the key apart from it."""
    from dataclasses import asdict

    from wsi_pipeline.cohorts.tiles import load_tiles
    from wsi_pipeline.console import show_result
    from wsi_pipeline.study.pack import pack as run

    sides = (load_tiles(real).select(domain, split), load_tiles(synthetic))
    result = run(*sides, out, count=count, seed=seed, quality=quality)
    text = "".join(f"Warning: {warning}\n" for warning in result.warnings) + (
        f"Wrote {result.page} for readers: {result.images} images of {result.side[0]} x {result.side[1]} px\n"
        f"Wrote {result.key}: which is which; readers must not get it\n"
        f"Next: wsi-pipeline study analyse {result.key} ANSWERS.csv ..."
    )
    show_result({"status": "packed", **asdict(result)}, text, log_format)


@app.command()
def analyse(
    key: KeyArg,
    answers: AnswersArg,
    margin: MarginOpt = 0.1,
    out: TableOpt = None,
    log_format: LogOpt = "text",
) -> None:
    """Accuracy, AUC and agreement of the readers, and whether they do no better than chance."""
    from dataclasses import asdict

    from wsi_pipeline.console import show_result
    from wsi_pipeline.study import analyse as study

    result = study.analyse(key, answers, margin=margin)
    if out is not None:
        study.write_table(out, result)
    show_result({"status": "analysed", **asdict(result)}, _text(result), log_format)


def _text(result: StudyResult) -> str:
    lines = [f"Study {result.study}: {result.images} images, {len(result.readers)} readers (95 % intervals)"]
    for reader in result.readers:
        verdict = "equivalent" if reader.equivalent else "not shown to be equivalent"
        lines += [
            f"{reader.reader}: {reader.accuracy.n} judged, {reader.missing} left out",
            f"  accuracy {_figure(reader.accuracy)}, AUC {_figure(reader.auc)}, {reader.seconds:.0f} s each",
            f"  synthetic recognised {_figure(reader.sensitivity)}, real {_figure(reader.specificity)}",
            f"  {verdict} to chance within {result.margin:g} (TOST p {reader.tost_p:.3g})",
        ]
    pairs = (f"{pair}: kappa {kappa:.2f}" for pair, kappa in result.kappa.items())
    return "\n".join([*lines, *pairs])


def _figure(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
