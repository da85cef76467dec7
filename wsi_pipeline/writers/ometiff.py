"""Exports a finished pyramid as one OME-TIFF file that OpenSlide, TiffSlide, QuPath and tifffile all open.

Why an export: TIFF is written front to back and cannot resume, so the run works on OME-Zarr and this module
copies its levels, tile by tile, into JPEG. Nothing is recomputed from the full image. Memory does not grow
with the slide: a few runs of tiles are in flight, whatever the width.

Why YCbCr is not named in the call: tifffile must be told ``photometric="rgb"``, the space of the *pixels*;
it then writes PhotometricInterpretation 6 and YCbCrSubSampling, which is what the JPEG streams hold.

Why the OME-XML is made here: tifffile's own carries a version-1 UUID (host address and clock). Ours is a
digest of the content, so that equal exports are equal files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import imagecodecs
import numpy as np
import tifffile

from wsi_pipeline._version import __version__
from wsi_pipeline.core.geometry import Mpp, Region, Size, ceil_div
from wsi_pipeline.core.protocols import U8_HWC, WHITE, Level, Slide
from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError, UnsupportedSlideError
from wsi_pipeline.writers.manifest import sync_folder
from wsi_pipeline.writers.tiff_hybrid import chain_subifds

__all__ = ["SYNTHETIC_MARK", "TiffConfig", "export_ometiff"]

SYNTHETIC_MARK = f"Synthetic, derived image made by wsi_pipeline {__version__}; not for primary diagnosis."

_COARSEST = 512
_RUN_PX = 4096
"""Width of what one worker reads at once: a shard of the working store."""

_SUBSAMPLING = {"4:2:0": (2, 2), "4:4:4": (1, 1)}
_OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_REMEDIES = {
    errno.ENOSPC: "free space on the disk or choose another folder",
    errno.EDQUOT: "free space within the quota or choose another folder",
    errno.EFBIG: "choose a file system without this size limit",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "choose a path whose parent is a folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENAMETOOLONG: "choose a shorter file name",
}

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (tiles written, tiles in all), from the thread that called the export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiffConfig:
    """How the OME-TIFF is encoded.

    ``quality``: JPEG quality, 1 to 100; ``subsampling``: of chroma; ``tile``: side in pixels, a multiple of
    16; ``layout``: ``"hybrid"`` shows the levels to every reader, ``"ome"`` keeps them in SubIFDs only;
    ``workers``: threads that read and encode, 0 = one per core, at most 8. Raises ConfigError.
    """

    quality: int = 90
    subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"
    tile: int = 512
    layout: Literal["hybrid", "ome"] = "hybrid"
    workers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"tiff.quality is {self.quality}; give a JPEG quality from 1 to 100")
        if self.subsampling not in _SUBSAMPLING:
            raise ConfigError(f"tiff.subsampling is {self.subsampling!r}; give '4:2:0' or '4:4:4'")
        if self.tile % 16 or not 16 <= self.tile <= _RUN_PX:
            raise ConfigError(f"tiff.tile is {self.tile}; give a multiple of 16 from 16 to {_RUN_PX}")
        if self.layout not in ("hybrid", "ome"):
            raise ConfigError(f"tiff.layout is {self.layout!r}; give 'hybrid' or 'ome'")
        if self.workers < 0:
            raise ConfigError(f"tiff.workers is {self.workers}; give 0 (one per core) or more")

    @property
    def threads(self) -> int:
        return self.workers or min(8, os.cpu_count() or 1)


def export_ometiff(
    slide: Slide,
    out: Path,
    config: TiffConfig,
    *,
    icc_profile: bytes | None = None,
    description: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Write all levels of ``slide`` to the pyramidal BigTIFF ``out`` and return its path.

    The levels must halve exactly (``Size.halved``) until no side is longer than 512 pixels; they are copied.
    ``description`` becomes key and value annotations of the OME-XML, after ``SYNTHETIC_MARK``; nothing else
    of the source is copied: no name, no path, no vendor text. ``icc_profile`` is embedded in each level.
    The file appears under its name only when it is complete; a failure leaves nothing, a kill leaves
    ``<name>.partial``. Equal input gives equal bytes.

    Raises OutputExistsError, OutputError (disk, rights), UnsupportedSlideError (no such pyramid),
    ConfigError (text that XML cannot hold), and what ``slide.read_level`` raises.
    """
    levels = _halving_levels(slide)
    notes = dict(description or {})
    xml = _ome_xml(slide, config, notes, hashlib.sha256(icc_profile or b"").hexdigest())
    with _new_file(out, overwrite) as file, _Encoder(slide, config, progress) as encoder:
        with tifffile.TiffWriter(file, bigtiff=True, byteorder="<", ome=False) as tiff:
            for number, level in enumerate(levels):
                first = number == 0
                tiff.write(
                    encoder.tiles(number),
                    shape=(level.size.height, level.size.width, 3),
                    dtype=np.uint8,
                    photometric="rgb",
                    tile=(encoder.sides[number],) * 2,
                    compression="jpeg",
                    subsampling=_SUBSAMPLING[config.subsampling],
                    subfiletype=0 if first else 1,
                    subifds=len(levels) - 1 if first else None,
                    resolution=_pixels_per_cm(slide.mpp, 2**number),
                    resolutionunit="CENTIMETER",
                    description=xml if first else None,
                    software=f"wsi_pipeline {__version__}" if first else False,
                    iccprofile=icc_profile,
                    metadata=None,
                )
        if config.layout == "hybrid":
            chain_subifds(file)
    return out


