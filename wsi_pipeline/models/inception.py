"""The ``inception`` extractor: 2048 pooled features of Inception v3, those of published FID and KID figures.

Weights: ``inception-2015-12-05.pt``, the network of 2015 as TorchScript, which clean-fid and StyleGAN use.

Why a digest decides: TorchScript is a program, and loading the file runs it. The file that everybody uses has
one SHA-256; any other is refused unless the user says that it is trusted.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.feature_files import needed_file, resized_tensor, sha256_of
from wsi_pipeline.models.features import F32

__all__ = ["INCEPTION_FILE", "INCEPTION_SHA256", "INCEPTION_URL", "Inception", "make_inception"]

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

SIDE = 299
DIMS = 2048

_REMEDY = f"download {INCEPTION_URL} and name it with --weights"


class Inception:
    """Features [B, 2048] of tiles, brought to 299 px as clean-fid does."""

    name = "inception"
    dims = DIMS
    side = SIDE
    resize = "299 px, PIL bicubic in float, antialiased (clean-fid)"

    def __init__(self, layers: Any, digest: str, device: str) -> None:
        self.digest = digest
        self._layers = layers
        self._device = torch.device(device)

    def __call__(self, pixels_BHWC: npt.NDArray[np.uint8]) -> F32:
        """Features, float32; equal in every batch up to rounding."""
        with torch.inference_mode():
            x = resized_tensor(pixels_BHWC, SIDE).to(self._device)
            found = self._layers((x - 128.0) / 128.0)
        if found.numel() != len(pixels_BHWC) * DIMS:
            raise CheckpointError(
                f"extractor inception: its file gives {tuple(found.shape)} features, not {DIMS}; {_REMEDY}"
            )
        return np.asarray(found.reshape(len(pixels_BHWC), DIMS).float().cpu().numpy(), np.float32)


def make_inception(*, weights: Path | None, model: str | None, device: str, trust: bool) -> Inception:
    """The network in the file ``weights``; CheckpointError where it is missing, unknown or no TorchScript."""
    if model is not None:
        raise ConfigError("extractor inception: takes no model name; leave it out, or choose timm")
    path = needed_file(weights, "inception", _REMEDY)
    digest = sha256_of(path)
    if digest != INCEPTION_SHA256 and not trust:
        raise CheckpointError(
            f"{path}: SHA-256 {digest} is not that of {INCEPTION_FILE} ({INCEPTION_SHA256}), and loading a "
            "TorchScript file runs its code; download it again, or add --trust-weights if you trust its maker"
        )
    return Inception(_layers(path, device), digest, device)


def _layers(path: Path, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out, this file is not
            network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: is no TorchScript file ({first}); {_REMEDY}") from error
    layers = getattr(network, "layers", None)
    if layers is None:
        raise CheckpointError(f"{path}: has no part 'layers' that makes the features; {_REMEDY}")
    return layers
