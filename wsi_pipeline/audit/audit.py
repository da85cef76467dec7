"""``audit_output``: does anything of a slide's vendor text, label or macro stand in an output?

Every byte of every file is searched, raw and unpacked; every file, page, array and chunk must be one that we
write; every picture and level is decoded and searched for the slide's side pictures. An output passes only if
nothing is found and nothing in it is unknown. What that proves, and what it does not, is part of the result.
"""

from __future__ import annotations

import datetime
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_pipeline.audit.bytes_search import BytesSearch
from wsi_pipeline.audit.inventory import OutputFile, output_files, picture_faults, store_faults
from wsi_pipeline.audit.payloads import Piece, file_pieces
from wsi_pipeline.audit.pictures import side_pictures
from wsi_pipeline.audit.pixels import PixelSearch, least_copy
from wsi_pipeline.audit.result import AuditResult, Finding, masked
from wsi_pipeline.audit.secrets import Secrets, find_secrets
from wsi_pipeline.audit.texts import slide_texts
from wsi_pipeline.audit.tiff_inventory import tiff_faults
from wsi_pipeline.core.protocols import U8_HWC, Slide
from wsi_pipeline.errors import OutputError, SlideError, UnsupportedSlideError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers._source import file_name, is_remote
from wsi_pipeline.writers.omezarr import read_label

__all__ = ["audit_output"]

_PICTURES = (".png", ".jpg", ".jpeg")
_TIFFS = (".tif", ".tiff")
_MAX_PIXELS = 200_000_000
_PROVEN = (
    "no whole value, word, code or number of the slide's texts stands in any byte of the output: in UTF-8, "
    "Latin-1 or UTF-16, in either case, escaped for JSON, HTML or URLs, packed in PNG chunks or base64",
    "the output consists of files, pages, arrays, chunks and tags that this program writes, and no others",
    "no coded bytes of the slide's side pictures stand in the output",
    "no decoded picture or level shows a side picture pixel for pixel, or scaled and turned by quarters",
)
_NOT_PROVEN = (
    "texts of three letters or less, numbers of five digits or less, and words that this program writes "
    "itself were searched for only inside their whole values",
    "a text that was translated, encrypted or packed in another way, or drawn as a picture, is not found",
    "what the scan itself shows, such as writing on the glass beside the tissue, is part of every output",
    "parts of a label that were cut out, scaled and coded with loss",
)
_OTHER_FILES = "texts that only the other files of this DICOM series hold were not searched for"


def audit_output(out: Path | str, slide: Path | str) -> AuditResult:
    """Audit an output (.ome.zarr, .ome.tif, or the folder of a run) against the slide that it was made of.

    Memory does not follow the size of the output, but for one grey copy of a level at a fourth to a sixteenth
    of its sides. Raises SlideError where the slide cannot be opened, OutputError where the output is not
    there or cannot be read.
    """
    out, path = Path(out), str(slide)
    if is_remote(path):
        raise UnsupportedSlideError(
            f"{path}: an audit reads the file itself; copy the slide here first", slide_id=file_name(path)
        )
    # Any pixel size will do: the audit asks for texts and pictures only.
    scan = open_slide(path, mpp=1.0)
    try:
        files, stores, faults = output_files(out)
        return _Audit(out, path, scan, files).run([*stores], faults)
    finally:
        scan.close()


