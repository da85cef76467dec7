"""A blinded study as one web page: real and synthetic tiles in an order that tells nothing, and a key apart.

Why ids and order come from a keyed hash of the pixels alone. Readers may look into the page. A counter, a
file name or a shuffle that a small seed reproduces would tell which tile came from which folder; a hash of
secret and pixels is the same whichever folder the tile lay in.

Why everything is encoded again. Readers must judge tissue, not files: all tiles are JPEG of one quality with
full colour resolution and the standard tables, without metadata, filled up to one length. What an earlier
lossy compression left in the pixels of one side stays, and is warned of.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from wsi_pipeline.cohorts.tiles import TileIndex, TileReader
from wsi_pipeline.core.sampling import permutation_at, stream_key
from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError
from wsi_pipeline.study.statistics import size_for_equivalence, size_for_interval

__all__ = ["COUNT", "KEY_KIND", "Pack", "pack"]

COUNT = 108
"""Images of each kind where nobody says: both together are enough for equivalence."""
KEY_KIND = "wsi-pipeline study key"
LOSSY = {6, 7, 33003, 33004, 33005, 34712, 34892, 50001}
"""TIFF compressions: JPEG, JPEG 2000, lossy JPEG of DNG, WebP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """What was written: the ``page`` for readers, the ``key`` for nobody else, ``images`` in all."""

    page: Path
    key: Path
    study: str
    images: int
    side: tuple[int, ...]
    warnings: tuple[str, ...]


def pack(
    real: TileIndex, synthetic: TileIndex, page: Path, *, count: int | None, seed: int | None, quality: int
) -> Pack:
    """Write the page of a study and ``NAME.key.json`` beside it, ``count`` tiles of each index at random.

    Without ``seed`` no one can repeat it. ``quality``: of the JPEGs, 1 to 100. Raises ConfigError for too few
    tiles, tiles of several sizes or one picture twice, OutputError and OutputExistsError.
    """
    key_path, have = page.with_suffix(".key.json"), min(len(real), len(synthetic))
    if page.exists() or key_path.exists():
        raise OutputExistsError(f"{page}: page or key is there already, and a study is kept", path=page)
    count = min(COUNT, have) if count is None else count
    if not 0 < count <= have or not 1 <= quality <= 100:
        raise ConfigError(f"study: {count} tiles at quality {quality}; 1 to {have} tiles at 1 to 100 can be")
    seed = secrets.randbits(64) if seed is None else seed
    salt = stream_key(seed, "study").to_bytes(16, "little")
    tiles, jpegs, shapes = {}, {}, set()
    lossy: dict[str, bool] = {}
    for truth, index in (("real", real), ("synthetic", synthetic)):
        reader, order = TileReader(index), stream_key(seed, truth)
        for row in (permutation_at(number, len(index), order) for number in range(count)):
            pixels_HWC, slide = reader.read(row), index.slide(row)
            shapes.add(pixels_HWC.shape[:2])
            name = hashlib.blake2b(pixels_HWC.tobytes(), key=salt, digest_size=8).hexdigest()
            if name in tiles or len(shapes) > 1:
                raise ConfigError(f"{slide.path}: a tile of another size, or one that is in the study twice")
            tiles[name] = {"truth": truth, "name": slide.name, "region": index.region_N4[row].tolist()}
            file = io.BytesIO()
            Image.fromarray(pixels_HWC).save(file, "JPEG", quality=quality, subsampling="4:4:4")
            jpegs[name] = file.getvalue()
            lossy[truth] = lossy.get(truth, False) or _is_lossy(slide.path)
        reader.close()
    study = hashlib.blake2b("".join(sorted(tiles)).encode(), key=salt, digest_size=6).hexdigest()
    key = {"kind": KEY_KIND, "study": study, "seed": seed, "quality": quality, "tiles": tiles}
    side = shapes.pop()
    try:
        key_path.write_text(json.dumps(key, indent=1), "utf-8")
        page.write_text(_page(study, side, jpegs, salt), "utf-8")
    except OSError as error:
        raise OutputError(f"{page}: cannot be written ({error.strerror or error})", path=page) from error
    warnings = tuple(_warnings(real, synthetic, lossy, len(tiles)))
    return Pack(page=page, key=key_path, study=study, images=len(tiles), side=side, warnings=warnings)


def _page(study: str, side: tuple[int, ...], jpegs: dict[str, bytes], salt: bytes) -> str:
    longest = max(map(len, jpegs.values()))
    random = np.random.Generator(np.random.Philox(int.from_bytes(salt, "little")))
    tiles = []
    for name, jpeg in sorted(jpegs.items()):
        filled = jpeg + random.bytes(longest - len(jpeg))  # decoders stop at the end mark
        tiles.append({"id": name, "jpeg": base64.b64encode(filled).decode()})
    data = json.dumps({"id": study, "height": side[0], "width": side[1], "tiles": tiles})
    return files("wsi_pipeline.study").joinpath("page.html").read_text("utf-8").replace("{{study}}", data)


def _is_lossy(path: str) -> bool:
    """Whether a file holds pixels that lost something; slides of scanners' own formats do."""
    ending = Path(path).suffix.lower()
    if ending in (".tif", ".tiff"):
        with tifffile.TiffFile(path) as tiff:
            return int(tiff.pages.first.compression) in LOSSY
    return ending not in (".png", ".zarr")


def _warnings(real: TileIndex, synthetic: TileIndex, lossy: dict[str, bool], images: int) -> list[str]:
    found = []
    if lossy["real"] != lossy["synthetic"]:
        which = "real" if lossy["real"] else "synthetic"
        found.append(f"only the {which} tiles are of lossy files; traces of compression may tell them apart")
    if real.mpp and synthetic.mpp and not np.allclose(real.mpp, synthetic.mpp, rtol=0.05):
        found.append(
            f"pixel sizes differ ({real.mpp[1]:g} and {synthetic.mpp[1]:g}) and may tell sides apart"
        )
    if images < size_for_interval():
        found.append(
            f"{images} images are few: a reader's accuracy to 10 points takes {size_for_interval()}, "
            f"equivalence to chance {size_for_equivalence()}"
        )
    return found
