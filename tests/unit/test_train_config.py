"""Settings of training: wrong ones are named by their path, and what contradicts itself is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from wsi_pipeline.config import load_settings, to_yaml
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.bundle import load_bundle, save_bundle
from wsi_pipeline.training.build import initial_weights, make_objective
from wsi_pipeline.training.config import ModelConfig, TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OF_TRAINING = sorted(p for p in CONFIGS.glob("*.yaml") if "objective" in yaml.safe_load(p.read_text()))


def load(*overrides: str, path: Path | None = None) -> TrainConfig:
    return load_settings(TrainConfig, path, overrides)


def test_defaults_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(to_yaml(TrainConfig()))
    assert load(path=path) == TrainConfig()


def test_there_are_configurations_of_training() -> None:
    assert OF_TRAINING


@pytest.mark.parametrize("path", OF_TRAINING, ids=lambda path: path.stem)
def test_every_configuration_of_training_loads(path: Path, tmp_path: Path) -> None:
    config = load(path=path)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load(path=again) == config


def test_published_values_are_the_defaults() -> None:
    config = TrainConfig()
    assert (config.model.rank_unet, config.model.rank_vae) == (128, 4)
    optimiser, losses = config.optimiser, config.objective.adversarial
    assert (optimiser.learning_rate, optimiser.betas, optimiser.weight_decay) == (5e-6, (0.9, 0.999), 1e-2)
    assert (optimiser.epsilon, optimiser.clip, optimiser.schedule) == (1e-8, 10.0, "constant")
    assert (losses.cycle_l1, losses.cycle_lpips, losses.identity_l1, losses.identity_lpips) == (1, 10, 1, 1)
    assert (losses.gan, losses.latent, losses.legacy_disc_grad_leak) == (0.5, "mode", False)
    assert losses.backbone.level2 == "cls"
    assert config.model.train_local_lora is False


WRONG = {
    "optimiser.learning_rate=.inf": r"optimiser\.learning_rate: inf is not a number",
    "optimiser.clip=.nan": r"optimiser\.clip: nan is not a number",
    "objective.paired.l1=-1.0": r"objective\.paired\.l1: -1.0 is not a number of 0 or more",
    "model.mpp=90.0": r"model\.mpp: 90.0 is no pixel size",
    "loop.seed=2024-13-45": r"--set loop\.seed=2024-13-45: the value is not YAML",
    "loop.stepps=3": r"loop\.stepps: no such setting; `wsi-pipeline train --show-config` lists all",
    "objective.adversarial.backbone.kindd=tiny": r"objective\.adversarial\.backbone\.kindd: no such setting",
    "data.frozen.icee=1": r"data\.frozen\.icee: no such setting",
    "loop.steps=many": r"loop\.steps: .*got 'many'",
    "loop.precision=fp16": r"loop\.precision: .*got 'fp16'",
    "objective.kind=cyclegan2": r"objective\.kind: .*got 'cyclegan2'",
    "objective.adversarial.latent=smaple": r"objective\.adversarial\.latent: .*got 'smaple'",
    "optimiser.schedule=step": r"optimiser\.schedule: .*got 'step'",
    "model.trainable=some": r"model\.trainable: .*got 'some'",
    "validation.metric=kid": r"validation\.metric: .*got 'kid'",
    "loop.batch=0": r"loop\.batch: 0 is not a positive number",
    "loop.keep=0": r"loop\.keep: 0 is not a positive number",
    "optimiser.learning_rate=0": "learning_rate",
    "optimiser.discriminator_learning_rate=-1": "discriminator_learning_rate",
    "optimiser.betas=[0.9, 1.0]": r"optimiser\.betas",
    "optimiser.weight_decay=-1": "weight_decay",
    "optimiser.warmup=-1": "warmup",
    "optimiser.ema=1.0": r"optimiser\.ema: 1\.0 is not in \[0, 1\)",
    "validation.tiles=1": "validation: .*tiles at least 2",
    "data.crop=100": r"data\.crop: 100 px is not a multiple of 32; give 96",
    "data.crop=16": r"data\.crop: 16 px is not a multiple of 32; give 32",
    "model.tile=100": r"model\.tile: 100 is not a multiple of 32",
    "model.rank_vae=0": r"model\.rank_vae",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_setting_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[override]) as caught:
        load(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pair", [("weights=x", "base=y"), ("base=y", "scratch=mini"), ("weights=x", "scratch=mini")]
)
def test_a_run_begins_in_one_place(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="give one of weights, base, scratch and network"):
        load(*(f"model.{value}" for value in pair))


# Contradictions that show when the networks are there


def objective(directions: tuple[str, ...], *overrides: str) -> Any:
    network = SimpleNamespace(directions=directions)
    return make_objective(load(*overrides), network, torch.device("cpu"), 0)


def test_paired_training_needs_pairs() -> None:
    with pytest.raises(ConfigError, match=r"paired needs data\.pairing aligned or simulated, not unpaired"):
        objective(("a2b",), "objective.kind=paired")


def test_cycles_need_both_directions() -> None:
    with pytest.raises(ConfigError, match=r"needs both directions; set model\.directions=both"):
        objective(("a2b",))


def test_a_backbone_without_its_file_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"backbone\.weights: CONCH's weights are missing"):
        objective(("a2b", "b2a"))


def test_one_direction_of_two_is_taken_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    whole = load_bundle(tiny_bundle)
    weights = initial_weights(ModelConfig(weights=str(tiny_bundle), directions="a2b"), 0)
    assert weights.layout.vaes == ("vae", "vae_patch")
    assert (weights.directions, list(weights.prompts)) == (("a2b",), ["a2b"])
    assert weights.digest != whole.digest
    save_bundle(weights, tmp_path / "one.safetensors")
    one = ModelConfig(weights=str(tmp_path / "one.safetensors"))
    with pytest.raises(ConfigError, match=r"has no direction b2a; train with model\.directions=a2b"):
        initial_weights(one, 0)
