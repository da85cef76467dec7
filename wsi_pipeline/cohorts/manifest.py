"""The table of a study: which slides, of which domain, patient and split. Checked whole before a run.

Columns: ``slide`` (a path, relative to the table, or a URL) and, all optional, ``domain`` (FF or FFPE),
``patient``, ``split`` (train, val, test), ``mpp`` and ``mpp_y`` (µm per pixel, override the file), ``mask``
(``detect``, ``whole`` or a GeoJSON file), ``pair`` (slides in register share it), ``transform`` (a
``pair.json`` of ``wsi-pipeline register``: the slide is read where its partner lies). What a TCGA barcode in
the file name states need not be repeated; other columns are passed over. A folder of slides is a cohort as
well: its sub-folders state domain and split.

Why every problem at once. A cohort has hundreds of slides; to be told of one bad row an hour, hours into a
run, costs a day.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from wsi_pipeline.cohorts.folders import walk
from wsi_pipeline.cohorts.names import DOMAINS, SPLIT_NAMES, place_of
from wsi_pipeline.cohorts.parquet import import_parquet
from wsi_pipeline.cohorts.splits import SPLITS, SplitConfig, draw_split, one_spelling
from wsi_pipeline.cohorts.tcga import parse_barcode
from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.errors import ConfigError, MissingMppError, WsiPipelineError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.mpp import mpp_of_cells
from wsi_pipeline.readers.warped import load_pair

__all__ = ["Cohort", "CohortSlide", "read_cohort"]

COLUMNS = ("slide", "domain", "patient", "split", "mpp", "mpp_y", "mask", "pair", "transform")
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".tif", ".tiff", ".btf", ".zarr")
"""Endings of what a folder of slides may hold."""
TILES = (".png", ".jpg", ".jpeg")
SHOWN = 20
THREADS = 4

Row = tuple[str, Mapping[str, str]]
"""Where a row stands (``line 7``), and its cells by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortSlide:
    """One slide of a cohort. ``mpp``: (y, x) override, None = the file's own; ``identity``: digest of the
    file and its transform; ``normal``: no tumour tissue, as far as a barcode says; ``pair``: empty where it
    has no partner; ``transform``: the ``pair.json`` through which it is read, empty: none."""

    path: str
    name: str
    identity: str
    domain: str
    patient: str
    split: str
    mpp: Mpp | None = None
    mask: str = "detect"
    pair: str = ""
    transform: str = ""
    normal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """The slides of a study, in the table's order; ``notices``: what was assumed, one sentence each."""

    origin: str
    slides: tuple[CohortSlide, ...]
    notices: tuple[str, ...] = ()


def read_cohort(path: str | Path, *, split: SplitConfig | None = None, threads: int = THREADS) -> Cohort:
    """Read and check a table (CSV or Parquet) or a folder of slides; every slide is opened once.

    ``split``: shares that are drawn by patient where the table gives no split. Raises ConfigError with all
    problems (the first ``SHOWN`` of them in words).
    """
    origin = Path(path)
    rows = _folder_rows(origin) if origin.is_dir() else _table_rows(origin)
    problems: list[str] = []
    read = [_parse(where, cells, origin, problems) for where, cells in rows]
    found = [(where, slide) for where, slide in read if slide is not None]
    with ThreadPoolExecutor(threads, "cohort") as pool:
        opened = list(pool.map(lambda item: _opened(*item), found))
    for where, looked in zip((where for where, _ in found), opened, strict=True):
        if isinstance(looked, str):
            problems.append(f"{where}: {looked}")
    slides = [(where, s) for (where, _), s in zip(found, opened, strict=True) if isinstance(s, CohortSlide)]
    problems += _doubles(slides)
    problems += _strangers(slides)
    problems += _leaks([(where, slide) for where, slide in found if slide.split in SPLITS])
    if not rows:
        problems.append("names no slide")
    if any(slide.split for _, slide in found) and not all(slide.split for _, slide in found):
        lacking = [where for where, slide in found if not slide.split]
        problems.append(f"{_listed(lacking)}: no split, where others have one; give it to all or to none")
    if problems:
        raise ConfigError(f"{origin.name}: {_told(problems)}")
    return _complete(origin, [slide for _, slide in slides], split or SplitConfig())


