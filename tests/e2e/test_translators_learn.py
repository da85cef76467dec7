"""Each system, trained for some hundred steps on a cohort whose answer is known: what its paper measures gets
better by what the theory says it can.

Pairs: smooth stains on glass; the target has the two stains in other colours (a fixed matrix of optical
densities), so PSNR has no ceiling but the network's. Labels: two classes that differ in colour alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wsi_pipeline.config import load_settings
from wsi_pipeline.core.structure import psnr
from wsi_pipeline.training.config import TrainConfig
from wsi_pipeline.training.run import train
from wsi_pipeline.translators.bundle import load_translator
from wsi_pipeline.translators.trainable import TileNetwork

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIDE, TRAINED, HELD_OUT = 32, 48, 12
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BROWN_BLUE = np.array([[0.3, 0.7, 1.2], [1.1, 0.8, 0.3]])
PINK_PURPLE = np.array([[0.2, 0.9, 0.4], [1.0, 1.2, 0.5]])


def stains(rng: np.random.Generator) -> np.ndarray:
    """Two concentrations [SIDE, SIDE, 2], smooth."""
    coarse = rng.uniform(0, 1, (SIDE // 8 + 3, SIDE // 8 + 3, 2)).astype(np.float32) ** 2
    planes = [
        Image.fromarray(coarse[..., i]).resize((SIDE + 16, SIDE + 16), Image.Resampling.BICUBIC)
        for i in (0, 1)
    ]
    return np.clip(np.stack([np.asarray(p)[8:-8, 8:-8] for p in planes], -1), 0, 1)


def seen(stains_HW2: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(240 * np.exp(-stains_HW2 @ colours)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("cohort"), np.random.default_rng(5)
    for split, count in (("train", TRAINED), ("val", HELD_OUT)):
        for i in range(count):
            stain = stains(rng)
            kinds = {
                "ihc": BROWN_BLUE,
                "he": PINK_PURPLE,
                ("brown", "pink")[i % 2]: (BROWN_BLUE, PINK_PURPLE)[i % 2],
            }
            for kind, colours in kinds.items():
                folder = root / (
                    f"labelled/{split}/{kind}" if kind in ("brown", "pink") else f"{kind}/{split}"
                )
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(seen(stain, colours)).save(folder / f"{i}.png")
    return root


def trained(name: str, cohort: Path, out: Path, steps: int, *more: str) -> tuple[Path, list[dict[str, Any]]]:
    """Weights of a run with a recipe at a small size, and its log."""
    labelled = name in ("wdm", "ddpm_p2")
    ends = (
        [
            f"data.target={cohort}/labelled/train",
            f"validation.target={cohort}/labelled/val",
            "data.labels=null",
        ]
        if labelled
        else [f"data.{side}={cohort}/{kind}/train" for side, kind in (("source", "ihc"), ("target", "he"))]
        + [f"validation.{side}={cohort}/{kind}/val" for side, kind in (("source", "ihc"), ("target", "he"))]
    )
    settings = [
        *ends,
        *("data.crop=32", "data.workers=0", "data.split=null", "data.augment=d4", "model.tile=32"),
        *("validation.split=null", f"validation.every={steps}", f"validation.tiles={HELD_OUT}"),
        *("validation.metric=fid" if labelled else "validation.metric=psnr",),
        f"loop.steps={steps}",
        *(
            "loop.batch=8",
            "loop.accumulate=1",
            "loop.device=cpu",
            "loop.tensorboard=false",
            "loop.log_every=20",
        ),
        *("optimiser.learning_rate=0.002", "optimiser.ema=0.97", "optimiser.warmup=20"),
        *more,
    ]
    result = train(load_settings(TrainConfig, CONFIGS / f"train_{name}.yaml", settings), out)
    return result.bundle.path, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


SMALL = (
    *("model.network.base=16", "model.network.groups=4", "model.network.mult=[1,2,2]"),
    *("model.network.attention=[]", "model.network.blocks=1"),
)
RECIPES = {
    "i2sb": (200, SMALL),
    "cwdm": (200, (*SMALL, "objective.diffusion.sampling.nfe=10")),
    "pix2pix": (150, ("model.network.base=8", "model.network.groups=4", "model.network.mult=[1,2,4,4]")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_paired_systems_learn_the_map(name: str, cohort: Path, tmp_path: Path) -> None:
    steps, more = RECIPES[name]
    _, log = trained(name, cohort, tmp_path / "run", steps, *more)
    key = "l1_a" if name == "pix2pix" else "mse"
    losses = [entry[key] for entry in log if entry["kind"] == "train"]
    assert losses[-1] < 0.25 * losses[0]
    ends = [sorted((cohort / kind / "val").glob("*.png")) for kind in ("ihc", "he")]
    before = np.mean(
        [psnr(np.array(Image.open(a)), np.array(Image.open(b))) for a, b in zip(*ends, strict=True)]
    )
    after = next(entry["psnr"] for entry in log if entry["kind"] == "validation")
    assert after > before + 8, (before, after)
    assert after > 26


@pytest.mark.parametrize("name", ["ddpm_p2", "wdm"])
def test_labelled_systems_draw_the_class_that_they_are_asked_for(
    name: str, cohort: Path, tmp_path: Path
) -> None:
    """Sixteen draws; by chance 14 or more of them are of their class in 1 of 480 runs."""
    more = (*SMALL, "objective.diffusion.condition.classes=2", "objective.diffusion.sampling.nfe=20")
    more = (*more, "objective.diffusion.measure_bands=0", "validation.every=100", "validation.choose=last")
    weights, log = trained(name, cohort, tmp_path / "run", 300, *more)
    losses = [entry["mse"] for entry in log if entry["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0], "the variance that is left of x0 given x_n cannot be learnt away"
    fids = [entry["fid"] for entry in log if entry["kind"] == "validation"]
    assert fids[-1] < 0.9 * fids[0], fids
    facts, tensors = load_translator(weights)
    assert facts.spec.classes == ("brown", "pink")
    network = TileNetwork(facts.spec, tensors)
    drawn = [network.translate(torch.zeros(1, 3, SIDE, SIDE), "a2b", number) for number in range(16)]
    # How green a tile is beside its red and blue: pink and purple absorb green most.
    green = [float(image[0, 1].mean() - (image[0, 0].mean() + image[0, 2].mean()) / 2) for image in drawn]
    real = [
        np.mean([np.array(Image.open(path)) @ [-0.5, 1, -0.5] for path in folder.iterdir()]) / 127.5
        for folder in (cohort / "labelled" / "train" / name for name in facts.spec.classes)
    ]
    middle = sum(real) / 2
    right = sum((value > middle) == (number % 2 == 0) for number, value in enumerate(green))
    assert right >= 14, (green, real)
