"""A local Zarr store that looks at a file before it is read: pipes, devices and giants are refused.

Why. zarr reads the file that a key names to its end. A link to ``/dev/zero`` or a sparse file of a terabyte
in a folder that somebody sent takes all memory, and a named pipe waits for ever.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.storage import LocalStore

__all__ = ["CheckedStore", "read_small", "regular_size"]

MAX_CHUNK_FILE = (1 << 30) + (64 << 20)
"""A chunk decodes to a gigabyte at most; what does not compress is a little larger than that."""
MAX_DOCUMENT = 32 << 20
_DOCUMENTS = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class CheckedStore(LocalStore):  # type: ignore[misc]
    """``LocalStore`` for reading; ``get`` raises OSError for what is no regular file of a sane size."""

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        """Bytes of a file, or of a range of it; None where there is no file."""
        size = regular_size(self.root / key)
        limit = MAX_DOCUMENT if key.rsplit("/", 1)[-1] in _DOCUMENTS else MAX_CHUNK_FILE
        if isinstance(byte_range, RangeByteRequest):
            size = min(size, byte_range.end - byte_range.start)
            if size < 0:
                raise OSError(f"{key}: a range that ends before it starts")
        elif isinstance(byte_range, SuffixByteRequest):
            size = min(size, byte_range.suffix)
        if size > limit:
            raise OSError(f"{key}: {size} bytes, more than a part of a slide has")
        return await super().get(key, prototype, byte_range)


def regular_size(path: Path | str) -> int:
    """Bytes of a regular file, 0 where there is none; raises OSError for pipes, devices and the like."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(f"{os.path.basename(path)}: is no regular file")
    return found.st_size


def read_small(path: Path) -> bytes:
    """The bytes of a document; raises OSError for what is no regular file or over ``MAX_DOCUMENT``."""
    if regular_size(path) > MAX_DOCUMENT:
        raise OSError(f"{path.name}: larger than a document is")
    return path.read_bytes()
