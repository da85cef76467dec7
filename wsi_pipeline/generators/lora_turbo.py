"""Diffusion-FFPE on tiles: the one-step LoRA generator of ``models.lora_turbo`` behind the generator seam.

Zhang et al., BIBM 2024. It changes structure, not only colour: it can invent and remove detail, so its output
is an illustration of how the tissue might look in paraffin, never evidence.

Speed. Adapters are merged into the weights when they are loaded; only what one direction needs is loaded;
networks run in bfloat16 or float16 where the device is good at it, in channels-last order, with the last
layers and the one-step formula in float32 (an error of eps is multiplied by 14.6).

Exactness. On a CPU each tile runs alone on one core, so its bits depend neither on the batch nor on the
number of cores or workers. On CUDA kernels are chosen by batch size, and the promise is one grey level.

Glass: the published model was not trained to keep it as it is (``_glass``).

The tile grid. Defaults come from measured seam figures (``tests/benchmarks/lora_turbo_seams.md``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
from dataclasses import dataclass, field
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
    Rounding,
    TileRunner,
    batch_for,
    choose_device,
    choose_dtype,
    from_uint8,
    one_core_each,
    tile_runner,
    to_uint8,
)
from wsi_pipeline.models.assemble import assemble
from wsi_pipeline.models.bundle import BundleFacts, load_bundle, load_facts
from wsi_pipeline.models.layout import VAES, Direction
from wsi_pipeline.models.lora_turbo import CELLS, SIZE_MULTIPLE, Translator
from wsi_pipeline.models.weights import tensors_digest

__all__ = ["LoraTurbo"]

VERSION = 1  # raise it when pixels would change
LATENT_PX = 8
BYTES_A_PIXEL = 2000  # of activations, for each byte of the type; measured on full-size networks at 512 px
STRIDE_MULTIPLE = (
    64  # the UNet halves the latent three times: other strides change its phase from tile to tile
)
HALO = (
    16  # puts tile borders beside, not onto, the cell lines of neighbouring tiles; at stride 384 it is free
)
SMALLEST_WITH_HALO = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTurbo:
    """One-step LoRA diffusion generator (Diffusion-FFPE): changes structure; needs imported weights.

    ``weights``: bundle made by ``wsi-pipeline models import``; ``direction``: ``a2b`` frozen to FFPE,
    ``b2a`` back; ``prompt``: one of the bundle's captions (None: the direction's); ``latent``: ``mode``, or
    ``sample`` with noise that belongs to the slide; ``gamma``: strength of the skip connections;
    ``rounding``: of the last step, ``truncate`` as the published program; ``device``: auto, cpu, cuda,
    cuda:N; ``batch``: tiles a call (None: from free memory, at most ``max_vram`` GiB); ``compile``:
    torch.compile; ``tile``, ``mpp``: None for the bundle's; ``halo``: pixels around a tile that are read and
    thrown away, None for 16 where the tile has 256 or more. Raises ConfigError for values that cannot work,
    CheckpointError where the bundle is missing, damaged or of another kind.
    """

    kind: ClassVar[str] = "lora_turbo"

    weights: Path
    direction: Direction = "a2b"
    prompt: str | None = None
    latent: Literal["mode", "sample"] = "mode"
    gamma: float = 1.0
    rounding: Rounding = "round"
    device: str = "auto"
    dtype: Dtype = "auto"
    unet_dtype: Dtype = "float32"
    batch: int | None = None
    max_vram: float | None = None
    compile: bool = False
    tile: int | None = None
    halo: int | None = None
    mpp: float | None = None
    _facts: BundleFacts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Read now, so that a wrong file stops the run before it starts.
        facts = load_facts(self.weights)
        object.__setattr__(self, "_facts", facts)
        if self.direction not in facts.directions:
            raise ConfigError(
                f"{self.weights}: has no direction {self.direction}; give {facts.directions[0]}"
            )
        if self.prompt is not None and self.prompt not in facts.prompts.values():
            known = ", ".join(f"'{text}'" for text in facts.prompts.values())
            raise ConfigError(
                f"{self.weights}: holds no embedding of '{self.prompt}', only of {known}; import the "
                "checkpoint again with --prompt-a2b"
            )
        _check_tile(self.kind, self.side, self.border)
        for name in ("batch", "max_vram", "mpp"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"generator {self.kind}: {name}={value}: must be above 0 and finite")
        if not 0.0 <= self.gamma <= 10.0:
            raise ConfigError(
                f"generator {self.kind}: gamma={self.gamma}: must be between 0 and 10; 1 is as trained"
            )
        for dtype in (self.dtype, self.unet_dtype):
            choose_dtype(dtype, choose_device(self.device))

    @property
    def side(self) -> int:
        """Side of a tile in pixels."""
        return self._facts.tile if self.tile is None else self.tile

    @property
    def border(self) -> int:
        """The halo: ``HALO`` where the tile is large enough for it, unless another is given."""
        return self.halo if self.halo is not None else HALO if self.side >= SMALLEST_WITH_HALO else 0

    @property
    def _overlap(self) -> int:
        """A fifth of what a tile writes or more, so that the stride is a multiple of ``STRIDE_MULTIPLE``."""
        written = self.side - 2 * self.border
        stride = max(1, written * 4 // 5 // STRIDE_MULTIPLE) * STRIDE_MULTIPLE
        return max(0, written - stride)

    @property
    def spec(self) -> GeneratorSpec:
        device = choose_device(self.device)
        mpp = self.mpp or self._facts.mpp
        identity = {
            "kind": self.kind,
            "version": VERSION,
            "tile": self.side,
            **self._facts_for_people(device),
        }
        return GeneratorSpec(
            kind=self.kind,
            tile=self.side,
            halo=self.border,
            align=STRIDE_MULTIPLE,
            mpp=(mpp, mpp),
            batch=self.batch or self._automatic_batch(device),
            digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            exact=device.type == "cpu",
            stain="h&e",
            overlap=self._overlap,
            cell=self.side // CELLS if VAES[self.direction][1] in self._facts.vaes else None,
        )

    def prepare(self, thumbnail_HWC: U8_HWC, tissue_HW: npt.NDArray[np.bool_], mpp: Mpp) -> Context:
        """What made the pixels, for the manifest, and what becomes of the slide's glass."""
        glass = measure_glass(thumbnail_HWC, tissue_HW, self.side, self._runner(1))
        notices = [f"{self.kind} changes structure: detail of the output may be invented, or missing"]
        if glass["reason"]:
            notices.append(
                f"glass around tiles stays as it is ({glass['reason']}): tile borders may show there"
            )
        return {**self._facts_for_people(choose_device(self.device)), "glass": glass, "notices": notices}

    def __call__(self, batch: TileBatch, context: Context) -> U8_BHWC:
        """Translated tiles. Raises GeneratorError where the device has no room for one tile, CheckpointError
        where the bundle changed or vanished since the run began."""
        return self._runner(len(batch.pixels_BHWC))(batch.pixels_BHWC, self._noise(batch))

    def background(self, pixels_HWC: U8_HWC, context: Context) -> U8_HWC:
        """Each channel scaled as the generator scales this slide's glass."""
        return scaled(pixels_HWC, context, self.spec)

    def _facts_for_people(self, device: torch.device) -> dict[str, Any]:
        """Everything that decides a pixel, by the names of the options."""
        facts = self._facts
        return {
            "weights": facts.identity,
            "base": facts.base_digest,
            "base_name": facts.base_name,
            "direction": self.direction,
            "prompt": self.prompt or facts.prompts[self.direction],
            "latent": self.latent,
            "gamma": self.gamma,
            "rounding": self.rounding,
            "dtype": str(choose_dtype(self.dtype, device)).removeprefix("torch."),
            "unet_dtype": str(choose_dtype(self.unet_dtype, device)).removeprefix("torch."),
            "device": device.type,
            "compiled": self.compile,
        }

    def _automatic_batch(self, device: torch.device) -> int:
        dtype = choose_dtype(self.dtype, device)
        weights = self._facts.size_bytes * dtype.itemsize // torch.float32.itemsize
        return batch_for(device, weights, self.side**2 * BYTES_A_PIXEL * dtype.itemsize, self.max_vram)

    def _runner(self, count: int) -> TileRunner:
        device = choose_device(self.device)
        with _LOADING:
            return _runner(
                self.weights,
                self._facts.identity,
                self.direction,
                self.prompt,
                device,
                choose_dtype(self.dtype, device),
                choose_dtype(self.unet_dtype, device),
                self.compile,
                self.gamma,
                self.rounding,
                min(self.spec.batch, count),
            )

    def _noise(self, batch: TileBatch) -> npt.NDArray[np.float32] | None:
        if self.latent == "mode":
            return None
        channels, side = int(self._facts.vae_config["latent_channels"]), self.side // LATENT_PX
        noise = np.zeros((len(batch.pixels_BHWC), channels, side, side), np.float32)
        for i, tile in enumerate(batch.tiles):
            cells = Region(tile.read.y // LATENT_PX, tile.read.x // LATENT_PX, side, side)
            noise[i] = lattice_normal(cells, key=batch.noise_key, channels=channels)
        return noise


def _check_tile(kind: str, side: int, halo: int) -> None:
    if side < STRIDE_MULTIPLE or side % SIZE_MULTIPLE:
        below = max(side // SIZE_MULTIPLE * SIZE_MULTIPLE, STRIDE_MULTIPLE)
        raise ConfigError(
            f"generator {kind}: tile={side}: must be a multiple of {SIZE_MULTIPLE}; "
            f"give {below} or {below + SIZE_MULTIPLE}"
        )
    if halo < 0 or halo % LATENT_PX or 2 * halo >= side:
        raise ConfigError(
            f"generator {kind}: halo={halo}: must be a multiple of {LATENT_PX} below {side // 2}"
        )


_LOADING = threading.Lock()
"""Without it two threads that ask at once would each load the weights."""


@functools.lru_cache(maxsize=1)
def _network(
    path: Path,
    identity: str,
    direction: Direction,
    prompt: str | None,
    device: torch.device,
    dtype: torch.dtype,
    unet_dtype: torch.dtype,
    compiled: bool,
) -> Translator:
    """The network, once in each process, however many generators and threads ask for it."""
    weights = load_bundle(path)
    if load_facts(path).identity != identity:
        raise CheckpointError(f"{path}: changed since the run began; start it again")
    if tensors_digest(weights.tensors) != weights.digest:
        raise CheckpointError(
            f"{path}: is damaged, its tensors are not those that were imported; copy it again"
        )
    text = next((p.embedding for p in weights.prompts.values() if p.text == prompt), None)
    with one_core_each(1) as pool:  # merging the adapters sums, too
        net = pool.submit(
            assemble, weights, direction, text=text, dtype=dtype, unet_dtype=unet_dtype, device=device
        ).result()
    return torch.compile(net) if compiled else net


@functools.lru_cache(maxsize=4)
def _runner(
    path: Path,
    identity: str,
    direction: Direction,
    prompt: str | None,
    device: torch.device,
    dtype: torch.dtype,
    unet_dtype: torch.dtype,
    compiled: bool,
    gamma: float,
    rounding: Rounding,
    batch: int,
) -> TileRunner:
    """A runner, kept because it remembers that memory ran out."""
    net = _network(path, identity, direction, prompt, device, dtype, unet_dtype, compiled)

    def translate(pixels_BHWC: Tensor, noise: Tensor | None) -> Tensor:
        y = net(from_uint8(pixels_BHWC), noise, gamma)
        if y.isnan().any():
            raise GeneratorError(
                f"{path}: makes values that are not numbers; its weights are damaged, or too large for "
                f"{dtype}: give dtype=float32"
            )
        return to_uint8(y, rounding)

    return tile_runner(translate, device, batch)
