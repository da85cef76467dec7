"""Classes of tiles: from a table by slide or patient, or from the folders that pictures lie in."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.cohorts.tiles import TileIndex, several
from wsi_pipeline.errors import ConfigError

__all__ = ["Labels", "read_labels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """``names`` of the classes, sorted; ``of_row``: number of the class of each row of the tile index."""

    names: tuple[str, ...]
    of_row: tuple[int, ...]


def read_labels(table: str | None, tiles: TileIndex) -> Labels:
    """Classes of all rows: of ``table`` (CSV with ``label`` and ``slide`` or ``patient``), or the name of the
    folder that each picture lies in. Raises ConfigError for a row without a class, or fewer than two classes.
    """
    known = None if table is None else _table(Path(table))
    named = []
    for slide in tiles.slides:
        keys = (slide.name, slide.patient, Path(slide.path).name)
        folder = Path(slide.name).parent.name
        found = folder if known is None else next((known[key] for key in keys if key in known), "")
        named.append(found)
    used = {int(number) for number in set(tiles.slide_N.tolist())}
    if bare := [tiles.slides[i].name for i in sorted(used) if not named[i]]:
        where = table or f"{tiles.origin} (a sub-folder for each class)"
        raise ConfigError(f"data.labels: {where} states no class of {several(bare)}")
    names = tuple(sorted({named[i] for i in used}))
    if len(names) < 2:
        raise ConfigError(f"data.labels: {table or tiles.origin} knows one class only ({names[0]})")
    places = {name: place for place, name in enumerate(names)}
    return Labels(names=names, of_row=tuple(places[named[i]] for i in tiles.slide_N.tolist()))


def _table(path: Path) -> Mapping[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a CSV file of labels") from error
    column = next((name for name in ("slide", "patient") if rows and name in rows[0]), None)
    if column is None or "label" not in rows[0]:
        raise ConfigError(f"{path}: needs the columns label, and slide or patient")
    found: dict[str, str] = {}
    for row in rows:
        key, label = (row[column] or "").strip(), (row["label"] or "").strip()
        if found.setdefault(key, label) != label:
            raise ConfigError(f"{path}: gives {key} two labels, {found[key]} and {label}; keep one")
    return found
