"""Searches pieces of bytes for texts and coded runs, and decides which hits count.

Random bytes hold every short text somewhere. So in what is no text (pixels, coded tiles) a text of fewer than
8 bytes counts only inside a run of at least 24 printable bytes: a word of 5 letters alone stands once in some
10^10 random bytes, in such a run less than once in 10^17. Longer texts count wherever they stand.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from wsi_pipeline.audit.payloads import EDGE, Piece
from wsi_pipeline.audit.result import Finding, masked
from wsi_pipeline.audit.search import Hit, Searcher, wide_texts
from wsi_pipeline.audit.secrets import Secret

__all__ = ["BytesSearch"]

_SURE = 8
_PRINTABLE_RUN = 24
_LETTERS = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") | frozenset(
    range(0x80, 0x100)
)


class BytesSearch:
    """Searches for ``secrets``, ``named`` (kept on purpose) and coded ``runs`` (picture, bytes) at once.

    ``named_found`` counts places of texts of the file name.
    """

    def __init__(
        self, secrets: Sequence[Secret], named: Sequence[Secret], runs: Sequence[tuple[str, bytes]]
    ) -> None:
        self._of: list[Secret | str] = []
        self._named = frozenset(named)
        self.named_found: set[tuple[str, str]] = set()
        patterns: list[bytes] = []
        for secret in (*secrets, *named):
            for pattern in _spellings(secret.text):
                self._of.append(secret)
                patterns.append(pattern)
        for name, run in runs:
            self._of.append(name)
            patterns.append(run)
        self._searcher = Searcher(patterns)
        self.overlap = self._searcher.longest

    def findings(self, pieces: Iterable[Piece]) -> Iterator[Finding]:
        """Findings in pieces of one file, each text once a place."""
        seen: set[tuple[str, object]] = set()
        for piece in pieces:
            for owner in self._owners(piece):
                if (piece.where, owner) in seen:
                    continue
                seen.add((piece.where, owner))
                if isinstance(owner, str):
                    yield Finding(
                        kind="picture", where=piece.where, what=f"coded bytes of the slide's {owner}"
                    )
                elif owner in self._named:
                    self.named_found.add((piece.where, owner.text))
                else:
                    what = f"a text of the slide, {masked(owner.text)}, from {_field(owner)}"
                    yield Finding(kind="text", where=piece.where, what=what)

    def _owners(self, piece: Piece) -> Iterator[Secret | str]:
        for hit in self._searcher.find(piece.data):
            if (piece.first or hit.start >= EDGE) and self._counts(piece.data, hit, piece.text):
                yield self._of[hit.pattern]
        for _, text in wide_texts(piece.data):
            for hit in self._searcher.find(text):
                if self._counts(text, hit, True):
                    yield self._of[hit.pattern]

    def _counts(self, data: bytes, hit: Hit, text: bool) -> bool:
        owner = self._of[hit.pattern]
        if isinstance(owner, str):
            return True
        sure = hit.stop - hit.start >= _SURE
        if owner.whole_word and (text or not sure):
            before, after = data[max(hit.start - 1, 0) : hit.start], data[hit.stop : hit.stop + 1]
            if (before and before[0] in _LETTERS) or (after and after[0] in _LETTERS):
                return False
        return text or sure or _printable_around(data, hit) >= _PRINTABLE_RUN


def _spellings(text: str) -> set[bytes]:
    """The bytes that stand for a text; UTF-16 of Latin-1 is found by ``wide_texts``."""
    found = set()
    for form in ("NFC", "NFD"):
        for spelled in (text, text.lower(), text.upper()):
            normal = unicodedata.normalize(form, spelled)
            encodings = ["utf-8", "latin-1", "cp1252"]
            if any(ord(character) > 0xFF for character in normal):
                encodings += ["utf-16-le", "utf-16-be"]
            for encoding in encodings:
                try:
                    found.add(normal.encode(encoding))
                except UnicodeEncodeError:
                    continue
    return {one for one in found if len(one) >= 4}


def _printable_around(data: bytes, hit: Hit) -> int:
    start, stop = hit.start, hit.stop
    while start > 0 and hit.start - start < _PRINTABLE_RUN and 0x20 <= data[start - 1] < 0x7F:
        start -= 1
    while stop < len(data) and stop - hit.stop < _PRINTABLE_RUN and 0x20 <= data[stop] < 0x7F:
        stop += 1
    return stop - start


def _field(secret: Secret) -> str:
    """The name of a field, unless it reads like a text itself."""
    plain = all(c.isalnum() or c in " ._-[]/" for c in secret.field)
    return secret.field if plain and len(secret.field) <= 80 else "a field of the vendor's"
