"""From settings to networks: where a run begins, what judges it, what it learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.backbones import Backbone, build_backbone
from wsi_pipeline.models.bundle import load_bundle
from wsi_pipeline.models.discriminator import Discriminator, MultilevelHead
from wsi_pipeline.models.fresh import fresh_adapters, from_scratch
from wsi_pipeline.models.hub import SD_TURBO, find_base, load_base
from wsi_pipeline.models.layout import VAES, Direction
from wsi_pipeline.models.lpips import make_lpips
from wsi_pipeline.models.prompts import embed_prompts
from wsi_pipeline.models.trainable import TurboNetwork
from wsi_pipeline.models.weights import Prompt, TurboWeights, tensors_digest
from wsi_pipeline.training.adversarial import AdversarialConfig, AdversarialObjective
from wsi_pipeline.training.config import ModelConfig, TrainConfig
from wsi_pipeline.training.objective import Objective
from wsi_pipeline.training.paired import PairedObjective

__all__ = ["initial_weights", "make_network", "make_objective"]

LICENCE = (
    "Trained with wsi-pipeline on {base}; the terms of what it was trained on and with apply: base, training "
    "images, networks that judged it."
)
MPP = 0.5  # where neither the settings nor the tiles state one


def initial_weights(config: ModelConfig, seed: int, tiles_mpp: float | None = None) -> TurboWeights:
    """The weights that training begins with; ``tiles_mpp``: µm per pixel of the tiles, where they state one.

    Raises ConfigError, CheckpointError.
    """
    if config.weights is not None:
        weights = load_bundle(config.weights)
        weights = replace(weights, mpp=config.mpp or tiles_mpp or weights.mpp)
        lacking = {"a2b", *(["b2a"] if config.directions == "both" else [])} - set(weights.directions)
        if lacking:
            raise ConfigError(
                f"{config.weights}: has no direction {sorted(lacking)[0]}; train with model.directions=a2b "
                "and objective.kind=paired, or begin with other weights"
            )
        return weights if config.directions == "both" else _one_way(weights)
    mpp = config.mpp or tiles_mpp or MPP
    captions: dict[Direction, str] = {"a2b": config.prompt_a2b}
    if config.directions == "both":
        captions["b2a"] = config.prompt_b2a
    if config.scratch is not None:
        return _from_scratch(config, captions, seed, mpp)
    name = config.base or SD_TURBO
    embedded = embed_prompts(find_base(name), list(captions.values()))
    return fresh_adapters(
        load_base(name),
        dict(zip(captions, embedded, strict=True)),
        rank_unet=config.rank_unet,
        rank_vae=config.rank_vae,
        multi_view=config.multi_view,
        seed=seed,
        mpp=mpp,
        tile=config.tile,
        licence=config.licence or LICENCE.format(base=name),
    )


def _one_way(weights: TurboWeights) -> TurboWeights:
    """The direction a2b alone."""
    vaes = tuple(vae for vae in weights.layout.vaes if vae in VAES["a2b"])
    layout = replace(weights.layout, vaes=vaes)
    tensors = {name: weights.tensors[name] for name in layout.canonical()}
    prompts: dict[Direction, Prompt] = {"a2b": weights.prompts["a2b"]}
    return replace(weights, layout=layout, tensors=tensors, prompts=prompts, digest=tensors_digest(tensors))


def _from_scratch(
    config: ModelConfig, captions: Mapping[Direction, str], seed: int, mpp: float
) -> TurboWeights:
    from wsi_pipeline.models.mini import MINI_UNET, MINI_VAE

    return from_scratch(
        MINI_UNET,
        MINI_VAE,
        captions,
        rank_unet=config.rank_unet,
        rank_vae=config.rank_vae,
        multi_view=config.multi_view,
        seed=seed,
        mpp=mpp,
        tile=config.tile,
        licence=config.licence or LICENCE.format(base="no base, from nothing"),
    )


def make_network(config: TrainConfig, weights: TurboWeights, device: torch.device) -> TurboNetwork:
    """The networks of the directions that are trained, on the device."""
    network = TurboNetwork(
        weights,
        trainable=config.model.trainable,
        train_local=config.model.train_local_lora,
        recompute=config.model.recompute,
        bf16=config.loop.precision == "bf16",
    )
    network.to(device).train()
    return network


def make_objective(config: TrainConfig, network: TurboNetwork, device: torch.device, seed: int) -> Objective:
    """The objective that the settings name. Raises ConfigError for one that does not fit the network or
    data."""
    if config.objective.kind == "paired":
        if config.data.pairing == "unpaired":
            raise ConfigError(
                "objective.kind: paired needs pairs, and data.pairing is unpaired; give aligned or simulated "
                "data, or train with objective.kind=adversarial"
            )
        paired = config.objective.paired
        return PairedObjective(network, paired, _perceptual(paired.lpips > 0, paired.lpips_vgg, device))
    if len(network.directions) < 2:
        raise ConfigError("objective.kind: adversarial needs both directions; set model.directions=both")
    settings = config.objective.adversarial
    backbone = build_backbone(settings.backbone)
    judges = {
        direction: _judge(settings, backbone, seed + place).to(device).train()
        for place, direction in enumerate(network.directions)
    }
    return AdversarialObjective(
        network, judges, settings, _perceptual(settings.lpips, settings.lpips_vgg, device)
    )


def _judge(config: AdversarialConfig, backbone: Backbone, seed: int) -> Discriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MultilevelHead(backbone.widths)
    return Discriminator(backbone, head, policy=config.augment)


def _perceptual(
    wanted: bool, vgg: str | None, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor] | None:
    if not wanted:
        return None
    made: Callable[[Tensor, Tensor], Tensor] = make_lpips(None if vgg is None else Path(vgg)).to(device)
    return made
