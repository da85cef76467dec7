"""Extractors on networks of timm and open_clip, by name: ``timm``, ``open_clip``, ``dino``.

Any network will do that gives one vector an image, with the user's weights; pathology networks (CONCH, UNI,
...) say more of tissue than Inception does. The licence of the weights is the user's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.feature_files import (
    fill_network,
    needed_file,
    read_tensors,
    resized_tensor,
    sha256_of,
)
from wsi_pipeline.models.features import F32

__all__ = [
    "DINO_FILE",
    "DINO_MODEL",
    "DINO_URL",
    "NetworkFeatures",
    "make_dino",
    "make_open_clip",
    "make_timm",
    "timm_network",
]

DINO_MODEL = "vit_base_patch8_224"
DINO_FILE = "dino_vitbase8_pretrain.pth"
DINO_URL = f"https://dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain/{DINO_FILE}"


class NetworkFeatures:
    """One vector a tile from a network on normalised images; implements ``FeatureExtractor``.

    ``network``: [B, 3, side, side] -> [B, dims]; ``mean``, ``std``: of the pixels in [0, 1].
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        name: str,
        digest: str,
        side: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: str,
    ) -> None:
        self.name = name
        self.digest = digest
        self.side = side
        self.resize = f"{side} px, PIL bicubic in float, antialiased"
        self._network = network
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self._device = torch.device(device)
        self.dims = int(self._features(torch.zeros(1, 3, side, side)).shape[1])

    def __call__(self, pixels_BHWC: npt.NDArray[np.uint8]) -> F32:
        """Features [B, dims] float32; equal in every batch up to rounding."""
        x = resized_tensor(pixels_BHWC, self.side) / 255.0
        found = self._features((x - self._mean) / self._std)
        return np.asarray(found.float().cpu().numpy(), np.float32)

    def _features(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            found = self._network(x.to(self._device))
        if found.ndim != 2:
            raise CheckpointError(
                f"extractor {self.name}: gives {tuple(found.shape)} for an image, not one vector; "
                "choose another model"
            )
        return found


def make_timm(*, weights: Path | None, model: str | None, device: str, trust: bool) -> NetworkFeatures:
    """A network of timm by name, its pooled features before the classifier."""
    path = needed_file(weights, "timm", "save the network's state_dict and name the file with --weights")
    if model is None:
        raise ConfigError(
            "extractor timm: needs the name of a network; give --model, e.g. vit_large_patch16_224"
        )
    network = timm_network(model, path)
    made_for = network.pretrained_cfg
    return NetworkFeatures(
        network.to(device),
        name=f"timm {model}",
        digest=sha256_of(path),
        side=int(made_for["input_size"][-1]),
        mean=tuple(made_for["mean"]),
        std=tuple(made_for["std"]),
        device=device,
    )


def timm_network(model: str, path: Path) -> Any:
    """A network of timm without its classifier, filled and in evaluation mode, on the CPU."""
    import timm

    if not timm.is_model(model):
        raise ConfigError(f"timm has no {model!r}; see timm.list_models()")
    state = read_tensors(path, "name the network's own file")
    scaled = {"init_values": 1.0} if "blocks.0.ls1.gamma" in state else {}
    network = timm.create_model(model, pretrained=False, num_classes=0, **scaled)
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    fill_network(network, state, source=path, what=f"timm's {model}", extra=tuple(f"{n}." for n in names))
    return network.eval().requires_grad_(False)


def make_open_clip(*, weights: Path | None, model: str | None, device: str, trust: bool) -> NetworkFeatures:
    """The image tower of a CLIP model of open_clip by name, its projected embedding."""
    import open_clip

    path = needed_file(weights, "open_clip", "save the model's state_dict and name the file with --weights")
    if model is None or model not in open_clip.list_models():
        raise ConfigError(f"extractor open_clip: there is no model {model!r}; give --model, e.g. ViT-B-16")
    tower = open_clip.create_model(model, load_weights=False).visual
    state = read_tensors(path, "name the model's own file")
    visual = {n.removeprefix("visual."): v for n, v in state.items() if n.startswith("visual.")}
    fill_network(tower, visual or state, source=path, what=f"the image tower of open_clip's {model}")
    side = tower.image_size
    return NetworkFeatures(
        tower.eval().requires_grad_(False).to(device),
        name=f"open_clip {model}",
        digest=sha256_of(path),
        side=int(side[0] if isinstance(side, tuple | list) else side),
        mean=tuple(tower.preprocess_cfg["mean"]),
        std=tuple(tower.preprocess_cfg["std"]),
        device=device,
    )


def make_dino(*, weights: Path | None, model: str | None, device: str, trust: bool) -> NetworkFeatures:
    """DINO's ViT-B/8 (or another ViT of timm), its class token; the official checkpoint has timm's names."""
    name = model or DINO_MODEL
    path = needed_file(weights, "dino", f"download {DINO_URL} and name it with --weights")
    network = timm_network(name, path)
    return NetworkFeatures(
        network.to(device),
        name=f"dino {name}",
        digest=sha256_of(path),
        side=int(network.pretrained_cfg["input_size"][-1]),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        device=device,
    )
