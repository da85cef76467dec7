"""Where an output goes, and how nothing that matters is ever overwritten, mixed or half visible."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError
from wsi_pipeline.writers.manifest import MANIFEST
from wsi_pipeline.writers.omezarr import LEDGERS

__all__ = ["check_target", "exclusive", "mapped", "open_partial", "output_kind", "sidecar", "swap_in"]


def output_kind(out: Path) -> Literal["zarr", "tiff"]:
    """The format that an output's name asks for; raises ConfigError for any other ending."""
    name = out.name.lower()
    if name.endswith(".zarr"):
        return "zarr"
    if name.endswith((".ome.tif", ".ome.tiff")):
        return "tiff"
    raise ConfigError(f"{out}: an output ends in .ome.zarr or .ome.tif; choose such a name")


def sidecar(out: Path, ending: str) -> Path:
    """A file beside the output, named after all of its name: ``a.ome.zarr`` -> ``a.ome.zarr.qc.png``.

    Why all of it: ``a.ome.zarr`` and ``a.ome.tif`` may lie side by side and must not share files.
    """
    return out.with_name(out.name + ending)


def check_target(out: Path, overwrite: bool, slide: Slide | None = None) -> None:
    """Refuse an output that would destroy anything but an earlier output of this program.

    Raises OutputExistsError; ``overwrite`` allows only what has our manifest, and never the slide itself.
    """
    if not os.path.lexists(out):
        return
    source = getattr(slide, "path", None)
    if source is not None and os.path.realpath(source) == os.path.realpath(out):
        raise OutputExistsError(f"{out}: is the slide itself; choose another name", path=out)
    if not overwrite:
        raise OutputExistsError(f"{out}: exists already; choose another name or use --overwrite", path=out)
    ours = out / MANIFEST if out.is_dir() else sidecar(out, f".{MANIFEST}")
    if out.is_symlink() or not ours.exists() or out.is_dir() != (output_kind(out) == "zarr"):
        raise OutputExistsError(
            f"{out}: is no output of this program, so --overwrite leaves it alone; move it away", path=out
        )


@contextmanager
def exclusive(store: Path, partial: Path, restart: bool) -> Iterator[None]:
    """Keep other processes out of ``partial`` while it is written, and create it.

    The lock lies beside the folder, so that throwing the folder away needs the lock too.
    """
    lock_path = sidecar(store, ".lock")
    with mapped(store):
        lock = _locked(lock_path, partial)
    with lock:
        if restart:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            with open_partial(store):
                yield
        finally:
            lock_path.unlink(missing_ok=True)


@contextmanager
def open_partial(store: Path) -> Iterator[None]:
    """Make the folder in which ``store`` is written; keeps nobody out."""
    partial = sidecar(store, ".partial")
    with mapped(partial):
        (partial / LEDGERS).mkdir(parents=True, exist_ok=True)
    yield


def _locked(path: Path, partial: Path) -> TextIO:
    """An open, locked file that is still the one under ``path``: a finished run removes its lock."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise OutputError(
                f"{partial}: another process is writing it; wait for that process or stop it", path=partial
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def swap_in(partial: Path, store: Path, overwrite: bool) -> None:
    """Make a finished folder visible under its name; an old output goes only after that."""
    old = sidecar(store, ".old")
    with mapped(store):
        if os.path.lexists(store):
            check_target(store, overwrite)
            shutil.rmtree(old, ignore_errors=True)
            os.replace(store, old)
        try:
            os.replace(partial, store)
        except OSError:  # a second attempt was faster
            if old.exists() and not store.exists():
                os.replace(old, store)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    """Errors of the operating system become one OutputError that names ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); check permissions and space, then run "
            "the same command again",
            path=path,
        ) from error
