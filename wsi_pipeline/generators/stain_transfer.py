"""Stain transfer: the colours of a frozen section mapped to those of routine paraffin sections.

This is a baseline. It changes colour, not structure: ice-crystal holes, blur and coarse chromatin of a frozen
section stay as they are. It is exact, fast (no GPU) and cannot invent or remove a nucleus, which makes it
the reference that a learned generator has to beat, and a sober choice where colour alone is the matter.

Method. Once per slide, never per tile (tiles fitted on their own differ in colour along their borders), the
stain vectors and strengths of haematoxylin and eosin are estimated on the thumbnail's tissue (Macenko et al.,
ISBI 2009, see ``core.stain``), relative to the slide's own glass colour. Every pixel's density is then
unmixed, scaled and remixed with the reference palette: one 3x3 matrix in density, and the glass becomes the
palette's white. Where the estimate is not to be trusted (too little tissue, one stain only, other colours),
the standard vectors of Ruifrok and Johnston 2001 stand in on both sides, so that tissue keeps its colours and
only the glass is whitened; the context records that and the reason.

Resolution. A thumbnail pixel of 8 um averages nucleus and cytoplasm: estimated vectors are closer together
and 99th-percentile strengths lower than at full resolution. The palette was therefore measured at several
resolutions (0.5 to 16 um/px) with the same code, and the rung at the thumbnail's own mpp is used, so that the
bias acts on both sides and cancels as far as frozen and paraffin tissue are equally fine-grained. What is
left depends on the tissue: thick, blurred or densely cellular frozen tissue loses less by averaging, and its
nuclei then come out paler than the palette's. On a frozen breast section (her2st C2), the 99th percentiles of
the full-resolution output, as parts of the palette's, are for thumbnails of 8, 4 and 2 um/px: haematoxylin
0.73, 0.81, 0.95; eosin 0.84, 0.91, 0.95. A finer thumbnail makes the rest smaller. Concentrations are
not clipped at zero, because vectors from averaged pixels lie inside the cone of the pure stains: clipping
would cut off exactly the pure nuclei and pure collagen of the full resolution.

The palette (``ffpe_palette.json``) holds measured facts of five Pathology Atlas slides (MIT licence); it was
written by ``scripts/measure_palette.py``, which also makes one from a laboratory's own FFPE images.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC, Context, GeneratorSpec, TileBatch
from wsi_pipeline.core.stain import Rgb, StainProfile, estimate_profile, map_density, transfer_matrix
from wsi_pipeline.errors import ConfigError, GeneratorError

__all__ = ["Palette", "StainTransfer", "load_palette"]

VERSION = 1  # raise it when pixels would change


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """How reference sections look at several resolutions: (um per pixel, profile), ascending."""

    rungs: tuple[tuple[float, StainProfile], ...]
    digest: str

    def at(self, mpp: Mpp) -> StainProfile:
        """Profile at the geometric mean of ``mpp``, interpolated in its logarithm, constant beyond."""
        position = 0.5 * (np.log(mpp[0]) + np.log(mpp[1]))
        ladder = np.log([um for um, _ in self.rungs])
        table = np.array([[*p.stains[0], *p.stains[1], *p.strengths] for _, p in self.rungs])
        values = np.array([np.interp(position, ladder, column) for column in table.T])
        h, e = values[:3], values[3:6]
        return StainProfile(
            stains=(_as_rgb(h / np.linalg.norm(h)), _as_rgb(e / np.linalg.norm(e))),
            strengths=(float(values[6]), float(values[7])),
            white=self.rungs[0][1].white,
        )


def load_palette(path: Path | None) -> Palette:
    """The palette of a file, or the shipped one for None; raises ConfigError where it is not a palette."""
    name = str(path) if path else "ffpe_palette.json"
    try:
        text = (
            path.read_text(encoding="utf-8")
            if path
            else resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        )
        data = json.loads(text)
        rungs = tuple(
            (float(rung["mpp"]), StainProfile.from_json({**rung, "white": data["white"]}))
            for rung in data["rungs"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{name}: not a stain palette ({error}); write one with scripts/measure_palette.py"
        ) from error
    resolutions = [um for um, _ in rungs]
    if not rungs or resolutions != sorted(set(resolutions)) or resolutions[0] <= 0:
        raise ConfigError(f"{name}: a palette needs rungs of ascending mpp; write it with measure_palette.py")
    return Palette(rungs=rungs, digest=hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class StainTransfer:
    """Maps the slide's H&E colours to an FFPE palette; changes colour, not structure.

    ``strength``: 0 leaves the slide as it is, 1 takes the palette fully; between, the map of densities is
    interpolated. ``palette``: file written by ``scripts/measure_palette.py``, None for the shipped one.
    ``tile``: side in pixels; ``batch``: tiles per call. Raises ConfigError for values out of range or a file
    that is no palette.
    """

    strength: float = 1.0
    palette: Path | None = None
    tile: int = 1088
    batch: int = 4
    _loaded: Palette = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ConfigError(f"generator stain_transfer: strength={self.strength}: must be between 0 and 1")
        if self.tile < 1 or self.batch < 1:
            raise ConfigError(
                f"generator stain_transfer: tile={self.tile}, batch={self.batch}: both must be >= 1"
            )
        # Read now, so that a bad file stops the run before it starts, and workers need not have the file.
        object.__setattr__(self, "_loaded", load_palette(self.palette))

    @property
    def spec(self) -> GeneratorSpec:
        # Tile and batch are left out: no pixel depends on them.
        identity = {
            "kind": "stain_transfer",
            "version": VERSION,
            "strength": self.strength,
            "palette": self._loaded.digest,
        }
        return GeneratorSpec(
            kind="stain_transfer",
            tile=self.tile,
            halo=0,
            align=1,
            mpp=None,
            batch=self.batch,
            digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            exact=True,
            stain="h&e",
            overlap=min(64, self.tile // 2),
        )

    def prepare(self, thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], mpp: Mpp) -> Context:
        """Profiles of the slide (``source``) and of the palette at this mpp (``target``), as JSON.

        ``source.fallback`` says why standard vectors stand in, "" where the slide's own were measured.
        """
        source = estimate_profile(thumbnail_HWC, tissue_HW)
        return {"source": source.to_json(), "target": self._loaded.at(mpp).to_json()}

    def __call__(self, batch: TileBatch, context: Context) -> U8_BHWC:
        """Recoloured pixels; raises GeneratorError where the context is not one that ``prepare`` made."""
        return self._recolour(batch.pixels_BHWC, context)

    def background(self, pixels_HWC: U8_HWC, context: Context) -> U8_HWC:
        """The same map as for tiles, so that nothing shows where tiles end."""
        return self._recolour(pixels_HWC, context)

    def _recolour(self, pixels: npt.NDArray[np.uint8], context: Context) -> npt.NDArray[np.uint8]:
        try:
            source = StainProfile.from_json(context["source"])
            target = StainProfile.from_json(context["target"])
        except (KeyError, TypeError, ValueError) as error:
            raise GeneratorError(
                f"generator stain_transfer: no stain profiles in the context ({error!r}); run prepare again",
                spec=self.spec,
            ) from error
        share = self.strength
        matrix = (1.0 - share) * np.eye(3) + share * transfer_matrix(source, target)
        log_white = (1.0 - share) * np.log(source.white) + share * np.log(target.white)
        return map_density(pixels, matrix, source.white, _as_rgb(np.exp(log_white)))


def _as_rgb(values: npt.NDArray[Any]) -> Rgb:
    r, g, b = (float(value) for value in values)
    return r, g, b
