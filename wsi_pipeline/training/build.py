"""From settings to networks: where a run begins, what judges it, what it learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.backbones import Backbone, build_backbone
from wsi_pipeline.models.bundle import load_bundle
from wsi_pipeline.models.discriminator import Discriminator, MultilevelHead
from wsi_pipeline.models.fresh import fresh_adapters, from_scratch
from wsi_pipeline.models.hub import SD_TURBO, find_base, load_base
from wsi_pipeline.models.layout import VAES, Direction
from wsi_pipeline.models.lpips import make_lpips
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.models.pix2pix import PatchGAN
from wsi_pipeline.models.prompts import embed_prompts
from wsi_pipeline.models.trainable import TurboNetwork
from wsi_pipeline.models.weights import Prompt, TurboWeights, tensors_digest
from wsi_pipeline.training.adversarial import AdversarialConfig, AdversarialObjective
from wsi_pipeline.training.aligned import AlignedObjective, aligned_networks
from wsi_pipeline.training.bands import measured
from wsi_pipeline.training.config import ModelConfig, TrainConfig
from wsi_pipeline.training.data import TileSamples, tiles_mpp
from wsi_pipeline.training.equivariance import WithCommutation
from wsi_pipeline.training.objective import Objective
from wsi_pipeline.training.paired import PairedObjective
from wsi_pipeline.training.path import PathObjective
from wsi_pipeline.training.pix2pix import Pix2PixObjective
from wsi_pipeline.translators.bundle import TranslatorSpec, is_translator, load_translator
from wsi_pipeline.translators.trainable import TileNetwork

__all__ = ["Trainee", "initial_weights", "make_objective", "make_trainee"]

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
        return weights if config.directions == "both" else _a2b_alone(weights)
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


def _a2b_alone(weights: TurboWeights) -> TurboWeights:
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


class Trainee(Protocol):
    """What the run trains and knows no more of than this; ``digest``: of the weights that it begins with."""

    learning: dict[str, nn.Parameter]

    @property
    def digest(self) -> str: ...

    @property
    def directions(self) -> tuple[Direction, ...]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def translate(self, image: Tensor, direction: Direction, number: int) -> Tensor:
        """A tile [1, 3, H, W] in [-1, 1] as the finished generator would make it; draws belong to
        ``number``."""

    def save(self, learned: Mapping[str, Tensor], path: Path) -> None:
        """Write the weights file, with ``learned`` in place of what it has."""


def make_trainee(config: TrainConfig, samples: TileSamples, device: torch.device) -> Any:
    """The networks that are trained, on the device: a ``TurboNetwork`` or a ``TileNetwork``.

    Raises ConfigError, CheckpointError.
    """
    model, bf16 = config.model, config.loop.precision == "bf16"
    mpp = tiles_mpp(config.data)
    if model.network is not None or (model.weights is not None and is_translator(model.weights)):
        return _tile_network(config, samples, mpp, bf16).to(device)
    if config.objective.kind == "diffusion":
        raise ConfigError(
            "objective.kind: diffusion trains another network than this; set model.network.family=unet2d"
        )
    network = TurboNetwork(
        initial_weights(model, config.loop.seed, mpp),
        trainable=model.trainable,
        train_local=model.train_local_lora,
        recompute=model.recompute,
        bf16=bf16,
    )
    return network.to(device).train()


def _tile_network(config: TrainConfig, samples: TileSamples, mpp: float | None, bf16: bool) -> TileNetwork:
    model, path = config.model, config.objective.diffusion
    diffusion = None
    if config.objective.kind == "diffusion":
        representation = measured(path.representation, samples, path.measure_bands)
        diffusion = replace(path.system, representation=representation)
    tensors = None
    if model.weights is not None:
        facts, tensors = load_translator(model.weights)
        spec = replace(facts.spec, mpp=model.mpp or mpp or facts.spec.mpp)
        if diffusion is not None:
            spec = replace(spec, diffusion=diffusion, sampling=path.sampling)
    else:
        names = () if samples.labels is None or diffusion is None else samples.labels.names
        classes = 0 if diffusion is None else diffusion.condition.classes
        if names and classes and len(names) != classes:
            raise ConfigError(
                f"objective.diffusion.condition.classes: is {classes}, and the data has {len(names)} "
                f"({', '.join(names)})"
            )
        spec = TranslatorSpec(
            network=model.network or NetworkConfig(),
            diffusion=diffusion,
            sampling=path.sampling,
            mpp=model.mpp or mpp or MPP,
            tile=model.tile,
            classes=names if classes else (),
            licence=model.licence or LICENCE.format(base="no base, from nothing"),
        )
    if config.data.crop % spec.multiple:
        raise ConfigError(
            f"data.crop: {config.data.crop} px is not a multiple of {spec.multiple} (the network's)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)
        return TileNetwork(spec, tensors, bf16)


def make_objective(config: TrainConfig, network: Any, device: torch.device, seed: int) -> Objective:
    """The objective that the settings name. Raises ConfigError for one that does not fit the network."""
    objective = _objective(config, network, device, seed)
    if not config.objective.equivariance.weight:
        return objective
    if config.objective.kind == "diffusion":
        raise ConfigError(
            "objective.equivariance: a denoiser makes no picture in one pass; set its weight to 0"
        )
    return WithCommutation(objective, _one_way(network), config.objective.equivariance)


def _one_way(network: Any) -> Callable[[Tensor], Tensor]:
    def translate(image: Tensor) -> Tensor:
        made: Tensor = network(image, "a2b")
        return made

    return translate


def _objective(config: TrainConfig, network: Any, device: torch.device, seed: int) -> Objective:
    settings = config.objective
    if settings.kind == "diffusion":
        return PathObjective(network, settings.diffusion)
    if settings.kind == "paired":
        paired = settings.paired
        return PairedObjective(network, paired, _perceptual(paired.lpips > 0, paired.lpips_vgg, device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.kind == "pix2pix":
            judge = PatchGAN(in_channels=6, norm=settings.pix2pix.norm).to(device).train()
            return Pix2PixObjective(network, judge, settings.pix2pix)
    if settings.kind == "aligned":
        multiple = 2 ** (len(settings.aligned.networks.fields) - 1)
        if config.data.crop % multiple:
            raise ConfigError(
                f"data.crop: {config.data.crop} px is no multiple of {multiple} (registration's)"
            )
        registration, judge = aligned_networks(settings.aligned, seed)
        registration.to(device).train()
        judge = None if judge is None else judge.to(device).train()
        return AlignedObjective(_one_way(network), network.learning, registration, judge, settings.aligned)
    if len(network.directions) < 2:
        raise ConfigError("objective.kind: adversarial needs both directions; set model.directions=both")
    return _adversarial(settings.adversarial, network, device, seed)


def _adversarial(
    settings: AdversarialConfig, network: TurboNetwork, device: torch.device, seed: int
) -> Objective:
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
