"""A finished output gets its final name, in a folder or an object store.

Nothing half-done is ever visible under a final name. In a folder one rename does it; from another file system
the bytes are first copied beside the place. An old output waits as ``NAME.old`` until the new one stands, so
a crash leaves one of the two, and the next call tidies up. Uploads are the affair of ``upload``.

Several attempts at one slide may publish, for a worker that counts as dead may still be alive. They made the
same bytes from the same files, so who comes late finds the output there, or its own files gone, and is done.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from wsi_pipeline.errors import IncompleteOutputError, OutputError, OutputExistsError
from wsi_pipeline.pipeline.outputs import check_target, mapped, sidecar
from wsi_pipeline.readers._source import is_remote
from wsi_pipeline.runs.upload import Upload, local_path
from wsi_pipeline.writers.manifest import MANIFEST, read_manifest, sync_folder

__all__ = ["exists_with", "is_url", "publish"]

_PIECE = 8 << 20
_BEAT_BYTES = 64 << 20
_NEW = ".publishing"
_FOREIGN_SECONDS = 86400.0

Beat = Callable[[], None]


def is_url(target: str) -> bool:
    """Whether outputs go to a URL that fsspec opens, and not to a folder."""
    return is_remote(target)


def exists_with(target: str, name: str, fingerprint: str) -> bool | None:
    """Whether the finished output ``name`` of this fingerprint is there; False: another one, None: nothing.

    Compares what the manifest says, and a TIFF's size, and reads no pixels. Raises OutputError where the
    target cannot be read.
    """
    folder = _folder(target)
    found = Upload(target).found(_safe(name)) if folder is None else _found(folder / _safe(name))
    return None if found is None else found == fingerprint


def publish(
    files: Mapping[Path, str], target: str, *, overwrite: bool, beat: Beat, fingerprint: str = ""
) -> None:
    """Move finished files and OME-Zarr folders to their names relative to ``target``, a folder or URL.

    The output itself comes last; its manifest and pictures before it. An output of the same fingerprint that
    is there already is success, another one raises OutputExistsError unless ``overwrite``, which leaves alone
    what this program did not make. Files that are gone were published by another attempt if their names
    exist; ``fingerprint``, where it is given, has to agree. ``beat`` is called every second or 64 MiB and
    may raise.

    Raises OutputError where the target cannot be written, ConfigError where a package for the URL is missing.
    """
    folder = _folder(target)
    expected = fingerprint or _expected(files)
    if folder is None:
        Upload(target).put(_in_order(files), expected, overwrite=overwrite, beat=beat)
        for path in files:
            _discard(path)
        return
    ordered = _in_order(files)
    for path, name in ordered.items():
        if _is_output(name):
            with mapped(folder / name):
                _tidy(folder / name)
            _check(path, folder / name, expected, overwrite)
    for path, name in ordered.items():
        with mapped(folder / name):
            _place(path, folder / name, expected, overwrite, beat)


def _folder(target: str) -> Path | None:
    """The local folder that a target names, None where it is elsewhere."""
    if not is_remote(target):
        return Path(target)
    local = local_path(target)
    return None if local is None else Path(local)


def _safe(name: str) -> str:
    """The name, if it stays inside the target."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name:
        raise OutputError(f"{name}: leaves the output folder; choose another name", path=name)
    return name


def _in_order(files: Mapping[Path, str]) -> dict[Path, str]:
    return dict(sorted(((p, _safe(n)) for p, n in files.items()), key=lambda item: _is_output(item[1])))


def _is_output(name: str) -> bool:
    return name.lower().endswith((".zarr", ".ome.tif", ".ome.tiff"))


def _expected(files: Mapping[Path, str]) -> str:
    """Fingerprint that the manifest among the files states; "" where there is none (any more)."""
    for path in files:
        manifest = path / MANIFEST if path.is_dir() else path
        if manifest.name.endswith(MANIFEST):
            return str(_manifest(manifest).get("fingerprint", ""))
    return ""


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except IncompleteOutputError:
        return {}


def _found(out: Path) -> str | None:
    """Fingerprint of the output that stands there, "" of what is none of ours, None where nothing does."""
    if out.is_dir() and not out.is_symlink():
        return str(_manifest(out / MANIFEST).get("fingerprint", ""))
    if not os.path.lexists(out):
        return None
    document = _manifest(sidecar(out, f".{MANIFEST}"))
    size = document.get("tiff", {}).get("bytes")  # a crash may have left a new manifest beside an old TIFF
    return str(document.get("fingerprint", "")) if size == out.lstat().st_size else ""


