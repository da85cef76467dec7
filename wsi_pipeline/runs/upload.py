"""Finished outputs to any file system that fsspec knows: S3 and other object stores, or a server.

An object store has no rename, so an OME-Zarr becomes visible by its root metadata: all other files go first,
and until those of the root are there no reader opens it. What a killed upload left is told by a note beside
the files, ``NAME/.publishing``, with the fingerprint; the next attempt keeps the files that are equal.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError
from wsi_pipeline.readers._source import remote_errors
from wsi_pipeline.writers.manifest import MANIFEST

__all__ = ["Upload", "local_path"]

ROOT = ("zarr.json", ".zgroup", ".zattrs")
"""Metadata of the root group, in the order in which it is written."""
NOTE = ".publishing"
ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"})
"""Stores where an object is there whole or not at all."""
WIDTH = 8

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
             "sftp": "paramiko", "ssh": "paramiko"}  # fmt: skip

_SYSTEM: tuple[type[BaseException], ...] = (OSError,)

Beat = Callable[[], None]


def local_path(url: str) -> str | None:
    """The path of a ``file://`` URL; None for any other."""
    if not url.startswith(("file://", "local://")):
        return None
    from fsspec.core import url_to_fs

    return str(url_to_fs(url)[1])


class Upload:
    """A place for outputs that is a URL. Raises ConfigError where no package serves its kind."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self._url = re.sub(r"//[^/@]*@", "//", url.rstrip("/"))
        kind = url.split("://", 1)[0]
        try:
            with self._reached():
                self._fs, root = url_to_fs(url)
        except ImportError as error:
            package = _PACKAGES.get(kind)
            remedy = f"pip install {package}" if package else f"install what {kind}:// needs"
            raise ConfigError(f"{self._url}: {' '.join(str(error).split())}; {remedy}") from error
        except ValueError as error:
            raise ConfigError(f"{self._url}: {' '.join(str(error).split())}; check the address") from error
        self._root = str(root).rstrip("/")
        self._atomic = kind in ATOMIC

    def found(self, name: str) -> str | None:
        """Fingerprint of the finished output of that name, "" of what is none of ours, None for nothing."""
        key = self._key(name)
        with self._reached(name):
            self._fs.invalidate_cache()
            if _is_store(name):
                if not any(self._info(f"{key}/{part}") for part in ("zarr.json", ".zattrs")):
                    return None
                return str(self._document(f"{key}/{MANIFEST}").get("fingerprint", ""))
            info = self._info(key)
            if info is None:
                return None
            document = self._document(f"{key}.{MANIFEST}")
            same = document.get("tiff", {}).get("bytes") == info["size"]
            return str(document.get("fingerprint", "")) if same else ""

    def put(self, files: Mapping[Path, str], expected: str, *, overwrite: bool, beat: Beat) -> None:
        """Upload files and stores, in this order; see ``publish``."""
        there = {}
        for path, name in files.items():
            if _is_output(name):
                there[name] = self._checked(path, name, expected, overwrite)
        for path, name in files.items():
            with self._reached(name):
                if there.get(name):
                    self._tidy(self._key(name))
                    continue
                if _is_store(name):
                    self._put_store(path, name, expected, beat)
                elif os.path.lexists(path):
                    self._send_all({path: self._key(name)}, beat)
                elif self._info(self._key(name)) is None:
                    raise FileNotFoundError(errno.ENOENT, "the finished file is gone", str(path))

    def _checked(self, path: Path, name: str, expected: str, overwrite: bool) -> bool:
        """Whether the output is there already; raises where another one must not be replaced."""
        found, gone = self.found(name), not os.path.lexists(path)
        if gone and not (found and found == (expected or found)):
            raise OutputError(
                f"{self._url}/{name}: is gone before it was published; convert the slide again", path=path
            )
        if gone or (found and found == expected and not overwrite):
            return True
        if found == "":
            raise OutputExistsError(
                f"{self._url}/{name}: is no output of this program; move it away", path=f"{self._url}/{name}"
            )
        if found and not overwrite:
            raise OutputExistsError(
                f"{self._url}/{name}: another output stands there; move it away, or use --overwrite",
                path=f"{self._url}/{name}",
            )
        return False

    def _put_store(self, store: Path, name: str, expected: str, beat: Beat) -> None:
        key = self._key(name)
        files = {p.relative_to(store).as_posix(): p for p in sorted(store.rglob("*")) if p.is_file()}
        self._fs.invalidate_cache()
        there = {str(k)[len(key) + 1 :]: info for k, info in self._fs.find(key, detail=True).items()}
        before = self._document(f"{key}/{NOTE}") or self._document(f"{key}/{MANIFEST}")
        if there and "fingerprint" not in before:
            raise OutputExistsError(
                f"{self._url}/{name}: holds files that this program did not make; move them away",
                path=f"{self._url}/{name}",
            )
        _still_there(store)
        for part in reversed(ROOT):
            if part in there:
                self._fs.rm_file(f"{key}/{part}")
        self._pipe(f"{key}/{NOTE}", json.dumps({"fingerprint": expected}).encode())
        same_plan = bool(expected) and before.get("fingerprint") == expected
        kept = {n for n, p in files.items() if n in there and same_plan and _is_same(there[n], p)} - set(ROOT)
        self._send_all({p: f"{key}/{n}" for n, p in files.items() if n not in kept and n not in ROOT}, beat)
        for part in there.keys() - files.keys() - {NOTE, *ROOT}:
            with suppress(FileNotFoundError):  # a half-sent file of before, which has its name by now
                self._fs.rm_file(f"{key}/{part}")
        _still_there(store)
        for part in ROOT:
            if part in files:
                self._send_all({files[part]: f"{key}/{part}"}, beat)
        self._fs.rm_file(f"{key}/{NOTE}")

    def _tidy(self, key: str) -> None:
        """Remove what an upload left that was killed after its last file; the note goes last."""
        if self._info(f"{key}/{NOTE}") is not None:
            for part in (*(f".{root}{NOTE}" for root in ROOT), NOTE):
                with suppress(FileNotFoundError):
                    self._fs.rm_file(f"{key}/{part}")

    def _send_all(self, pairs: Mapping[Path, str], beat: Beat) -> None:
        """Upload several files at once; ``beat`` only while something moves, so that a hang shows."""
        from fsspec.callbacks import Callback

        moved = 0

        def count(size: int | None, value: int, **_: object) -> None:
            nonlocal moved
            moved += 1

        with ThreadPoolExecutor(WIDTH, "upload") as pool:
            pending = {
                pool.submit(self._send, path, key, Callback(hooks={"moved": count}))
                for path, key in pairs.items()
            }
            try:
                while pending:
                    before = moved
                    done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    if done or moved != before:
                        beat()
            finally:
                pool.shutdown(cancel_futures=True)

    def _send(self, path: Path, key: str, callback: Any) -> None:
        if self._atomic:
            self._fs.put_file(str(path), key, callback=callback)
            return
        folder, _, name = key.rpartition("/")
        fresh = f"{folder}/.{name}{NOTE}"
        self._fs.makedirs(folder, exist_ok=True)
        self._fs.put_file(str(path), fresh, callback=callback)
        self._fs.mv(fresh, key)

    def _pipe(self, key: str, data: bytes) -> None:
        if not self._atomic:
            self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(key, data)

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _info(self, key: str) -> Mapping[str, Any] | None:
        try:
            info: Mapping[str, Any] = self._fs.info(key)
        except FileNotFoundError:
            return None
        return info if info.get("type") == "file" else None

    def _document(self, key: str) -> dict[str, Any]:
        document = None
        with suppress(FileNotFoundError, ValueError, RecursionError):
            document = json.loads(self._fs.cat_file(key))
        return document if isinstance(document, dict) else {}

    @contextmanager
    def _reached(self, name: str = "") -> Iterator[None]:
        """Errors of the client become one OutputError that names the URL."""
        url = f"{self._url}/{name}" if name else self._url
        try:
            yield
        except (*_SYSTEM, *remote_errors()) as error:
            told = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
            raise OutputError(
                f"{url}: cannot be reached or written ({told[:200]}); check address, credentials and "
                "network, then run the same command again",
                path=url,
            ) from error


def _still_there(store: Path) -> None:
    """What was listed is all of it: another attempt that is done renames the folder before it empties it."""
    if not store.exists():
        raise FileNotFoundError(errno.ENOENT, "it went away while it was sent", str(store))


def _is_store(name: str) -> bool:
    return name.lower().endswith(".zarr")


def _is_output(name: str) -> bool:
    return _is_store(name) or name.lower().endswith((".ome.tif", ".ome.tiff"))


def _is_same(info: Mapping[str, Any], path: Path) -> bool:
    """Whether an object surely has a file's bytes: the store states its MD5, and it is equal."""
    if info.get("size") != path.stat().st_size:
        return False
    etag = str(info.get("ETag", "")).strip('"')
    stated = info.get("md5Hash")
    if not re.fullmatch("[0-9a-f]{32}", etag) and not stated:
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return etag == digest.hexdigest() or stated == base64.b64encode(digest.digest()).decode()
