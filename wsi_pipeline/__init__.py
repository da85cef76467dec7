"""Whole-slide translation of fresh-frozen sections to FFPE style.

    from wsi_pipeline import open_slide, plan, convert, export

Names are imported on first use, so that ``import wsi_pipeline`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wsi_pipeline._version import __version__

if TYPE_CHECKING:
    from wsi_pipeline.api import convert, convert_many, export, plan, verify
    from wsi_pipeline.config import load_config, load_run_config
    from wsi_pipeline.errors import WsiPipelineError
    from wsi_pipeline.pipeline.settings import ConvertConfig
    from wsi_pipeline.readers import open_slide

__all__ = [
    "ConvertConfig",
    "WsiPipelineError",
    "__version__",
    "convert",
    "convert_many",
    "export",
    "load_config",
    "load_run_config",
    "open_slide",
    "plan",
    "verify",
]

_HOME = {
    "ConvertConfig": "wsi_pipeline.pipeline.settings",
    "WsiPipelineError": "wsi_pipeline.errors",
    "convert": "wsi_pipeline.api",
    "convert_many": "wsi_pipeline.api",
    "export": "wsi_pipeline.api",
    "load_config": "wsi_pipeline.config",
    "load_run_config": "wsi_pipeline.config",
    "open_slide": "wsi_pipeline.readers",
    "plan": "wsi_pipeline.api",
    "verify": "wsi_pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
