"""What a run promised to take at most: disk and memory.

The disk's promise is kept by reservations. A slide starts only when all that it can at most need is free, and
what it reserved stays reserved until it is finished and measured. Where nothing else runs and the bound does
not fit, a slide may still try with what is left: compression makes most outputs much smaller than the bound.
Then its worker watches its own folder and stops in time; ``BURST`` is set aside for what it writes between
two looks.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.core.geometry import ceil_div
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.core.protocols import LABEL_CELL
from wsi_pipeline.errors import ConfigError, OutputError
from wsi_pipeline.pipeline.memory import rss
from wsi_pipeline.runs.sizes import show_size
from wsi_pipeline.writers.ometiff import TiffConfig
from wsi_pipeline.writers.omezarr import CHUNK, CHUNK_V2, LABELS

__all__ = [
    "Admission",
    "DiskBudget",
    "DiskGuard",
    "folder_bytes",
    "rss",
    "total_rss",
    "upper_bound",
    "worker_limit",
]

BURST = 1 << 30
"""Bytes that a slide's workers may write between two looks at their folder."""

FLOOR = 600 << 20
"""Resident bytes below which no worker converts anything."""
PARENT_GROWTH = 128 << 20

_BLOSC_HEADER = 16
_INDEX_ENTRY = 16
_CHECKSUM = 4
_FILE_ROUNDING = 4096
_LEDGER_LINE = 96
_WRITTEN_TWICE = 2  # the merged ledger is written beside its parts; attempts have ledgers of their own
_ARRAY_METADATA = 4096
_FIXED = 16 << 20
"""Manifest, colour profile, QC picture, overlay and the record of files."""
_WHITE_TILE = 64 << 10
"""A blank tile of the largest side at the best quality."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """``allowance``: bytes that the slide may take, None where it may not start (or where there is no
    limit); ``wait``: it may fit once another one is finished; ``reason``: why it may not start."""

    allowance: int | None
    wait: bool = False
    reason: str = ""


class DiskBudget:
    """``limit`` in bytes (None: any) for what lies there already (``used``) and what is reserved.

    ``held``: which part of ``used`` is unfinished work of which slide; it is not counted again when the slide
    is admitted. Used by one thread.
    """

    def __init__(self, limit: int | None, used: int, held: Mapping[str, int] | None = None) -> None:
        self._limit = limit
        self._used = used
        self._held = dict(held or {})
        self._reserved: dict[str, int] = {}

    @property
    def limited(self) -> bool:
        return self._limit is not None

    @property
    def used(self) -> int:
        """Bytes of everything that is finished or was left; reservations do not count."""
        return self._used

    @property
    def promised(self) -> int:
        """Bytes that are used or reserved: never more than the limit, unless they were at the start."""
        return self._used + sum(self._reserved.values())

    def admit(self, key: str, upper: int) -> Admission:
        """Reserve room for a slide that needs at most ``upper`` bytes, what it has there already included."""
        if self._limit is None:
            return Admission(allowance=None)
        self._used -= self._held.get(key, 0)
        self._reserved.pop(key, None)
        free = self._limit - self.promised
        if upper <= free:
            granted = reserved = upper
        elif not self._reserved and free > 2 * BURST + self._held.get(key, 0):
            granted, reserved = free - BURST, free
        else:
            self._used += self._held.get(key, 0)
            wait = bool(self._reserved)
            reason = (
                f"it may need {show_size(upper)} and {show_size(max(free, 0))} of the disk budget are left: "
                "raise --max-disk, then run again"
            )
            return Admission(allowance=None, wait=wait, reason=reason)
        self._held.pop(key, None)
        self._reserved[key] = reserved
        return Admission(allowance=granted)

    def settle(self, key: str, actual: int) -> None:
        """The slide is finished, or was given up: in place of its reservation counts what it left."""
        self._reserved.pop(key, None)
        self._used += actual - self._held.pop(key, 0)


def upper_bound(plan: SlidePlan, tiff: TiffConfig | bool) -> int:
    """Bytes that an output can at most take while it is made, as its file system counts them.

    All planned blocks, uncompressed, with what the codecs add to data that do not compress; labels, ledger
    and metadata; the TIFF beside its working store. ``tiff``: how it is encoded, True for the worst case.
    """
    shape, keys = plan.shape, plan.block_keys()
    total = _FIXED + len(keys) * (_LEDGER_LINE * _WRITTEN_TWICE + 2 * _FILE_ROUNDING)
    v2 = plan.settings.get("zarr", {}).get("ngff") == "0.4"
    chunk = CHUNK_V2 if v2 else CHUNK
    for level, index in keys:
        region = shape.region(level, index)
        chunks = ceil_div(region.height, chunk) * ceil_div(region.width, chunk)
        total += chunks * (3 * chunk * chunk + _BLOSC_HEADER + _INDEX_ENTRY) + _CHECKSUM
        total += chunks * _FILE_ROUNDING if v2 else 0
    total += _label_bytes(plan)
    total += len(shape.levels) * (1 + len(LABELS)) * (_ARRAY_METADATA + 4 * _FILE_ROUNDING)
    if tiff:
        total += _tiff_bytes(plan, TiffConfig(subsampling="4:4:4") if tiff is True else tiff)
    return total


def _label_bytes(plan: SlidePlan) -> int:
    """Labels cover the slide whatever is planned; their chunks are as many as level 0 has blocks."""
    side = plan.block // LABEL_CELL
    height, width = (ceil_div(v, LABEL_CELL) for v in (plan.grid.size.height, plan.grid.size.width))
    total = 0
    for _ in plan.shape.levels:
        rows, cols = ceil_div(height, side), ceil_div(width, side)
        # A folder a row, and in the record of files a line a chunk.
        total += rows * cols * (side * side + _BLOSC_HEADER + 2 * _FILE_ROUNDING) + rows * _FILE_ROUNDING
        height, width = ceil_div(height, 2), ceil_div(width, 2)
    return total * len(LABELS)


def _tiff_bytes(plan: SlidePlan, config: TiffConfig) -> int:
    """JPEG's own worst case (libjpeg-turbo, ``tjBufSize``): 6 bytes a pixel at 4:4:4, 3 at 4:2:0."""
    a_pixel = 6 if config.subsampling == "4:4:4" else 3
    # A tile that only touches a planned block is no blank one.
    margin = 0 if plan.block % config.tile == 0 else config.tile
    total = _FIXED
    for level, indices in enumerate(plan.shape.planned(plan.blocks())):
        size = plan.shape.levels[level]
        tiles = ceil_div(size.height, config.tile) * ceil_div(size.width, config.tile)
        drawn = 0
        for index in indices:
            region = plan.shape.region(level, index)
            height, width = (ceil_div(v, config.tile) * config.tile for v in (region.height, region.width))
            drawn += (height + 2 * margin) * (width + 2 * margin)
        total += min(drawn, tiles * config.tile**2) * a_pixel + tiles * (2048 + 32)
        total += 0 if _is_whole(plan) else tiles * _white_tile(config)
    return total


