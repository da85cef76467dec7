"""The parts of PNG and JPEG files, and which of them an output of ours may have.

Sources: PNG specification 3rd edition, chapter 5; ITU-T T.81, annex B.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["foreign_parts", "jpeg_segments", "png_chunks"]

_PNG_OURS = frozenset({"IHDR", "PLTE", "IDAT", "IEND", "tRNS"})
_JPEG_OURS = frozenset({"APP0", "APP14", "DQT", "DHT", "SOF", "SOS", "DRI"})
_JPEG_NAMES = {0xFE: "COM", 0xDB: "DQT", 0xC4: "DHT", 0xDA: "SOS", 0xDD: "DRI"}


def png_chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(type, body) of each chunk; what follows the end comes as ``("after IEND", rest)``."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8].decode("latin-1")
        yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length
        if kind == "IEND":
            break
    if position < len(data):
        yield "after IEND", data[position:]


def jpeg_segments(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, body) of each marker segment; what follows the end of the picture as ``("after EOI", rest)``."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        (length,) = struct.unpack_from(">H", data, position + 2)
        yield _jpeg_name(marker), data[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xDA:
            position = _next_marker(data, position)
            if data[position : position + 2] == b"\xff\xd9":
                position += 2
                break
    if position < len(data):
        yield "after EOI", data[position:]


def foreign_parts(data: bytes) -> Iterator[str]:
    """Names of the parts that no picture of ours has: texts, EXIF, previews, bytes after the end."""
    if data.startswith(b"\x89PNG"):
        yield from (f"a {kind} chunk" for kind, _ in png_chunks(data) if kind not in _PNG_OURS)
    elif data.startswith(b"\xff\xd8"):
        yield from (f"a {name} segment" for name, _ in jpeg_segments(data) if name not in _JPEG_OURS)
    else:
        yield "no picture"


def _jpeg_name(marker: int) -> str:
    if 0xE0 <= marker <= 0xEF:
        return f"APP{marker - 0xE0}"
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
        return "SOF"
    return _JPEG_NAMES.get(marker, f"FF{marker:02X}")


def _next_marker(data: bytes, position: int) -> int:
    """Where the coded pixels end: the next FF that is neither stuffed nor a restart marker."""
    while (position := data.find(b"\xff", position)) >= 0:
        if data[position + 1 : position + 2] not in (b"\0", *(bytes((0xD0 + i,)) for i in range(8))):
            return position
        position += 2
    return len(data)
