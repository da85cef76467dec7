"""How results and events look: a rich bar with the time left, or one JSON object a line."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import rich.console
import rich.progress
import rich.table

from wsi_pipeline.api import PlanResult
from wsi_pipeline.doctor import examine
from wsi_pipeline.errors import SlideError, WsiPipelineError
from wsi_pipeline.generators import describe
from wsi_pipeline.model_api import Fetched, ImportResult
from wsi_pipeline.models.bundle import BundleFacts
from wsi_pipeline.pipeline.convert import ConvertResult
from wsi_pipeline.pipeline.events import Event, Notice, Planned, Progress, Stage
from wsi_pipeline.runs.events import RunProgress, SlideChanged
from wsi_pipeline.translators.bundle import TranslatorFacts

if TYPE_CHECKING:
    from wsi_pipeline.runs.run import RunResult

__all__ = [
    "Console",
    "show_bundle",
    "show_doctor",
    "show_error",
    "show_fetched",
    "show_imported",
    "show_models",
    "show_plan",
    "show_result",
]

STAGES = {
    "plan": "Looking for tissue",
    "blocks": "Converting",
    "finish": "Finishing",
    "measure": "Measuring seams",
    "export": "Writing OME-TIFF",
}


class Console:
    """Renders the events of one command; use as a context manager."""

    def __init__(self, log_format: str) -> None:
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
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Console:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            if self._json:
                _json_line({"event": "stopped"})
            self._stderr.print("Stopped. Run the same command again to continue.")

    def emit(self, event: Event | RunProgress | SlideChanged) -> None:
        """Show one event."""
        if self._json:
            _json_line({"event": type(event).__name__.lower(), **asdict(event)})
            return
        match event:
            case Stage():
                self._next(STAGES.get(event.stage, event.stage))
            case Planned():
                self._next(STAGES["blocks"])
                again = f", {event.resumed} finished earlier" if event.resumed else ""
                self._stderr.print(f"{event.slide_id}: {event.tiles} tiles, {event.blocks} blocks{again}")
            case Progress() if self._task is not None:
                self._bar.update(self._task, completed=event.done, total=event.total)
            case Notice():
                self._stderr.print(f"{event.slide_id}: {event.message}", markup=False)
            case SlideChanged() if event.status != "running":
                reason = f": {event.reason}" if event.reason else ""
                self._stderr.print(f"{event.status:8}{event.source}{reason}", markup=False)
            case RunProgress():
                if self._task is None:
                    self._next("Slides")
                self._bar.update(self._task, completed=event.share * event.total, total=event.total)  # type: ignore[arg-type]
            case _:
                pass

    def _next(self, description: str) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(description, total=None)

    def converted(self, result: ConvertResult) -> None:
        """The closing lines of a conversion."""
        if result.status == "no_tissue":
            text = f"{result.slide_id}: no tissue, nothing converted ({result.reason}); see {result.qc}"
        else:
            picture = f"\nLook at {result.qc}" if result.qc else ""
            text = (
                f"Wrote {result.path}: {result.tissue_mm2:.2f} mm² of tissue, {result.tiles} tiles, "
                f"{result.blocks} blocks in {result.seconds:.1f} s{_seams(result)}{picture}"
            )
        self.result(_plain(asdict(result)), text)

    def ran(self, result: RunResult) -> None:
        """The closing lines of a run over many slides."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(result.counts.items()))
        why = f" (ended early: {result.why})" if result.why else ""
        text = f"{counts} in {_duration(result.seconds)}{why}\nLook at {result.report}"
        self.result(_plain(asdict(result)) | {"exit_code": result.exit_code}, text)

    def result(self, values: dict[str, Any], text: str) -> None:
        """What stdout gets in the end."""
        self._bar.stop()
        if self._json:
            _json_line({"event": "result", **values})
        else:
            sys.stdout.write(text + "\n")