def _complete(origin: Path, slides: list[CohortSlide], config: SplitConfig) -> Cohort:
    notices = []
    alone = [slide.name for slide in slides if not slide.patient]
    if alone:
        # Sections of a pair are of one patient; else a pair could be torn over the splits.
        slides = [s if s.patient else replace(s, patient=s.pair or s.name) for s in slides]
        notices.append(f"{len(alone)} slides state no patient: each (or each pair) counts as one")
    if not slides[0].split:
        slides = [replace(slide, split=draw_split(slide.patient, config)) for slide in slides]
        patients = defaultdict(set)
        for slide in slides:
            patients[slide.split].add(one_spelling(slide.patient))
        counts = ", ".join(f"{name} {len(patients[name])}" for name in SPLITS)
        notices.append(f"no split given: patients were drawn with seed {config.seed} ({counts})")
        for name in SPLITS:
            if getattr(config, name) > 0 and not patients[name]:
                notices.append(f"no patient fell to {name}: state the split, or try another split.seed")
    return Cohort(origin=str(origin), slides=tuple(slides), notices=tuple(notices))


def _table_rows(path: Path) -> list[Row]:
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            columns, rows = _parquet(path)
        else:
            columns, rows = _csv(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}); give a CSV, a Parquet file or a folder"
        ) from error
    if "slide" not in columns:
        raise ConfigError(
            f"{path}: has no column slide; a cohort's columns are {', '.join(COLUMNS)}, of which only slide "
            "is needed"
        )
    for column in columns:
        near = difflib.get_close_matches(column, set(COLUMNS) - set(columns), n=1, cutoff=0.8)
        if column not in COLUMNS and near:
            raise ConfigError(f"{path}: column {column!r} is unknown; is it {near[0]!r}?")
    return rows


