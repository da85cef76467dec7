"""One batch through the objective and one whole iteration against the published training loop."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.models.diff_augment import Draws
from wsi_pipeline.models.discriminator import Discriminator, MultilevelHead
from wsi_pipeline.models.hub import load_base
from wsi_pipeline.models.prompts import PROMPTS, embed_prompts
from wsi_pipeline.models.published import import_checkpoint
from wsi_pipeline.models.trainable import TurboNetwork
from wsi_pipeline.models.weights import TurboWeights
from wsi_pipeline.training.adversarial import AdversarialConfig, AdversarialObjective
from wsi_pipeline.training.config import OptimiserConfig
from wsi_pipeline.training.loop import Iteration, make_optimisers
from wsi_pipeline.training.objective import Sample

pytestmark = pytest.mark.usefixtures("one_thread")

LEAKS = {"legacy": True, "fixed": False}
EITHER = pytest.mark.parametrize("leak", [pytest.param("legacy", marks=pytest.mark.slow), "fixed"])
CALLS = ("gan_a", "gan_b", "fake_a", "fake_b", "real_a", "real_b")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Toy(nn.Module):
    """The fixture's stand-in for CONCH: three pixelwise layers on a 14 x 14 image."""

    widths = (768, 768, 768)

    def __init__(self, formula: Callable[..., np.ndarray], salt: str) -> None:
        super().__init__()
        self.weight = [torch.from_numpy(formula(f"toy.level{i}.weight", (768, 3), salt)) for i in range(3)]
        self.bias = [torch.from_numpy(formula(f"toy.level{i}.bias", (768,), salt)) for i in range(3)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = F.interpolate(x * 0.5 + 0.5, (14, 14), mode="area")
        p = (p - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        level0, level1 = (
            torch.tanh(torch.einsum("oc,bchw->bohw", self.weight[i], p) + self.bias[i][:, None, None])
            for i in (0, 1)
        )
        return level0, level1, torch.tanh(p.mean((2, 3)) @ self.weight[2].T + self.bias[2])


@functools.cache
def _weights(folder: Path) -> TurboWeights:
    base = load_base(folder / "tiny-base")
    found = import_checkpoint(folder / "model.pkl", base)
    embedded = embed_prompts(folder / "tiny-base", list(PROMPTS.values()))
    return TurboWeights(
        **{name: getattr(found, name) for name in ("layout", "tensors", "unet_scale", "vae_scale", "source")},
        prompts=dict(zip(PROMPTS, embedded, strict=True)),
        base_name="tiny",
        base_digest="",
        licence="",
        mpp=0.5,
        tile=64,
        digest="",
    )


@functools.cache
def _recorded(folder: Path) -> Mapping[str, np.ndarray]:
    path = folder / "training_case.npz"
    if not path.exists():
        pytest.skip("this set has no training case")
    return dict(np.load(path))


def _objective(folder: Path, leak: bool, prefix: str = "") -> AdversarialObjective:
    spec = importlib.util.spec_from_file_location("formula_weights", folder / "formula_weights.py")
    formula = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formula)
    salt, recorded = f"{folder.name}/", _recorded(folder)
    judges = {}
    for direction, name in (("a2b", "net_disc_a"), ("b2a", "net_disc_b")):
        judge = Discriminator(Toy(formula.formula_array, salt), MultilevelHead(Toy.widths)).train()
        shapes = {f"{name}.{key}": tensor for key, tensor in judge.state_dict().items()}
        filled = formula.fill_state_dict(shapes, salt)
        state = {key.removeprefix(f"{name}."): torch.from_numpy(value) for key, value in filled.items()}
        judge.load_state_dict(state, strict=False)
        judges[direction] = judge

    def draws(sample: Sample, call: str, height: int, width: int) -> Draws:
        drawn = recorded[f"{prefix}aug_draws"][CALLS.index(call)]
        uniform = [torch.from_numpy(row).float() for row in drawn[:3]]
        return Draws(*uniform, *(torch.from_numpy(row).long() for row in drawn[3:]))

    network = TurboNetwork(_weights(folder)).train()
    config = AdversarialConfig(legacy_disc_grad_leak=leak, lpips=False)
    return AdversarialObjective(network, judges, config, None, draws)


def _sample(folder: Path) -> Sample:
    recorded = _recorded(folder)
    return Sample(
        source=torch.from_numpy(recorded["img_a"]),
        target=torch.from_numpy(recorded["img_b"]),
        numbers=np.arange(len(recorded["img_a"])),
        seed=0,
    )


def _canonical(name: str) -> str:
    """The published optimiser's name of a parameter -> ours."""
    name = name.removeprefix("vae_enc.").replace(".base_layer.", ".")
    for adapter in ("default_encoder", "default_decoder", "default_others", "vae_skip"):
        name = name.replace(f".{adapter}.", ".")
    return name


def _norms(
    names: np.ndarray, parameters: Mapping[str, Any], rename: Callable[[str], str] = str
) -> np.ndarray:
    values = (parameters.get(rename(str(name))) for name in names)
    return np.array([np.nan if v is None or v.grad is None else float(v.grad.norm()) for v in values])


def _close(found: np.ndarray, wanted: np.ndarray, relative: float) -> None:
    """Within ``relative`` of (norm + 1e-4 of the largest), as the fixtures' text suggests."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    scale = np.abs(wanted) + 1e-4 * np.nanmax(np.abs(wanted))
    assert np.nanmax(np.abs(found - wanted) / scale) < relative


@EITHER
def test_losses_and_gradients_of_every_update(parity_set: Path, leak: str) -> None:
    recorded, objective = _recorded(parity_set), _objective(parity_set, LEAKS[leak])
    generator, judges = objective.groups["generator"], objective.groups["discriminator"]
    names, totals = (
        {"cycle": "cycle", "gan": "gan", "identity": "idt", "fake": "d_fake", "real": "d_real"},
        {},
    )
    logs: dict[str, float] = {}
    for update in objective.updates(_sample(parity_set)):
        total = 0.0
        for term in update.terms:
            term.loss.backward()
            total += float(term.loss.detach())
            logs |= {key: float(value) for key, value in term.logs.items()}
        name = names[update.name]
        totals[name] = total
        if update.group == "generator":
            found = _norms(recorded["G_param_names"], generator, _canonical)
            _close(found, recorded[f"{name}.grad_norms"], 1e-3)
            for key in (k for k in recorded if k.startswith(f"{name}.grad.")):
                grad = generator[_canonical(key.removeprefix(f"{name}.grad."))].grad.flatten()[:64].numpy()
                np.testing.assert_allclose(grad, recorded[key], atol=1e-3 * np.abs(recorded[key]).max())
        else:
            found = _norms(recorded["D_param_names"], judges)
            _close(found, recorded[f"{leak}.{name}.grad_norms"], 1e-3)
        for parameter in objective.groups[update.group].values():
            parameter.grad = None
    for name, total in totals.items():
        assert total == pytest.approx(float(recorded[f"backward.{name}"]), abs=1e-5), name
    logs |= {f"disc_{x}": logs[f"disc_{x}_fake"] + logs[f"disc_{x}_real"] for x in "ab"}
    for key in (k for k in recorded if k.startswith("loss.")):
        assert logs[key.removeprefix("loss.")] == pytest.approx(float(recorded[key]), abs=1e-5), key
    for key in (k for k in recorded if k.startswith("after.")):
        found = objective.buffers[key.removeprefix("after.")].numpy()
        np.testing.assert_allclose(found, recorded[key], atol=1e-5)


@EITHER
def test_a_whole_iteration(parity_set: Path, leak: str) -> None:
    recorded, prefix = _recorded(parity_set), f"iter_{leak}."
    objective = _objective(parity_set, LEAKS[leak], prefix)
    before = {
        group: {name: p.detach().clone() for name, p in parameters.items()}
        for group, parameters in objective.groups.items()
    }
    settings = OptimiserConfig(learning_rate=1e-4)
    iteration = Iteration(
        objective=objective,
        optimisers=make_optimisers(objective, settings),
        config=settings,
        accelerator=Accelerator(cpu=True),
        steps=1,
    )
    logs = {name: float(value) for name, value in iteration.run(0, [_sample(parity_set)]).items()}
    logs |= {f"disc_{x}": logs[f"disc_{x}_fake"] + logs[f"disc_{x}_real"] for x in "ab"}
    for key in (k for k in recorded if k.startswith(f"{prefix}loss.")):
        name = key.removeprefix(f"{prefix}loss.")
        assert logs[name] == pytest.approx(float(recorded[key]), abs=2e-5), name
    for update, name in {"cycle": "cycle", "gan": "gan", "identity": "idt", "fake": "d_fake"}.items():
        wanted = float(recorded[f"{prefix}{name}.grad_total_norm"])
        assert logs[f"norm_{update}"] == pytest.approx(wanted, rel=1e-3), update
    limits = {"generator": ("G", _canonical, 5e-3), "discriminator": ("D", str, 1e-4)}
    for group, (letter, rename, limit) in limits.items():
        moved = []
        for name in recorded[f"{letter}_param_names"]:
            own = rename(str(name))
            parameter = objective.groups[group].get(own)
            moved.append(
                0.0 if parameter is None else float((parameter.detach() - before[group][own]).norm())
            )
        wanted = recorded[f"{prefix}{letter}_delta_norms"]
        _close(np.array(moved), np.nan_to_num(wanted), limit)
