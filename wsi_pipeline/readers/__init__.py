"""Readers: bytes in, native pixels out. ``open_slide`` is the one door.

The file's content decides which readers are asked, in which order; the first that understands it opens it.
Heavy libraries are imported with the reader that needs them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.errors import ConfigError, UnsupportedSlideError
from wsi_pipeline.readers._base import FOREIGN_ERRORS, NotThisReaderError, reason, slide_name
from wsi_pipeline.readers._source import file_name, is_remote, open_source, remote_errors
from wsi_pipeline.readers.mpp import MppClaim, plausible, read_mpp_table

__all__ = ["READERS", "open_slide"]

READERS: dict[str, str] = {
    "tiff": "wsi_pipeline.readers.tiff:TiffSlide",
    "openslide": "wsi_pipeline.readers.openslide:OpenSlideSlide",
    "omezarr": "wsi_pipeline.readers.omezarr:OmeZarrSlide",
    "image": "wsi_pipeline.readers.image:ImageSlide",
}

_ZARR_MARKERS = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata", ".zarray")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LFS = b"version https://git-lfs"


def open_slide(
    path: str | Path,
    *,
    mpp: Mpp | float | None = None,
    mpp_table: Path | None = None,
    reader: str = "auto",
    transform: str | Path | None = None,
) -> Slide:
    """Open a slide file, an OME-Zarr folder, or an fsspec URL of a TIFF or OME-Zarr.

    ``mpp``: micrometres per pixel ((y, x), or one number for both) that wins over whatever the file says;
    ``mpp_table``: CSV ``slide,mpp[,mpp_y]`` of such overrides, used for the slides that it lists; ``reader``:
    ``"auto"``, a name in ``READERS``, or ``"my_lab.module:Class"`` (called with the path and
    ``mpp=MppClaim | None``); ``transform``: a ``pair.json`` of ``wsi-pipeline register``, through which the
    slide is read as if it lay where the fixed slide lies.

    Raises UnsupportedSlideError (no such file, empty, Git LFS pointer, unknown or unwanted content; it says
    what was tried), MissingMppError, MppConflictError, CorruptRegionError, and ConfigError for
    a bad override, table or reader name.
    """
    text = str(path)
    override = _override(text, mpp, mpp_table)
    names = _candidates(text) if reader == "auto" else [reader]
    refusals: list[str] = []
    for name in names:
        slide = _load(name)(text, mpp=override)
        try:
            slide.levels, slide.mpp  # noqa: B018  opens the file and settles its mpp, here rather than mid-run
        except NotThisReaderError as error:
            refusals.append(str(error).removeprefix(f"{file_name(text)}: "))
            continue
        return slide if transform is None else _warped(slide, transform)
    raise UnsupportedSlideError(
        f"{file_name(text)}: no reader opens it ({'; '.join(refusals)}); convert it to a pyramidal "
        "TIFF first: vips tiffsave IN OUT.tif --tile --pyramid",
        slide_id=slide_name(text),
    )


def _warped(slide: Slide, transform: str | Path) -> Slide:
    from wsi_pipeline.readers.warped import WarpedSlide, load_pair

    return WarpedSlide(slide, load_pair(transform))


def _override(path: str, mpp: Mpp | float | None, mpp_table: Path | None) -> MppClaim | None:
    if mpp is not None:
        pair = (float(mpp), float(mpp)) if isinstance(mpp, int | float) else (float(mpp[0]), float(mpp[1]))
        if not all(math.isfinite(value) and value > 0 for value in pair):
            raise ConfigError(f"--mpp {mpp}: a pixel size is a positive number of micrometres")
        if not plausible(pair):
            raise ConfigError(f"--mpp {mpp}: no slide has such a pixel size; give 0.02 to 20 µm per pixel")
        return MppClaim("--mpp", pair)
    if mpp_table is not None:
        table = read_mpp_table(mpp_table)
        name = file_name(path)
        for key in (name, slide_name(path), Path(name).stem):
            if key in table:
                return MppClaim(f"mpp table {Path(mpp_table).name}", table[key])
    return None


def _load(name: str) -> Callable[..., Slide]:
    target = READERS.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ConfigError(
            f"reader {name!r}: unknown; choose from auto, {', '.join(READERS)} or give module:Class"
        )
    try:
        loaded: Callable[..., Slide] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reader {name!r}: cannot be imported ({error})") from error
    return loaded


def _candidates(path: str) -> list[str]:
    """Names of the readers to ask, in order, by what the path holds."""
    name, slide_id = file_name(path), slide_name(path)
    if not is_remote(path) and os.path.isdir(path):
        return _folder_candidates(path, name, slide_id)
    if is_remote(path) and ".zarr" in name:
        return ["omezarr"]
    if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UnsupportedSlideError(f"{path}: is no regular file", slide_id=slide_id)
    try:
        source = open_source(path)
        head = source.pread(0, 256)
    except FileNotFoundError as error:
        raise UnsupportedSlideError(
            path + (": no such file, or no answer from its server" if is_remote(path) else ": no such file"),
            slide_id=slide_id,
        ) from error
    except ImportError as error:
        raise UnsupportedSlideError(f"{path}: {reason(error)}", slide_id=slide_id) from error
    except (*FOREIGN_ERRORS, *remote_errors()) as error:
        raise UnsupportedSlideError(
            f"{path}: cannot be opened ({reason(error)})", slide_id=slide_id
        ) from error
    if not head:
        raise UnsupportedSlideError(
            f"{name}: the file is empty; copy it again from its source", slide_id=slide_id
        )
    if head.startswith(_LFS):
        raise UnsupportedSlideError(
            f"{name}: a Git LFS pointer, not the slide itself; run git lfs pull", slide_id=slide_id
        )
    if head.startswith(_TIFF):
        return ["tiff", "image"] if is_remote(path) else ["tiff", "openslide", "image"]
    if head.startswith((b"\xff\xd8", b"\x89PNG")) and not name.lower().endswith(".mrxs"):
        return ["image"]
    return ["openslide"]


def _folder_candidates(path: str, name: str, slide_id: str) -> list[str]:
    if name.endswith(".partial") or any(
        os.path.exists(os.path.join(path, marker)) for marker in _ZARR_MARKERS
    ):
        return ["omezarr"]
    raise UnsupportedSlideError(
        f"{name}: a folder, and no OME-Zarr; name the slide file instead (for MIRAX the .mrxs beside it, "
        "for DICOM one .dcm of the series)",
        slide_id=slide_id,
    )
