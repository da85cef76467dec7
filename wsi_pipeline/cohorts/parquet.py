"""Parquet, for those who installed it: pyarrow belongs to the part of the package that trains."""

from __future__ import annotations

from typing import Any

from wsi_pipeline.errors import ConfigError

__all__ = ["import_parquet"]


def import_parquet() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``; ConfigError with the remedy where they are absent."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"Parquet: pyarrow cannot be imported ({error}); pip install 'wsi-pipeline[train]'"
        ) from error
    return pyarrow, pyarrow.parquet
