"""Translators other than Diffusion-FFPE on tiles: one pass (pix2pix, aligned training) or many (paths).

Many steps are as independent of tiling as one. All noise belongs to the slide's lattice (``core.noise``):
jump k of the sampler draws the field of step k at the tile's place, so tiles see equal noise where they
overlap, and a tile alone, in a batch, or after a resume gets the same. It is drawn on the CPU one jump ahead,
while the network runs.

Exactness. As in ``lora_turbo``: on a CPU each tile runs alone on one core, so bits do not depend on the
batch; on CUDA the promise is one grey level a step."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.noise import lattice_normal
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC, Context, GeneratorSpec, TileBatch
from wsi_pipeline.errors import CheckpointError, ConfigError, GeneratorError
from wsi_pipeline.generators._glass import measure_glass, scaled
from wsi_pipeline.generators._torch import (
    Dtype,
    TileRunner,
    batch_for,
    choose_device,
    choose_dtype,
    from_uint8,
    tile_runner,
    to_uint8,
)
from wsi_pipeline.translators.bundle import (
    TranslatorFacts,
    build_translator,
    load_translator,
    load_translator_facts,
)
from wsi_pipeline.translators.parts import Parts, make_parts
from wsi_pipeline.translators.sampler import draw
from wsi_pipeline.translators.settings import SamplingConfig

__all__ = ["Translator"]

VERSION = 1  # raise it when pixels would change
RUNS = 4096
"""Steps of noise that one run may use; the next run begins after them."""
BYTES_A_PIXEL = 1500  # of activations, for each byte of the type


@dataclass(frozen=True, slots=True, kw_only=True)
class Translator:
    """Other translators (pix2pix, bridges, wavelet diffusion, aligned training): needs a weights file.

    ``weights``: made by `wsi-pipeline train` or `wsi-pipeline models import --kind`; ``nfe``: calls of the
    network a tile, ``method`` and ``guidance``: of the sampler, None for those of the file; ``label``: name
    or number of a class; ``run``: another number draws other noise; ``stop_after``: show the state after so
    many jumps (0: the start), None the result; ``stopped``: show the ``state`` itself or the ``estimate`` of
    the result at that point; ``device``, ``dtype``, ``batch``, ``max_vram``, ``tile``, ``halo``, ``mpp``: as
    of ``lora_turbo``. Raises ConfigError for values that cannot work, CheckpointError for a file that is
    none."""

    kind: ClassVar[str] = "translator"

    weights: Path
    nfe: int | None = None
    method: Literal["ancestral", "ddim", "dpmsolver"] | None = None
    guidance: float | None = None
    label: int | str | None = None
    run: int = 0
    stop_after: int | None = None
    stopped: Literal["state", "estimate"] = "state"
    device: str = "auto"
    dtype: Dtype = "float32"
    batch: int | None = None
    max_vram: float | None = None
    tile: int | None = None
    halo: int | None = None
    mpp: float | None = None
    _facts: TranslatorFacts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        facts = load_translator_facts(self.weights)
        object.__setattr__(self, "_facts", facts)
        spec, where = facts.spec, f"generator {self.kind}"
        if spec.axes != "yx" or spec.channels != 3:
            raise ConfigError(f"{self.weights}: is made for volumes; use `wsi-pipeline sample --source`")
        if spec.diffusion is not None:
            spec.diffusion.check_translates(str(self.weights))
        for name, side, unit in (("tile", self.side, spec.multiple), ("halo", self.border, spec.alignment)):
            if side % unit:
                raise ConfigError(f"{where}: {name}={side}: must be a multiple of {unit}")
        if self.side < 16 or not 0 <= 2 * self.border < self.side:
            raise ConfigError(f"{where}: tile={self.side}, halo={self.border}: leave nothing to write")
        if self.run < 0 or self._sampling.nfe >= RUNS:
            raise ConfigError(f"{where}: run is 0 or more, nfe below {RUNS}")
        if self.stop_after is not None and not (
            spec.diffusion and 0 <= self.stop_after <= self._sampling.nfe
        ):
            raise ConfigError(
                f"{where}: stop_after={self.stop_after}: give 0 to {self._sampling.nfe} of a path"
            )
        self._label()
        choose_dtype(self.dtype, choose_device(self.device))

    @property
    def side(self) -> int:
        """Side of a tile in pixels."""
        return self.tile or self._facts.spec.tile

    @property
    def border(self) -> int:
        """The halo: a sixteenth of the tile unless another is given."""
        unit = self._facts.spec.alignment
        return self.side // 16 // unit * unit if self.halo is None else self.halo

    @property
    def _sampling(self) -> SamplingConfig:
        given: dict[str, Any] = {"nfe": self.nfe, "method": self.method, "guidance": self.guidance}
        return replace(
            self._facts.spec.sampling, **{key: value for key, value in given.items() if value is not None}
        )

    @property
    def spec(self) -> GeneratorSpec:
        device = choose_device(self.device)
        mpp, written = self.mpp or self._facts.spec.mpp, self.side - 2 * self.border
        # Strides that networks halve without a rest, as far as tiles then still overlap by a fifth.
        unit = max(self._facts.spec.alignment, min(self._facts.spec.multiple, self.side // 8))
        wish = {"kind": self.kind, "version": VERSION, "tile": self.side, **self._facts_for_people(device)}
        overlap = written - written * 4 // 5 // unit * unit
        dtype = choose_dtype(self.dtype, device)
        tile_bytes = self.side**2 * BYTES_A_PIXEL * dtype.itemsize
        return GeneratorSpec(
            kind=self.kind,
            tile=self.side,
            halo=self.border,
            align=unit,
            mpp=(mpp, mpp),
            batch=self.batch or batch_for(device, self._facts.size_bytes, tile_bytes, self.max_vram),
            digest=hashlib.sha256(json.dumps(wish, sort_keys=True).encode()).hexdigest(),
            exact=device.type == "cpu",
            stain="any",
            overlap=overlap,
        )

    def prepare(self, thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], mpp: Mpp) -> Context:
        """What made the pixels, for the manifest, and what becomes of the slide's glass."""
        glass = measure_glass(thumbnail_HWC, tissue_HW, self.side, lambda p: self._translated(p, (), 0))
        notices = [f"{self.kind} changes structure: detail of the output may be invented, or missing"]
        if self._facts.spec.network.norm == "instance":
            notices.append("instance norms look at each tile alone: neighbouring tiles may differ in colour")
        if glass["reason"]:
            notices.append(
                f"glass around tiles stays as it is ({glass['reason']}): tile borders may show there"
            )
        return {**self._facts_for_people(choose_device(self.device)), "glass": glass, "notices": notices}

    def __call__(self, batch: TileBatch, context: Context) -> U8_BHWC:
        """Translated tiles. Raises GeneratorError where the device has no room for one tile, CheckpointError
        where the file changed since the run began."""
        return self._translated(
            batch.pixels_BHWC, [(t.read.y, t.read.x) for t in batch.tiles], batch.noise_key
        )

    def background(self, pixels_HWC: U8_HWC, context: Context) -> U8_HWC:
        """Each channel scaled as the network scales this slide's glass."""
        return scaled(pixels_HWC, context, self.spec)

    def _translated(self, pixels_BHWC: U8_BHWC, places: Any, key: int) -> U8_BHWC:
        corners_B2 = np.zeros((len(pixels_BHWC), 2), np.float32)  # exact up to 16 million pixels
        if len(places):
            corners_B2[: len(places)] = places
        device = choose_device(self.device)
        with _LOADING:
            runner = _runner(self, self._facts.identity, device, min(self.spec.batch, len(pixels_BHWC)), key)
        return runner(pixels_BHWC, corners_B2)

    def _label(self) -> int | None:
        diffusion, names = self._facts.spec.diffusion, self._facts.spec.classes
        classes = diffusion.condition.classes if diffusion else 0
        number = names.index(self.label) if self.label in names else self.label
        if (number is None) != (classes == 0) or (
            number is not None and not (isinstance(number, int) and 0 <= number < classes)
        ):
            known = ", ".join(names) or (f"0 to {classes - 1}" if classes else "none")
            raise ConfigError(f"generator {self.kind}: label={self.label}: choose from {known}")
        return number

    def _facts_for_people(self, device: torch.device) -> dict[str, Any]:
        """Everything that decides a pixel, by the names of the options."""
        sampling = asdict(self._sampling) if self._facts.spec.diffusion else {}
        return {
            "weights": self._facts.identity,
            "source": self._facts.spec.source,
            **sampling,
            "label": self.label,
            "run": self.run,
            "stop_after": self.stop_after,
            "stopped": self.stopped,
            "dtype": str(choose_dtype(self.dtype, device)).removeprefix("torch."),
            "device": device.type,
        }


