"""The table of a run: which slides, and what is told about each. Checked whole before anything starts.

Columns: ``slide`` (a path, relative to the table, or a URL) and, all optional, ``mpp`` and ``mpp_y`` (µm per
pixel, override the file), ``mask`` (``detect``, ``whole`` or a GeoJSON file) and ``roi`` (a GeoJSON file or
``Y,X,HEIGHT,WIDTH``); other columns are passed over, so a cohort's table serves as well. Comma, semicolon or
tab. A ``.txt`` file may simply list paths, one a line; lines that start with ``#`` are passed over.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.readers._source import is_remote
from wsi_pipeline.readers.mpp import mpp_of_cells
from wsi_pipeline.runs.names import shown

__all__ = ["TABLES", "TableRow", "read_table"]

TABLES = (".csv", ".tsv", ".txt")
COLUMNS = ("slide", "mpp", "mpp_y", "mask", "roi")
SHOWN = 20
LARGEST = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One slide of a table. ``where``: ``line 7``; ``slide``: as written; ``path``: absolute, or a URL."""

    where: str
    slide: str
    path: str
    mpp: Mpp | None = None
    mask: str | None = None
    roi: str | None = None


def read_table(path: str | Path) -> list[TableRow]:
    """The rows of a table; raises ConfigError with all problems (the first ``SHOWN`` of them in words)."""
    path = Path(path)
    text = _text(path)
    problems: list[str] = []
    plain = path.suffix.lower() == ".txt" and not _has_header(text)
    rows = _list_rows(text) if plain else _csv(path, text, problems)
    found = [row for where, cells in rows if (row := _row(where, cells, path, problems)) is not None]
    if not rows and not problems:
        problems.append("names no slide")
    if problems:
        many = f"{len(problems)} problems: " if len(problems) > 1 else ""
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ConfigError(f"{path.name}: {many}{'; '.join(problems[:SHOWN])}{more}")
    return found


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise FileNotFoundError(None, "no such file" if not path.exists() else "no regular file")
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: is too large for a table of slides; give a CSV of paths")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a CSV of slides") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a UTF-8 text; save the table as CSV (UTF-8)") from error


def _has_header(text: str) -> bool:
    first = text.partition("\n")[0]
    return any("slide" in (cell.strip(' "\r').lower() for cell in first.split(mark)) for mark in ",;\t")


def _list_rows(text: str) -> list[tuple[str, Mapping[str, str]]]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    return [(f"line {number}", {"slide": line}) for number, line in lines if line and line[0] != "#"]


def _csv(path: Path, text: str, problems: list[str]) -> list[tuple[str, Mapping[str, str]]]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows: list[tuple[str, Mapping[str, str]]] = []
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        _check_columns(path, columns)
        for cells in reader:
            where = f"line {reader.line_num}"
            if None in cells:
                problems.append(
                    f"{where}: has more cells than the first line; quote values that contain {delimiter!r}"
                )
                continue
            values = {name: (value or "").strip() for name, value in cells.items()}
            if any(values.values()):
                rows.append((where, values))
    except csv.Error as error:
        raise ConfigError(f"{path.name}: line {reader.line_num}: is no CSV ({error})") from error
    return rows


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for name in columns:
        if name and columns.count(name) > 1:
            raise ConfigError(f"{path.name}: column {shown(name)!r} is there twice; keep one")
        near = difflib.get_close_matches(name, set(COLUMNS) - set(columns), n=1, cutoff=0.8)
        if name not in COLUMNS and near:
            raise ConfigError(f"{path.name}: column {shown(name)!r} is unknown; is it {near[0]!r}?")
    if "slide" not in columns:
        raise ConfigError(
            f"{path.name}: has no column slide; the columns are {', '.join(COLUMNS)}, of which only slide is "
            "needed (a .txt file may list paths, one a line)"
        )


def _row(where: str, cells: Mapping[str, str], table: Path, problems: list[str]) -> TableRow | None:
    def problem(text: str) -> None:
        problems.append(f"{where}: {text}")

    slide, mask, roi = (cells.get(column, "") for column in ("slide", "mask", "roi"))
    if not slide:
        problem("no slide")
    elif "\0" in slide:
        problem("the slide's name contains a zero byte")
    if mask and mask not in ("detect", "whole"):
        mask = _file("mask", mask, table, problem)
    if roi and not _is_box(roi):
        if roi.lower().endswith((".geojson", ".json")):
            roi = _file("roi", roi, table, problem)
        else:
            problem(f"roi {shown(roi)} is neither a GeoJSON file nor Y,X,HEIGHT,WIDTH in level-0 pixels")
    mpp = _mpp(cells.get("mpp", ""), cells.get("mpp_y", ""), problem)
    if not slide or "\0" in slide:
        return None
    path = _resolved(slide, table)
    return TableRow(where=where, slide=slide, path=path, mpp=mpp, mask=mask or None, roi=roi or None)


def _resolved(path: str, table: Path) -> str:
    return path if is_remote(path) else os.path.abspath(table.parent / path)


def _file(column: str, given: str, table: Path, problem: Callable[[str], None]) -> str:
    path = _resolved(given, table)
    if "\0" in given or not os.path.isfile(path):
        problem(f"{column} {shown(given)}: no such file")
    return path


def _is_box(roi: str) -> bool:
    parts = roi.split(",")
    try:
        return len(parts) == 4 and min(int(part) for part in parts[2:]) > 0 and bool([*map(int, parts[:2])])
    except ValueError:
        return False


def _mpp(x: str, y: str, problem: Callable[[str], None]) -> Mpp | None:
    try:
        return mpp_of_cells(x, y)
    except ValueError:
        told = shown(" ".join(filter(None, (x, y))))
        problem(f"mpp {told} is no pixel size in µm; give a number from 0.02 to 20")
        return None