def show_plan(result: PlanResult, log_format: str) -> None:
    """The dry run as a table or as JSON."""
    found, cost = result.survey, result.estimate
    plan = found.plan
    size = plan.grid.size
    values = {
        "slide_id": plan.slide_id,
        "reader": result.slide.reader,
        "mpp_y": plan.mpp[0],
        "mpp_x": plan.mpp[1],
        "mpp_origin": plan.mpp_origin,
        "height": size.height,
        "width": size.width,
        "stain": found.verdict.kind,
        "tissue_mm2": round(found.tissue.tissue.area_mm2, 3),
        "excluded_mm2": found.excluded_mm2,
        "no_tissue_reason": found.tissue.reason,
        "generator": plan.generator.kind,
        "tiles": cost.tiles,
        "blocks": cost.blocks,
        "estimated_bytes": cost.size_bytes,
        "estimated_seconds": round(cost.seconds, 1),
        "free_bytes": cost.free_bytes,
        "overlay": str(result.overlay),
    }
    if log_format == "json":
        _json_line({"event": "result", **values})
        return
    excluded = ", ".join(f"{name} {area:.3f}" for name, area in found.excluded_mm2.items() if area)
    rows = [
        ("slide", f"{plan.slide_id} ({result.slide.reader} reader)"),
        ("size", f"{size.width} x {size.height} px at {plan.mpp[1]:.4g} x {plan.mpp[0]:.4g} µm/px"),
        ("pixel size from", plan.mpp_origin),
        ("staining", f"{found.verdict.kind} ({found.verdict.reason})"),
        ("tissue", f"{found.tissue.tissue.area_mm2:.3f} mm²" + _reason(found.tissue.reason)),
        ("excluded", f"{excluded} mm²" if excluded else "nothing"),
        ("generator", f"{plan.generator.kind}, {cost.tiles} tiles of {plan.grid.tile} px"),
        ("output", f"{cost.blocks} blocks, about {cost.size_bytes / 1e6:.0f} MB as OME-Zarr"),
        ("disk", f"{cost.free_bytes / 1e9:.1f} GB free here"),
        ("time", f"about {_duration(cost.seconds)}"),
        ("overlay", str(result.overlay)),
        *([("outline", str(result.geojson))] if result.geojson else []),
    ]
    _table(rows)


def show_models(log_format: str) -> None:
    """The generators with their options, or why one cannot be used here."""
    for entry in describe():
        if log_format == "json":
            _json_line(asdict(entry))
        elif entry.problem:
            _table([(entry.name, entry.problem)])
        else:
            options = ", ".join(
                f"{o.name}" if o.required else f"{o.name}={o.default!r}" for o in entry.options
            )
            _table([(entry.name, entry.summary), ("", f"options: {options or 'none'}")])


def show_result(values: dict[str, Any], text: str, log_format: str) -> None:
    """The closing line of a command without progress."""
    if log_format == "json":
        _json_line({"event": "result", **values})
    else:
        sys.stdout.write(text + "\n")


def show_bundle(facts: BundleFacts | TranslatorFacts, log_format: str) -> None:
    """The facts of a weights file as a table or as JSON."""
    if log_format == "json":
        _json_line({"event": "result", **_bundle_values(facts)})
        return
    made = f"{facts.path} ({_size(facts.size_bytes)}), by {facts.created_by}"
    if isinstance(facts, TranslatorFacts):
        _table([("translator", made), *_translator_rows(facts)])
        return
    captions = ", ".join(f'{direction} "{text}"' for direction, text in facts.prompts.items())
    _table(
        [
            ("bundle", made),
            ("directions", captions),
            ("trained at", f"{facts.mpp:g} µm/px, tiles of {facts.tile} px"),
            (
                "source",
                f"{facts.source}, adapters of rank {facts.rank_unet} (UNet) and {facts.rank_vae} (VAE)",
            ),
            ("base", f"{facts.base_name}, digest {facts.base_digest}"),
            ("weights", f"{facts.identity} (as in manifests)"),
            ("licence", facts.licence),
        ]
    )


