"""Many byte patterns in one pass over many bytes.

Why not ``re``: an alternation of a thousand patterns is tried one by one at each byte. Here numpy looks at
each window of four bytes once, in a table of 2^18 flags; only where the table says yes are patterns compared.
Each pattern is entered by its four bytes that are rarest in ordinary text, so that text costs no more than
noise. Bytes are folded before: ASCII letters to lower case, white space to spaces.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsi_pipeline.audit.own import own_text

__all__ = ["Hit", "Searcher", "fold", "wide_texts"]

_KEY = 4
_BITS = 18
_FACTOR = np.uint32(2654435761)
_FOLD = bytes.maketrans(bytes(range(65, 91)) + b"\t\r\n\x0b\x0c", bytes(range(97, 123)) + b" " * 5)


class Hit(NamedTuple):
    pattern: int
    start: int
    stop: int


def fold(data: bytes) -> bytes:
    return data.translate(_FOLD)


class Searcher:
    """Finds all of ``patterns`` (4 bytes or more each); ``longest`` is the overlap that chunks need."""

    def __init__(self, patterns: Sequence[bytes]) -> None:
        folded = [fold(pattern) for pattern in patterns]
        if any(len(pattern) < _KEY for pattern in folded):
            raise ValueError("a pattern has at least four bytes")
        self.longest = max(map(len, folded), default=0)
        counts = _usual_keys()
        self._by_key: dict[int, list[tuple[int, int, bytes]]] = defaultdict(list)
        for number, pattern in enumerate(folded):
            at = min(range(len(pattern) - _KEY + 1), key=lambda i: _commonness(pattern[i : i + _KEY], counts))
            self._by_key[int.from_bytes(pattern[at : at + _KEY], "little")].append((number, at, pattern))
        self._keys = np.array(sorted(self._by_key), np.uint32)
        self._table = np.zeros(1 << _BITS, np.bool_)
        self._table[_hashed(self._keys)] = True

    def find(self, data: bytes) -> Iterator[Hit]:
        """All places in ``data`` where a pattern stands, folded."""
        if not self._by_key or len(data) < _KEY:
            return
        folded = fold(data)
        for position in self._candidates(np.frombuffer(folded, np.uint8)):
            key = int.from_bytes(folded[position : position + _KEY], "little")
            for number, at, pattern in self._by_key[key]:
                start = position - at
                if start >= 0 and folded.startswith(pattern, start):
                    yield Hit(number, start, start + len(pattern))

    def _candidates(self, data: npt.NDArray[np.uint8]) -> list[int]:
        positions = []
        for shift in range(_KEY):
            count = (len(data) - shift) // _KEY
            words = data[shift : shift + count * _KEY].view("<u4").astype(np.uint32, copy=False)
            places = np.flatnonzero(self._table.take(_hashed(words)))
            keys = words[places]
            nearest = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            places = places[self._keys[nearest] == keys]
            positions.append(places * _KEY + shift)
        return [int(one) for one in np.concatenate(positions)]


@lru_cache(maxsize=1)
def _usual_keys() -> Counter[bytes]:
    usual = fold(own_text().encode())
    return Counter(usual[i : i + _KEY] for i in range(len(usual) - _KEY + 1))


def _hashed(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    return (words * _FACTOR) >> np.uint32(32 - _BITS)


def _commonness(key: bytes, counts: Counter[bytes]) -> tuple[int, int]:
    """Four equal bytes (white, zeros) are common in pixels, whatever stands in texts."""
    return (counts[key] + (100 if len(set(key)) < 3 else 0), key.count(b" "))


def wide_texts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Runs of four characters or more in UTF-16, either order, as (position, UTF-8); Latin-1 only.

    Each comes twice: in the big-endian order the last character has no zero behind it, so it is added once.
    """
    values = np.frombuffer(data, np.uint8)
    if len(values) < 8:
        return
    pairs = (values[:-1] >= 0x20) & (values[1:] == 0)
    starts = pairs[:-4] & pairs[2:-2] & pairs[4:]
    last = -1
    for start in np.flatnonzero(starts):
        if start < last:
            continue
        stop = int(start)
        while stop < len(pairs) and pairs[stop]:
            stop += 2
        last = stop
        for end in (stop, stop + 1):
            yield int(start), data[int(start) : end : 2].decode("latin-1").encode()
