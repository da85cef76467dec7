"""pix2pix against published numbers: images, logits, losses, gradients, moving statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import parity_other as other
import pytest
import torch
from torch import Tensor, nn

from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.models.networks import build_network
from wsi_pipeline.models.pix2pix import PatchGAN
from wsi_pipeline.training.objective import Sample
from wsi_pipeline.training.pix2pix import Pix2PixConfig, Pix2PixObjective

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = (1, 2, 4, 8, 8, 8, 8, 8)
IMAGE, LOSS = 5e-5, 1e-5


def filled(network: nn.Module, folder: Path, prefix: str) -> nn.Module:
    """Weights of the set: names, shapes and order have to be those of the published network."""
    told = other.facts(folder, "pix2pix")
    wanted, gain = told[f"shapes_{prefix}"], told["gain_of_weights_with_2_or_more_dims"]
    assert [(k, list(t.shape)) for k, t in network.state_dict().items()] == list(wanted.items())
    state: dict[str, Tensor] = {}
    for key, shape in wanted.items():
        if not key.endswith("num_batches_tracked"):
            one = {key: shape}
            state |= other.weights(
                folder, one, told["salt"], prefix=f"{prefix}.", gain=gain if shape[1:] else 1.0
            )
    logs = {
        key: tensor.double().exp().float() for key, tensor in state.items() if key.endswith("running_var")
    }
    network.load_state_dict(state | logs, strict=False)
    return network


def translator(folder: Path, prefix: str, norm: Any = "batch", levels: int = 8) -> nn.Module:
    base = other.facts(folder, "pix2pix")["ngf"]
    config = NetworkConfig(family="pix2pix", base=base, mult=LEVELS[:levels], norm=norm)
    return filled(build_network(config, in_channels=3, out_channels=3), folder, prefix)


def judge(folder: Path, prefix: str, norm: Any = "batch") -> nn.Module:
    return filled(PatchGAN(base=other.facts(folder, "pix2pix")["ndf"], norm=norm), folder, prefix)


def pair(recorded: other.Arrays) -> tuple[Tensor, Tensor]:
    a, b = (torch.from_numpy(recorded[f"{name}_uint8"]).permute(0, 3, 1, 2) for name in "ab")
    return a / 127.5 - 1, b / 127.5 - 1


@torch.no_grad()
def test_translations_and_logits_have_parity(other_set: Path) -> None:
    recorded = other.arrays(other_set, "pix2pix_cases")
    a, b = pair(recorded)
    network, judged = translator(other_set, "G").eval(), judge(other_set, "D").eval()
    fake = network(a)
    other.close(fake, recorded["eval.fake_b"], IMAGE)
    other.close(judged(torch.cat([a, fake], 1)), recorded["eval.d_logits_fake"], IMAGE)
    other.close(judged(torch.cat([a, b], 1)), recorded["eval.d_logits_real"], IMAGE)
    small = translator(other_set, "G7", levels=7).eval()(a[:, :, :128, :128])
    other.close(small, recorded["eval.unet128.fake_b"], IMAGE)
    network, judged = (
        translator(other_set, "Gi", "instance").eval(),
        judge(other_set, "Di", "instance").eval(),
    )
    fake = network(a)
    other.close(fake[:, :, ::2, ::2], recorded["eval.instance_norm.fake_b_every_second_pixel"], IMAGE)
    other.close(judged(torch.cat([a, fake], 1)), recorded["eval.instance_norm.d_logits_fake"], IMAGE)


class Network:
    """What the objective asks of a network."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.learning = module, dict(module.named_parameters())

    def __call__(self, image: Tensor, direction: str) -> Tensor:
        made: Tensor = self.module(image)
        return made


LOGS = {
    "loss_D_fake": "disc_fake",
    "loss_D_real": "disc_real",
    "loss_D": "judge",
    "loss_G_GAN": "gan",
    "loss_G": "pix2pix",
}


@pytest.mark.parametrize("case", ["eval_losses", "train_losses", "lsgan_train_losses"])
def test_losses_gradients_and_statistics_have_parity(other_set: Path, case: str) -> None:
    recorded, told = other.arrays(other_set, "pix2pix_cases"), other.facts(other_set, "pix2pix")
    (a, b), network, judged = pair(recorded), translator(other_set, "G"), judge(other_set, "D")
    network.train("train" in case)
    judged.train("train" in case)
    config = Pix2PixConfig(gan_mode="lsgan" if case.startswith("lsgan") else "vanilla")
    objective = Pix2PixObjective(Network(network), judged, config)
    logs: dict[str, Tensor] = {}
    sample = Sample(source=a, target=b, numbers=np.array([0]), seed=1)
    for update in objective.updates(sample):  # no optimiser steps between, as recorded
        for term in update.terms:
            term.loss.backward()
            logs |= term.logs | {update.name: term.loss.detach()}
    logs |= {"l1": config.l1 * logs["l1_a"]}
    for name, key in (LOGS | {"loss_G_L1": "l1"}).items():
        wanted = float(recorded[f"{case}.{name}"])
        assert float(logs[key]) == pytest.approx(wanted, rel=LOSS), name
    if f"{case}.grad_norms_G" in recorded:
        limit = 2e-2 if "train" in case else 1e-3
        parts = (("G", network), ("D", judged))
        for part, module in parts:
            gradients = {name: p.grad for name, p in module.named_parameters()}
            compare(gradients, told[f"{part}_param_names"], recorded[f"{case}.grad_norms_{part}"], limit)
    if f"{case}.after.D_num_batches" in recorded:
        last = [module for module in judged.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        assert int(last.num_batches_tracked) == int(recorded[f"{case}.after.D_num_batches"]) == 3
        other.close(last.running_mean, recorded[f"{case}.after.D_running_mean_last"], LOSS)
        other.close(last.running_var, recorded[f"{case}.after.D_running_var_last"], LOSS)
        outermost = network.state_dict()["model.model.1.model.6.running_mean"]
        other.close(outermost, recorded[f"{case}.after.G_running_mean_outermost_up"], LOSS)


def compare(gradients: Mapping[str, Tensor | None], names: list[str], wanted: Any, limit: float) -> None:
    norms = np.array([float(g.norm()) if (g := gradients[name]) is not None else np.nan for name in names])
    assert (np.abs(norms - wanted) / (wanted + 1e-4 * wanted.max())).max() <= limit