def _check(source: Path, out: Path, expected: str, overwrite: bool) -> None:
    """Before anything moves: may this output take its place?"""
    gone = not os.path.lexists(source)  # first: what is gone by now stands there by then
    found = _found(out)
    if gone:
        if not (found and found == (expected or found)):
            raise OutputError(f"{out}: is gone before it was published; convert the slide again", path=out)
    elif found == "" or (found and overwrite):
        check_target(out, overwrite)
    elif found and found != expected:
        raise OutputExistsError(
            f"{out}: another output stands there; move it away, or use --overwrite", path=out
        )


def _place(source: Path, out: Path, expected: str, overwrite: bool, beat: Beat) -> None:
    """Give one file or folder its name; whatever stood there goes after that."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(source) and os.path.lexists(out):
        return  # another attempt was faster; _check has looked at what it left
    if _is_output(out.name) and not overwrite and expected and _found(out) == expected:
        _discard(source)
        return
    ready = source
    try:
        if _is_apart(source, out.parent):
            ready = _beside(source, out, beat)
        try:
            _swap(ready, out, overwrite)
        except OSError as error:  # layered file systems are one device and yet cannot rename
            if error.errno != errno.EXDEV or ready != source:
                raise
            ready = _beside(source, out, beat)
            _swap(ready, out, overwrite)
    except OSError:
        if not _has_come(source, out, expected):
            raise
    finally:
        if ready != source:
            _remove(ready)
    sync_folder(out.parent)
    _discard(source)


def _swap(ready: Path, out: Path, overwrite: bool) -> None:
    """Only who moved an old output away may remove it: what another attempt moved may be its own, whole."""
    old = sidecar(out, ".old")
    moved = overwrite and out.is_dir() and not out.is_symlink()
    if moved:
        os.replace(out, old)
    try:
        os.replace(ready, out)
    except OSError:
        if moved and not os.path.lexists(out):
            os.replace(old, out)
        raise
    if moved:
        shutil.rmtree(old, ignore_errors=True)


def _has_come(source: Path, out: Path, expected: str) -> bool:
    """Whether another attempt has put the same there since we looked."""
    if not _is_output(out.name):
        return os.path.lexists(out) and not os.path.lexists(source)
    found = _found(out)
    return bool(found) and (found == expected or (not expected and not os.path.lexists(source)))


def _is_apart(source: Path, folder: Path) -> bool:
    return os.stat(source).st_dev != os.stat(folder).st_dev


def _tidy(out: Path) -> None:
    """End what a crash interrupted: the old output comes back where no new one stands."""
    old = sidecar(out, ".old")
    if old.is_dir():
        if os.path.lexists(out):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, out)
    if out.parent.is_dir():
        for left in out.parent.glob(f".{glob.escape(out.name)}.*{_NEW}"):
            if _is_dead(left):
                _remove(left)


def _is_dead(copy: Path) -> bool:
    """Whether the process that made a half copy is gone; of another machine's a day has to have passed."""
    host, _, pid = copy.name.removesuffix(_NEW).rsplit(".", 1)[-1].rpartition("-")[0].rpartition("-")
    if host == _host() and os.path.isdir("/proc"):
        return not os.path.isdir(f"/proc/{pid}")
    with suppress(OSError):
        return time.time() - copy.lstat().st_mtime > _FOREIGN_SECONDS
    return False


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def _beside(source: Path, out: Path, beat: Beat) -> Path:
    """A whole and durable copy of the source beside its place."""
    copy = out.with_name(f".{out.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{_NEW}")
    try:
        if not source.is_dir():
            _copy(source, copy, beat)
            return copy
        begun = os.stat(source)
        for folder, _, names in os.walk(source, onerror=_raise):
            there = copy / os.path.relpath(folder, source)
            there.mkdir()
            for name in names:
                _copy(Path(folder, name), there / name, beat)
            sync_folder(there)
        if not os.path.samestat(begun, os.stat(source)):
            raise FileNotFoundError(errno.ENOENT, "it went away while it was copied", os.fspath(source))
    except BaseException:
        _remove(copy)
        raise
    return copy


def _copy(source: Path, copy: Path, beat: Beat) -> None:
    since = 0
    with source.open("rb") as reader, copy.open("wb") as writer:
        while piece := reader.read(_PIECE):
            writer.write(piece)
            since += len(piece)
            if since >= _BEAT_BYTES:
                since = 0
                beat()
        writer.flush()
        os.fsync(writer.fileno())
    beat()


def _raise(error: OSError) -> None:
    raise error


def _discard(source: Path) -> None:
    """Remove what was published. A folder is renamed first: another attempt that reads it at the same time
    must miss it as a whole, and not take half of it for all."""
    if source.is_dir() and not source.is_symlink():
        doomed = source.with_name(f".{source.name}.{secrets.token_hex(4)}.gone")
        with suppress(FileNotFoundError):
            os.replace(source, doomed)
        source = doomed
    _remove(source)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
