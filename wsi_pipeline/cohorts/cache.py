"""Tiles on a fast disk, for slides that are remote or slow: a folder that any number of processes share.

A file holds one tile, decoded, behind a line that states its shape and checksum. Why not compressed: of
codecs that lose nothing, those that are fast save a tenth to a quarter of H&E, those that halve it take 6 to
10 ms to read a tile of 512 px, which a JPEG slide on a local disk gives in 2.

The quota holds at any moment, also while several processes write: one writes at a time, under a lock, and
first adds the tile's size to the folder's ledger; who would exceed the quota removes what was longest unused
before. A process that dies meanwhile leaves the ledger too high, never too low; the next removal counts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import google_crc32c
import numpy as np

from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import ConfigError

__all__ = ["DiskCache"]

LEDGER = "wsi_pipeline_tile_cache.json"
SUFFIX, FRESH = ".tile", ".partial"
SLACK = 0.1
"""Share of the quota that a removal frees."""
TOUCHED_EVERY = 60.0
"""Seconds after which a use of a tile is noted again."""

logger = logging.getLogger(__name__)


class DiskCache:
    """Decoded tiles by name, at most ``quota`` bytes of them, in ``folder`` (made if it is absent).

    Picklable; safe in threads and processes. A folder that is not ours, or a quota of nothing, is a
    ConfigError. A disk that cannot be written costs speed and one warning, nothing else.
    """

    def __init__(self, folder: str | Path, quota: int) -> None:
        if quota < 1:
            raise ConfigError(f"data.cache_gib: a quota of {quota} bytes holds nothing")
        self._folder, self._quota = Path(folder), quota
        self._writable = True
        ledger = self._folder / LEDGER
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not ledger.exists():
                if any(self._folder.iterdir()) and not ledger.exists():
                    raise ConfigError(f"{folder}: holds other files; give the tile cache a folder of its own")
                ledger.touch()
        except OSError as error:
            raise ConfigError(f"{folder}: the tile cache cannot be made ({error.strerror})") from error

    def get(self, name: str, make: Callable[[], U8_HWC]) -> U8_HWC:
        """The tile of this name, [H, W, 3] uint8; made by ``make()`` where it is absent or damaged."""
        path = self._path(name)
        tile_HWC = _read(path)
        if tile_HWC is not None:
            return tile_HWC
        tile_HWC = make()
        if self._writable:
            try:
                self._store(path, tile_HWC)
            except OSError as error:
                self._writable = False
                logger.warning("%s: no longer written, %s; slides are read instead", self._folder, error)
        return tile_HWC

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self._folder / digest[:2] / (digest[2:] + SUFFIX)

    def _store(self, path: Path, tile_HWC: U8_HWC) -> None:
        content = np.ascontiguousarray(tile_HWC).data.cast("B")
        head = json.dumps({"shape": tile_HWC.shape, "crc32c": google_crc32c.value(bytes(content))})
        size = len(head) + 1 + len(content)
        if size > self._quota:
            return
        with self._locked() as ledger:
            used = _used(ledger)
            if used is None or used + size > self._quota:
                used = self._evict(self._quota - max(size, int(SLACK * self._quota)))
            _note(ledger, used + size)
            path.parent.mkdir(exist_ok=True)
            fresh = path.with_suffix(f".{os.getpid()}{FRESH}")
            try:
                with open(fresh, "wb") as file:
                    file.write(head.encode() + b"\n")
                    file.write(content)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)

    def _evict(self, target: int) -> int:
        """Remove what was longest unused until at most ``target`` bytes are left; returns how many are."""
        files = []
        for shard in os.scandir(self._folder):
            if not shard.is_dir():
                continue
            for entry in os.scandir(shard.path):
                if entry.name.endswith((SUFFIX, FRESH)):
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat()
                        files.append((facts.st_mtime_ns, facts.st_size, entry.path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    @contextmanager
    def _locked(self) -> Iterator[TextIO]:
        """The ledger, while nobody else has it."""
        import fcntl

        with open(self._folder / LEDGER, "r+", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _used(ledger: TextIO) -> int | None:
    """Bytes in the folder, or about to be; None where a crash tore the note."""
    try:
        return int(json.loads(ledger.read() or '{"used": 0}')["used"])
    except (ValueError, KeyError, TypeError):
        return None


def _note(ledger: TextIO, used: int) -> None:
    ledger.seek(0)
    ledger.truncate()
    ledger.write(json.dumps({"used": used}))
    ledger.flush()


def _read(path: Path) -> U8_HWC | None:
    """The tile of a file; None where there is none, or none that can be trusted (it is removed)."""
    try:
        with open(path, "rb") as file:
            head, content = file.readline(), file.read()
            if time.time() - os.fstat(file.fileno()).st_mtime > TOUCHED_EVERY:
                os.utime(path)
    except OSError:
        return None
    try:
        facts = json.loads(head)
        if google_crc32c.value(content) == facts["crc32c"]:
            return np.frombuffer(content, np.uint8).reshape(facts["shape"])
    except (ValueError, KeyError, TypeError):
        pass
    with contextlib.suppress(OSError):
        path.unlink()
    return None
