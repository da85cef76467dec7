"""Weights files of other programs: reading one safely, and saying in a line how it does not fit.

Why not plain pickle: unpickling runs whatever the file says. Here torch rebuilds tensors and plain containers
and refuses every other name in the file, so that no code of it is ever run.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.layout import Shape

__all__ = ["Part", "check_fit", "few", "read_checkpoint", "read_part"]

# What torch.load raises on bytes that are no checkpoint, or not a whole one.
_UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(AssertionError, MemoryError, OverflowError, struct.error, zipfile.BadZipFile, NotImplementedError),
)
_ZIP = b"PK\x03\x04"
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_ADAPTER = re.compile(r"\.lora_([AB])\.(?:[^.]+\.)?weight$")
_SHOWN = 3


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary that ``torch.save`` wrote; tensors on the CPU, in the file's dtypes, mapped if possible.

    A prefix ``module.`` (data-parallel training) is taken off where every key of a dictionary has it. Raises
    CheckpointError where the file is missing, cut short, something else, or holds code, which is never run.
    """
    path = Path(path)
    try:
        head = _head(path)
        _refuse_lookalikes(path, head)
        loaded = _load(path, zipped=head.startswith(_ZIP))
    except OSError as error:
        reason = (error.strerror or str(error)).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); check the path and the rights") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path}: {_diagnosis(error, path, head)}") from error
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise CheckpointError(f"{path}: holds a {kind} instead of a dictionary; name the generator's file")
    entries = _unwrapped(loaded).items()
    return {str(key): _unwrapped(value) if isinstance(value, dict) else value for key, value in entries}


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the checkpoint file in it")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file; name the checkpoint file itself")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: is empty; download or copy it again")
    return head


def _refuse_lookalikes(path: Path, head: bytes) -> None:
    """Name what failed downloads leave behind."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a git-LFS pointer, not the file; run git lfs pull in its repository"
        )
    if text.startswith(b"<"):
        raise CheckpointError(
            f"{path}: is a web page, not a checkpoint; open its address in a browser and download the file"
        )
    if path.suffix == ".safetensors" or head[8:10] in (b'{"', b"{}"):
        raise CheckpointError(
            f"{path}: is a safetensors file; this reads files that torch.save wrote (.pkl, .pt)"
        )


def _load(path: Path, zipped: bool) -> Any:
    mapped = zipped and _is_mappable(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old pickle protocols and storages are read all the same
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)


def _is_mappable(path: Path) -> bool:
    """Whether records lie in the file as they are; a repacked, compressed file would be read as noise.

    Their checksums are compared here, because torch does not: a damaged weight is no error to it.
    """
    with zipfile.ZipFile(path) as archive:
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
        if stored and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"checksum of {damaged} differs")
    return stored


def _diagnosis(error: BaseException, path: Path, head: bytes) -> str:
    refused = _REFUSED.search(str(error))
    if refused:
        return (
            f"holds code or objects ({refused[1]}), refused, nothing of it was run; "
            "ask its author for a file that holds only tensors, numbers and text"
        )
    if all(byte >= 0x20 or byte in b"\t\n\r" for byte in head) and head.isascii():
        return "is a text file, not a checkpoint, nothing of it was run; download the file itself"
    return (
        f"is cut short, damaged or no PyTorch checkpoint ({path.stat().st_size} bytes), nothing of it was "
        "run; download or copy it again"
    )


def _unwrapped(entries: dict[Any, Any]) -> dict[Any, Any]:
    while entries and all(isinstance(key, str) and key.startswith("module.") for key in entries):
        entries = {key.removeprefix("module."): value for key, value in entries.items()}
    return entries


@dataclass(frozen=True, kw_only=True)
class Part:
    """One dictionary of a foreign file, by canonical names, beside what it has to hold.

    ``entry``: its key in the file; ``found``: name -> value, None where the file has none; ``wanted``: name
    -> shape; ``twice``: keys that name a tensor a second time (two adapters on one layer).
    """

    entry: str
    found: Mapping[str, Any] | None
    wanted: Mapping[str, Shape]
    twice: tuple[str, ...] = ()


def read_part(
    checkpoint: Mapping[str, Any], entry: str, prefix: str, wanted: Mapping[str, Shape], source: str
) -> Part:
    """A dictionary of the file by canonical names: with ``prefix``, without what peft puts into names."""
    entries = checkpoint.get(entry)
    if entries is None:
        return Part(entry=entry, found=None, wanted=wanted)
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{source}: {entry} is not a dictionary of tensors; name the generator's file")
    found: dict[str, Any] = {}
    twice = []
    for key, value in entries.items():
        name = _ADAPTER.sub(r".lora_\1.weight", f"{prefix}{key}".replace(".base_layer.", "."))
        if name in found:
            twice.append(f"{entry} {key}")
        found.setdefault(name, value)
    return Part(entry=entry, found=found, wanted=wanted, twice=tuple(twice))


def check_fit(parts: Sequence[Part], extra: Iterable[str], source: str, base_name: str) -> None:
    """Raise one CheckpointError that names every kind of difference, if there is any.

    ``extra``: tensors of the file outside ``parts``. A tensor that stands in two parts counts once.
    """
    missing: dict[str, None] = {}
    surplus = dict.fromkeys(extra)
    shapes: dict[str, str] = {}
    unusable: dict[str, None] = {}
    other_widths = False
    for part in parts:
        if part.found is None:
            missing[part.entry] = None
            continue
        missing.update(dict.fromkeys(name for name in part.wanted if name not in part.found))
        surplus.update(dict.fromkeys(name for name in part.found if name not in part.wanted))
        surplus.update(dict.fromkeys(part.twice))
        for name in part.wanted.keys() & part.found.keys():
            value, shape = part.found[name], part.wanted[name]
            if not _is_usable(value):
                unusable[name] = None
            elif tuple(value.shape) != shape:
                shapes[name] = f"{name} {_written(value.shape)} instead of {_written(shape)}"
                other_widths |= _without_rank(name, tuple(value.shape)) != _without_rank(name, shape)
    kinds = {
        "missing": list(missing),
        "extra": list(surplus),
        "of another shape": [shapes[name] for name in sorted(shapes)],
        "without floating-point values": sorted(unusable),
    }
    said = [f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names]
    if said:
        remedy = _remedy(other_widths, only_ranks=bool(shapes) and len(said) == 1)
        raise CheckpointError(f"{source}: does not fit base {base_name}: {', '.join(said)}; {remedy}")


def _remedy(other_widths: bool, only_ranks: bool) -> str:
    if other_widths:
        return "the base does not match: import it with the base it was trained on"
    if only_ranks:
        return "its adapters are not of the rank that it states: download or save it again"
    return "import it with the base it was trained on, or download it again"


def _is_usable(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return bool(value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu")


def _without_rank(name: str, shape: Shape) -> Shape:
    """The dimensions that the base decides."""
    if name.endswith(".lora_A.weight"):
        return shape[1:]
    return shape[:1] + shape[2:] if name.endswith(".lora_B.weight") else shape


def _written(shape: Iterable[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def few(names: Sequence[str]) -> str:
    """The first names, on one line whatever they hold."""
    shown = [repr(str(name))[1:-1][:120] for name in names[:_SHOWN]]
    return ", ".join([*shown, "…"] if len(names) > _SHOWN else shown)
