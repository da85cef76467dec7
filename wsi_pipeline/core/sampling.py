"""Which tile is sample i: pure functions of (seed, number), so ranks, workers and resume cannot matter.

Samples are numbered 0, 1, 2 ... without end. Sample ``number`` of a list of ``length`` things belongs to
epoch ``number // length``, and each epoch is a permutation of its own: every thing comes once before any
comes twice. Nobody holds a position, so there is none to save: who wants to go on at step t asks for the
numbers of step t. Lists of different lengths (frozen tiles, FFPE tiles) each go round at their own pace.

Why sorting raw words instead of ``Generator.permutation``: the bits of Philox are the same in every numpy
(NEP 19), what its shuffle makes of them is not promised. A run that is resumed after an update of numpy
must see the tiles that it would have seen.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["permutation_at", "sample_rng", "stream_key"]


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


def sample_rng(seed: int, number: int, stream: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose (``stream``); counter-based (Philox)."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, f"{stream}/{number}")))


@lru_cache(maxsize=8)
def _permutation(epoch: int, length: int, key: int) -> npt.NDArray[np.int64]:
    words = np.random.Philox(key=stream_key(key, f"epoch {epoch}")).random_raw(length)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order
