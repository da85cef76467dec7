"""Slides on a slow share are copied to a local disk before they are read, and leave it again.

Any number of processes share one staging folder. Each staging is a folder ``HOST-PID-START-N-BYTES`` whose
name is its reservation; all of them together stay below the quota. Reservations are made under a lock file.

Why a lock for each staging, and not only its process's number: the kernel lets go of a lock when its process
dies, however it dies, also in another container whose process numbers mean nothing here. So whoever comes
next removes exactly what dead processes left.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wsi_pipeline.pipeline.outputs import mapped
from wsi_pipeline.readers._source import file_name, is_remote
from wsi_pipeline.runs.companions import parts_of
from wsi_pipeline.runs.names import shown
from wsi_pipeline.runs.sizes import show_size

__all__ = ["clean_staging", "staged"]

BEAT_BYTES = 64 << 20
SPARE_BYTES = 512 << 20
"""What a copy leaves free on the staging disk, for others."""

_PIECE = 8 << 20
_LOCK = ".lock"
_OWNER = "owner"
_STAGING = re.compile(r"[A-Za-z0-9_.]+-[0-9]+-[0-9]+-[0-9]+-([0-9]+)")
_numbers = itertools.count()

log = logging.getLogger(__name__)


@contextmanager
def staged(path: str, folder: Path | None, quota: int, *, beat: Callable[[], None]) -> Iterator[str]:
    """The path under which a slide is read best: of a copy in ``folder``, or its own.

    All files of the slide go along. It is read where it lies, and the log says why, if there is no folder, if
    it is a URL, exceeds the quota in bytes or the disk, holds links, or cannot be copied. ``beat`` is called
    every 64 MiB and may raise. The copy is removed in any case.
    """
    staging = None if folder is None or is_remote(path) else _copied(path.rstrip(os.sep), folder, quota, beat)
    if staging is None:
        yield path
        return
    try:
        yield os.fspath(staging.slide / file_name(path))
    finally:
        staging.remove()


def clean_staging(folder: Path) -> int:
    """Remove what processes that died left in a staging folder; returns the bytes that they had reserved."""
    if not folder.is_dir():
        return 0
    with mapped(folder), _locked(folder):
        return _clean(folder)


@dataclass(frozen=True, slots=True)
class _Staging:
    root: Path
    owner: IO[str]

    @property
    def slide(self) -> Path:
        return self.root / "slide"

    def remove(self) -> None:
        """The lock goes after the copy: until then nobody else removes the folder."""
        shutil.rmtree(self.slide, ignore_errors=True)
        with suppress(OSError):
            (self.root / _OWNER).unlink(missing_ok=True)
            self.root.rmdir()
        self.owner.close()


def _copied(path: str, folder: Path, quota: int, beat: Callable[[], None]) -> _Staging | None:
    """A finished copy, or None where the slide is to be read in place."""
    name = shown(file_name(path))
    staging = None
    try:
        files = _files(path)
        if files is None:
            log.info("%s: holds links or no plain files; read where it lies", name)
            return None
        staging = _reserve(folder, sum(files.values()), quota, name)
        if staging is None:
            return None
        _copy(files, os.path.dirname(path), staging.slide, beat)
    except OSError as error:
        if staging is not None:
            staging.remove()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the staging disk is full" if full else error.strerror or str(error)
        log.warning("%s: cannot be staged (%s); read where it lies", name, why)
        return None
    except BaseException:  # the run was stopped
        if staging is not None:
            staging.remove()
        raise
    return staging


def _files(path: str) -> dict[str, int] | None:
    """Every file of a slide with its size in bytes; None where a folder of it holds links: a copy without
    what they point to would be another slide."""
    files: dict[str, int] = {}
    pending = [path, *parts_of(path)]
    while pending:
        current = pending.pop()
        if not os.path.isdir(current):
            if not os.path.isfile(current):
                return None
            files[current] = os.path.getsize(current)
            continue
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.is_symlink():
                    return None
                pending.append(entry.path)
    return files


def _reserve(folder: Path, need: int, quota: int, name: str) -> _Staging | None:
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _clean(folder)
        taken = sum(_stagings(folder).values())
        if taken + need > quota:
            log.info(
                "%s: %s do not fit into the staging quota (%s of %s taken); read where it lies",
                name, show_size(need), show_size(taken), show_size(quota),
            )  # fmt: skip
            return None
        if shutil.disk_usage(folder).free < _unwritten(folder) + need + SPARE_BYTES:
            log.warning("%s: no room on the staging disk; read where it lies", name)
            return None
        host = re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())
        root = folder / f"{host}-{os.getpid()}-{_start_of(os.getpid())}-{next(_numbers)}-{need}"
        (root / "slide").mkdir(parents=True)
        owner = (root / _OWNER).open("w", encoding="ascii")
        fcntl.flock(owner, fcntl.LOCK_EX)
        return _Staging(root, owner)


def _copy(files: dict[str, int], base: str, target: Path, beat: Callable[[], None]) -> None:
    """Copy files below ``target`` as they lie below ``base``; OSError where one changes meanwhile."""
    since = 0
    buffer = memoryview(bytearray(_PIECE))
    for path, size in files.items():
        copy = target / os.path.relpath(path, base or os.curdir)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copied = 0
        with open(path, "rb", buffering=0) as source, copy.open("wb", buffering=0) as file:
            while count := source.readinto(buffer):
                piece = buffer[:count]
                while piece:
                    piece = piece[file.write(piece) :]
                copied += count
                since += count
                if copied > size:
                    break
                if since >= BEAT_BYTES:
                    since = 0
                    beat()
        if copied != size:
            raise OSError(f"{shown(os.path.basename(path))} changed while it was copied")


def _stagings(folder: Path) -> dict[Path, int]:
    """All stagings of a folder with what they reserved; the lock is held."""
    return {path: int(match[1]) for path in folder.iterdir() if (match := _STAGING.fullmatch(path.name))}


def _unwritten(folder: Path) -> int:
    """Bytes that are reserved by copies that are not written yet."""
    left = 0
    for path, size in _stagings(folder).items():
        with suppress(OSError):
            left += max(size - sum(p.stat().st_size for p in path.rglob("*") if p.is_file()), 0)
    return left


def _clean(folder: Path) -> int:
    """Remove stagings whose owner is gone; the folder's lock is held."""
    removed = 0
    for path, size in _stagings(folder).items():
        if _is_dead(path):
            shutil.rmtree(path, ignore_errors=True)
            removed += size
    return removed


def _is_dead(staging: Path) -> bool:
    """Whether no process holds its lock. The folder's lock is held, so one without a file to lock is not just
    being made: its process died early, or is about to remove it."""
    try:
        with (staging / _OWNER).open("r+", encoding="ascii") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _start_of(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where it is gone or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
