"""Tiles of a cohort as a table, and their pixels: from slides on the lattice, or from folders of pictures.

A row of the index is a region of a slide; a folder of pictures is an index too, one row a file, the whole
picture its region. What trains and what evaluates sees rows and pixels only.

Why no copies on disk. The slides are the data: a dump of tiles would multiply them, and a change of tile side
or pixel size would need another. Reading goes through ``SlideView``, the resampler of the conversion, so a
network is trained on the very pixels that it will be asked to translate.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wsi_pipeline.cohorts.cache import DiskCache
from wsi_pipeline.cohorts.folders import walk
from wsi_pipeline.cohorts.names import place_of
from wsi_pipeline.cohorts.tcga import parse_barcode
from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import ConfigError, SlideError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.image import picture_size
from wsi_pipeline.readers.lattice import IccMode, SlideView
from wsi_pipeline.readers.warped import WarpedSlide, on_lattice

if TYPE_CHECKING:
    from wsi_pipeline.cohorts.settings import FilterConfig

__all__ = ["PICTURES", "IndexedSlide", "TileIndex", "TileReader", "load_tiles", "several"]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
"""Endings of the pictures that a folder may hold, in any case."""
UNREAD = (".bmp", ".ppm", ".webp")
"""Endings that other programs take and our readers do not; they are told of, not passed over."""
PICTURE_BYTES = 512 << 20
"""Decoded pictures that one process keeps at the most; the newest always stays."""
SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedSlide:
    """What the rows of one slide (or picture) have in common.

    ``path``: the file; ``name``: for people; ``identity``: digest of its content, empty where nobody looked;
    ``mpp``: (y, x) pixel size that overrides the file's own (for pictures, which state none, 1 where nobody
    said); ``lattice``: pixel size of the lattice on which its regions lie (None: its own pixels);
    ``domain`` (``FF`` or ``FFPE``), ``patient``, ``split``: empty where unknown; ``pair``: slides of the same
    ``pair`` in two domains show the same tissue in register; ``transform``: the ``pair.json`` through which
    the slide is read, empty: none.
    """

    path: str
    name: str
    identity: str = ""
    mpp: Mpp | None = None
    lattice: Mpp | None = None
    domain: str = ""
    patient: str = ""
    split: str = ""
    pair: str = ""
    transform: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileIndex:
    """Tiles of many slides. Row i is region ``region_N4[i]`` (y, x, height, width) of ``slides[slide_N[i]]``.

    ``origin``: the file or folder, for messages; ``mpp``: the (y, x) pixel size of all tiles, each slide's
    own within a few per cent (see ``mpp_of``), None where unknown; ``tile``: side of all tiles in pixels, 0
    where they differ; ``icc``: what is done with colour profiles.
    """

    origin: str
    slides: tuple[IndexedSlide, ...]
    slide_N: npt.NDArray[np.int32]
    region_N4: npt.NDArray[np.int64]
    mpp: Mpp | None = None
    tile: int = 0
    icc: IccMode = "ignore"

    def __len__(self) -> int:
        return len(self.slide_N)

    def slide(self, row: int) -> IndexedSlide:
        """The slide of a row."""
        return self.slides[int(self.slide_N[row])]

    def region(self, row: int) -> Region:
        """The region of a row."""
        y, x, height, width = self.region_N4[row].tolist()
        return Region(y, x, height, width)

    @property
    def digest(self) -> str:
        """Of the rows and their slides: equal indices give equal samples."""
        digest = hashlib.sha256(repr((self.mpp, self.icc)).encode())
        for slide in self.slides:
            who = slide.identity or slide.name
            digest.update(repr((who, slide.mpp, slide.lattice, slide.pair)).encode())
        for values in (self.slide_N, self.region_N4):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def mpp_of(self, row: int) -> Mpp | None:
        """The exact (y, x) pixel size of a row's tile; None where unknown."""
        return self.slide(row).lattice or self.mpp

    @property
    def domain_N(self) -> npt.NDArray[np.str_]:
        """Domain of each row."""
        return self._each([slide.domain for slide in self.slides])

    @property
    def patient_N(self) -> npt.NDArray[np.str_]:
        """Patient of each row; the slide's name where the patient is unknown."""
        return self._each([slide.patient or slide.name for slide in self.slides])

    @property
    def split_N(self) -> npt.NDArray[np.str_]:
        """Split of each row."""
        return self._each([slide.split for slide in self.slides])

    @property
    def has_splits(self) -> bool:
        """Whether any tile belongs to one."""
        return any(slide.split for slide in self.slides)

    def _each(self, values: Sequence[str]) -> npt.NDArray[np.str_]:
        return np.array(values, np.str_)[self.slide_N] if values else np.empty(0, np.str_)

    def rows(self, keep: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> TileIndex:
        """The index of some rows (a mask, or their numbers); all slides stay."""
        return replace(self, slide_N=self.slide_N[keep], region_N4=self.region_N4[keep])

    def select(self, domain: str | None = None, split: str | None = None) -> TileIndex:
        """The rows of a domain and a split; None takes any. Raises ConfigError where none is left."""
        keep = np.ones(len(self), np.bool_)
        for wanted, have_N in ((domain, self.domain_N), (split, self.split_N)):
            if wanted is not None:
                keep &= have_N == wanted
        if len(self) and not keep.any():
            wish = " and ".join(
                f"{name} {value!r}" for name, value in (("domain", domain), ("split", split)) if value
            )
            there = sorted({(slide.domain or "none", slide.split or "none") for slide in self.slides})
            pairs = ", ".join(f"{have}/{part}" for have, part in there[:SHOWN])
            raise ConfigError(f"{self.origin}: no tile has {wish}; it has (domain/split): {pairs}")
        return self.rows(keep)


class TileReader:
    """Pixels of an index's rows. Picklable and thread-safe; slides open on first use in each process.

    ``open_slides``: how many slides one process keeps open at the most, the least recently used closes;
    pictures, which are decoded whole, also leave when they take more than ``PICTURE_BYTES`` together.
    ``cache``: where whole tiles of slides are kept on disk (pictures are not, they are there already).
    """

    def __init__(self, index: TileIndex, *, open_slides: int = 8, cache: DiskCache | None = None) -> None:
        if open_slides < 1:
            raise ConfigError(f"open_slides: {open_slides} is not a positive number")
        self.index = index
        self._limit, self._cache = open_slides, cache
        self._lock = threading.Lock()
        self._open: OrderedDict[int, SlideView] = OrderedDict()

    def read(self, row: int, crop: Region | None = None) -> U8_HWC:
        """The tile of a row, or ``crop`` of it (counted from the tile's corner), [H, W, 3] uint8.

        Raises ValueError for a crop that reaches outside the tile, SlideError where the slide fails.
        """
        tile = self.index.region(row)
        region = tile if crop is None else crop.shifted(tile.y, tile.x)
        if region.intersect(tile) != region:
            raise ValueError(f"{crop} is not inside a tile of {tile.height} x {tile.width} px")
        number = int(self.index.slide_N[row])
        name = self._name(number, tile)
        if self._cache is None or name is None:
            return self._view(number).read(region)
        tile_HWC = self._cache.get(name, lambda: self._view(number).read(tile))
        return tile_HWC[region.slices(tile)].copy()

    def inside(self, row: int, crop: Region | None = None) -> npt.NDArray[np.bool_]:
        """Which pixels of ``read(row, crop)`` show the slide, bool [H, W]: where a transform leads off its
        slide, the tile is white."""
        tile = self.index.region(row)
        region = tile if crop is None else crop.shifted(tile.y, tile.x)
        slide = self._view(int(self.index.slide_N[row])).slide
        everything = np.ones((region.height, region.width), np.bool_)
        return slide.inside(region) if isinstance(slide, WarpedSlide) else everything

    def _name(self, number: int, tile: Region) -> str | None:
        """What decides a tile's pixels, as text; None where the file's content is unknown."""
        entry = self.index.slides[number]
        decides = (entry.identity, entry.mpp, entry.lattice, tile, self.index.icc)
        return repr(decides) if entry.identity else None

    def close(self) -> None:
        """Close the slides of this process; they open again when they are read."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].slide.close()

    def _view(self, number: int) -> SlideView:
        with self._lock:
            view = self._open.get(number)
            if view is not None:
                self._open.move_to_end(number)
                return view
        entry = self.index.slides[number]
        slide = open_slide(entry.path, mpp=entry.mpp, transform=entry.transform or None)
        if entry.identity and slide.identity != entry.identity:
            raise SlideError(
                f"{entry.path}: is not the file of which {self.index.origin} was made; "
                "make the index again with wsi-pipeline tile",
                slide_id=slide.slide_id,
            )
        view = SlideView(on_lattice(slide, entry.lattice), entry.lattice, icc=self.index.icc)
        with self._lock:
            self._open[number] = view
            while len(self._open) > 1 and (len(self._open) > self._limit or self._decoded() > PICTURE_BYTES):
                self._open.popitem(last=False)[1].slide.close()
        return view

    def _decoded(self) -> int:
        slides = (view.slide for view in self._open.values())
        return sum(3 * slide.levels[0].size.area for slide in slides if slide.reader == "image")

    def __getstate__(self) -> tuple[TileIndex, int, DiskCache | None]:
        return self.index, self._limit, self._cache

    def __setstate__(self, state: tuple[TileIndex, int, DiskCache | None]) -> None:
        self.index, self._limit, self._cache = state
        self._lock = threading.Lock()
        self._open = OrderedDict()


def load_tiles(
    path: str | Path,
    *,
    mpp: Mpp | float | None = None,
    filters: FilterConfig | None = None,
    everything: bool = False,
) -> TileIndex:
    """The tiles of an index file (Parquet), or of a folder of pictures.

    Of an index, the tiles that serve, by the filters that it was made with or by ``filters``; or all of them
    (``everything``).
    Of a folder, each PNG, JPEG or TIFF in it and below, sorted, is one tile; sub-folders ``FF``, ``FFPE``,
    ``train``, ``trainA`` and so on state domain and split; links are followed. ``mpp``: pixel size of the
    pictures, which is noted and changes no pixel, or expected of the index. Raises ConfigError for what is
    neither, an index of another pixel size, a folder without pictures, or pictures that cannot be opened.
    """
    pair = (float(mpp), float(mpp)) if isinstance(mpp, int | float) else mpp
    if Path(path).is_file():
        from wsi_pipeline.cohorts.index_file import load_index

        tiles = load_index(Path(path), filters=filters, everything=everything)
        if pair and tiles.mpp and max(abs(a / b - 1) for a, b in zip(pair, tiles.mpp, strict=True)) > 0.1:
            raise ConfigError(f"{path}: its tiles have {tiles.mpp[1]:g} µm per pixel, not {pair[1]:g}")
        return tiles
    if Path(path).is_dir():
        return _folder_tiles(Path(path), pair)
    raise ConfigError(f"{path}: no such folder or tile index; make one with wsi-pipeline tile")


def _folder_tiles(folder: Path, pair: Mpp | None) -> TileIndex:
    names = _pictures(folder)
    slides, regions, problems = [], [], []
    for name in names:
        try:
            size = picture_size(folder / name)
        except SlideError as error:
            problems.append(str(error))
            continue
        regions.append((0, 0, size.height, size.width))
        slides.append(_picture(folder, name, pair))
    if problems:
        raise ConfigError(f"{folder}: {several(problems)}")
    sides = {side for _, _, *sides in regions for side in sides}
    return TileIndex(
        origin=str(folder),
        slides=tuple(slides),
        slide_N=np.arange(len(slides), dtype=np.int32),
        region_N4=np.array(regions, np.int64).reshape(-1, 4),
        mpp=pair,
        tile=sides.pop() if len(sides) == 1 else 0,
    )


def _picture(folder: Path, name: str, mpp: Mpp | None) -> IndexedSlide:
    """What a picture's relative name states: folders name domain and split, a barcode the patient.

    Its partner of the other domain has the same name in the folder of that domain.
    """
    stem = Path(name).with_suffix("")
    place, barcode = place_of(stem.parts[:-1]), parse_barcode(stem.name)
    domain = place.domain or (barcode.domain if barcode else "")
    return IndexedSlide(
        path=str(folder / name),
        name=stem.as_posix(),
        mpp=mpp or (1.0, 1.0),
        domain=domain,
        patient=barcode.patient if barcode else "",
        split=place.split,
        pair="/".join((place.split, *place.rest, stem.name)).lstrip("/"),
    )


def _pictures(folder: Path) -> list[str]:
    """Relative names of the pictures below a folder, sorted; hidden files and folders are passed over."""
    found: list[str] = []
    unread: set[str] = set()
    for parts, _, files in walk(folder):
        for name in files:
            ending = Path(name).suffix.lower()
            if ending in PICTURES:
                found.append("/".join((*parts, name)))
            elif ending in UNREAD:
                unread.add(ending)
    if unread:
        raise ConfigError(
            f"{folder}: holds pictures that cannot be read ({', '.join(sorted(unread))}); convert them to PNG"
        )
    if not found:
        raise ConfigError(f"{folder}: holds no picture ({', '.join(PICTURES)})")
    return sorted(found)


def several(problems: Sequence[str], shown: int = SHOWN) -> str:
    """The first problems in one line, and how many more there are."""
    more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more