_LOADING = threading.Lock()
"""Without it two threads that ask at once would each load the weights."""


@functools.lru_cache(maxsize=1)
def _network(path: Path, identity: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The network, once in each process."""
    facts, tensors = load_translator(path)
    if facts.identity != identity:
        raise CheckpointError(f"{path}: changed since the run began; start it again")
    return build_translator(facts.spec, tensors, device).to(dtype)


@functools.lru_cache(maxsize=4)
def _runner(owner: Translator, identity: str, device: torch.device, batch: int, key: int) -> TileRunner:
    """A runner for one slide's noise, kept because it remembers that memory ran out."""
    dtype = choose_dtype(owner.dtype, device)
    net = _network(owner.weights, identity, device, dtype)
    diffusion, (low, high) = owner._facts.spec.diffusion, owner._facts.spec.value_range
    parts = None if diffusion is None else make_parts(diffusion)

    def network(x: Tensor, *rest: Tensor) -> Tensor:
        made: Tensor = net(x.to(dtype), *rest).float()
        return made

    def translate(pixels_BHWC: Tensor, corners_B2: Tensor | None) -> Tensor:
        image = (from_uint8(pixels_BHWC) + 1.0) * ((high - low) / 2.0) + low
        if parts is None or corners_B2 is None:
            made = network(image)
        else:
            made = _drawn(owner, network, parts, image, corners_B2, key)
        if not made.isfinite().all():
            raise GeneratorError(
                f"{owner.weights}: makes values that are not numbers; its weights are damaged"
            )
        return to_uint8((made - low) * (2.0 / (high - low)) - 1.0, "round")

    return tile_runner(translate, device, batch)


class _Stopped(Exception):
    """Carries the picture at which the sampler shall stop."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.picture = picture


def _drawn(
    owner: Translator,
    network: Callable[..., Tensor],
    parts: Parts,
    image: Tensor,
    corners_B2: Tensor,
    key: int,
) -> Tensor:
    """What the sampler makes of tiles [B, 3, H, W] at these corners."""
    spec, label = owner._facts.spec, owner._label()

    def watch(k: int, n: int, state: Tensor, estimate: Tensor) -> None:
        if k + 1 == owner.stop_after:
            raise _Stopped(state if owner.stopped == "state" else estimate)

    regions = [Region(int(y), int(x), *image.shape[-2:]) for y, x in corners_B2.tolist()]
    with _drawn_ahead(regions, key, owner.run * RUNS, spec.channels, image.device) as noise:
        if owner.stop_after == 0:
            return noise(0) if parts.path.from_noise else image
        try:
            return draw(
                network,
                parts,
                owner._sampling,
                source=image,
                label=None if label is None else torch.full((len(image),), label, device=image.device),
                noise=noise,
                value_range=spec.value_range,
                watch=watch,
            )
        except _Stopped as stopped:
            return stopped.picture


@contextmanager
def _drawn_ahead(
    regions: list[Region], key: int, first: int, channels: int, device: torch.device
) -> Iterator[Callable[[int], Tensor]]:
    """Noise of jump k, [B, C, H, W]; that of the next jump is drawn meanwhile, off the critical path."""

    def made(k: int) -> Tensor:
        fields = [lattice_normal(r, key=key, channels=channels, step=first + k) for r in regions]
        return torch.from_numpy(np.stack(fields))

    coming: dict[int, Future[Tensor]] = {}
    with ThreadPoolExecutor(1, "noise") as pool:

        def noise(k: int) -> Tensor:
            now = coming.pop(k).result() if k in coming else made(k)
            coming.setdefault(k + 1, pool.submit(made, k + 1))
            return now.to(device, non_blocking=True)

        yield noise