def _csv(path: Path) -> tuple[list[str], list[Row]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a UTF-8 text; save the table as CSV (UTF-8)") from error
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    columns = [name.strip().lower() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    _check_doubled(path, columns)
    rows: list[Row] = []
    try:
        for cells in reader:
            if None in cells:
                raise ConfigError(
                    f"{path}, line {reader.line_num}: has more cells than the first line; quote values that "
                    f"contain {delimiter!r}"
                )
            values = {name: (value or "").strip() for name, value in cells.items()}
            if any(values.values()):
                rows.append((f"line {reader.line_num}", values))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: is no CSV ({error})") from error
    return columns, rows


def _parquet(path: Path) -> tuple[list[str], list[Row]]:
    pyarrow, parquet = import_parquet()
    try:
        columns = [name.strip().lower() for name in parquet.read_schema(path).names]
        _check_doubled(path, columns)  # pyarrow refuses to read them, in words about its own schemas
        found = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no Parquet file ({str(error).partition(chr(10))[0]})") from error
    rows: list[Row] = []
    for number, cells in enumerate(found, start=1):
        values = zip(columns, cells.values(), strict=True)
        rows.append((f"row {number}", {name: _text(value) for name, value in values}))
    return columns, rows


def _check_doubled(path: Path, columns: Sequence[str]) -> None:
    """One column of a name, whatever its case; spreadsheets leave columns without a name at the end."""
    for name in columns:
        if name and columns.count(name) > 1:
            raise ConfigError(f"{path}: column {name!r} is there {columns.count(name)} times; keep one")


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _folder_rows(folder: Path) -> list[Row]:
    """Every slide below a folder, sorted; the folders between state domain and split."""
    rows: list[Row] = []
    tiles = 0
    for parts, folders, files in walk(folder):
        stores = [name for name in folders if name.endswith(".zarr")]
        folders[:] = [name for name in folders if name not in stores]
        place = place_of(parts)
        for name in sorted(files + stores):
            ending = Path(name).suffix.lower()
            tiles += ending in TILES
            if ending in SLIDES:
                cells = {"slide": "/".join((*parts, name)), "domain": place.domain, "split": place.split}
                rows.append((cells["slide"], cells))
    if tiles and not rows:
        raise ConfigError(
            f"{folder}: holds pictures, no slides; tiles need no index: name the folder as data.source and "
            "data.target of wsi-pipeline train, or list the pictures with their mpp in a table"
        )
    if not rows:
        raise ConfigError(f"{folder}: holds no slide ({', '.join(SLIDES)})")
    return rows


def _parse(
    where: str, cells: Mapping[str, str], origin: Path, problems: list[str]
) -> tuple[str, CohortSlide | None]:
    """The slide of a row as far as its cells tell; None (and a problem) where there is none to open."""

    def cell(column: str) -> str:
        return cells.get(column, "")

    def problem(text: str) -> None:
        problems.append(f"{where}: {text}")

    if not cell("slide"):
        problem("no slide")
        return where, None
    path = _resolved(cell("slide"), origin)
    name = Path(cell("slide").rstrip("/")).name
    barcode = parse_barcode(name)
    domain = DOMAINS.get(cell("domain").lower(), "")
    if cell("domain") and not domain:
        problem(f"domain {cell('domain')!r} is neither FF nor FFPE")
    elif not cell("domain"):
        domain = barcode.domain if barcode else ""
        if not domain:
            problem(f"{name} states no domain: FF or FFPE")
    split = SPLIT_NAMES.get(cell("split").lower(), "")
    if cell("split") and not split:
        problem(f"split {cell('split')!r} is none of train, val, test")
    mask = cell("mask") or "detect"
    if mask not in ("detect", "whole"):
        mask = _resolved(mask, origin)
        if not os.path.isfile(mask):
            problem(f"mask {cell('mask')}: no such file")
    transform = cell("transform") and _resolved(cell("transform"), origin)
    if "://" not in path and not os.path.exists(path):
        problem(f"{cell('slide')}: no such file")
        return where, None
    return where, CohortSlide(
        path=path,
        name=name,
        identity="",
        domain=domain,
        patient=cell("patient") or (barcode.patient if barcode else ""),
        split=split or ("unknown" if cell("split") else ""),
        mpp=_mpp(cell("mpp"), cell("mpp_y"), problem),
        mask=mask,
        pair=cell("pair"),
        transform=transform,
        normal=barcode.normal if barcode else False,
    )


def _resolved(path: str, origin: Path) -> str:
    if "://" in path:
        return path
    base = origin if origin.is_dir() else origin.parent
    return os.path.abspath(base / path)


def _mpp(x: str, y: str, problem: Callable[[str], None]) -> Mpp | None:
    try:
        return mpp_of_cells(x, y)
    except ValueError:
        problem(
            f"mpp {' '.join(filter(None, (x, y)))!r} is no pixel size in µm; give a number from 0.02 to 20"
        )
        return None


def _opened(where: str, slide: CohortSlide) -> CohortSlide | str:
    """The slide with its identity, or what is wrong with the file."""
    try:
        opened = open_slide(slide.path, mpp=slide.mpp, transform=slide.transform or None)
        identity = opened.identity
        opened.close()
    except MissingMppError:
        return f"{slide.name}: no source states the pixel size; give it in the column mpp"
    except WsiPipelineError as error:
        return str(error)
    return replace(slide, identity=identity)


def _doubles(slides: Iterable[tuple[str, CohortSlide]]) -> Iterator[str]:
    first: dict[str, tuple[str, str]] = {}
    for where, slide in slides:
        before = first.setdefault(slide.identity, (where, slide.name))
        if before[0] != where:
            same = "the same slide" if before[1] == slide.name else f"the same file as {before[1]},"
            yield f"{where}: {slide.name} is {same} of {before[0]}; keep one row"


def _strangers(slides: Sequence[tuple[str, CohortSlide]]) -> Iterator[str]:
    """A transform maps from one slide; as a partner of another one its tiles would show other tissue."""
    fixed = {slide.pair: slide for _, slide in slides if slide.pair and not slide.transform}
    for where, slide in slides:
        partner = fixed.get(slide.pair)
        if slide.transform and partner is not None:
            pair = load_pair(slide.transform)
            if pair.identities[0] != partner.identity:
                yield (
                    f"{where}: {pair.path.name} maps from {pair.names[0]}, its partner is {partner.name}; "
                    "register the slides of a pair with each other"
                )


def _leaks(slides: Iterable[tuple[str, CohortSlide]]) -> Iterator[str]:
    by_patient: dict[str, list[tuple[str, CohortSlide]]] = defaultdict(list)
    for where, slide in slides:
        if slide.patient:
            by_patient[one_spelling(slide.patient)].append((where, slide))
    for rows in by_patient.values():
        if len({slide.split for _, slide in rows}) > 1:
            patient = " or ".join(dict.fromkeys(slide.patient for _, slide in rows))
            told = ", ".join(f"{slide.split} ({where}, {slide.domain or '?'})" for where, slide in rows)
            yield f"patient {patient} is in several splits: {told}; a patient belongs to one, in both domains"


def _told(problems: Sequence[str]) -> str:
    many = f"{len(problems)} problems: " if len(problems) > 1 else ""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return many + "; ".join(problems[:SHOWN]) + more


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return ", ".join(places[:SHOWN]) + more
