"""What every generator that runs on torch needs: device, dtype, batch size, and uint8 in and out.

Pixels cross to the device as uint8 (a quarter of float32's bytes) and are normalised there. On CUDA all
micro-batches of a call are queued before the first is waited for, through pinned buffers, so that copies run
beside kernels.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.core.protocols import U8_BHWC
from wsi_pipeline.errors import ConfigError, GeneratorError
from wsi_pipeline.models.pixels import Rounding, from_uint8, to_uint8

__all__ = [
    "Dtype",
    "Rounding",
    "TileRunner",
    "batch_for",
    "choose_device",
    "choose_dtype",
    "from_uint8",
    "one_core_each",
    "tile_runner",
    "to_uint8",
]

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

MOST_TILES = 16
"""More tiles a call do not make a large GPU faster, they only wait for each other."""

CORES: int = torch.get_num_threads()
"""Threads that a CPU gives this process; asked once, as ``one_core_each`` changes torch's answer."""

log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``; ConfigError where it is
    absent."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"device '{name}': is not supported; give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    index = device.index or 0
    if index >= count:
        raise ConfigError(f"device '{name}': is not there (CUDA devices: {count}); give auto or cpu")
    return torch.device("cuda", index)


def choose_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """A type that the device is good at for ``auto``; float16 on a CPU is refused (it runs, but never
    ends)."""
    if name == "auto":
        return _fast_dtype(device)
    if name == "float16" and device.type == "cpu":
        raise ConfigError("dtype float16: is hopelessly slow on a CPU; give auto, bfloat16 or float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        good = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if good else torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32


@functools.cache  # asked again when the weights are loaded, it would count them twice
def batch_for(device: torch.device, weight_bytes: int, tile_bytes: int, max_vram: float | None) -> int:
    """Tiles that fit into memory at once: a guess on the small side, which ``TileRunner`` mends if it fails.

    On a GPU a power of two up to ``MOST_TILES``, of its free memory or ``max_vram`` GiB of it. On a CPU one
    for each core, as long as half of the machine's memory holds them.
    """
    if device.type != "cuda":
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return max(1, min(CORES, (installed // 2 - weight_bytes) // tile_bytes))
    free, _ = torch.cuda.mem_get_info(device)
    allowed = free if max_vram is None else min(free, int(max_vram * 2**30))
    tiles = max(1, int(0.9 * allowed - weight_bytes) // tile_bytes)
    return min(MOST_TILES, 1 << (tiles.bit_length() - 1))


def one_core_each(lanes: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core.

    Why: sums over several cores depend on how many there are (GroupNorm in bfloat16: 36 % of the pixels, up
    to 5 levels), so a run with another number of workers would make other pixels. Tiles side by side on one
    core each are no slower than tile after tile on all of them.
    """
    return ThreadPoolExecutor(lanes, "tile", torch.set_num_threads, (1,))


@dataclass(slots=True, kw_only=True)
class TileRunner:
    """Runs a network over tiles in micro-batches of one constant size, fewer at a time if memory runs out.

    ``network``: [n, H, W, 3] uint8 and extras [n, ...] or None, on ``device``, -> [n, H, W, 3] uint8, where n
    is always ``micro_batch``. ``lanes``: micro-batches that a CPU works on at once, each on one core.
    """

    network: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    device: torch.device
    micro_batch: int = 1
    lanes: int = 1

    def __call__(self, pixels_BHWC: U8_BHWC, extra: npt.NDArray[np.float32] | None = None) -> U8_BHWC:
        """Translate all tiles; ``extra`` [B, ...] goes along with them, e.g. noise.

        Raises GeneratorError where not even one tile fits into memory.
        """
        while True:
            try:
                return self._run(pixels_BHWC, extra)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if self.micro_batch == self.lanes == 1:
                    raise GeneratorError(
                        f"{self.device}: out of memory with a single tile of {pixels_BHWC.shape[1]} px; "
                        "close other programs on it, or give dtype=bfloat16 or device=cpu"
                    ) from error
            # Outside the handler: the traceback kept the tensors of the failed run alive.
            self._shrink()

    def _shrink(self) -> None:
        if self.micro_batch > 1:
            self.micro_batch //= 2
        else:
            self.lanes //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        tiles = self.micro_batch * self.lanes
        log.warning("%s: out of memory, going on with %d tiles at a time", self.device, tiles)

    def _run(self, pixels_BHWC: U8_BHWC, extra: npt.NDArray[np.float32] | None) -> U8_BHWC:
        result = np.empty_like(pixels_BHWC)

        def made(start: int) -> torch.Tensor:
            rows = np.arange(start, start + self.micro_batch).clip(max=len(pixels_BHWC) - 1)
            with torch.inference_mode():
                noise = None if extra is None else self._sent(extra[rows])
                return self._fetched(self.network(self._sent(pixels_BHWC[rows]), noise))

        starts = range(0, len(pixels_BHWC), self.micro_batch)
        if self.device.type == "cpu":
            with one_core_each(self.lanes) as pool:
                parts = list(pool.map(made, starts))
        else:
            parts = [made(start) for start in starts]
            torch.cuda.synchronize(self.device)
        for start, pixels in zip(starts, parts, strict=True):
            part = result[start : start + self.micro_batch]
            part[:] = pixels.numpy()[: len(part)]
        return result

    def _sent(self, array: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
        )

    def _fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def tile_runner(
    network: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor], device: torch.device, batch: int
) -> TileRunner:
    """A runner that makes ``batch`` tiles at once: in lanes of one on a CPU, else as one micro-batch."""
    if device.type == "cpu":
        return TileRunner(network=network, device=device, lanes=batch)
    return TileRunner(network=network, device=device, micro_batch=batch)


def _out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for a GPU's, and only a message for the CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
