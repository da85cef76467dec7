"""Learning works: two domains that differ by a known transform, and how far training closes the gap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.core.stain import map_density
from wsi_pipeline.models.backbones import BackboneConfig
from wsi_pipeline.models.bundle import save_bundle
from wsi_pipeline.models.features import make_extractor
from wsi_pipeline.models.fresh import from_scratch
from wsi_pipeline.models.random_weights import TINY_UNET, TINY_VAE
from wsi_pipeline.training.adversarial import AdversarialConfig
from wsi_pipeline.training.config import (
    LoopConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimiserConfig,
    TrainConfig,
)
from wsi_pipeline.training.data import DataConfig
from wsi_pipeline.training.run import train
from wsi_pipeline.training.validation import Validation, ValidationConfig

UNET = {
    **TINY_UNET,
    "block_out_channels": (8, 16, 16, 16),
    "attention_head_dim": (1, 2, 2, 2),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
}
VAE = {**TINY_VAE, "block_out_channels": (8, 12, 16, 16), "layers_per_block": 1, "norm_num_groups": 1}

STAIN_33 = np.array([[0.75, 0.15, 0.0], [0.05, 0.75, 0.1], [0.1, 0.0, 1.25]])
"""The known transform, on optical densities: other strengths and hues of both stains."""

SIDE, STEPS = 96, 50
GLASS = 215


def _cohort(folder: Path, data: Path) -> None:
    """Tiles a, and tiles b of other fields under the transform; two quarters of each to judge by."""
    pictures = sorted((data / "ffpe" / "pathologyatlas").glob("*.jpg"))[:4]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
    random = np.random.default_rng(0)
    for domain, columns in (("a", (0, 1400)), ("b", (1524, 3048 - SIDE))):
        for split in ("train", "val"):
            (folder / f"{split}_{domain}").mkdir()
        made = 0
        while made < 240:
            y, x = int(random.integers(3048 - SIDE)), int(random.integers(*columns))
            tile = pixels[made % len(pixels)][y : y + SIDE, x : x + SIDE]
            if tile.mean() > GLASS:
                continue
            if domain == "b":
                tile = map_density(tile, STAIN_33, (245.0, 245.0, 245.0), (232.0, 226.0, 238.0))
            split = "val" if made % 2 else "train"
            Image.fromarray(tile).save(folder / f"{split}_{domain}" / f"{made:04d}.png")
            made += 1


@pytest.mark.slow  # a minute and a half of one core
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("one_thread")
def test_unpaired_training_closes_the_gap_between_two_domains(tmp_path: Path, data_dir: Path) -> None:
    _cohort(tmp_path, data_dir)
    weights = from_scratch(
        UNET,
        VAE,
        {"a2b": "b", "b2a": "a"},
        rank_unet=1,
        rank_vae=1,
        multi_view=False,
        seed=0,
        mpp=0.5,
        tile=512,
        licence="test",
    )
    save_bundle(weights, tmp_path / "init.safetensors")
    data = DataConfig(source=str(tmp_path / "train_a"), target=str(tmp_path / "train_b"), crop=64, mpp=0.5)
    judged = ValidationConfig(
        every=STEPS,
        tiles=120,
        split=None,
        source=str(tmp_path / "val_a"),
        target=str(tmp_path / "val_b"),
        choose="last",
    )
    adversarial = AdversarialConfig(
        lpips=False, gan=1.0, cycle_l1=2.0, identity_l1=0.5, backbone=BackboneConfig(kind="tiny")
    )
    config = TrainConfig(
        data=data,
        model=ModelConfig(weights=str(tmp_path / "init.safetensors"), trainable="all"),
        objective=ObjectiveConfig(adversarial=adversarial),
        optimiser=OptimiserConfig(learning_rate=2e-3, weight_decay=0.0, betas=(0.5, 0.99), ema=0.9),
        validation=judged,
        loop=LoopConfig(steps=STEPS, batch=4, device="cpu", tensorboard=False),
    )
    untranslated = Validation(judged, data, make_extractor("tiny")).figures(
        lambda pixels, _: pixels, ("a2b",)
    )
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    reached = next(line for line in lines if line["kind"] == "validation")
    share = reached["fid"] / untranslated["fid"]
    print(f"FID {untranslated['fid']:.3f} -> {reached['fid']:.3f}, structure {reached['structure']:.3f}")
    assert share <= 0.35, (untranslated, reached)
    assert reached["structure"] >= 0.9, reached
