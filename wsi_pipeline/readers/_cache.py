"""One cache of decoded tiles per process, shared by all slides, with a cap in bytes.

Why one. Per-handle caches grow with the number of open slides; a run over a directory then eats memory
without end. Keys carry the slide's identity, so a slide that is opened again finds its tiles.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from wsi_pipeline.core.protocols import U8_HWC

__all__ = ["TILE_CACHE", "TileCache", "cache_token"]


class TileCache:
    """Least-recently-used decoded arrays under a byte cap; thread-safe, and never decodes under its lock.

    The newest entry always stays, even if it alone exceeds the cap. Threads that ask for the same missing
    entry wait for the one that decodes it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, U8_HWC] = OrderedDict()
        self._pending: dict[Hashable, Future[U8_HWC]] = {}
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    def get(self, key: Hashable, make: Callable[[], U8_HWC]) -> U8_HWC:
        """The entry, made by ``make()`` on a miss; whatever ``make`` raises reaches every waiting thread."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
            pending = self._pending.get(key)
            mine = pending is None
            if pending is None:
                pending = self._pending[key] = Future()
        if not mine:
            return pending.result()
        try:
            entry = make()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            pending.set_exception(error)
            raise
        self.put(key, entry)
        pending.set_result(entry)
        return entry

    def peek(self, key: Hashable) -> U8_HWC | None:
        """The entry if it is there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def put(self, key: Hashable, entry: U8_HWC) -> None:
        """Store a decoded array (it becomes read-only) and drop the least recently used ones over the cap."""
        entry.setflags(write=False)
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes += entry.nbytes - (0 if old is None else old.nbytes)
            self._entries[key] = entry
            self._pending.pop(key, None)
            while self._bytes > self.capacity and len(self._entries) > 1:
                self._bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0


_TOKENS = itertools.count()


def cache_token() -> int:
    """A number that no other open slide of this process has or had: the first part of a cache key."""
    return next(_TOKENS)


TILE_CACHE = TileCache(256 << 20)
