"""The weights of a one-step LoRA generator as one value, whatever file they came from.

Adapters are kept unmerged: only so can the same weights be trained on, or written back to the published
format. ``lora_turbo.assemble`` merges them when a network is built to be run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from wsi_pipeline.models.layout import DIRECTIONS, VAES, Direction, Layout

__all__ = ["Imported", "Prompt", "TurboWeights", "tensors_digest"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A caption and its embedding [1, tokens, width] float32: the last hidden state after the final norm."""

    text: str
    embedding: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TurboWeights:
    """Every tensor by its canonical name (``layout``), and what is needed to run them.

    ``tensors`` may be lazy (a memory-mapped file): take a tensor once, when it is needed. Floating-point of
    any width. ``unet_scale``, ``vae_scale``: alpha / rank of the adapters. ``prompts``: one for each
    direction. ``base_name``, ``base_digest``: the base model and ``tensors_digest`` of its UNet and VAE;
    ``source``: the format that was imported; ``licence``: what the user has to know; ``mpp``: µm per pixel
    that the weights were trained at; ``tile``: side in pixels. ``digest``: ``tensors_digest`` of ``tensors``.
    """

    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    unet_scale: float
    vae_scale: float
    prompts: Mapping[Direction, Prompt]
    base_name: str
    base_digest: str
    source: str
    licence: str
    mpp: float
    tile: int
    digest: str

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Directions whose global VAE exists."""
        return tuple(d for d in DIRECTIONS if VAES[d][0] in self.layout.vaes)

    def multi_view(self, direction: Direction) -> bool:
        """Whether tiles are also encoded as 4x4 cells, by a second encoder."""
        return VAES[direction][1] in self.layout.vaes


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a foreign file holds: ``TurboWeights`` less what only its importer knows (prompts, licence, size).

    ``tensors``: every name of ``layout.canonical()``, in its order and in the file's dtypes; they may be
    mapped from the file. ``source``: ``diffusion-ffpe``, ``cyclegan-turbo`` or ``pix2pix-turbo``;
    ``notices``: what the user should know, a sentence each.
    """

    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    unet_scale: float
    vae_scale: float
    source: str
    notices: tuple[str, ...]


def tensors_digest(tensors: Mapping[str, torch.Tensor], names: Iterable[str] | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, or of ``names``, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors if names is None else names):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
