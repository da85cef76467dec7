"""One side of a comparison: tiles of a folder, of a tile index or of a slide, each with a key and a patient.

The key says which tiles of two sides belong together: file name without its ending, or position on the
lattice. The patient is what intervals resample; where nobody states one, a rule guesses it from the name, and
the report says which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from wsi_pipeline.cohorts.names import place_of
from wsi_pipeline.cohorts.tcga import parse_barcode
from wsi_pipeline.cohorts.tiles import TileIndex, TileReader, load_tiles
from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.evaluation.settings import EvaluateConfig
from wsi_pipeline.evaluation.slide_tiles import is_slide, slide_index

__all__ = ["Role", "TileSet", "open_tiles", "pair_up"]

Role = Literal["generated", "reference", "source"]

_SAMPLED = 64  # files whose encoding is looked at
_SAME_LATTICE = 1e-3  # relative difference of pixel sizes; positions drift by that share of the way
_LOSSLESS = ("PNG", "TIFF", "OME-Zarr")
_TRAILING_NUMBERS = re.compile(r"([^A-Za-z0-9]+\d+)+$")
_DEFAULT_DOMAINS: dict[Role, str] = {"generated": "FF", "reference": "FFPE", "source": "FF"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileSet:
    """Tiles of one size with what is known of them.

    ``role`` in the comparison; ``keys`` and ``names`` (for people) of the tiles, ``groups``: their patients,
    by ``group_rule``; ``encoding`` of the files; ``size``: height and width in px; ``mpp`` where known.
    """

    role: Role
    index: TileIndex
    reader: TileReader
    keys: tuple[str, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    group_rule: str
    encoding: str
    size: tuple[int, int]
    mpp: Mpp | None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def origin(self) -> str:
        return self.index.origin

    @property
    def is_lossless(self) -> bool:
        return self.encoding.startswith(_LOSSLESS) and "JPEG" not in self.encoding

    def rows(self, chosen: Sequence[int], groups: Sequence[str]) -> TileSet:
        """Some of the tiles, in that order, with ``groups`` for patients."""
        index = self.index.rows(np.array(chosen, np.int64))
        return replace(
            self,
            index=index,
            reader=TileReader(index),
            keys=tuple(self.keys[row] for row in chosen),
            names=tuple(self.names[row] for row in chosen),
            groups=tuple(groups),
        )

    def read(self, row: int) -> U8_HWC:
        """The tile of a row, [H, W, 3] uint8; SlideError where it cannot be read."""
        return self.reader.read(row)


def open_tiles(path: str, role: Role, config: EvaluateConfig, like: TileSet | None = None) -> TileSet:
    """The tiles of a folder, a tile index (.parquet) or a slide.

    ``like``: a side that is open already; a slide is then read on its lattice, and as ``source`` at its very
    positions. Raises ConfigError for an empty folder, tiles of several sizes, a domain that is not there.
    """
    if is_slide(path):
        same = like if role == "source" or (role == "reference" and config.paired) else None
        index = slide_index(
            path,
            tile=like.size[0] if like else config.tile,
            mpp=like.mpp if like else None,
            stated=config.mpp,
            min_tissue=config.min_tissue,
            positions=same.index.region_N4 if same else None,
        )
    else:
        index = load_tiles(path)
        index = index.select(_domain(index, role, config), config.split if index.has_splits else None)
    if config.limit is not None and len(index) > config.limit and role != "source":
        kept = np.random.Generator(np.random.Philox(config.seed)).permutation(len(index))[: config.limit]
        index = index.rows(np.sort(kept))
    if len(index) == 0:
        raise ConfigError(f"{path}: holds no tile; name a folder, a tile index or a slide that has some")
    groups, rule = _groups(index)
    return TileSet(
        role=role,
        index=index,
        reader=TileReader(index),
        keys=tuple(_keys(index)),
        names=tuple(_names(index)),
        groups=groups,
        group_rule=rule,
        encoding=_encoding(index),
        size=_one_size(index),
        mpp=index.mpp,
    )


def pair_up(left: TileSet, right: TileSet) -> list[tuple[int, int]]:
    """Rows of two sides that belong together, in the order of ``left``.

    By key; where no key fits, by file name alone, if names are unique. Raises ConfigError where nothing fits,
    several tiles fit, the sizes differ, or positions are those of different lattices.
    """
    pairs = _matched(left.keys, right.keys)
    _check_single(left, {left.keys[row] for row, _ in pairs})
    _check_single(right, {left.keys[row] for row, _ in pairs})
    if not pairs:
        alone = [[PurePosixPath(key).name for key in side.keys] for side in (left, right)]
        if all(len(set(names)) == len(names) for names in alone):
            pairs = _matched(*alone)
    if not pairs:
        raise ConfigError(
            f"{right.origin}: no tile has the name or position of a tile of {left.origin} "
            f"({right.names[0]} against {left.names[0]}); name the folder or slide that it was made from"
        )
    if left.size != right.size:
        raise ConfigError(
            f"{right.origin}: tiles of {_px(right.size)}, those of {left.origin} have {_px(left.size)}; "
            "pairs need one size"
        )
    _check_lattices(left.index, right.index, pairs)
    return pairs


def _check_single(side: TileSet, matched: set[str]) -> None:
    """One tile for each key that found a partner: of several, nobody knows which is meant."""
    first: dict[str, int] = {}
    for row, key in enumerate(side.keys):
        if key in matched and first.setdefault(key, row) != row:
            files = [side.index.slide(number).path for number in (first[key], row)]
            raise ConfigError(
                f"{side.origin}: {files[0]} and {files[1]} have one name ({key}), so it is open which is the "
                "partner; keep one, or name the folder or domain of the right one"
            )


def _check_lattices(left: TileIndex, right: TileIndex, pairs: Sequence[tuple[int, int]]) -> None:
    """Equal positions are equal tissue on equal lattices only; those of an index may differ by slide."""
    ours, theirs = (
        index.slide_N[np.array(rows, np.int64)]
        for index, rows in zip((left, right), zip(*pairs, strict=True), strict=True)
    )
    _, first = np.unique(np.stack([ours, theirs]), axis=1, return_index=True)
    for place in first.tolist():
        a, b = left.slides[int(ours[place])], right.slides[int(theirs[place])]
        if a.lattice is None or b.lattice is None:
            continue
        if max(abs(x / y - 1.0) for x, y in zip(a.lattice, b.lattice, strict=True)) > _SAME_LATTICE:
            raise ConfigError(
                f"{right.origin}: {b.name} has tiles of {b.lattice[1]:.4g} µm per pixel, {a.name} of "
                f"{left.origin} of {a.lattice[1]:.4g}: equal positions are other tissue; make indices of "
                "pairs with wsi-pipeline tile --set tiling.tolerance=0"
            )


def _matched(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    rows = {key: row for row, key in enumerate(right)}
    return [(row, rows[key]) for row, key in enumerate(left) if key in rows]


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"


def _domain(index: TileIndex, role: Role, config: EvaluateConfig) -> str | None:
    """The domain that is asked for, or, of an index with several, the usual one of the role."""
    asked = {
        "generated": config.domain,
        "reference": config.reference_domain,
        "source": config.source_domain,
    }[role]
    there = {slide.domain for slide in index.slides} - {""}
    if asked is not None or len(there) < 2:
        return asked
    return _DEFAULT_DOMAINS[role] if _DEFAULT_DOMAINS[role] in there else None


def _one_size(index: TileIndex) -> tuple[int, int]:
    sizes = Counter(map(tuple, index.region_N4[:, 2:].tolist()))
    if len(sizes) > 1:
        shown = ", ".join(f"{count} of {_px((h, w))}" for (h, w), count in sizes.most_common(3))
        raise ConfigError(f"{index.origin}: tiles of several sizes ({shown}); cut them to one size")
    ((height, width),) = sizes
    return int(height), int(width)


def _keys(index: TileIndex) -> list[str]:
    """Name of the slide or picture (of its pair, where there is one) and, inside a slide, the position."""
    keys = []
    for row in range(len(index)):
        slide, (y, x, _, _) = index.slide(row), index.region_N4[row].tolist()
        name = slide.pair or slide.name
        keys.append(name if slide.lattice is None and (y, x) == (0, 0) else f"{name}@{y},{x}")
    return keys


def _names(index: TileIndex) -> list[str]:
    names = []
    for row in range(len(index)):
        slide, (y, x, _, _) = index.slide(row), index.region_N4[row].tolist()
        names.append(f"{slide.name} at y {y}, x {x}" if slide.lattice is not None else slide.name)
    return names


def _groups(index: TileIndex) -> tuple[tuple[str, ...], str]:
    """Patient of each tile, and the rule that it was found by."""
    used = [index.slides[number] for number in np.unique(index.slide_N).tolist()]
    names = [index.slide(row).name for row in range(len(index))]
    barcodes = {slide.name: parse_barcode(slide.name) for slide in used}
    if all(barcodes.values()):
        patients = {name: barcode.patient for name, barcode in barcodes.items() if barcode}
        return tuple(patients[name] for name in names), "TCGA barcode"
    if any(slide.patient for slide in used):
        return tuple(index.patient_N.tolist()), "patient column of the index"
    if any(slide.lattice is not None for slide in used):
        return tuple(names), "slide, as no patient is stated"
    folders = ["/".join(place_of(PurePosixPath(name).parts[:-1]).rest) for name in names]
    if len(set(folders)) > 1:  # those of domains and splits are no patients
        return tuple(folders), "sub-folder"
    return tuple(_prefix(name) for name in names), "file name without trailing numbers"


def _prefix(name: str) -> str:
    return _TRAILING_NUMBERS.sub("", PurePosixPath(name).name) or PurePosixPath(name).name


def _encoding(index: TileIndex) -> str:
    """How the pixels are stored, most frequent first; JPEG with its quality, which features feel."""
    used = [index.slides[number] for number in np.unique(index.slide_N).tolist()]
    step = max(1, len(used) // _SAMPLED)
    found = Counter(
        _slide_encoding(slide.path) if slide.lattice is not None else _picture_encoding(slide.path)
        for slide in used[::step]
    )
    return ", ".join(name for name, _ in found.most_common())


def _slide_encoding(path: str) -> str:
    return (
        "OME-Zarr" if ".zarr" in path else f"slide ({Path(path).suffix.lstrip('.').lower() or 'no ending'})"
    )


def _picture_encoding(path: str) -> str:
    try:
        with Image.open(path) as picture:
            form, tables = picture.format or "unknown", getattr(picture, "quantization", None)
            compression = picture.info.get("compression")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return "unknown"
    if form == "JPEG" and tables:
        return f"JPEG of quality {_jpeg_quality(tables[min(tables)])}"
    return "TIFF (JPEG inside)" if form == "TIFF" and compression == "jpeg" else form


def _jpeg_quality(table: Sequence[int]) -> int:
    """Quality of libjpeg's scale whose luminance table is closest; 50 is the standard's own table.

    The sum of the standard's is 3688; libjpeg scales it by 50 / q below 50 and by 2 - q / 50 above.
    """
    if max(table) == 1:
        return 100
    scale = sum(table) / 3688.0
    quality = 50.0 / scale if scale > 1.0 else 100.0 - 50.0 * scale
    return int(np.clip(round(quality), 1, 100))
