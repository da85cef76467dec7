"""Damage that knows OME-Zarr: its JSON documents, its chunk files, its links."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ZARR_KINDS"]

_DOCUMENTS = ("zarr.json", ".zattrs", ".zarray", ".zgroup", ".zmetadata")
_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 3, 2**31, 2**32, 2**63, 2**70, 1e300, 0.0, -0.5),
    *(float("nan"), float("inf"), None, True, "", "x", "../../x", "/", "..", "a" * 5000),
    *([], {}, [0], [2**40] * 3, [0, 0, 0], [-1, -1, -1], [3, 2**40, 2**40], "uint16", "<f8", "|O", "zstd"),
)
# Key, and what it becomes; each reaches another piece of code.
_AIMED: tuple[tuple[str, Any], ...] = (
    ("shape", [3, 2**40, 2**40]),
    ("shape", [3, 2**20, 2**20]),
    ("shape", [3, 300_000, 200_000]),
    ("shape", [3, 1, 2**33]),
    ("shape", [3, 2**33, 1]),
    ("shape", [3, 0, 10]),
    ("shape", [3]),
    ("shape", [3, -5, 10]),
    ("shape", [2**62, 2**62, 2**62]),
    ("shape", [1, 3, 1, 100, 100]),
    ("shape", "x"),
    ("chunks", [0, 0, 0]),
    ("chunks", [3, -1, 7]),
    ("chunks", [3, 2**31, 2**31]),
    ("chunks", [1, 1, 1]),
    ("chunks", [3, 20_000, 15_000]),
    ("chunk_shape", [0, 0, 0]),
    ("chunk_shape", [3, -1, 7]),
    ("chunk_shape", [3, 2**31, 2**31]),
    ("chunk_shape", [1, 1, 1]),
    ("chunk_shape", [3, 20_000, 15_000]),
    ("dtype", "<u2"),
    ("dtype", "|O"),
    ("dtype", "|S1000000000"),
    ("data_type", "float64"),
    ("data_type", "complex512"),
    ("data_type", {"name": "x", "configuration": {}}),
    ("fill_value", 300),
    ("fill_value", None),
    ("fill_value", "NaN"),
    ("codecs", []),
    ("codecs", [{"name": "x"}]),
    ("codecs", [{"name": "transpose", "configuration": {"order": [9, 9]}}]),
    ("compressor", {"id": "x"}),
    ("compressor", None),
    ("compressor", {"id": "pickle"}),
    ("filters", [{"id": "pickle"}]),
    ("filters", [{"id": "delta", "dtype": "<u2"}]),
    ("order", "Q"),
    ("dimension_separator", "../"),
    ("zarr_format", 9),
    ("node_type", "x"),
    ("scale", [0, 0, 0]),
    ("scale", [float("nan")] * 3),
    ("scale", [1, float("inf"), 1]),
    ("scale", [1, -0.5, -0.5]),
    ("scale", [1, 1e-300, 1e300]),
    ("scale", [1]),
    ("scale", "x"),
    ("unit", 7),
    ("path", "../../x"),
    ("path", "../0"),
    ("path", "/"),
    ("path", ""),
    ("path", "0/0/0/0"),
    ("path", "a" * 300),
    ("path", "\0"),
    ("path", 7),
    ("axes", []),
    ("axes", ["y", "y", "x"]),
    ("axes", ["x"] * 1000),
    ("name", "y"),
    ("datasets", []),
    ("datasets", {"path": "0"}),
    ("multiscales", [{}]),
    ("multiscales", "x"),
    ("multiscales", [[]]),
    ("ome", []),
    ("attributes", None),
    ("consolidated_metadata", {"kind": "inline", "metadata": {"0": {}}}),
)


def _documents(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.name in _DOCUMENTS)


def _chunks(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*") if p.is_file() and "." not in p.name)


def _choose(found: list[Path], rng: np.random.Generator) -> Path:
    return found[int(rng.integers(len(found)))]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below ``node``."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


def json_value(store: Path, rng: np.random.Generator) -> str:
    """Any value of any document becomes something else, or goes."""
    path = _choose(_documents(store), rng)
    document = json.loads(path.read_text())
    places = _places(document)
    if not places:
        path.write_text("[]")
        return f"{path.name} is []"
    container, key = places[int(rng.integers(len(places)))]
    if rng.random() < 0.2:
        del container[key]
        told = f"{path.parent.name}/{path.name}: {key} is gone"
    else:
        container[key] = _VALUES[int(rng.integers(len(_VALUES)))]
        told = f"{path.parent.name}/{path.name}: {key} = {str(container[key])[:40]}"
    path.write_text(json.dumps(document))
    return told


def json_aimed(store: Path, rng: np.random.Generator) -> str:
    """A value that matters becomes one that hurts, in one array or in all documents."""
    texts = {path: json.loads(path.read_text()) for path in _documents(store)}
    known = {key for doc in texts.values() for _, key in _places(doc) if isinstance(key, str)}
    aimed = [(key, value) for key, value in _AIMED if key in known]
    key, value = aimed[int(rng.integers(len(aimed)))]
    everywhere = rng.random() < 0.4
    hit = [path for path, doc in texts.items() if any(k == key for _, k in _places(doc))]
    for path in hit if everywhere else hit[:1]:
        for container, found in _places(texts[path]):
            if found == key and isinstance(container, dict):
                container[key] = value
        path.write_text(json.dumps(texts[path]))
    return f"{key} = {str(value)[:40]} in {'all' if everywhere else 'one'}"


def json_text(store: Path, rng: np.random.Generator) -> str:
    """A document is no JSON, a bomb of brackets, empty, cut, not there, or a folder."""
    path = _choose(_documents(store), rng)
    content = path.read_bytes()
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    name, new = (
        ("deep lists", b"[" * 10_000 + b"]" * 10_000),
        ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        ("deep attributes", b'{"zarr_format":3,"node_type":"group","attributes":' + deep + b"}"),
        ("empty", b""),
        ("cut", content[: len(content) // 2]),
        ("a long number", b'{"zarr_format": ' + b"9" * 50_000 + b"}"),
        ("no UTF-8", b"\xff\xfe" + content),
        ("a list", b"[1, 2]"),
        ("a number", b"7"),
        ("null", b"null"),
        ("big", b'{"a": "' + b"x" * (8 << 20) + b'"}'),
        ("gone", None),
        ("a folder", None),
    )[int(rng.integers(13))]
    if new is None:
        path.unlink()
        if name == "a folder":
            path.mkdir()
    else:
        path.write_bytes(new)
    return f"{path.parent.name}/{path.name}: {name}"


def document_flips(store: Path, rng: np.random.Generator) -> str:
    path = _choose(_documents(store), rng)
    data = bytearray(path.read_bytes())
    count = int(2 ** rng.uniform(0, 4))
    for position in rng.integers(0, len(data), count):
        data[position] = int(rng.integers(32, 127))
    path.write_bytes(data)
    return f"{path.parent.name}/{path.name}: {count} letters"


def chunk_bytes(store: Path, rng: np.random.Generator) -> str:
    """Chunks flipped (at both ends: headers and shard indices), cut, doubled, empty."""
    found = _chunks(store)
    for path in found if rng.random() < 0.5 else [_choose(found, rng)]:
        data = bytearray(path.read_bytes())
        way = int(rng.integers(5))
        if way == 0:
            data = data[: int(rng.integers(0, len(data)))]
        elif way == 1:
            data = data * 2
        elif way == 2:
            data = bytearray(b"\xff" * len(data))
        else:
            for _ in range(int(2 ** rng.uniform(0, 6))):
                edge = min(len(data), 256)
                low = (0, len(data) - edge)[int(rng.integers(2))]
                data[int(rng.integers(low, low + edge))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
    return "chunks damaged"


def chunk_files(store: Path, rng: np.random.Generator) -> str:
    """A chunk is gone, a folder, a link to itself, to /dev/zero, out of the store, a pipe, a giant."""
    path = _choose(_chunks(store), rng)
    way = int(rng.integers(8))
    if way == 7:
        (path.parent / "loop").symlink_to(store, target_is_directory=True)
        return "a link back to the store"
    path.unlink()
    if way == 1:
        path.mkdir()
    elif way == 2:
        path.symlink_to(path.name)
    elif way == 3:
        path.symlink_to("/dev/zero")
    elif way == 4:
        path.symlink_to("../../../../../../etc/hostname")
    elif way == 5:
        os.mkfifo(path)
    elif way == 6:
        with open(path, "wb") as file:
            file.truncate(8 << 30)
    names = ("gone", "a folder", "a link to itself", "endless", "a link outside", "a pipe", "a giant")
    return f"a chunk is {names[way]}"


ZARR_KINDS: dict[str, Callable[[Path, np.random.Generator], str]] = {
    "json value": json_value,
    "json aimed": json_aimed,
    "json text": json_text,
    "json letters": document_flips,
    "chunk bytes": chunk_bytes,
    "chunk files": chunk_files,
}
