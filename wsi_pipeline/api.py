"""The Python interface: what the command line does, with typed results.

>>> from wsi_pipeline import convert, open_slide
>>> result = convert("slide.svs", "slide.ome.zarr")          # doctest: +SKIP
>>> open_slide(result.path).levels[0].size                   # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.evaluation.seams import seam_figures
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline.convert import ConvertResult, convert_slide, export_slide
from wsi_pipeline.pipeline.estimate import Estimate, estimate
from wsi_pipeline.pipeline.events import Emit, ignore
from wsi_pipeline.pipeline.planning import Survey, open_configured, survey
from wsi_pipeline.pipeline.qc import write_geojson, write_overlay
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.pipeline.verify import VerifyResult, verify_output
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.runs.events import RunEmit
from wsi_pipeline.runs.events import ignore as ignore_run
from wsi_pipeline.runs.settings import RunConfig

if TYPE_CHECKING:
    from wsi_pipeline.runs.run import RunResult

__all__ = ["PlanResult", "convert", "convert_many", "export", "plan", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """What a conversion would do. ``survey.plan`` is the plan, ``survey.tissue`` what was detected."""

    slide: Slide
    survey: Survey
    estimate: Estimate
    overlay: Path | None
    geojson: Path | None


def plan(
    slide: str | Path | Slide,
    config: ConvertConfig | None = None,
    *,
    overlay: str | Path | None = None,
    geojson: str | Path | None = None,
) -> PlanResult:
    """Dry run: open the slide, detect tissue, lay out tiles and blocks, estimate bytes and time.

    Writes nothing but the ``overlay`` PNG and the tissue as ``geojson``, where a path is given; the
    GeoJSON can be corrected by hand and given back as ``input.mask``. Raises SlideError, ConfigError,
    OutputError.
    """
    config = config or ConvertConfig()
    opened = _open(slide, config)
    found = survey(opened, config)
    cost = estimate(opened, found, config)
    if overlay is not None:
        write_overlay(found, Path(overlay))
    if geojson is not None:
        write_geojson(found, opened.mpp, Path(geojson))
    return PlanResult(
        slide=opened,
        survey=found,
        estimate=cost,
        overlay=Path(overlay) if overlay else None,
        geojson=Path(geojson) if geojson else None,
    )


def convert(
    slide: str | Path | Slide,
    out: str | Path,
    config: ConvertConfig | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    seams: bool = False,
    emit: Emit = ignore,
) -> ConvertResult:
    """Convert a whole slide to ``out`` (``.ome.zarr`` or ``.ome.tif``); continues an interrupted run.

    ``seams`` measures the seam figures (formats_and_seams 5.6) and puts them into the manifest.
    Raises SlideError, ConfigError, GeneratorError, OutputError; see ``errors`` for the exit codes.
    """
    config = config or ConvertConfig()
    opened = _open(slide, config)
    try:
        return convert_slide(
            opened,
            Path(out),
            config,
            overwrite=overwrite,
            restart=restart,
            inspect=_Measure(config) if seams else None,
            emit=emit,
        )
    finally:
        if not isinstance(slide, Slide):
            opened.close()


def convert_many(
    slides: str | Path,
    out: str | Path,
    config: RunConfig | None = None,
    *,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    emit: RunEmit = ignore_run,
) -> RunResult:
    """Convert every slide of a folder, a CSV or a pattern to the folder (or URL) ``out``.

    Calling it again continues. A slide that fails raises nothing: see ``RunResult.counts`` and its report.
    Raises ConfigError where nothing can start, OutputError where another run is at work there.
    """
    from wsi_pipeline.runs.run import convert_many as run_many  # a single slide need not wait for it

    config = config or RunConfig()
    return run_many(
        str(slides),
        str(out),
        config,
        run_folder=None if run_dir is None else Path(run_dir),
        overwrite=overwrite,
        restart=restart,
        inspect=_Measure(config.conversion) if config.directory.seams else None,
        emit=emit,
    )


@dataclass(frozen=True, slots=True)
class _Measure:
    """Measures the seam figures of a finished conversion; goes to worker processes."""

    config: ConvertConfig

    def __call__(self, source: Slide, output: Slide, found: Survey) -> dict[str, Any]:
        config = self.config
        generator = make_generator(config.generator.name, config.generator.options)
        before = SlideView(source, found.plan.mpp, icc=config.input.icc)
        after = SlideView(output, found.plan.mpp, icc="ignore")
        return seam_figures(before, after, found.plan, generator, cell=found.plan.generator.cell)


def export(
    store: str | Path,
    out: str | Path,
    config: ConvertConfig | None = None,
    *,
    overwrite: bool = False,
    emit: Emit = ignore,
) -> Path:
    """Export a finished OME-Zarr output to a hybrid OME-TIFF that OpenSlide and QuPath open."""
    return export_slide(Path(store), Path(out), config or ConvertConfig(), overwrite=overwrite, emit=emit)


def verify(output: str | Path, *, emit: Emit = ignore) -> VerifyResult:
    """Hash an output again and compare it with its ledger."""
    return verify_output(Path(output), emit)


def _open(slide: str | Path | Slide, config: ConvertConfig) -> Slide:
    return open_configured(slide, config) if isinstance(slide, str | Path) else slide
