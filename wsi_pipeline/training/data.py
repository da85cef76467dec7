"""Samples for training: pairs of tiles, each a pure function of (seed, number), read by as many processes as
one likes.

Step t of a run covers the numbers [t * batch * world, (t + 1) * batch * world); rank r takes its contiguous
part of them. So the tiles of a step are the same for one process and for eight, with or without workers, and
a run that goes on at step t sees what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from wsi_pipeline.cohorts.cache import DiskCache
from wsi_pipeline.cohorts.tiles import TileIndex, TileReader, load_tiles, several
from wsi_pipeline.core.frozen import FrozenModel, simulate_pair
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC
from wsi_pipeline.core.sampling import WindowedOrder, sample_rng, stream_key
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.training.augment import SYMMETRIES, jitter_stain, turn
from wsi_pipeline.training.labels import Labels, read_labels

__all__ = ["DataConfig", "TileSamples", "TrainBatch", "batches", "tiles_mpp"]

Pairing: TypeAlias = Literal["unpaired", "aligned", "rough", "simulated", "labelled"]
Augment: TypeAlias = Literal["none", "d4", "d4+colour"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the tiles come from and what is made of them.

    ``source``, ``target``: a tile index or a folder of pictures each, of which ``source_domain`` /
    ``target_domain`` and ``split`` take a part (None: FF and FFPE where there are both; a split counts where
    the tiles have splits); ``pairing``: ``unpaired`` draws the two sides independently, ``aligned`` takes
    tiles of the same name (folders) or pair and region (indices), ``rough`` does the same with pairs that may
    be off by some pixels, ``simulated`` makes both from the target (``source`` is not read) by the model of
    frozen artefacts ``frozen`` (large ice holes stay in the target: nobody knows what was there),
    ``labelled`` reads the target alone, with its class from ``labels`` (a CSV file with the columns ``slide``
    or ``patient``, and ``label``) or the folder that it lies in; ``crop``: side in pixels, at a random place
    of each tile; ``augment``: ``d4`` for the eight symmetries, ``d4+colour`` for mild changes of stain too;
    ``mpp``: pixel size of pictures, which simulation needs; ``workers``: reading processes (0: none, read
    inline); ``prefetch``: batches that each keeps ready; ``mix``: slides of each side from which samples are
    drawn at a time, and which a process keeps open (another number is another order of samples, where there
    are more slides); ``cache``: a folder on a fast disk for tiles of remote or slow slides, ``cache_gib`` GiB
    at the most."""

    source: str = ""
    target: str = ""
    source_domain: str | None = None
    target_domain: str | None = None
    split: str | None = "train"
    pairing: Pairing = "unpaired"
    labels: str | None = None
    crop: int = 512
    augment: Augment = "d4"
    mpp: float | None = None
    frozen: FrozenModel = field(default_factory=FrozenModel)
    workers: int = 0
    prefetch: int = 2
    mix: int = 32
    cache: str | None = None
    cache_gib: float = 20.0

    def __post_init__(self) -> None:
        for name, least in (("crop", 1), ("workers", 0), ("prefetch", 1), ("mix", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}: {getattr(self, name)} is too small; give at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Samples of one step and rank: ``numbers`` int64 [B], pixels uint8 [B, H, W, 3] of both sides, and
    ``labels`` int64 [B] where the data has classes."""

    numbers: npt.NDArray[np.int64]
    source_BHWC: U8_BHWC
    target_BHWC: U8_BHWC
    labels: npt.NDArray[np.int64] | None = None


class TileSamples:
    """Pairs of tiles by number; picklable. Raises ConfigError for tiles that cannot serve (all at once)."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        target = _side(config, "target", config.target, config.target_domain)
        cache = None if config.cache is None else DiskCache(config.cache, int(config.cache_gib * 2**30))
        self._target = TileReader(target, open_slides=config.mix, cache=cache)
        self._source: TileReader | None = None
        self._pairs_N2: npt.NDArray[np.int64] | None = None
        self.labels: Labels | None = None
        if config.pairing == "labelled":
            self.labels = read_labels(config.labels, target)
        if config.pairing in ("simulated", "labelled"):
            if config.pairing == "simulated":
                _mpp(target, 0)  # all rows state their pixel size, or none
            self._orders = {"pair": self._order("pair", target.slide_N)}
            return
        source = _side(config, "source", config.source, config.source_domain)
        self._source = TileReader(source, open_slides=config.mix, cache=cache)
        if config.pairing in ("aligned", "rough"):
            self._pairs_N2 = _pairs(source, target)
            self._orders = {"pair": self._order("pair", source.slide_N[self._pairs_N2[:, 0]])}
        else:
            sides = {"source": source, "target": target}
            self._orders = {name: self._order(name, side.slide_N) for name, side in sides.items()}

    def _order(self, stream: str, slide_N: npt.NDArray[np.int32]) -> WindowedOrder:
        _, group_N = np.unique(slide_N, return_inverse=True)
        key = stream_key(self.seed, f"{stream} order")
        return WindowedOrder(group_N.astype(np.int32), self.config.mix, key)

    @property
    def length(self) -> int:
        """Samples in an epoch: pairs, or tiles of the longer side."""
        return max(len(order) for order in self._orders.values())

    @property
    def digest(self) -> str:
        """Of the tiles that samples are made of; with the configuration and the seed it decides them all."""
        return "/".join(r.index.digest for r in (self._source, self._target) if r is not None)

    @property
    def left_out(self) -> int:
        """Tiles of either side that have no partner, in aligned mode."""
        if self._pairs_N2 is None or self._source is None:
            return 0
        return len(self._source.index) + len(self._target.index) - 2 * len(self._pairs_N2)

    def labels_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Classes [B] of samples, None where the data has none."""
        if self.labels is None:
            return None
        rows = [self._orders["pair"].at(number) for number in numbers.tolist()]
        return np.array([self.labels.of_row[row] for row in rows], np.int64)

    def sample(self, number: int) -> tuple[U8_HWC, U8_HWC]:
        """Source and target of one sample, [crop, crop, 3] uint8 each; SlideError where a slide fails.

        Why only the source's colours change in paired modes: the target is the answer, and an answer that
        varies at random cannot be learnt.
        """
        if self._source is None:
            row = self._orders["pair"].at(number)
            ffpe_HWC = self._cut(self._target, row, number, "pair")
            if self.config.pairing == "labelled":
                made_HWC = self._coloured(ffpe_HWC, number, "target")
                return made_HWC, made_HWC
            mpp, rng = _mpp(self._target.index, row), sample_rng(self.seed, number, "frozen")
            source_HWC, target_HWC = simulate_pair(ffpe_HWC, mpp, self.config.frozen, rng)
            return self._coloured(source_HWC, number, "source"), target_HWC
        if self._pairs_N2 is not None:
            rows = self._pairs_N2[self._orders["pair"].at(number)]
            source_HWC = self._cut(self._source, int(rows[0]), number, "pair")
            target_HWC = self._cut(self._target, int(rows[1]), number, "pair")
            return self._coloured(source_HWC, number, "source"), target_HWC
        sides = []
        for name, reader in (("source", self._source), ("target", self._target)):
            cut_HWC = self._cut(reader, self._orders[name].at(number), number, name)
            sides.append(self._coloured(cut_HWC, number, name))
        return sides[0], sides[1]

    def _cut(self, reader: TileReader, row: int, number: int, stream: str) -> U8_HWC:
        """A crop of a tile, turned; the draws are the same for all tiles of a size in one stream."""
        rng, side = sample_rng(self.seed, number, f"{stream} geometry"), self.config.crop
        tile = reader.index.region(row)
        y = int(rng.integers(tile.height - side + 1))
        x = int(rng.integers(tile.width - side + 1))
        symmetry = int(rng.integers(SYMMETRIES))
        pixels_HWC = reader.read(row, Region(y, x, side, side))
        return pixels_HWC if self.config.augment == "none" else turn(pixels_HWC, symmetry)

    def _coloured(self, pixels_HWC: U8_HWC, number: int, stream: str) -> U8_HWC:
        if self.config.augment != "d4+colour":
            return pixels_HWC
        return jitter_stain(pixels_HWC, sample_rng(self.seed, number, f"{stream} colour"))


def _side(config: DataConfig, name: str, path: str, domain: str | None) -> TileIndex:
    if not path:
        raise ConfigError(f"data.{name}: name a tile index or a folder of pictures")
    tiles = load_tiles(path, mpp=config.mpp)
    if domain is None and len({slide.domain for slide in tiles.slides}) > 1:
        domain = "FF" if name == "source" else "FFPE"
    try:
        tiles = tiles.select(domain, config.split if tiles.has_splits else None)
    except ConfigError as error:
        remedy = "data.split, validation.split (null: all) or data.source_domain, target_domain choose others"
        raise ConfigError(f"{error}; {remedy}") from error
    if not len(tiles):
        raise ConfigError(f"data.{name}: {path} holds no tile; look at the filters of the index")
    small_N = (tiles.region_N4[:, 2:] < config.crop).any(axis=1)
    if small_N.any():
        problems = [
            f"{tiles.slide(row).path} is {tiles.region(row).height} x {tiles.region(row).width} px"
            for row in np.flatnonzero(small_N).tolist()
        ]
        raise ConfigError(
            f"data.crop: {config.crop} px is larger than some tiles ({several(problems)}); give a "
            "smaller crop or take these tiles out"
        )
    return tiles


def _mpp(tiles: TileIndex, row: int) -> float:
    """Pixel size of a row's tile in µm, the geometric mean of both axes."""
    mpp = tiles.mpp_of(row)
    if mpp is None:
        raise ConfigError(f"data.mpp: state the pixel size of the pictures in {tiles.origin}, in µm")
    return math.sqrt(mpp[0] * mpp[1])


def _pairs(source: TileIndex, target: TileIndex) -> npt.NDArray[np.int64]:
    """Rows [N, 2] of both sides that show the same place, in the source's order; ConfigError for none."""
    partners, pairs = _by_place(target), []
    for place, row in _by_place(source).items():
        partner = partners.get(place)
        if partner is None:
            continue
        ours, theirs = source.mpp_of(row), target.mpp_of(partner)
        if ours and theirs and not np.allclose(ours, theirs, rtol=1e-3):
            raise ConfigError(
                f"{source.slide(row).path} and {target.slide(partner).path} are a pair but have lattices of "
                f"{ours} and {theirs} µm; make the index with --set tiling.tolerance=0"
            )
        if source.region(row).size != target.region(partner).size:
            raise ConfigError(
                f"{source.slide(row).path} and {target.slide(partner).path} are a pair but differ in size; "
                "aligned tiles show the same field"
            )
        pairs.append((row, partner))
    if not pairs:
        raise ConfigError(
            f"data.pairing: no tile of {source.origin} has a partner in {target.origin}; pictures are "
            "paired by the same relative name, index rows by pair_id and region"
        )
    return np.array(pairs, np.int64)


def _by_place(tiles: TileIndex) -> dict[tuple[str, int, int], int]:
    places: dict[tuple[str, int, int], int] = {}
    for row in range(len(tiles)):
        slide, region = tiles.slide(row), tiles.region(row)
        place = (slide.pair, region.y, region.x)
        if slide.pair and places.setdefault(place, row) != row:
            raise ConfigError(
                f"{slide.path}: the same pair as {tiles.slide(places[place]).path} ({slide.pair}); "
                "names of pairs are unique on each side"
            )
    return places


def tiles_mpp(config: DataConfig) -> float | None:
    """µm per pixel of the tiles, None where they state none.

    Raises ConfigError where the two sides differ by more than a tenth: the generator would learn to enlarge.
    """
    named = {"target": config.target, "source": config.source}
    if config.pairing in ("simulated", "labelled"):
        named["source"] = ""
    found = {}
    for name, path in named.items():
        mpp = load_tiles(path, mpp=config.mpp).mpp if path else None
        if mpp is not None:
            found[name] = float(np.sqrt(mpp[0] * mpp[1]))
    if len(found) == 2 and max(found.values()) > 1.1 * min(found.values()):
        raise ConfigError(
            f"data: source tiles have {found['source']:.4g} µm per pixel and target tiles "
            f"{found['target']:.4g}; make both indices with one --mpp"
        )
    return found.get("target", found.get("source"))


def batches(
    config: DataConfig, *, seed: int, batch: int, start: int, stop: int, rank: int = 0, world: int = 1
) -> Iterator[TrainBatch]:
    """The batches of steps ``start`` to ``stop - 1`` for one rank, ``batch`` samples each.

    Raises ConfigError before the first for tiles that cannot serve, SlideError where a slide fails.
    """
    if batch < 1 or not 0 <= rank < world or start < 0:
        raise ValueError(f"batch {batch}, rank {rank} of {world}, start {start}")
    source = _Batches(TileSamples(config, seed), batch, rank, world)
    steps = range(start, max(start, stop))
    if config.workers == 0:
        return _inline(source, steps)
    from wsi_pipeline.training.workers import load_in_processes

    made = load_in_processes(
        source.fill, steps, shape=source.shape, workers=config.workers, prefetch=config.prefetch
    )
    return (source.batch_of(numbers, pixels) for numbers, pixels in made)


def _inline(source: _Batches, steps: range) -> Iterator[TrainBatch]:
    for step in steps:
        pixels = np.empty(source.shape, np.uint8)
        yield source.batch_of(source.fill(step, pixels), pixels)


@dataclass(frozen=True, slots=True)
class _Batches:
    """Steps to batches, for one rank."""

    samples: TileSamples
    batch: int
    rank: int
    world: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a batch's pixels: both sides, samples, rows, columns, channels."""
        side = self.samples.config.crop
        return (2, self.batch, side, side, 3)

    def batch_of(self, numbers: npt.NDArray[np.int64], pixels: npt.NDArray[np.uint8]) -> TrainBatch:
        """Filled pixels as a batch."""
        labels = self.samples.labels_of(numbers)
        return TrainBatch(numbers=numbers, source_BHWC=pixels[0], target_BHWC=pixels[1], labels=labels)

    def fill(self, step: int, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Write the samples of a step into an array of ``shape``; returns their numbers."""
        first = (step * self.world + self.rank) * self.batch
        numbers = np.arange(first, first + self.batch, dtype=np.int64)
        for i, number in enumerate(numbers.tolist()):
            pixels[0, i], pixels[1, i] = self.samples.sample(number)
        return numbers
