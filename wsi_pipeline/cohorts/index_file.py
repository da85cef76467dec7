"""The tile index as a Parquet file: one row a tile, the slide's facts repeated, settings in the metadata.

Anything that reads Parquet reads it. ``keep`` and ``reason`` say what the filters of the moment make of the
scores; who loads the index may ask other filters instead, for all tiles are in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from wsi_pipeline.cohorts.manifest import CohortSlide
from wsi_pipeline.cohorts.parquet import import_parquet
from wsi_pipeline.cohorts.settings import FilterConfig
from wsi_pipeline.cohorts.tiles import IndexedSlide, TileIndex
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers.lattice import IccMode
from wsi_pipeline.readers.mpp import plausible

__all__ = ["INDEX_KEY", "index_metadata", "judge", "load_index", "slide_columns"]

INDEX_KEY = b"wsi_pipeline_tiles"
VERSION = 1
REASONS = ("", "tissue", "pen", "white", "black", "colour", "blur")
"""Why a tile does not serve; the first that applies, in this order. Empty: it serves."""
SCORES = ("tissue", "pen", "white", "black", "red", "green", "blue", "sharpness")
"""The scores that filters look at."""
_TEXTS = ("slide", "name", "identity", "domain", "patient", "split", "pair")
_FILLED = (*_TEXTS, "y", "x", "height", "width", "mpp_y", "mpp_x")
"""Columns that every row of an index fills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """What ``load_index`` needs, as numpy arrays."""

    slide_N: npt.NDArray[np.int32]
    slides: tuple[IndexedSlide, ...]
    region_N4: npt.NDArray[np.int64]


def judge(table: Any, filters: FilterConfig) -> npt.NDArray[np.int8]:
    """For each row of a table with scores (pyarrow), the number of its reason in ``REASONS``."""

    def column(name: str) -> npt.NDArray[np.float32]:
        return np.asarray(table[name].to_numpy())

    windows = zip(("red", "green", "blue"), filters.windows, strict=True)
    open_ended = (0.0, 255.0)
    colour_N = np.zeros(len(table), np.bool_)
    for name, window in windows:
        if window != open_ended:
            colour_N |= ~((column(name) > window[0]) & (column(name) < window[1]))
    tests = (
        column("tissue") < filters.min_tissue,
        column("pen") > filters.max_pen,
        column("white") > filters.max_white,
        column("black") > filters.max_black,
        colour_N,
        column("sharpness") < filters.min_sharpness,
    )
    reason_N = np.zeros(len(table), np.int8)
    for number, failed_N in reversed(list(enumerate(tests, start=1))):
        reason_N[failed_N] = number
    return reason_N


def slide_columns(
    table: Any, slide: CohortSlide, mpp: Sequence[float], reason_N: npt.NDArray[np.int8], path: str
) -> Any:
    """The rows of one slide as they stand in the index; ``mpp``: of its lattice, ``path``: as written."""
    pyarrow, _ = import_parquet()
    count = len(table)
    texts = {
        "slide": path,
        "name": slide.name,
        "identity": slide.identity,
        "domain": slide.domain,
        "patient": slide.patient,
        "split": slide.split,
        "pair": slide.pair,
        "transform": slide.transform,
    }
    columns = {}
    for name in texts:
        codes = pyarrow.array(np.zeros(count, np.int32))
        columns[name] = pyarrow.DictionaryArray.from_arrays(codes, pyarrow.array([texts[name]]))
    places = ("mpp_y", "mpp_x", "slide_mpp_y", "slide_mpp_x")
    for name, value in zip(places, (*mpp, *(slide.mpp or (None, None))), strict=True):
        columns[name] = pyarrow.array([value] * count, pyarrow.float64())
    for name in table.column_names:
        columns[name] = table[name].combine_chunks()
    columns["keep"] = pyarrow.array(reason_N == 0)
    columns["reason"] = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(reason_N.astype(np.int32)), pyarrow.array(REASONS)
    )
    return pyarrow.table(columns)


