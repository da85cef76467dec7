"""The ``inception`` extractor: 2048 pooled features of Inception v3, those of published FID and KID figures.

Beside it, of the same file: ``inception_spatial``, whose FID is the sFID of C. Nash et al., 2021 (first seven
channels of the layer ``mixed_6/conv`` at 17 x 17 places; in torchvision's names ``Mixed_6d.branch1x1`` after
norm and ReLU), and ``inception_logits``, for the inception score (without the bias of the last layer).
That this layer is the published one rests on its name: no reference of ADM was at hand to compare numbers
with, and ADM resizes by TensorFlow's bilinear rule. Compare sFID within this program only.

Weights: ``inception-2015-12-05.pt``, the network of 2015 as TorchScript, which clean-fid and StyleGAN use.

Why a digest decides: TorchScript is a program, and loading the file runs it. The file that everybody uses has
one SHA-256; any other is refused unless the user says that it is trusted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.feature_files import needed_file, resized_tensor, sha256_of
from wsi_pipeline.models.features import F32

__all__ = [
    *("INCEPTION_FILE", "INCEPTION_SHA256", "INCEPTION_URL", "Inception"),
    *("make_inception", "make_logits", "make_spatial"),
]

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

SIDE = 299
DIMS = 2048
SPATIAL_DIMS = 2023

_SPATIAL_LAYER = "mixed_6"
_SPATIAL_CHANNELS = 7

_REMEDY = f"download {INCEPTION_URL} and name it with --weights"


Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Inception:
    """Features [B, dims] of tiles, brought to 299 px as clean-fid does; ``head``: the network up to them."""

    side = SIDE
    resize = "299 px, PIL bicubic in float, antialiased (clean-fid)"

    def __init__(self, head: Head, digest: str, device: str, *, name: str, dims: int) -> None:
        self.name, self.dims, self.digest = name, dims, digest
        self._head = head
        self._device = torch.device(device)

    def __call__(self, pixels_BHWC: npt.NDArray[np.uint8]) -> F32:
        """Features, float32; equal in every batch up to rounding."""
        with torch.inference_mode():
            x = resized_tensor(pixels_BHWC, SIDE).to(self._device)
            found = self._head((x - 128.0) / 128.0)
        if found.numel() != len(pixels_BHWC) * self.dims:
            raise CheckpointError(
                f"extractor {self.name}: its file gives {tuple(found.shape)} features, not {self.dims}; "
                f"{_REMEDY}"
            )
        return np.asarray(found.reshape(len(pixels_BHWC), self.dims).float().cpu().numpy(), np.float32)


def make_inception(*, weights: Path | None, model: str | None, device: str, trust: bool) -> Inception:
    """The pooled features; CheckpointError where ``weights`` is missing, unknown or no TorchScript."""
    network, digest = _network("inception", weights, model, device, trust)
    return Inception(_part(network, "layers", weights), digest, device, name="inception", dims=DIMS)


def make_spatial(*, weights: Path | None, model: str | None, device: str, trust: bool) -> Inception:
    """The features of sFID, see the module; CheckpointError as above, or where the layer is not there."""
    network, digest = _network("inception_spatial", weights, model, device, trust)
    layers = _part(network, "layers", weights)
    wanted = _part(network, f"layers.{_SPATIAL_LAYER}.conv", weights)
    names = [name for name, _ in layers.named_children()]
    before = [getattr(layers, name) for name in names[: names.index(_SPATIAL_LAYER)]]

    def head(x: torch.Tensor) -> torch.Tensor:
        for layer in before:
            x = layer(x)
        found: torch.Tensor = wanted(x)
        return found[:, :_SPATIAL_CHANNELS].flatten(1)

    return Inception(head, digest, device, name="inception_spatial", dims=SPATIAL_DIMS)


def make_logits(*, weights: Path | None, model: str | None, device: str, trust: bool) -> Inception:
    """The 1008 logits without bias; CheckpointError as above, or where the file has no last layer."""
    network, digest = _network("inception_logits", weights, model, device, trust)
    layers, weight = (_part(network, name, weights) for name in ("layers", "output.weight"))

    def head(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(layers(x).reshape(len(x), -1), weight)

    return Inception(head, digest, device, name="inception_logits", dims=len(weight))


def _network(kind: str, weights: Path | None, model: str | None, device: str, trust: bool) -> tuple[Any, str]:
    """The network in the file and its digest."""
    if model is not None:
        raise ConfigError(f"extractor {kind}: takes no model name; leave it out, or choose timm")
    path = needed_file(weights, kind, _REMEDY)
    digest = sha256_of(path)
    if digest != INCEPTION_SHA256 and not trust:
        raise CheckpointError(
            f"{path}: SHA-256 {digest} is not that of {INCEPTION_FILE} ({INCEPTION_SHA256}), and loading a "
            "TorchScript file runs its code; download it again, or add --trust-weights if you trust its maker"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out, this file is not
            return torch.jit.load(str(path), map_location=device).eval(), digest
    except (RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: is no TorchScript file ({first}); {_REMEDY}") from error


def _part(network: Any, name: str, path: Path | None) -> Any:
    found = network
    for step in name.split("."):
        found = getattr(found, step, None)
    if found is None:
        raise CheckpointError(f"{path}: has no part {name!r} that makes the features; {_REMEDY}")
    return found