def _pixels_per_cm(mpp: Mpp, factor: int) -> tuple[float, float]:
    """Resolution of a level as TIFF wants it: (x, y), pixels in a centimetre.

    The factor is the exact power of two: odd sides were padded, not squeezed, when the level was made.
    """
    return 1e4 / (mpp[1] * factor), 1e4 / (mpp[0] * factor)


def _halving_levels(slide: Slide) -> tuple[Level, ...]:
    levels = slide.levels
    for above, below in zip(levels, levels[1:], strict=False):
        if below.size != above.size.halved():
            raise UnsupportedSlideError(
                f"{slide.slide_id}: level of {below.size.width} x {below.size.height} pixels is not half of "
                f"{above.size.width} x {above.size.height}; export a finished OME-Zarr of this pipeline",
                slide_id=slide.slide_id,
            )
    coarsest = levels[-1].size
    if max(coarsest.height, coarsest.width) > _COARSEST:
        raise UnsupportedSlideError(
            f"{slide.slide_id}: the coarsest level has {coarsest.width} x {coarsest.height} pixels, more "
            f"than {_COARSEST}; export a finished OME-Zarr of this pipeline, which has all levels",
            slide_id=slide.slide_id,
        )
    return levels


class _Encoder:
    """Reads and encodes runs of tiles in a thread pool, a bounded number ahead of the writer."""

    def __init__(self, slide: Slide, config: TiffConfig, progress: Progress | None) -> None:
        self._slide = slide
        self._config = config
        self._progress = progress
        self._done = 0
        sizes = [level.size for level in slide.levels]
        self.sides = [_tile_side(size, config.tile) for size in sizes]
        self._total = sum(_tile_count(size, side) for size, side in zip(sizes, self.sides, strict=True))
        self._white = {
            side: self._jpeg(np.full((side, side, 3), WHITE, np.uint8)) for side in set(self.sides)
        }
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="ometiff")

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def tiles(self, level: int) -> Iterator[bytes]:
        """Encoded tiles of a level, row-major."""
        ahead: deque[Future[list[bytes]]] = deque()
        for run in _runs(self._slide.levels[level].size, self.sides[level]):
            ahead.append(self._pool.submit(self._encode_run, level, run))
            if len(ahead) > 2 * self._config.threads:
                yield from self._count(ahead.popleft().result())
        while ahead:
            yield from self._count(ahead.popleft().result())

    def _count(self, tiles: list[bytes]) -> Iterator[bytes]:
        for tile in tiles:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
            yield tile  # last: tifffile never comes back after the last tile of a level

    def _encode_run(self, level: int, run: Region) -> list[bytes]:
        side = self.sides[level]
        pixels_HWC = self._slide.read_level(level, run)
        # Replicated edges: a white margin would ring into the last pixels of the slide.
        right, bottom = -run.width % side, -run.height % side
        if right or bottom:
            pixels_HWC = np.pad(pixels_HWC, ((0, bottom), (0, right), (0, 0)), mode="edge")
        tiles = (pixels_HWC[:, x : x + side] for x in range(0, pixels_HWC.shape[1], side))
        # Every tile is written, blank or not: OpenSlide before 4.0.1 refuses files with missing tiles.
        return [self._white[side] if tile.min() == WHITE else self._jpeg(tile) for tile in tiles]

    def _jpeg(self, tile_HWC: U8_HWC) -> bytes:
        return bytes(
            imagecodecs.jpeg8_encode(
                np.ascontiguousarray(tile_HWC),
                level=self._config.quality,
                colorspace="RGB",
                outcolorspace="YCBCR",
                subsampling=_SUBSAMPLING[self._config.subsampling],
            )
        )