def _is_whole(plan: SlidePlan) -> bool:
    rows, cols = plan.shape.grid(0)
    return len(plan.blocks()) == rows * cols


def _white_tile(config: TiffConfig) -> int:
    return max(_WHITE_TILE * (config.tile * config.tile) // (4096 * 4096), 4096)


class DiskGuard:
    """Stops a slide before it takes more than its ``allowance`` or the disk than all but ``min_free`` bytes.

    ``check`` is cheap enough for every event: it looks at most every ``interval`` seconds.
    """

    def __init__(self, folder: Path, allowance: int | None, min_free: int, interval: float = 1.0) -> None:
        self._folder, self._allowance, self._min_free = folder, allowance, min_free
        self._interval = interval
        self._next = 0.0

    def check(self) -> None:
        """Raises OutputError where the disk budget or the disk is used up."""
        now = time.monotonic()
        if now < self._next:
            return
        free = shutil.disk_usage(self._folder).free if self._folder.exists() else self._min_free
        if free < self._min_free:
            raise OutputError(
                f"{self._folder}: the disk is almost full ({show_size(free)} free, "
                f"{show_size(self._min_free)} shall stay free); free space, then run the same command again "
                "to continue",
                path=self._folder,
            )
        if self._allowance is not None and (taken := folder_bytes(self._folder)) > self._allowance:
            raise OutputError(
                f"{self._folder}: the disk budget is used up ({show_size(taken)} written, "
                f"{show_size(self._allowance)} were left for this slide); raise --max-disk, then run the "
                "same command again to continue",
                path=self._folder,
            )
        if self._interval:  # a look at many files takes time itself: a tenth of the whole at most
            self._next = time.monotonic() + max(self._interval, 9 * (time.monotonic() - now))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, as stated or as the disk holds them, whichever is more."""
    total, pending = 0, [os.fspath(folder)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
                        state = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # renamed or removed since
                        continue
                    total += max(state.st_size, getattr(state, "st_blocks", 0) * 512)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return total


def total_rss(pids: Iterable[int]) -> int:
    """Resident bytes of several processes; what they share counts for each, so this is never too little."""
    return sum(map(rss, pids))


def worker_limit(max_ram: int | None, workers: int, parent: int) -> int | None:
    """Resident bytes that each of ``workers`` processes may take beside a parent of ``parent`` bytes.

    A sixteenth stays free for what a process takes between two looks at it. Raises ConfigError where less
    than ``FLOOR`` is left for each.
    """
    if max_ram is None:
        return None
    left = (max_ram - parent - PARENT_GROWTH) * 15 // 16
    each = left // workers
    if each >= FLOOR:
        return each
    fitting = max(left // FLOOR, 0)
    remedy = f"use --workers {fitting}, or raise it" if fitting else "raise it"
    least = (FLOOR * workers) * 16 // 15 + parent + PARENT_GROWTH
    raise ConfigError(
        f"directory.max_ram: {show_size(max_ram)} are too little for {workers} workers, which need "
        f"{show_size(least)} at least; {remedy}"
    )
