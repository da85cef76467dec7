"""Damage that knows TIFF: entries of directories, pointers between them, and texts that are bombs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["TIFF_KINDS", "Entry", "Layout", "parse"]

_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_NUMBERS = (0, 1, 3, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
# Extents, tiles, strips, samples, bits, compression, planes, photometric, predictor, tables, profile, pages
_STRUCTURAL = frozenset(
    {254, 256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 282, 283, 284, 296, 317, 322, 323, 324, 325}
    | {330, 338, 339, 347, 530, 32997, 32998, 34675, 65420, 65421, 65426, 65432}
)
_DESCRIPTION = 270


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A directory entry: where it stands, what it says, where its values stand."""

    at: int
    tag: int
    kind: int
    count: int
    values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What was found: byte order, width of offsets, directories, their entries, and next-directory fields."""

    order: str
    big: bool
    directories: tuple[int, ...]
    entries: tuple[Entry, ...]
    nexts: tuple[int, ...]

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def width(self) -> int:
        return 8 if self.big else 4


def parse(data: bytes | bytearray) -> Layout:
    """Directories of the main chain and of SubIFDs, each once; the base files are sound."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    word = order + ("Q" if big else "I")
    head, size, number = (8, 20, order + "Q") if big else (2, 12, order + "H")
    waiting = [struct.unpack_from(word, data, 8 if big else 4)[0]]
    directories: list[int] = []
    entries: list[Entry] = []
    nexts = [8 if big else 4]
    while waiting:
        start = waiting.pop()
        if start in directories or not 0 < start < len(data) - 8:
            continue
        directories.append(start)
        count = struct.unpack_from(number, data, start)[0]
        for at in range(start + head, start + head + count * size, size):
            tag, kind = struct.unpack_from(order + "HH", data, at)
            total = struct.unpack_from(word, data, at + 4)[0]
            inline = at + (12 if big else 8)
            fits = total * _SIZES.get(kind, 1) <= (8 if big else 4)
            values = inline if fits else struct.unpack_from(word, data, inline)[0]
            entries.append(Entry(at=at, tag=tag, kind=kind, count=total, values=values))
            if tag == 330:
                waiting += [_get(data, order, kind, values, i) for i in range(total)]
        nexts.append(start + head + count * size)
        waiting.append(struct.unpack_from(word, data, nexts[-1])[0])
    return Layout(
        order=order, big=big, directories=tuple(directories), entries=tuple(entries), nexts=tuple(nexts)
    )


def _get(data: bytes | bytearray, order: str, kind: int, at: int, index: int) -> int:
    size = _SIZES[kind]
    start = at + size * index
    return int.from_bytes(data[start : start + size], "little" if order == "<" else "big")


def _put(data: bytearray, order: str, size: int, at: int, value: int) -> None:
    if at + size <= len(data):
        value %= 1 << (8 * size)
        data[at : at + size] = value.to_bytes(size, "little" if order == "<" else "big")


def _number(data: bytearray, rng: np.random.Generator) -> int:
    """Absurd, or a place in this file."""
    places = (len(data), len(data) - 1, int(rng.integers(0, len(data))), 8)
    pool = (*_NUMBERS, *places)
    return int(pool[rng.integers(len(pool))])


def _pick(layout: Layout, rng: np.random.Generator) -> Entry:
    structural = [entry for entry in layout.entries if entry.tag in _STRUCTURAL]
    pool = structural if structural and rng.random() < 0.85 else list(layout.entries)
    return pool[rng.integers(len(pool))]


def tag_value(data: bytearray, rng: np.random.Generator) -> str:
    """One or all values of one to three entries."""
    layout, told = parse(data), []
    for _ in range(rng.integers(1, 4)):
        entry, value = _pick(layout, rng), _number(data, rng)
        size = _SIZES.get(entry.kind, 1)
        which = range(entry.count) if rng.random() < 0.3 else [int(rng.integers(max(entry.count, 1)))]
        for index in which:
            _put(data, layout.order, size, entry.values + size * index, value)
        told.append(f"tag {entry.tag} is {value}")
    return "; ".join(told)