class _Audit:
    """The state of one audit: what is searched for, and what was found so far."""

    def __init__(self, out: Path, path: str, scan: Slide, files: list[OutputFile]) -> None:
        self._out, self._path, self._files = out, path, files
        self._secrets = _secrets(path, scan, files)
        side = side_pictures(path)
        self._remarks = list(side.remarks)
        self._pictures = len(side.pictures)
        self._bytes = BytesSearch(self._secrets.searched, self._secrets.in_name, side.runs)
        self._pixels = PixelSearch(side.pictures, scan)
        self._searched = 0
        self._least = 0
        self._found: dict[Finding, None] = {}

    def run(self, stores: list[OutputFile], faults: list[tuple[str, str]]) -> AuditResult:
        for where, what in faults:
            self._unknown(where, what)
        try:
            for path, name in self._files:
                self._file(path, name)
            for store, name in stores:
                self._store(store, name)
        except OSError as error:
            raise OutputError(
                f"{self._out}: cannot be read ({error.strerror or error}); check permissions", path=self._out
            ) from error
        return AuditResult(
            output=self._out,
            slide=file_name(self._path),
            files=len(self._files),
            bytes_searched=self._searched,
            texts=len(self._secrets.searched),
            pictures=self._pictures,
            pixels=self._pixels.pixels,
            findings=tuple(self._found),
            remarks=tuple(self._all_remarks()),
            proven=_PROVEN,
            not_proven=(
                *_NOT_PROVEN,
                *([_OTHER_FILES] if self._path.lower().endswith(".dcm") else []),
                f"scaled copies of fewer than {self._least} x {self._least} level pixels",
            ),
        )

    def _unknown(self, where: str, what: str) -> None:
        self._found[Finding(kind="unknown", where=where, what=what)] = None

    def _file(self, path: Path, name: str) -> None:
        """Bytes, parts and, of a picture, pixels of one file."""
        title = Piece(f"{name}, its name", name.encode("utf-8", "surrogateescape"), True)
        for finding in self._bytes.findings(self._pieces(path, name, title)):
            self._found[finding] = None
        if name.lower().endswith(_PICTURES):
            for what in picture_faults(path):
                self._unknown(name, what)
            self._picture(name, path)
        elif name.lower().endswith(_TIFFS):
            for part, what in tiff_faults(path):
                self._unknown(f"{name}, {part}", what)
            self._levels(path, name)

    def _pieces(self, path: Path, name: str, title: Piece) -> Iterator[Piece]:
        yield title
        for piece in file_pieces(path, name, self._bytes.overlap):
            self._searched += piece.raw
            if piece.picture:
                self._picture(piece.where, io.BytesIO(piece.data))
            yield piece

    def _store(self, store: Path, name: str) -> None:
        for part, what in store_faults(store):
            self._unknown(f"{name}/{part}", what)
        if name.endswith(".partial"):
            self._remarks.append(f"{name} is unfinished: its pixels were not decoded")
            return
        self._levels(store, name)
        for label in ("tissue", "disagreement"):
            try:
                grey_HW = read_label(store, label)
            except OutputError:
                self._unknown(f"{name}/labels/{label}", "cannot be decoded, so nothing is proven about it")
                continue
            self._shows(f"{name}/labels/{label}", np.repeat(grey_HW[..., None], 3, axis=2))

    def _levels(self, path: Path, name: str) -> None:
        try:
            output = open_slide(path, mpp=1.0)
            for number, level in enumerate(output.levels):
                self._least = max(self._least, least_copy(level.size.area))
                for picture, how in self._pixels.in_level(output, number):
                    self._looks(f"{name}, level {number}", picture, how)
            output.close()
        except SlideError:
            self._unknown(name, "its pixels cannot be decoded, so nothing is proven about them")

    def _picture(self, where: str, source: Path | io.BytesIO) -> None:
        try:
            with Image.open(source) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise ValueError("too large")
                pixels_HWC = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            self._unknown(where, "a picture that cannot be decoded, so nothing is proven about it")
            return
        self._shows(where, pixels_HWC)

    def _shows(self, where: str, pixels_HWC: U8_HWC) -> None:
        for picture, how in self._pixels.in_picture(pixels_HWC):
            self._looks(where, picture, how)

    def _looks(self, where: str, picture: str, how: str) -> None:
        same = [f for f in self._found if f.kind == "picture" and f.where == where and picture in f.what]
        if not same:
            what = f"shows the slide's {picture} ({how})"
            self._found[Finding(kind="picture", where=where, what=what)] = None

    def _all_remarks(self) -> Iterator[str]:
        yield from self._remarks
        named = self._bytes.named_found
        if named:
            texts = sorted({masked(text) for _, text in named})
            yield (
                f"kept on purpose: the file name, with {len(texts)} texts that the slide's file holds too "
                f"({', '.join(texts[:5])}); if it names the patient, rename the file before you convert it"
            )
        if self._secrets.common:
            yield (
                f"{self._secrets.common} words of the slide are also words of this program: searched for "
                "inside their whole values only"
            )
        if self._secrets.today:
            yield "the slide names the day on which the output was made: that date was not searched for"
        if self._pixels.left_out:
            yield (
                f"not searched for by likeness, because the scan itself looks like it: "
                f"{', '.join(self._pixels.left_out)}"
            )


def _secrets(path: str, scan: Slide, files: list[OutputFile]) -> Secrets:
    sizes = {side for level in scan.levels for side in (level.size.height, level.size.width)}
    days = set()
    for file, _ in files:
        made = os.stat(file).st_mtime
        days |= {
            datetime.date.fromtimestamp(made),
            datetime.datetime.fromtimestamp(made, datetime.UTC).date(),
        }
    return find_secrets(slide_texts(path), file_name(path), sizes, days)
