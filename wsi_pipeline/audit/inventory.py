"""Which files an output may consist of, and whether each has only the parts that we write.

A name that is on no list here is a finding: about what we do not know nothing is proven.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsi_pipeline.audit.containers import foreign_parts
from wsi_pipeline.core.geometry import ceil_div
from wsi_pipeline.errors import IncompleteOutputError, OutputError
from wsi_pipeline.writers.manifest import read_manifest

__all__ = ["OutputFile", "Store", "output_files", "picture_faults", "store_faults"]

OutputFile = tuple[Path, str]
"""A file and its name inside the output, ``/`` between folders."""
Store = tuple[Path, str]

_SIDECARS = (".qc.png", ".overlay.png", ".manifest.json")
_IN_STORE = re.compile(
    r"(zarr\.json|\.zgroup|\.zattrs|manifest\.json|profile\.icc"
    r"|ledger/(ledger\.jsonl|files\.json|band-[\w.-]+\.jsonl)"
    r"|labels/(zarr\.json|\.zgroup|\.zattrs)"
    r"|labels/(tissue|disagreement)/(zarr\.json|\.zgroup|\.zattrs)"
    r"|(labels/(tissue|disagreement)/)?\d+/(zarr\.json|\.zarray|\.zattrs)"
    r"|\d+/(c/)?0/\d+/\d+|labels/(tissue|disagreement)/\d+/(c/)?\d+/\d+)"
)
_IN_FOLDER = re.compile(
    r"(report\.html|summary\.csv|run\.json|\.wsi_run/(lease|lock)|\.wsi_run/(slides|beats)/[^/]+\.json"
    r"|\.wsi_run/pictures/[^/]+\.(before|after)\.jpg"
    r"|(.*/)?[^/]+\.ome\.(zarr|tiff?)\.(qc|overlay)\.png|(.*/)?[^/]+\.ome\.tiff?(\.manifest\.json)?)"
)
_CHUNK = re.compile(r"(?P<array>(labels/\w+/)?\d+)/(c/)?(0/)?(?P<row>\d+)/(?P<col>\d+)")
_STORE_NAME = re.compile(r"\.zarr(\.partial)?$")


def output_files(out: Path) -> tuple[list[OutputFile], list[Store], list[tuple[str, str]]]:
    """Files, stores inside, and (where, what is wrong with the name) of an output.

    ``out``: a store or TIFF, with the sidecars beside it, or a folder with all below it. Links are not
    followed. Raises OutputError where there is nothing.
    """
    if not out.exists():
        raise OutputError(
            f"{out}: no such output; give an .ome.zarr, an .ome.tif or the folder of a run", path=out
        )
    beside = [out.with_name(out.name + ending) for ending in _SIDECARS]
    files = [(path, path.name) for path in beside if path.is_file()]
    faults: list[tuple[str, str]] = []
    stores: list[Store] = []
    if out.is_file():
        return [(out, out.name), *files], stores, faults
    top = out.name + "/" if _STORE_NAME.search(out.name) else ""
    if top:
        stores.append((out, out.name))
    for folder, folders, names in os.walk(out):
        folders.sort()
        relative = os.path.relpath(folder, out)
        prefix = top + ("" if relative == "." else relative.replace(os.sep, "/") + "/")
        for name in (*sorted(names), *folders):
            path = Path(folder, name)
            if path.is_symlink():
                faults.append((prefix + name, "a link, which no output has"))
            elif path.is_dir() and _STORE_NAME.search(name):
                stores.append((path, prefix + name))
            elif path.is_file():
                files.append((path, prefix + name))
                if not _is_known(prefix + name):
                    faults.append((prefix + name, "a file that no output of this program has"))
    return files, stores, faults


def _is_known(name: str) -> bool:
    parts = name.split("/")
    for depth in range(len(parts) - 1, 0, -1):
        if _STORE_NAME.search(parts[depth - 1]):
            return bool(_IN_STORE.fullmatch("/".join(parts[depth:])))
    plain = re.sub(r"^\.wsi_run/work/[^/]+/", "", name)
    return bool(_IN_FOLDER.fullmatch(plain))


def picture_faults(path: Path) -> list[str]:
    """Parts of a PNG or JPEG that none of ours has."""
    return [f"{part}, which no picture of this program has" for part in foreign_parts(path.read_bytes())]


def store_faults(store: Path) -> Iterator[tuple[str, str]]:
    """(part, what is wrong): arrays that are no level or label, chunks outside their array, unused bytes."""
    levels = _level_names(store)
    known = {
        *levels,
        *(f"labels/{label}/{level}" for label in ("tissue", "disagreement") for level in levels),
    }
    arrays: dict[str, tuple[int, int] | None] = {}
    for path in sorted(store.rglob("*")):
        relative = path.relative_to(store).as_posix()
        match = _CHUNK.fullmatch(relative)
        if not match or not path.is_file():
            continue
        name = match["array"]
        if name not in arrays:
            arrays[name] = _grid(store / name)
            if name not in known:
                yield name, "an array that is no level of the image and none of its labels"
        grid = arrays[name]
        if grid is None or int(match["row"]) >= grid[0] or int(match["col"]) >= grid[1]:
            yield relative, "a chunk outside its array"
        elif (spare := _unused_bytes(path, store / name)) != 0:
            yield relative, f"{spare} bytes that are no part of a chunk"


def _level_names(store: Path) -> list[str]:
    attributes = _read(store / "zarr.json").get("attributes", {}) or _read(store / ".zattrs")
    try:
        ome = attributes.get("ome", attributes)
        return [str(dataset["path"]) for dataset in ome["multiscales"][0]["datasets"]]
    except (KeyError, IndexError, TypeError, AttributeError):
        return []


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except IncompleteOutputError:
        return {}


def _grid(array: Path) -> tuple[int, int] | None:
    """Rows and columns of chunks."""
    v3, v2 = _read(array / "zarr.json"), _read(array / ".zarray")
    try:
        chunks = v3["chunk_grid"]["configuration"]["chunk_shape"] if v3 else v2["chunks"]
        shape = (v3 or v2)["shape"]
        return ceil_div(shape[-2], chunks[-2]), ceil_div(shape[-1], chunks[-1])
    except (KeyError, TypeError, IndexError, ZeroDivisionError):
        return None


def _unused_bytes(path: Path, array: Path) -> int:
    """Bytes of a chunk file that its shard index, or the header of its blosc chunk, does not account for."""
    size = path.stat().st_size
    v3 = _read(array / "zarr.json")
    codec = v3["codecs"][0] if v3 else {}
    with path.open("rb") as file:
        if codec.get("name") != "sharding_indexed":
            head = file.read(16)
            return size - (int.from_bytes(head[12:16], "little") if len(head) == 16 else 0)
        shard = v3["chunk_grid"]["configuration"]["chunk_shape"]
        inner = codec["configuration"]["chunk_shape"]
        count = 1
        for whole, part in zip(shard, inner, strict=True):
            count *= whole // part
        index_size = 16 * count + 4
        file.seek(max(size - index_size, 0))
        index = file.read(16 * count)
    if len(index) != 16 * count:
        return size
    entries = struct.iter_unpack("<QQ", index)
    return int(size - index_size - sum(length for offset, length in entries if offset != 2**64 - 1))
