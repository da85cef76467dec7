"""The settings of a conversion, part by part; each default stands here once.

``config.py`` reads them from YAML. Parts that belong to one module (tissue, OME-Zarr, OME-TIFF) are
declared beside that module and only composed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wsi_pipeline.core.plan import Background
from wsi_pipeline.core.tissue import TissueConfig
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.writers.ometiff import TiffConfig
from wsi_pipeline.writers.omezarr import OmeZarrConfig

__all__ = [
    "ConvertConfig",
    "ExecutionConfig",
    "GeneratorConfig",
    "InputConfig",
    "OutputConfig",
    "TilingConfig",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """How the slide is opened and which part of it counts.

    ``mpp``: micrometres per pixel, overrides what the file says; ``mpp_table``: CSV of overrides;
    ``icc``: ``srgb`` converts to sRGB before the generator, ``keep`` passes pixels and profile on,
    ``ignore`` drops the profile; ``stain``: ``h&e`` refuses anything else, ``any`` does not look;
    ``mask``: ``detect``, ``whole`` or a GeoJSON file of hand-corrected tissue; ``roi``: a GeoJSON file
    or ``Y,X,HEIGHT,WIDTH`` in level-0 pixels of the slide.
    """

    mpp: float | None = None
    mpp_table: str | None = None
    reader: str = "auto"
    icc: Literal["srgb", "keep", "ignore"] = "srgb"
    stain: Literal["h&e", "any"] = "h&e"
    mask: str = "detect"
    roi: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingConfig:
    """How the slide is cut. ``mpp``: working resolution in µm per pixel, taken exactly (None: the one that
    the generator was made for, or the slide's own, halved some times, where that lies within 10 %);
    ``overlap``: pixels that neighbouring tiles blend over (None: what the generator asks for); ``seed``:
    for generators that draw noise."""

    mpp: float | None = None
    overlap: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorConfig:
    """``name`` from ``wsi-pipeline models`` or ``package.module:Class``; ``options`` are its own."""

    name: str = "stain_transfer"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """``background``: what stands where no tissue is: ``matched`` is the source slide with its glass in
    the generator's colours, ``source`` the slide as it is, ``white`` nothing (sparse, fast, small);
    ``qc``: write the quality-control PNG beside the output."""

    background: Background = "matched"
    qc: bool = True
    zarr: OmeZarrConfig = field(default_factory=OmeZarrConfig)
    tiff: TiffConfig = field(default_factory=TiffConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """Decides no byte of the output. ``workers``: processes (None: 1 for a slide; for a directory one a
    GPU, else as many as the cores and the memory carry); ``threads``: reading and writing threads of each;
    ``batch``: tiles a generator call (None: the generator's own)."""

    workers: int | None = None
    threads: int = 2
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"run.{name}: {value} is not a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """Everything that one conversion can be told."""

    input: InputConfig = field(default_factory=InputConfig)
    tissue: TissueConfig = field(default_factory=TissueConfig)
    tiling: TilingConfig = field(default_factory=TilingConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    run: ExecutionConfig = field(default_factory=ExecutionConfig)
