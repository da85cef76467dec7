"""Damaged slides from seeds: one number, one base file, one mutant, the same on every machine.

``mutate(base, folder, seed)`` writes the mutant into a folder of its own (DICOM series are looked for
beside the file) and says what was done. Kinds that know a format live in ``mutate_tiff`` and
``mutate_zarr``; flips, cuts, DICOM and pictures are here.
"""

from __future__ import annotations

import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mutate_tiff import TIFF_KINDS
from mutate_zarr import ZARR_KINDS

__all__ = ["Mutant", "mutate"]

Mutator = Callable[[bytearray, np.random.Generator], str]

_HUGE = (0, 1, 2, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_VR = rb"(?:AE|AS|AT|CS|DA|DS|DT|FD|FL|IS|LO|LT|PN|SH|SL|SS|ST|TM|UI|UL|US|OB|OW|SQ|UN|UT)"
_LONG_VR = (b"OB", b"OW", b"SQ", b"UN", b"UT")
# Rows, Columns, NumberOfFrames, bits, TotalPixelMatrixColumns and Rows, PixelSpacing, samples, photometric
_DICOM_TAGS = tuple(
    struct.pack("<HH", group, element)
    for group, element in (
        *((0x28, e) for e in (0x02, 0x04, 0x08, 0x10, 0x11, 0x30, 0x100, 0x101, 0x102)),
        *((0x48, e) for e in (0x06, 0x07)),
        *((0x02, e) for e in (0x00, 0x10)),
        (0x7FE0, 0x10),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A damaged copy: ``key`` is ``base name:seed``, ``what`` the damage in words."""

    path: Path
    key: str
    kind: str
    what: str


def mutate(base: Path, folder: Path, seed: int) -> Mutant:
    """The mutant of this seed, at ``folder / base.name``; a fresh folder is expected."""
    rng = np.random.default_rng([zlib.crc32(base.name.encode()), seed])
    path = folder / base.name
    folder.mkdir(parents=True)
    if base.is_dir():
        shutil.copytree(base, path)
        for found in (path, *path.rglob("*")):
            found.chmod(0o755 if found.is_dir() else 0o644)
        kind = str(rng.choice([*ZARR_KINDS, "json aimed"]))
        what = ZARR_KINDS[kind](path, rng)
    else:
        sound = base.read_bytes()
        data = bytearray(sound)
        kinds = _kinds(data)
        while data == sound:  # 1 is absurd for many a field, and what stands in others
            kind = str(rng.choice(list(kinds)))
            what = kinds[kind](data, rng)
        path.write_bytes(data)
    return Mutant(path=path, key=f"{base.name}:{seed}", kind=kind, what=what)


def _kinds(data: bytearray) -> dict[str, Mutator]:
    if data[:2] in (b"II", b"MM"):
        # Structure is where readers go wrong: the plain kinds get a small share.
        return {"flips": flips, "cut": cut, **TIFF_KINDS}
    if data[128:132] == b"DICM":
        return {"flips": flips, "cut": cut, "dicom length": dicom_length, "dicom value": dicom_value}
    return {"flips": flips, "cut": cut, "picture size": picture_size, "picture part": picture_part}


def flips(data: bytearray, rng: np.random.Generator) -> str:
    """1 to 64 bytes, mostly in the first and last 4 KiB, where the structure is."""
    count = int(2 ** rng.uniform(0, 6))
    edge = min(4096, len(data))
    for _ in range(count):
        low, high = ((0, edge), (len(data) - edge, len(data)), (0, len(data)))[rng.integers(3)]
        data[int(rng.integers(low, high))] ^= int(rng.integers(1, 256))
    return f"{count} bytes flipped"


def cut(data: bytearray, rng: np.random.Generator) -> str:
    """Cut anywhere, or near the head or the tail."""
    place = (
        int(rng.integers(0, len(data))),
        int(rng.integers(0, min(600, len(data)))),
        len(data) - int(rng.integers(1, min(600, len(data)))),
    )[rng.integers(3)]
    del data[place:]
    return f"cut at {place}"


def _dicom_elements(data: bytearray) -> list[tuple[bytes, bytes, int]]:
    """Tag, value representation and position of what looks like an explicit element."""
    pattern = re.compile(rb"([\x02\x08\x18\x20\x28\x40\x48\xe0][\x00\x7f]..)(" + _VR + rb")", re.DOTALL)
    return [(m.group(1), m.group(2), m.start()) for m in pattern.finditer(bytes(data))]


def dicom_length(data: bytearray, rng: np.random.Generator) -> str:
    """The length of an element becomes absurd."""
    _, vr, at = _dicom_elements(data)[rng.integers(len(_dicom_elements(data)))]
    value = int(_HUGE[rng.integers(len(_HUGE))])
    if vr in _LONG_VR:
        struct.pack_into("<I", data, at + 8, value)
    else:
        struct.pack_into("<H", data, at + 6, value & 0xFFFF)
    return f"length of element {data[at : at + 4].hex()} is {value}"


def dicom_value(data: bytearray, rng: np.random.Generator) -> str:
    """Rows, columns, frames, bits, matrix size or the transfer syntax becomes absurd."""
    elements = [item for item in _dicom_elements(data) if item[0] in _DICOM_TAGS]
    tag, vr, at = elements[rng.integers(len(elements))]
    start, end = at + 8, at + 8 + struct.unpack_from("<H", data, at + 6)[0]
    if vr in _LONG_VR:
        start, end = at + 12, at + 12 + min(struct.unpack_from("<I", data, at + 8)[0], 16)
    if vr in (b"IS", b"DS"):
        texts = (b"0", b"-1", b"1e999", b"nan", b"9" * 40, b"1", b"x", b"2147483647")
        data[start:end] = texts[rng.integers(len(texts))][: end - start].ljust(end - start)
    else:
        value = int(_HUGE[rng.integers(len(_HUGE))]).to_bytes(4, "little")
        data[start:end] = (value * 8)[: end - start]
    return f"element {tag.hex()} is {bytes(data[start:end])!r}"


def picture_size(data: bytearray, rng: np.random.Generator) -> str:
    """The header of a PNG or JPEG claims other, mostly absurd extents; checksums are right."""
    values = (0, 1, 7, 4096, 30_000, 65_535, 0x7FFFFFFF, 0xFFFFFFFF)
    height, width = (int(values[i]) for i in rng.integers(0, len(values), 2))
    if data[:4] == b"\x89PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(bytes(data[12:29])))
    else:
        frame = re.search(rb"\xff[\xc0-\xc2]\x00\x11", bytes(data))
        at = frame.start() if frame else 0
        struct.pack_into(">HH", data, at + 5, height & 0xFFFF, width & 0xFFFF)
    return f"claims {height} x {width} px"


def picture_part(data: bytearray, rng: np.random.Generator) -> str:
    """A part is put in that unpacks to much, or is of nonsense."""
    bomb = zlib.compress(bytes(64 << 20), 9)
    if data[:4] == b"\x89PNG":
        name, body = (
            (b"zTXt", b"k\0\0" + bomb),
            (b"iTXt", b"k\0\1\0\0\0" + bomb),
            (b"iCCP", b"k\0\0" + bomb),
            (b"eXIf", b"II*\0\xff\xff\xff\xff"),
            (b"tRNS", bytes(5)),
            (b"PLTE", bytes(7)),
            (b"IDAT", bomb),
        )[rng.integers(7)]
        checked = name + body
        data[33:33] = struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))
        return f"a {name.decode()} of {len(body)} bytes"
    marker, body = (
        (b"\xff\xe1", b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        (b"\xff\xe1", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(60)),
        (b"\xff\xe2", b"ICC_PROFILE\0\x01\xff" + bytes(200)),
        (b"\xff\xdb", bytes(30)),
        (b"\xff\xc4", b"\xff" * 40),
        (b"\xff\xe2", b"MPF\0II*\0\x08\0\0\0\xff\xff" + bytes(60)),
    )[rng.integers(6)]
    data[2:2] = marker + struct.pack(">H", len(body) + 2) + body
    return f"a segment {marker.hex()} of {len(body)} bytes"
