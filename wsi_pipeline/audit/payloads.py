"""The bytes of an output as they stand, and what they hold once unpacked.

Every file is read raw, in overlapping chunks. Beside that, text is freed of the escapes of JSON, HTML and
URLs; compressed chunks of PNG are inflated; base64 is decoded, and what it holds is unpacked in turn.
"""

from __future__ import annotations

import base64
import binascii
import html
import mmap
import re
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.audit.containers import jpeg_segments, png_chunks

__all__ = ["EDGE", "Piece", "file_pieces", "is_text_file"]

CHUNK = 1 << 20
EDGE = 64
"""Bytes of context before a hit that a chunk keeps from the one before."""
_TEXT_SUFFIXES = (".json", ".jsonl", ".html", ".csv", ".xml", ".txt", ".geojson", ".yaml", ".svg", ".log")
_TEXT_NAMES = (".zattrs", ".zarray", ".zgroup", ".zmetadata", "lease", "lock")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')
_INFLATED = 64 << 20
_DEEPEST = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to search. ``first``: hits count from byte 0, else from ``EDGE``; ``picture``: a whole PNG or
    JPEG that stood inside a text; ``raw``: bytes of the file itself, which count as searched."""

    where: str
    data: bytes
    text: bool
    first: bool = True
    raw: int = 0
    picture: bool = False


def is_text_file(name: str) -> bool:
    base = name.rsplit("/", 1)[-1].lower()
    return base.endswith(_TEXT_SUFFIXES) or base in _TEXT_NAMES


def file_pieces(path: Path, name: str, overlap: int) -> Iterator[Piece]:
    """All pieces of a file; ``overlap``: the longest pattern. Raises OSError."""
    text = is_text_file(name)
    with path.open("rb") as file:
        kept, first = b"", True
        while fresh := file.read(CHUNK):
            data = kept + fresh
            yield Piece(name, data, text, first, len(fresh))
            if text:
                yield from (Piece(name, one, True, first) for one in _unescaped(data))
            kept, first = data[-(overlap + EDGE) :], False
    size = path.stat().st_size
    if not size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        head = whole[:8]
        if text:
            yield from _decoded(name, whole, 0)
        elif head.startswith((b"\x89PNG", b"\xff\xd8")):
            yield from _packed(name, whole[:], 0)


def _unescaped(data: bytes) -> Iterator[bytes]:
    """The text without escapes of JSON, HTML and URLs, after each step that changed it."""
    text = data.decode("utf-8", "replace")
    for step in (_unescape_json, html.unescape, _unescape_json, urllib.parse.unquote):
        before, text = text, step(text)
        if text != before:
            yield text.encode("utf-8", "replace")


def _unescape_json(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        code, short = match.groups()
        return chr(int(code, 16)) if code else {"b": " ", "f": " "}.get(short) or _plain(short)

    if "\\" not in text:
        return text
    replaced = _ESCAPE.sub(character, text)
    return replaced.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _plain(short: str) -> str:
    return {"n": "\n", "r": "\r", "t": "\t"}.get(short, short)


def _decoded(name: str, data: bytes | mmap.mmap, depth: int) -> Iterator[Piece]:
    """What stands in base64 inside a text."""
    for number, match in enumerate(_BASE64.finditer(data)):
        coded = match.group().rstrip(b"=")
        try:
            inner = base64.b64decode(coded + b"=" * (-len(coded) % 4))
        except binascii.Error:
            continue
        yield from _packed(f"{name}, base64 text {number + 1}", inner, depth + 1)


def _packed(where: str, data: bytes, depth: int) -> Iterator[Piece]:
    """A whole file in memory (depth 0: its raw bytes were given out before), and its packed parts."""
    is_picture = data.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff"))
    if depth:
        yield Piece(where, data, text=not is_picture and _is_ascii(data), picture=is_picture)
    if data.startswith(b"\x89PNG"):
        for kind, body in png_chunks(data):
            if kind in ("zTXt", "iTXt", "tEXt", "iCCP"):
                yield Piece(f"{where}, {kind} chunk", body, text=kind != "iCCP")
                yield from (
                    Piece(f"{where}, {kind} chunk", inner, text=kind != "iCCP") for inner in _inflated(body)
                )
    elif data.startswith(b"\xff\xd8"):
        for marker, body in jpeg_segments(data):
            if marker == "COM":
                yield Piece(f"{where}, {marker} segment", body, text=True)
    elif depth and depth < _DEEPEST and _is_ascii(data):
        yield from (Piece(where, one, True) for one in _unescaped(data))
        yield from _decoded(where, data, depth)


def _inflated(body: bytes) -> Iterator[bytes]:
    """zlib streams in a chunk: they follow its keyword and flags, so each possible start is tried."""
    for start in (match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", body[:1024])):
        try:
            yield zlib.decompressobj().decompress(body[start:], _INFLATED)
        except zlib.error:
            continue


def _is_ascii(data: bytes) -> bool:
    return data.isascii() and b"\0" not in data
