"""Which tile is sample i: pure functions of (seed, number), so ranks, workers and resume cannot matter.

Samples are numbered 0, 1, 2 ... without end. Sample ``number`` of a list of ``length`` things belongs to
epoch ``number // length``, and each epoch is a permutation of its own: every thing comes once before any
comes twice. Nobody holds a position, so there is none to save: who wants to go on at step t asks for the
numbers of step t. Lists of different lengths (frozen tiles, FFPE tiles) each go round at their own pace.

Why windows. To open a slide of a hundred thousand tiles takes 25 ms and 4 MB, ten times what a tile of it
takes. If every sample came from any of a thousand slides, opening them would be all that readers do. So an
epoch permutes the slides, cuts them into windows, and permutes the tiles of each window: it is still a
permutation of all tiles, but only one window's slides are in use at a time.

Why sorting raw words instead of ``Generator.permutation``: the bits of Philox are the same in every numpy
(NEP 19), what its shuffle makes of them is not promised. A run that is resumed after an update of numpy
must see the tiles that it would have seen.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["WindowedOrder", "permutation_at", "sample_rng", "stream_key"]


def stream_key(seed: int, stream: str) -> int:
    """The key, 128 bits, of everything that the stream of this name draws from this seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), "little")


def permutation_at(number: int, length: int, key: int) -> int:
    """Element ``number`` of an endless sequence of permutations of ``range(length)``.

    Raises ValueError for an empty range or a negative number. An epoch is made once and kept (two or three of
    a key at a time are in use); one of a million elements takes a tenth of a second.
    """
    if length < 1 or number < 0:
        raise ValueError(f"sample {number} of {length} things")
    epoch, position = divmod(number, length)
    return int(_permutation(epoch, length, key)[position])


class WindowedOrder:
    """An endless sequence of permutations of things that come in groups, ``window`` groups mixed at a time.

    ``group_N``: the group of each thing, integers from 0. With no more groups than a window holds it is
    ``permutation_at``. A pure function of its arguments and the number; picklable. Raises ValueError for
    nothing to permute.
    """

    def __init__(self, group_N: npt.NDArray[np.int32], window: int, key: int) -> None:
        if not len(group_N) or window < 1:
            raise ValueError(f"{len(group_N)} things in windows of {window}")
        self._group_N = group_N
        self._window, self._key = window, key
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._group_N)

    def at(self, number: int) -> int:
        """The thing at this place of the sequence; ValueError for a negative number."""
        if number < 0:
            raise ValueError(f"sample {number}")
        epoch, position = divmod(number, len(self._group_N))
        order = self._orders.get(epoch)
        if order is None:
            order = self._order(epoch)
            # One epoch ends while the next begins: two are in use, and a dict assignment is atomic.
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return int(order[position])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        groups = int(self._group_N.max()) + 1
        if groups <= self._window:
            return _permutation(epoch, len(self._group_N), self._key)
        place_G = np.empty(groups, np.int64)
        place_G[_permutation(epoch, groups, stream_key(self._key, "groups"))] = np.arange(groups)
        words = _words(epoch, len(self._group_N), self._key)
        return np.lexsort((words, (place_G // self._window)[self._group_N]))

    def __getstate__(self) -> tuple[npt.NDArray[np.int32], int, int]:
        return self._group_N, self._window, self._key

    def __setstate__(self, state: tuple[npt.NDArray[np.int32], int, int]) -> None:
        self._group_N, self._window, self._key = state
        self._orders = {}


def sample_rng(seed: int, number: int, stream: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose (``stream``); counter-based (Philox)."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, f"{stream}/{number}")))


@lru_cache(maxsize=8)
def _permutation(epoch: int, length: int, key: int) -> npt.NDArray[np.int64]:
    order = np.argsort(_words(epoch, length, key), kind="stable")
    order.setflags(write=False)
    return order


def _words(epoch: int, length: int, key: int) -> npt.NDArray[np.uint64]:
    return np.asarray(np.random.Philox(key=stream_key(key, f"epoch {epoch}")).random_raw(length))
