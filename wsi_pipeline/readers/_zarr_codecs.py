"""Blosc that looks at a frame's header before it decodes it.

Why. A Blosc frame states its own length, and numcodecs believes it: of a chunk file that was cut off, by a
full disk or a broken copy, the decoder reads on behind the end of the buffer, and the process dies of a
segmentation fault (seen) or goes on with foreign memory as pixels. The header is 16 bytes; zarr and numcodecs
have public registries in which this codec takes the place of theirs, for the whole process.
"""

from __future__ import annotations

import struct
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import zarr
from zarr.codecs import BloscCodec
from zarr.registry import register_codec

__all__ = ["CheckedBlosc", "CheckedBloscCodec", "check_frame"]

_HEADER = struct.Struct("<4B3I")
_MAX_DECODED = (1 << 30) + (64 << 20)


def check_frame(frame: Any) -> None:
    """Raise ValueError where a Blosc frame is cut off or claims to hold over a gigabyte."""
    view = memoryview(frame).cast("B")
    if len(view) < _HEADER.size:
        raise ValueError(f"a Blosc frame of {len(view)} bytes has no header")
    decoded, _, stored = _HEADER.unpack_from(view)[4:]
    if stored > len(view):
        raise ValueError(f"a Blosc frame of {stored} bytes ends after {len(view)}")
    if decoded > _MAX_DECODED:
        raise ValueError(f"a Blosc frame claims {decoded} bytes")


class CheckedBlosc(numcodecs.Blosc):  # type: ignore[misc]
    """Blosc of Zarr v2."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The decoded bytes; raises ValueError for a frame that is cut off."""
        check_frame(buf)
        return super().decode(buf, out)


class CheckedBloscCodec(BloscCodec):  # type: ignore[misc]
    """Blosc of Zarr v3."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        check_frame(chunk_bytes.as_numpy_array())
        return await super()._decode_single(chunk_bytes, chunk_spec)


numcodecs.register_codec(CheckedBlosc)
register_codec("blosc", CheckedBloscCodec)
zarr.config.set({"codecs.blosc": f"{__name__}.{CheckedBloscCodec.__qualname__}"})
