"""Safetensors files: read tensor by tensor, written tensor by tensor.

Format: 8 bytes length (little-endian), that many bytes of JSON (name -> dtype, shape, data_offsets; and the
texts of ``__metadata__``), then the tensors one after the other (https://github.com/huggingface/safetensors).

Why it is written here and not by that library: only one tensor at a time is touched, where some versions of
it hold a second copy of the model. torch is imported on use, so that a header is read without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from wsi_pipeline.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Header", "Stored", "StoredTensors", "Take", "read_header", "stored_once", "write_file"]

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library reads no longer header either."""

ALIGNMENT = 64
SPARE = 64 * 2**20
"""Bytes that must stay free on the disk."""

Shape: TypeAlias = tuple[int, ...]
Take: TypeAlias = Callable[[str], "Tensor"]


class Header(NamedTuple):
    """The head of a file: shapes of its tensors, its metadata, and the size of the whole file in bytes."""

    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    size_bytes: int


class Stored(NamedTuple):
    """A tensor in a file: name of its dtype there, shape, bytes in all and bytes of one value."""

    dtype: str
    shape: Shape
    nbytes: int
    width: int


class StoredTensors(Mapping[str, "Tensor"]):
    """Tensors of files by name, mapped from the files when they are asked for.

    ``places``: name -> (file, name in that file). Raises CheckpointError where a file cannot be opened.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self.places = places
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path, key = self.places[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {key} cannot be read ({error}); copy the file again") from error

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_header(path: Path, remedy: str) -> Header:
    """The head of any safetensors file; nothing else is read.

    Raises CheckpointError, ending with ``remedy``, for a file that is missing, of another kind or truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            looks_right = start[8:] == b"{" and length <= MAX_HEADER
            text = start[8:] + file.read(length - 1) if looks_right else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if not looks_right:
        # PK opens torch's zip archives, 0x80 a pickle.
        pickled = start[:2] == b"PK" or start[:1] == b"\x80"
        kind = "a pickled checkpoint" if pickled else "another kind of file"
        raise CheckpointError(f"{path}: is no safetensors file but {kind}; {remedy}")
    if len(text) < length:
        raise CheckpointError(f"{path}: is truncated within its header ({size} bytes); {remedy}")
    try:
        table = json.loads(text)
        metadata = dict(table.pop("__metadata__", {}))
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in table.items()}
        end = max((int(entry["data_offsets"][1]) for entry in table.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r}); {remedy}") from error
    expected = 8 + length + end
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{path}: is {state} ({size} bytes, {expected} expected); {remedy}")
    return Header(shapes, metadata, size)


def stored_once(names: Iterable[str], take: Take) -> tuple[dict[str, Stored], dict[str, str]]:
    """What has to be written, in the order of the file, and name -> written name of equal content.

    Raises CheckpointError for a tensor that is not of floating-point type.
    """
    import torch

    dtypes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    entries: dict[str, Stored] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[str, Shape, bytes], str] = {}
    for name in names:
        tensor = take(name)
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{name}: is {tensor.dtype}, weights are floating-point; import them again")
        content = _bytes(tensor)
        dtype, shape = dtypes[tensor.dtype], tuple(tensor.shape)
        same = first.setdefault((dtype, shape, hashlib.sha256(content).digest()), name)
        if same != name:
            aliases[name] = same
        else:
            entries[name] = Stored(dtype, shape, content.nbytes, tensor.element_size())
    # Wide types first: every tensor then starts at a multiple of its own width.
    return dict(sorted(entries.items(), key=lambda item: -item[1].width)), aliases


def write_file(path: Path, entries: Mapping[str, Stored], take: Take, metadata: Mapping[str, str]) -> None:
    """Write a file under a temporary name, flush it to the disk and put it in its place.

    Raises ConfigError where the disk is too full, CheckpointError where it cannot be written.
    """
    header = _header_bytes(entries, metadata)
    needed = len(header) + sum(entry.nbytes for entry in entries.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed + SPARE:
        raise ConfigError(
            f"{path}: needs {needed / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB free; "
            "free space, or choose another folder"
        )
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for name in entries:
                file.write(_bytes(take(name)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _header_bytes(entries: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces."""
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, entry in entries.items():
        span = [offset, offset + entry.nbytes]
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