def index_metadata(path: Path) -> dict[str, Any] | None:
    """What an index says of itself (JSON values); None where the file is no index of ours."""
    pyarrow, parquet = import_parquet()
    try:
        metadata = parquet.read_schema(path).metadata or {}
        found = json.loads(metadata[INDEX_KEY])
    except (OSError, KeyError, ValueError, pyarrow.ArrowException):
        return None
    return found if isinstance(found, dict) else None


def load_index(path: Path, *, filters: FilterConfig | None = None, everything: bool = False) -> TileIndex:
    """The tiles of an index file that serve: by its own ``keep``, by other filters, or everything.

    Raises ConfigError for a file that is no index, of a version that this program does not know, or damaged.
    """
    pyarrow, parquet = import_parquet()
    about = index_metadata(path)
    if about is None:
        raise ConfigError(f"{path}: is no tile index; make one with wsi-pipeline tile COHORT -o {path.name}")
    if about.get("version") != VERSION:
        raise ConfigError(f"{path}: a tile index of another version; make it again with wsi-pipeline tile")
    try:
        wanted = [*_FILLED, "slide_mpp_y", "slide_mpp_x", *(SCORES if filters else ["keep"])]
        wanted += {"transform"} & set(parquet.read_schema(path).names)  # indices of old have none
        table = parquet.read_table(path, columns=wanted)
        empty = [name for name in wanted if not name.startswith("slide_mpp") and table[name].null_count]
        if empty:
            raise ValueError(f"no value in {empty[0]}")
        kept_N = judge(table, filters) == 0 if filters else np.asarray(table["keep"].to_numpy(), np.bool_)
        columns = _columns(table, path)
        mpp, icc = float(about["mpp"]), about["icc"]
        if not plausible((mpp, mpp)) or icc not in get_args(IccMode):
            raise ValueError(f"mpp {mpp}, icc {icc}")
    except (OSError, KeyError, TypeError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{path}: the tile index is damaged ({reason}); make it again with wsi-pipeline tile --overwrite"
        ) from error
    chosen = slice(None) if everything else kept_N
    sides = np.unique(columns.region_N4[:, 2:])
    return TileIndex(
        origin=str(path),
        slides=columns.slides,
        slide_N=columns.slide_N[chosen],
        region_N4=columns.region_N4[chosen],
        mpp=(mpp, mpp),
        tile=int(sides[0]) if len(sides) == 1 else 0,
        icc=icc,
    )


def _columns(table: Any, path: Path) -> _Columns:
    """Rows of one slide share its file; the first of them speaks for all."""
    slide = table["slide"].combine_chunks()
    slide = slide if hasattr(slide, "indices") else slide.dictionary_encode()
    _, first, slide_N = np.unique(slide.indices.to_numpy(), return_index=True, return_inverse=True)
    heads = table.take(first).to_pylist()
    slides = []
    for head in heads:
        given = (head["slide_mpp_y"], head["slide_mpp_x"])
        slides.append(
            IndexedSlide(
                path=_found(head["slide"], path),
                name=head["name"],
                identity=head["identity"],
                mpp=None if given[0] is None else given,
                lattice=(head["mpp_y"], head["mpp_x"]),
                transform=_found(head["transform"], path) if head.get("transform") else "",
                **{name: head[name] for name in ("domain", "patient", "split", "pair")},
            )
        )
    region_N4 = np.stack([table[name].to_numpy() for name in ("y", "x", "height", "width")], axis=1)
    return _Columns(
        slide_N=slide_N.astype(np.int32), slides=tuple(slides), region_N4=region_N4.astype(np.int64)
    )


def _found(slide: str, index: Path) -> str:
    """Relative paths count from the index, so that a cohort can move with it."""
    return slide if "://" in slide else str(index.absolute().parent / slide)
