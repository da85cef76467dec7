"""``wsi-pipeline tile``: parse, call one library function, render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from wsi_pipeline.cohorts.events import CohortEvent
    from wsi_pipeline.cohorts.index import IndexResult

__all__ = ["tile"]


def tile(
    cohort: Annotated[
        Path | None,
        typer.Argument(
            metavar="COHORT",
            help="Table of slides (CSV or Parquet), or a folder of slides.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="INDEX.parquet")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML settings.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. filters.min_tissue=0.3."),
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="µm per pixel of the tiles \\[default: 0.5].")] = None,
    side: Annotated[
        int | None, typer.Option("--tile", help="Side of a tile in pixels \\[default: 512].")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index of another cohort or other settings.")
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print all settings as YAML and stop.")
    ] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="text, or json for one JSON object a line on stdout.")
    ] = "text",
) -> None:
    """Find the tiles of a cohort and score them; run the same command again to continue."""
    from wsi_pipeline.cohorts.settings import CohortConfig
    from wsi_pipeline.config import load_settings, to_yaml
    from wsi_pipeline.errors import ConfigError, SlideError

    named = {"tiling.mpp": mpp, "tiling.tile": side}
    given = {key: value for key, value in named.items() if value is not None}
    resolved = load_settings(CohortConfig, config, settings or [], given)
    if show_config:
        typer.echo(to_yaml(resolved), nl=False)
        return
    if cohort is None or out is None:
        raise ConfigError(
            "tile: name the cohort and the index, wsi-pipeline tile COHORT.csv -o INDEX.parquet"
        )
    from wsi_pipeline.cohorts.index import make_index

    with CohortConsole(log_format) as console:
        result = make_index(cohort, out, resolved, workers=workers, overwrite=overwrite, emit=console.emit)
        console.finished(result)
    if result.failed:
        first = next(iter(result.failed))
        raise SlideError(
            f"{len(result.failed)} of {len(result.failed) + result.slides} slides failed and are not in "
            f"{out.name}; correct them or take them out, and run the same command again",
            slide_id=first,
        )


class CohortConsole:
    """Renders the making of an index: a bar over slides, or JSON lines; use as a context manager."""

    def __init__(self, log_format: str) -> None:
        import rich.console
        import rich.progress

        self._json = log_format == "json"
        self._stderr = rich.console.Console(stderr=True, highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=self._stderr,
            transient=True,
            disable=self._json or not self._stderr.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> CohortConsole:
        self._task = self._bar.add_task("Checking the cohort", total=None)
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            self._stderr.print("Stopped. Run the same command again to continue.")

    def emit(self, event: CohortEvent) -> None:
        """Show one event."""
        from dataclasses import asdict

        from wsi_pipeline.cohorts.events import Checked, SlideFailed, SlideTiled

        if self._json:
            typer.echo(json.dumps({"event": type(event).__name__.lower(), **asdict(event)}))
            return
        match event:
            case Checked():
                again = f", {event.resumed} tiled earlier" if event.resumed else ""
                self._stderr.print(f"{event.slides} slides{again}")
                for notice in event.notices:
                    self._stderr.print(f"Note: {notice}", markup=False)
                self._bar.update(
                    self._task, description="Tiling", completed=event.resumed, total=event.slides
                )
            case SlideTiled():
                self._bar.update(self._task, completed=event.done)
                if event.reason:
                    self._stderr.print(f"{event.slide}: no tiles ({event.reason})", markup=False)
                if event.astray:
                    told = f"{event.slide}: {event.astray} tiles not made, their tissue is not in register"
                    self._stderr.print(f"Note: {told} with the fixed slide", markup=False)
            case SlideFailed():
                self._bar.update(self._task, completed=event.done)
                self._stderr.print(f"Failed: {event.message}", markup=False)

    def finished(self, result: IndexResult) -> None:
        """The closing lines."""
        self._bar.stop()
        counts = {f"{domain}/{split}": kept for (domain, split), kept in sorted(result.counts.items())}
        if self._json:
            values = {"path": str(result.path), "page": str(result.page), "failed": result.failed}
            numbers = {"slides": result.slides, "tiles": result.tiles, "kept": result.kept}
            typer.echo(json.dumps({"event": "result", **values, **numbers, "counts": counts}))
            return
        told = ", ".join(f"{place} {kept}" for place, kept in counts.items())
        typer.echo(
            f"Wrote {result.path}: {result.kept} of {result.tiles} tiles serve, from {result.slides} slides "
            f"({told})\nLook at {result.page}"
        )