def _tile_side(size: Size, side: int) -> int:
    """The side asked for, unless the level is much smaller: libvips refuses such tiles."""
    longest = max(size.height, size.width)
    return side if side <= 2 * longest else min(side, ceil_div(longest, 16) * 16)


def _tile_count(size: Size, side: int) -> int:
    return ceil_div(size.height, side) * ceil_div(size.width, side)


def _runs(size: Size, side: int) -> Iterator[Region]:
    """Pieces of tile rows, row-major, each some whole tiles wide and inside the level."""
    step = side * max(1, _RUN_PX // side)
    for y in range(0, size.height, side):
        for x in range(0, size.width, step):
            yield Region(y, x, min(side, size.height - y), min(step, size.width - x))


def _ome_xml(slide: Slide, config: TiffConfig, notes: dict[str, str], icc_digest: str) -> bytes:
    """OME-XML 2016-06 of one interleaved RGB image; ``TiffData`` names IFD 0, levels are found by SubIFDs."""
    for text in (*notes.keys(), *notes.values()):
        if _NOT_XML.search(text):
            raise ConfigError(f"description text {text!r} has control characters; remove them")
    content = (slide.identity, slide.mpp, __version__, icc_digest, sorted(notes.items()))
    encoding = (config.quality, config.subsampling, config.tile, config.layout)
    digest = uuid.uuid5(uuid.NAMESPACE_URL, repr((content, encoding)))
    ome = ET.Element(
        "OME",
        {
            "xmlns": _OME,
            "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
            "xsi:schemaLocation": f"{_OME} {_OME}/ome.xsd",
            "UUID": f"urn:uuid:{digest}",
            "Creator": f"wsi_pipeline {__version__}",
        },
    )
    image = ET.SubElement(ome, "Image", {"ID": "Image:0", "Name": "synthetic"})
    ET.SubElement(image, "Description").text = SYNTHETIC_MARK
    _add_pixels(image, slide.levels[0].size, slide.mpp)
    if notes:
        ET.SubElement(image, "AnnotationRef", {"ID": "Annotation:0"})
        annotations = ET.SubElement(ome, "StructuredAnnotations")
        annotation = ET.SubElement(
            annotations, "MapAnnotation", {"ID": "Annotation:0", "Namespace": "urn:wsi-pipeline:provenance"}
        )
        value = ET.SubElement(annotation, "Value")
        for key in notes:
            ET.SubElement(value, "M", {"K": key}).text = notes[key]
    xml: bytes = ET.tostring(ome, encoding="utf-8", xml_declaration=True)
    return xml


def _add_pixels(image: ET.Element, size: Size, mpp: Mpp) -> None:
    pixels = ET.SubElement(
        image,
        "Pixels",
        {
            "ID": "Pixels:0",
            "DimensionOrder": "XYCZT",
            "Type": "uint8",
            "SignificantBits": "8",
            "Interleaved": "true",
            "BigEndian": "false",
            "SizeX": str(size.width),
            "SizeY": str(size.height),
            "SizeC": "3",
            "SizeZ": "1",
            "SizeT": "1",
            "PhysicalSizeX": repr(float(mpp[1])),
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": repr(float(mpp[0])),
            "PhysicalSizeYUnit": "µm",
        },
    )
    ET.SubElement(pixels, "Channel", {"ID": "Channel:0:0", "SamplesPerPixel": "3"})
    ET.SubElement(pixels, "TiffData", {"IFD": "0", "PlaneCount": "1"})


@contextmanager
def _new_file(out: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file that gets the name ``out`` only when the block ends well; maps OSError to OutputError."""
    _refuse_existing(out, overwrite)
    partial = out.with_name(out.name + ".partial")
    mine: os.stat_result | None = None
    try:
        partial.unlink(missing_ok=True)  # left by a run that was killed
        with partial.open("x+b") as file:
            mine = os.fstat(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not _still(partial, mine):
            raise OutputError(f"{out}: another process writes this file too; run only one", path=out)
        _refuse_existing(out, overwrite)
        os.replace(partial, out)
        sync_folder(out.parent)
    except BaseException as error:
        if mine is not None and _still(partial, mine):
            with suppress(OSError):
                partial.unlink()
        if isinstance(error, OSError):
            remedy = _REMEDIES.get(error.errno or 0, "check the disk and run the export again")
            reason = error.strerror or str(error)
            raise OutputError(f"{out}: cannot be written ({reason}); {remedy}", path=out) from error
        raise


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise OutputExistsError(f"{out}: is a folder; give a file name", path=out)
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out}: exists already; choose another name or allow overwriting", path=out)


def _still(partial: Path, mine: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(partial), mine)
    return False
