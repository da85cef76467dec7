"""Bytes of a local file or a remote object (fsspec), read at an offset from any thread."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import threading
import weakref
from pathlib import PurePosixPath
from typing import Any, Protocol

__all__ = [
    "ByteSource",
    "SourceReader",
    "file_name",
    "is_remote",
    "open_source",
    "remote_errors",
    "sampled_digest",
]

_WINDOW = 64 << 10
_WINDOWS = 5


class ByteSource(Protocol):
    """A file of known size that any number of threads may read at once."""

    @property
    def size(self) -> int: ...

    def pread(self, offset: int, count: int) -> bytes:
        """At most ``count`` bytes from ``offset``; shorter only at the end of the file. Raises OSError."""


def is_remote(path: str) -> bool:
    """Whether the path is a URL that fsspec opens (``https://``, ``s3://``, ``memory://``)."""
    return "://" in path


def file_name(path: str) -> str:
    """Last component of a path or URL, without query."""
    if is_remote(path):
        return PurePosixPath(path.split("?", 1)[0].rstrip("/")).name
    return os.path.basename(path.rstrip("/" + os.sep))


def open_source(path: str) -> ByteSource:
    """Open a local path or a URL for positioned reads. Raises OSError (or ``remote_errors()``)."""
    return _RemoteSource(path) if is_remote(path) else _LocalSource(path)


def remote_errors() -> tuple[type[BaseException], ...]:
    """Error types of the remote clients in use that derive from Exception alone."""
    names = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"),
             ("botocore.exceptions", "ClientError"))  # fmt: skip
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if isinstance(kind, type))


def sampled_digest(source: ByteSource) -> str:
    """SHA-256 of the size and of five evenly spaced 64 KiB windows, the head and the tail among them.

    Small files are hashed whole. Hashing a whole slide would cost minutes on a network drive; a slide is
    never edited in place, so head, tail and samples tell two apart.
    """
    digest = hashlib.sha256(f"{source.size}\n".encode())
    last = max(source.size - _WINDOW, 0)
    for offset in sorted({last * index // (_WINDOWS - 1) for index in range(_WINDOWS)}):
        digest.update(source.pread(offset, _WINDOW))
    if 0 < source.size <= _WINDOW * _WINDOWS:
        digest.update(source.pread(0, source.size))
    return digest.hexdigest()


class _LocalSource:
    """The descriptor closes when the last reader lets go, so that ``Slide.close`` cannot pull it away from a
    thread that is reading: a reused descriptor number would return another file's bytes."""

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(path, flags)
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size

    def pread(self, offset: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            parts = []
            while count > 0 and (part := os.pread(self._fd, min(count, 1 << 30), offset)):
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        with self._lock:  # Windows
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, count)


class _RemoteSource:
    def __init__(self, url: str) -> None:
        import fsspec

        self._lock = threading.Lock()
        self._file: Any = fsspec.open(url, mode="rb", block_size=1 << 20).open()
        if self._file.size is None:
            raise OSError("the server does not state the file's size or refuses ranges")
        self.size = int(self._file.size)

    def pread(self, offset: int, count: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return bytes(self._file.read(count))


class SourceReader(io.RawIOBase):
    """File object over a ByteSource, for libraries that parse a structure through ``read`` and ``seek``."""

    def __init__(self, source: ByteSource) -> None:
        self._source: ByteSource | None = source
        self._size = source.size
        self._position = 0

    def release(self) -> None:
        """Forget the source: a parser that keeps its file in a reference cycle would keep it open."""
        self._source = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._source is None:
            raise ValueError("the file object was released")
        data = self._source.pread(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
