"""``wsi-pipeline train``: parse, call one library function, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from wsi_pipeline.training.events import Event

__all__ = ["train"]


def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Settings, e.g. of the folder configs/.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. loop.batch=4."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what the folder holds of an earlier run.")
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print all settings as YAML and stop.")
    ] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="text, or json for one JSON object a line on stdout.")
    ] = "text",
) -> None:
    """Train a generator from tiles; run the same command again to continue an interrupted run."""
    from wsi_pipeline.config import load_settings, to_yaml
    from wsi_pipeline.errors import ConfigError
    from wsi_pipeline.training.config import TrainConfig

    resolved = load_settings(TrainConfig, config, settings or [])
    if show_config:
        typer.echo(to_yaml(resolved), nl=False)
        return
    if out is None:
        raise ConfigError("train: name the folder of the run with --out RUN")
    from wsi_pipeline.training.run import train as run

    with TrainConsole(log_format) as console:
        run(resolved, out, restart=restart, emit=console.emit)


class TrainConsole:
    """Renders a run: a bar with the newest figures, or JSON lines; use as a context manager."""

    def __init__(self, log_format: str) -> None:
        import rich.console
        import rich.progress

        self._json = log_format == "json"
        self._stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=self._stderr,
            disable=self._json or not self._stderr.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> TrainConsole:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            if self._json:
                typer.echo('{"event": "stopped"}')
            self._stderr.print("Stopped. Run the same command again to continue from the last checkpoint.")

    def emit(self, event: Event) -> None:
        """Show one event."""
        from wsi_pipeline.training.events import Finished, Notice, Saved, Started, Stepped, Validated

        if self._json:
            if not isinstance(event, Stepped) or event.logs:
                _json_line(event)
            return
        match event:
            case Started():
                self._task = self._bar.add_task(
                    "Training", total=event.steps, completed=event.step, figures=""
                )
                self._stderr.print(_started(event))
            case Stepped():
                self._bar.update(self._task, completed=event.step)
                if event.logs:
                    self._bar.update(self._task, figures=_figures(event.logs))
                if event.logs and not self._stderr.is_terminal:
                    self._stderr.print(f"{event.step}: {_figures(event.logs, 20)}")
            case Validated():
                best = " (best so far)" if event.best else ""
                self._stderr.print(f"Validation at {event.step}: {_figures(event.figures, 20)}{best}")
            case Notice():
                self._stderr.print(event.message, markup=False)
            case Saved():
                pass
            case Finished():
                self._bar.stop()
                figures = f": {_figures(event.figures, 20)}" if event.figures else ""
                typer.echo(f"Wrote {event.bundle}, the weights of iteration {event.step}{figures}")
                typer.echo(f"Next: wsi-pipeline convert SLIDE -o OUT.ome.zarr --weights {event.bundle}")


def _started(event: Any) -> str:
    learning = ", ".join(f"{count:,} values of the {group}" for group, count in event.learning.items())
    again = f", going on after iteration {event.step}" if event.step else ""
    many = f" in {event.processes} processes" if event.processes > 1 else ""
    return f"Learning: {learning}; on {event.device}{many}{again}"


def _figures(values: Any, most: int = 4) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:most])


def _json_line(event: Event) -> None:
    import json
    from dataclasses import asdict

    name = {"Finished": "result"}.get(type(event).__name__, type(event).__name__.lower())
    fields = {key: _finite(value) for key, value in asdict(event).items()}
    typer.echo(json.dumps({"event": name, **fields}, default=str))


def _finite(value: Any) -> Any:
    """Figures as JSON knows them: what is no number becomes null."""
    import math

    if not isinstance(value, dict):
        return value
    return {name: number if math.isfinite(number) else None for name, number in value.items()}
