"""Shared by the end-to-end tests of conversion: a small slide, small blocks, and digests of an output."""

from __future__ import annotations

import hashlib
from pathlib import Path

from wsi_pipeline.core.geometry import Size
from wsi_pipeline.core.plan import Background
from wsi_pipeline.pipeline.convert import ConvertResult, convert_slide
from wsi_pipeline.pipeline.settings import (
    ConvertConfig,
    ExecutionConfig,
    GeneratorConfig,
    InputConfig,
    OutputConfig,
)
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.writers.omezarr import OmeZarrConfig

SLIDE = SyntheticSlide(size=Size(5003, 4501), tissue_share=0.35, seed=3)


def settings(
    *,
    generator: str = "stain_transfer",
    background: Background = "matched",
    ngff: str = "0.5",
    run: ExecutionConfig | None = None,
    roi: str | None = None,
) -> ConvertConfig:
    return ConvertConfig(
        input=InputConfig(roi=roi),
        generator=GeneratorConfig(name=generator),
        output=OutputConfig(
            background=background,
            qc=False,
            zarr=OmeZarrConfig(block=1024, ngff=ngff),  # type: ignore[arg-type]
        ),
        run=run or ExecutionConfig(),
    )


def convert(out: Path, config: ConvertConfig) -> ConvertResult:
    return convert_slide(SLIDE, out, config)


def digests(store: Path) -> dict[str, str]:
    """sha256 of every chunk file (pixels and labels) by its path in the store."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.parts[len(store.parts)] not in ("ledger",) and "." not in path.name
    }