def tag_near(data: bytearray, rng: np.random.Generator) -> str:
    """A value that is off by little: another tile size, a shifted offset, a doubled extent."""
    layout = parse(data)
    entry = _pick(layout, rng)
    size = _SIZES.get(entry.kind, 1)
    at = entry.values + size * int(rng.integers(max(entry.count, 1)))
    old = _get(data, layout.order, entry.kind if entry.kind in _SIZES else 1, at, 0)
    value = int((old + 1, old - 1, old * 2, old // 2, old * 1000, old ^ 0x100)[rng.integers(6)])
    _put(data, layout.order, size, at, value)
    return f"tag {entry.tag} is {value}, was {old}"


def tag_count(data: bytearray, rng: np.random.Generator) -> str:
    layout = parse(data)
    entry, value = _pick(layout, rng), _number(data, rng)
    _put(data, layout.order, layout.width, entry.at + 4, value)
    return f"tag {entry.tag} has {value} values"


def tag_kind(data: bytearray, rng: np.random.Generator) -> str:
    layout = parse(data)
    entry = _pick(layout, rng)
    value = int((0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 18, 99, 65_535)[rng.integers(14)])
    _put(data, layout.order, 2, entry.at + 2, value)
    return f"tag {entry.tag} is of type {value}"


def tag_place(data: bytearray, rng: np.random.Generator) -> str:
    """The entry's own value or offset field, whatever it was."""
    layout = parse(data)
    entry, value = _pick(layout, rng), _number(data, rng)
    _put(data, layout.order, layout.width, entry.at + (12 if layout.big else 8), value)
    return f"the field of tag {entry.tag} is {value}"


def tag_name(data: bytearray, rng: np.random.Generator) -> str:
    """An entry becomes another one, often doubled or missing then."""
    layout = parse(data)
    entry = layout.entries[rng.integers(len(layout.entries))]
    codes = sorted(_STRUCTURAL | {_DESCRIPTION, 305, 33628, 34118, 34361, 42113, 50838, 50839, 51023, 65449})
    value = int(codes[rng.integers(len(codes))])
    _put(data, layout.order, 2, entry.at, value)
    return f"tag {entry.tag} is called {value}"


def directory(data: bytearray, rng: np.random.Generator) -> str:
    """Pointers between directories: loops, the middle of pixels, beyond the end; the number of entries."""
    layout = parse(data)
    if rng.random() < 0.25:
        start = int(layout.directories[rng.integers(len(layout.directories))])
        value = int((0, 1, 2, 200, 4097, 65_535, 2**40)[rng.integers(7)])
        _put(data, layout.order, 8 if layout.big else 2, start, value)
        return f"a directory of {value} entries"
    at = int(layout.nexts[rng.integers(len(layout.nexts))])
    loops = layout.directories
    value = int(loops[rng.integers(len(loops))]) if rng.random() < 0.6 else _number(data, rng)
    _put(data, layout.order, layout.width, at, value)
    return f"the directory pointer at {at} leads to {value}"


def subdirectory_loop(data: bytearray, rng: np.random.Generator) -> str:
    """Some entry becomes a SubIFDs entry that leads to a directory, mostly back to its own."""
    layout = parse(data)
    entry = layout.entries[rng.integers(len(layout.entries))]
    target = int(layout.directories[rng.integers(len(layout.directories))])
    _put(data, layout.order, 2, entry.at, 330)
    _put(data, layout.order, 2, entry.at + 2, 16 if layout.big else 4)
    _put(data, layout.order, layout.width, entry.at + 4, 1)
    _put(data, layout.order, layout.width, entry.at + (12 if layout.big else 8), target)
    return f"tag {entry.tag} is a SubIFD that leads to {target}"


def directory_chain(data: bytearray, rng: np.random.Generator) -> str:
    """Thousands of directories: copies of the first one, chained."""
    layout = parse(data)
    start = layout.directories[0]
    end = layout.nexts[1]
    copies = int((300, 3_000, 30_000)[rng.integers(3)])
    body = bytes(data[start:end])
    if len(data) % 2:
        data.append(0)
    first = len(data)
    step = len(body) + layout.width
    for index in range(copies):
        following = first + (index + 1) * step if index + 1 < copies else 0
        data += body + struct.pack(layout.offset, following & (2 ** (8 * layout.width) - 1))
    _put(data, layout.order, layout.width, end, first)
    return f"{copies} further directories"


def border_cut(data: bytearray, rng: np.random.Generator) -> str:
    """Cut where a directory, an entry or its values begin or end."""
    layout = parse(data)
    places = [*layout.directories, *layout.nexts, *(e.at for e in layout.entries)]
    places += [entry.values for entry in layout.entries]
    place = min(int(places[rng.integers(len(places))]) + int(rng.integers(-1, 2)), len(data))
    del data[max(place, 0) :]
    return f"cut at {place}"


_LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "lol" * 10}">' for i in range(12))
_OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
_SIZES_XML = 'DimensionOrder="XYCZT" Type="uint8" SizeC="{c}" SizeT="{t}" SizeX="{x}" SizeY="{y}" SizeZ="{z}"'


def _pixels(extra: str = "", inside: str = "<TiffData/>", **sizes: object) -> str:
    filled = _SIZES_XML.format(**{"c": 3, "t": 1, "x": 512, "y": 512, "z": 1, **sizes})
    channel = '<Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
    return f'<Image ID="Image:0"><Pixels ID="Pixels:0" {filled} {extra}>{channel}{inside}</Pixels></Image>'


def _texts() -> tuple[tuple[str, str], ...]:
    """Names and contents of descriptions that some parser may choke on."""
    image = "".join(_pixels(c=3) for _ in range(20_000))
    elsewhere = '<TiffData><UUID FileName="../../x.tif">u</UUID></TiffData>'
    along = '<ModuloAlongT Type="lifetime" Start="0" Step="0.001" End="1000000"/>'
    modulo = (
        '<StructuredAnnotations><XMLAnnotation ID="A" Namespace="openmicroscopy.org/omero/dimension/modulo">'
        f"<Value><Modulo>{along}</Modulo></Value></XMLAnnotation></StructuredAnnotations>" + _pixels()
    )
    return (
        ("billion laughs", f"<?xml version='1.0'?><!DOCTYPE x [{_LAUGHS}]>{_OME}&l11;</OME>"),
        ("deep nesting", _OME + "<a>" * 200_000 + "</a>" * 200_000 + "</OME>"),
        ("deep nesting, open", _OME + "<a>" * 200_000),
        ("absurd SizeX", _OME + _pixels(x=2**62, y=2**62) + "</OME>"),
        ("a billion planes", _OME + _pixels(t=10**9) + "</OME>"),
        ("planes to the sky", _OME + _pixels(t=10**6, z=10**6, c=10**6) + "</OME>"),
        ("many channels", _OME + _pixels(c=3 * 10**7) + "</OME>"),
        ("negative sizes", _OME + _pixels(x=-1, t=-5, c=0) + "</OME>"),
        ("a far TiffData", _OME + _pixels(inside='<TiffData IFD="2147483647"/>') + "</OME>"),
        ("many planes of TiffData", _OME + _pixels(inside='<TiffData PlaneCount="999999999"/>') + "</OME>"),
        ("another file", _OME + _pixels(inside=elsewhere) + "</OME>"),
        ("a long modulo", _OME + modulo + "</OME>"),
        ("many images", _OME + image + "</OME>"),
        ("nan sizes", _OME + _pixels('PhysicalSizeX="nan" PhysicalSizeY="1e999"') + "</OME>"),
        ("a long number", _OME + _pixels(f'PhysicalSizeX="{"9" * 99_999}" PhysicalSizeY="1"') + "</OME>"),
        ("open Pixels", _OME + "<Pixels " * 120_000 + "</OME>"),
        ("spaces of Aperio", "Aperio Image Library |" + " " * 400_000 + "x"),
        ("words of Aperio", "Aperio Image Library |" + "a " * 200_000 + "x"),
        ("bars of Aperio", "Aperio Image Library " + "|a=" * 200_000),
        ("MPP nan", "Aperio Image Library v1\r\n1x1|AppMag = 0|MPP = nan"),
        ("MPP long", "Aperio Image Library v1\r\n1x1|AppMag = 40|MPP = " + "1" * 5_000),
        ("ImageJ", "ImageJ=1.11a\nimages=2000000000\nslices=2000000000\nhyperstack=true\nmode=grayscale\n"),
        ("ImageJ, negative", "ImageJ=1.11a\nimages=-7\nchannels=0\nframes=-2\n"),
        ("shaped", '{"shape": [2000000000, 2000000000, 3]}'),
        ("shaped, long", '{"shape": [' + "1," * 100_000 + "1]}"),
        ("shaped, deep", '{"shape": ' + "[" * 100_000),
        ("no text", ""),
        ("zeros", "\0" * 1000),
    )


def text(data: bytearray, rng: np.random.Generator) -> str:
    """The first description (or another early entry, renamed) becomes a text that is a bomb."""
    layout = parse(data)
    named = [entry for entry in layout.entries if entry.tag == _DESCRIPTION]
    entry = named[0] if named else layout.entries[min(4, len(layout.entries) - 1)]
    texts = _texts()
    name, content = texts[rng.integers(len(texts))]
    encoded = content.encode() + b"\0"
    place, pad = len(data), -len(encoded) % 2
    data += encoded + bytes(pad + 8)
    _put(data, layout.order, 2, entry.at, _DESCRIPTION)
    _put(data, layout.order, 2, entry.at + 2, 2)
    _put(data, layout.order, layout.width, entry.at + 4, len(encoded))
    _put(data, layout.order, layout.width, entry.at + (12 if layout.big else 8), place)
    return f"description: {name}"


TIFF_KINDS: dict[str, Callable[[bytearray, np.random.Generator], str]] = {
    "tag value": tag_value,
    "tag near": tag_near,
    "tag count": tag_count,
    "tag type": tag_kind,
    "tag offset": tag_place,
    "tag name": tag_name,
    "directory": directory,
    "directory loop": subdirectory_loop,
    "directory chain": directory_chain,
    "border cut": border_cut,
    "text": text,
}
