"""DINO-structure: how far the layout of a translated tile departs from its source, seen by a frozen ViT.

S(x) is the cosine self-similarity of the keys of the last block (class token included, heads joined); the
score of a pair is ``mean((S(output) - S(source))^2)``. Lower = structure kept; 0 for equal images.

Sources: N. Tumanyan et al., "Splicing ViT features for semantic appearance transfer", CVPR 2022 (keys of
DINO ViT-B/8, block 11); G. Parmar et al., 2023-2024 (the score as a figure of translations).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.feature_files import needed_file, sha256_of
from wsi_pipeline.models.vit_features import DINO_MODEL, DINO_URL, timm_network

__all__ = ["DinoStructure", "keys_of", "make_dino_structure", "self_similarity", "structure_score"]

F64: TypeAlias = npt.NDArray[np.float64]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EPSILON = 1e-8


def keys_of(qkv_BTC: Tensor, heads: int) -> Tensor:
    """Keys [B, heads, T, width] of a projection [B, T, 3 * heads * width] laid out (3, heads, width)."""
    batch, tokens, channels = qkv_BTC.shape
    parts = qkv_BTC.reshape(batch, tokens, 3, heads, channels // (3 * heads))
    return parts[:, :, 1].transpose(1, 2)


def self_similarity(keys_BHTD: Tensor) -> Tensor:
    """Cosine similarity [B, T, T] of the tokens, all heads joined; products of norms are at least 1e-8."""
    tokens_BTC = keys_BHTD.transpose(1, 2).flatten(2)
    norms = tokens_BTC.norm(dim=2)
    floor = (norms[:, :, None] * norms[:, None, :]).clamp(min=_EPSILON)
    return tokens_BTC @ tokens_BTC.transpose(1, 2) / floor


def structure_score(source_BHTD: Tensor, output_BHTD: Tensor) -> Tensor:
    """Score [B] of pairs of keys [B, heads, T, width]."""
    gap = self_similarity(output_BHTD.float()) - self_similarity(source_BHTD.float())
    return gap.square().mean(dim=(1, 2))


class DinoStructure:
    """Scores of pairs of tiles; ``side``: px that the short side of a tile is brought to."""

    def __init__(self, network: Any, *, name: str, digest: str, device: str) -> None:
        self.name = name
        self.digest = digest
        self.side = int(network.pretrained_cfg["input_size"][-1])
        self._device = torch.device(device)
        self._network = network.to(self._device)
        self._heads = int(network.blocks[-1].attn.num_heads)

    def __call__(self, source_BHWC: npt.NDArray[np.uint8], output_BHWC: npt.NDArray[np.uint8]) -> F64:
        """Scores [B] float64 of square tiles; ConfigError for others."""
        with torch.inference_mode():
            score = structure_score(self._keys(source_BHWC), self._keys(output_BHWC))
        return np.asarray(score.double().cpu().numpy(), np.float64)

    def _keys(self, pixels_BHWC: npt.NDArray[np.uint8]) -> Tensor:
        height, width = pixels_BHWC.shape[1:3]
        if height != width:
            raise ConfigError(f"DINO-structure: tiles of {height} x {width} px; it takes square ones")
        size = (self.side, self.side)
        resized = [Image.fromarray(t).resize(size, Image.Resampling.BILINEAR) for t in pixels_BHWC]
        x = (
            torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2)
            / 255.0
        )
        x = (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
        seen: list[Tensor] = []
        hook = self._network.blocks[-1].attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out))
        try:
            self._network(x.to(self._device))
        finally:
            hook.remove()
        return keys_of(seen[0], self._heads)


def make_dino_structure(
    weights: Path | None, *, model: str = DINO_MODEL, device: str = "cpu"
) -> DinoStructure:
    """DINO's ViT-B/8 from the official checkpoint; CheckpointError where that is missing or does not fit."""
    path = needed_file(weights, "dino", f"download {DINO_URL} and name it with --dino")
    network = timm_network(model, path)
    if not hasattr(getattr(network.blocks[-1], "attn", None), "qkv"):
        raise CheckpointError(f"{path}: {model} has no joint query-key-value projection; choose a plain ViT")
    return DinoStructure(network, name=model, digest=sha256_of(path), device=device)