def show_imported(result: ImportResult, log_format: str) -> None:
    """What an import made, what to know about it, and what to type next."""
    facts = result.facts
    if log_format == "json":
        values = {"status": "imported", "notices": list(result.notices), **_bundle_values(facts)}
        _json_line({"event": "result", **values})
        return
    for notice in result.notices:
        sys.stderr.write(f"Note: {notice}\n")
    show_bundle(facts, log_format)
    weights = shlex.quote(str(facts.path))
    translates = isinstance(facts, BundleFacts) or facts.spec.translates
    what = "convert SLIDE -o OUT.ome.zarr" if translates else "sample -o OUT"
    sys.stdout.write(f"Next: wsi-pipeline {what} --weights {weights}\n")


def show_fetched(result: Fetched, log_format: str) -> None:
    """Where the base model is, and what to type next."""
    base = "" if result.is_default else f" --base {shlex.quote(result.hub_id)}"
    show_result(
        {"status": "fetched", **_plain(asdict(result))},
        f"{result.hub_id} is in {result.folder} ({_size(result.size_bytes)})\n"
        f"Next: wsi-pipeline models import model.pkl{base} -o ffpe.safetensors",
        log_format,
    )


def _bundle_values(facts: BundleFacts | TranslatorFacts) -> dict[str, Any]:
    directions = {"directions": facts.directions} if isinstance(facts, BundleFacts) else {}
    return {**_plain(asdict(facts)), **directions}


def _translator_rows(facts: TranslatorFacts) -> list[tuple[str, str]]:
    spec, network = facts.spec, facts.spec.network
    works = "one pass of the network"
    if spec.diffusion is not None:
        path, condition = spec.diffusion.path, spec.diffusion.condition
        works = f"{path.kind} of {path.steps} steps on {spec.diffusion.representation.kind}"
        works += f", {spec.sampling.nfe} passes" + (", source beside the state" if condition.concat else "")
        works += f", {condition.classes} classes {', '.join(spec.classes)}" if condition.classes else ""
    return [
        ("network", f"{network.family}, {network.base} channels x {list(network.mult)}, norm {network.norm}"),
        ("works by", works),
        (
            "made for",
            f"{spec.mpp:g} µm/px, tiles of {spec.tile} px, {spec.channels} channels, axes {spec.axes}",
        ),
        ("source", spec.source),
        ("weights", f"{facts.identity} (as in manifests)"),
        ("licence", spec.licence),
    ]


def show_doctor(log_format: str) -> None:
    """What works here and what does not, with the remedy."""
    findings = examine()
    if log_format == "json":
        for finding in findings:
            _json_line(asdict(finding))
        return
    _table(
        [
            (f"{'ok' if f.ok else 'missing'}  {f.part}", f.state + (f" -> {f.remedy}" if f.remedy else ""))
            for f in findings
        ]
    )


def show_error(error: WsiPipelineError, *, json_lines: bool) -> None:
    """One line on stderr; with JSON logging also one object on stdout."""
    if json_lines:
        line = {"event": "error", "kind": type(error).__name__, "message": str(error)}
        slide = {"slide_id": error.slide_id} if isinstance(error, SlideError) else {}
        _json_line(line | slide | {"exit_code": error.exit_code})
    sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")


def _seams(result: ConvertResult) -> str:
    """The verdict of ``--seams``, if it was asked for."""
    seams = (result.figures or {}).get("seams")
    if seams is None:
        return ""
    words = {True: "passed", False: "failed, see the manifest", None: "too little tissue to tell"}
    return f"\nSeam figures: {words[seams['pass']]}"


def _reason(reason: str | None) -> str:
    return f" (none: {reason})" if reason else ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(rows: list[tuple[str, str]]) -> None:
    table = rich.table.Table.grid(padding=(0, 2))
    for left, right in rows:
        table.add_row(rich.text.Text(left, style="bold"), rich.text.Text(right))
    rich.console.Console().print(table)


def _json_line(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values, default=str) + "\n")
    sys.stdout.flush()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
