"""Every free text that a slide's file carries: what must not come out again.

From OpenSlide: all properties except those that OpenSlide computes itself. From TIFF: all tags of all pages
and SubIFDs that hold text, or bytes in which text stands (XP tags, EXIF, XMP, IPTC, private tags), and the
text of the ICC profile. From PNG and JPEG: comments, text chunks, EXIF, profile. From OME-Zarr: all strings
of its JSON. Not reached: texts of the other files of a DICOM series, of which OpenSlide shows one.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
from PIL import Image

from wsi_pipeline.readers._base import FOREIGN_ERRORS

__all__ = ["SlideText", "icc_texts", "printable_runs", "slide_texts", "tiff_pages"]

_COMPUTED = re.compile(
    r"openslide\.(level|associated|region|bounds-|mpp-|quickhash|vendor$|objective-power$|icc-size$"
    r"|background-color$)"
)
_JPEG_TABLES, _ICC = 347, 34675
_XP = range(40091, 40096)
_MAX_PAGES = 20_000
_RUN = re.compile(rb"[\x20-\x7e\t\r\n\xc0-\xff]{6,}")
_PLAIN = re.compile(r"[\w .,:;/()&@+-]{8,}")
_WIDE_RUN = re.compile(rb"(?:[\x20-\x7e\xc0-\xff]\0){4,}|(?:\0[\x20-\x7e\xc0-\xff]){4,}")


@dataclass(frozen=True, slots=True)
class SlideText:
    """One text and the name of the field that holds it."""

    field: str
    text: str


def slide_texts(path: str) -> list[SlideText]:
    """All texts of the slide at ``path``, a local file or OME-Zarr folder; each pair once."""
    if os.path.isdir(path):
        found = list(_zarr_texts(Path(path)))
    else:
        with open(path, "rb") as file:
            head = file.read(16)
        found = list(_openslide_texts(path))
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            found += _tiff_texts(path)
        elif head.startswith((b"\xff\xd8", b"\x89PNG")):
            found += _image_texts(path)
    return list(dict.fromkeys(item for item in found if item.text.strip()))


def _openslide_texts(path: str) -> Iterator[SlideText]:
    try:
        with openslide.OpenSlide(path) as slide:
            for key, value in slide.properties.items():
                if not _COMPUTED.match(key):
                    yield SlideText(key, value)
            profile = slide.color_profile
            if profile is not None:
                yield from (SlideText("ICC profile", text) for text in icc_texts(profile.tobytes()))
    except (openslide.OpenSlideError, *FOREIGN_ERRORS):
        return  # another reader opened it


def _tiff_texts(path: str) -> Iterator[SlideText]:
    with np.errstate(all="ignore"), tifffile.TiffFile(path) as tiff:
        for page in tiff_pages(tiff):
            for tag in page.tags:
                if tag.code == _ICC:
                    profile = tag.value if isinstance(tag.value, bytes) else b""
                    yield from (SlideText("ICC profile", text) for text in icc_texts(profile))
                elif tag.code != _JPEG_TABLES:
                    yield from (SlideText(f"TIFF {tag.name}", text) for text in _values(tag.value, tag.code))


def tiff_pages(tiff: tifffile.TiffFile) -> Iterator[Any]:
    """All pages of the main chain, each followed by its SubIFDs; stops at a damaged page."""
    try:
        for number, page in enumerate(tiff.pages):
            if number > _MAX_PAGES:
                return
            yield page
            if getattr(page, "subifds", None):
                yield from page.pages
    except FOREIGN_ERRORS:
        return


def _values(value: Any, code: int) -> Iterator[str]:
    """Texts inside a tag's value, of whatever type tifffile made of it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        if code in _XP:
            yield value.decode("utf-16-le", "replace").strip("\0")
        else:
            yield from printable_runs(value)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _values(inner, 0)
    elif isinstance(value, tuple | list) and value:
        if all(isinstance(one, int) and 0 <= one < 256 for one in value) and len(value) >= 6:
            yield from _values(bytes(value), code)
        else:
            for inner in value:
                if not isinstance(inner, int | float):
                    yield from _values(inner, code)


def printable_runs(data: bytes) -> Iterator[str]:
    """Texts of at least six bytes in binary data, UTF-8 or Latin-1, and UTF-16 of either order."""
    for match in _RUN.finditer(data):
        try:
            yield match.group().decode()
        except UnicodeDecodeError:
            yield match.group().decode("latin-1")
    for match in _WIDE_RUN.finditer(data):
        yield match.group().replace(b"\0", b"").decode("latin-1")


def icc_texts(profile: bytes) -> Iterator[str]:
    """Texts of an ICC profile: description, copyright, and what else is no table of numbers (ICC.1)."""
    numeric = {b"XYZ ", b"curv", b"para", b"mft1", b"mft2", b"mAB ", b"mBA ", b"sf32", b"sig ", b"view",
               b"meas", b"chrm", b"dtim", b"vcgt"}  # fmt: skip
    try:
        (count,) = struct.unpack_from(">I", profile, 128)
        for index in range(min(count, 200)):
            offset, size = struct.unpack_from(">4xII", profile, 132 + 12 * index)
            body = profile[offset : offset + size]
            if body[:4] in numeric:
                continue
            if body[:4] == b"mluc":
                yield from _multilingual(body)
            elif body[:4] in (b"text", b"desc"):
                yield from printable_runs(body[8:])
            else:
                yield from filter(_PLAIN.fullmatch, printable_runs(body[8:]))
    except struct.error:
        yield from printable_runs(profile)


def _multilingual(body: bytes) -> Iterator[str]:
    records, width = struct.unpack_from(">II", body, 8)
    for index in range(min(records, 200)):
        size, offset = struct.unpack_from(">II", body, 16 + width * index + 4)
        yield body[offset : offset + size].decode("utf-16-be", "replace")


def _image_texts(path: str) -> Iterator[SlideText]:
    try:
        with Image.open(path) as image:
            image.load()
            exif = image.getexif()
            values: Iterable[tuple[str, Any]] = [
                *((str(name), value) for name, value in image.info.items()),
                *((f"EXIF {code}", value) for code, value in exif.items()),
                *((f"EXIF {code}", value) for code, value in exif.get_ifd(34665).items()),
            ]
    except FOREIGN_ERRORS:
        return
    for name, value in values:
        if name == "icc_profile":
            yield from (SlideText("ICC profile", text) for text in icc_texts(value))
        else:
            code = int(name[5:]) if name.startswith("EXIF ") else 0
            yield from (SlideText(f"picture {name}", text) for text in _values(value, code))


def _zarr_texts(root: Path) -> Iterator[SlideText]:
    for path in sorted(root.rglob("*")):
        if path.name in ("zarr.json", ".zattrs", ".zgroup", ".zmetadata") or path.suffix in (".json", ".xml"):
            text = path.read_text(encoding="utf-8", errors="replace")
            try:
                yield from (SlideText(path.name, one) for one in _json_strings(json.loads(text)))
            except ValueError:
                yield SlideText(path.name, text)
    profile = root / "profile.icc"
    if profile.exists():
        yield from (SlideText("ICC profile", text) for text in icc_texts(io.FileIO(profile).readall()))


def _json_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _json_strings(inner)
