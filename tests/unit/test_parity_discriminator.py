"""Head, loss, DiffAugment and CONCH's trunk against the published program, every case of every set."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wsi_pipeline.models.backbones import Backbone, make_backbone
from wsi_pipeline.models.diff_augment import Draws, augment
from wsi_pipeline.models.discriminator import Discriminator, MultilevelHead, multilevel_loss

pytestmark = pytest.mark.usefixtures("one_thread")

RAW = {"brightness": "brightness_rand", "saturation": "saturation_rand", "contrast": "contrast_rand"}


def recorded(folder: Path, name: str) -> Mapping[str, np.ndarray]:
    if not (folder / name).exists():
        pytest.skip(f"this set has no {name}")
    return _arrays(folder / name)


@functools.cache
def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def formula(folder: Path) -> tuple[Any, str]:
    """The set's module of formula weights, and its salt."""
    spec = importlib.util.spec_from_file_location("formula_weights", folder / "formula_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, json.loads((folder / "manifest.json").read_text())["salt"]


def head_of(folder: Path) -> MultilevelHead:
    path = folder / "discriminator_head.safetensors"
    if not path.exists():
        pytest.skip("this set has no head")
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    hidden, width = state["decoder.2.0.weight_orig"].shape
    head = MultilevelHead((state["decoder.0.1.weight_orig"].shape[1],) * 2 + (width,), hidden)
    for name, tensor in head.state_dict().items():
        if name.endswith("filt"):
            assert torch.equal(tensor, state[name]), name
    head.load_state_dict(state, strict=True)
    return head


def close(found: Tensor, wanted: np.ndarray, limit: float) -> None:
    np.testing.assert_allclose(found.detach().numpy().reshape(wanted.shape), wanted, rtol=0, atol=limit)


# The head


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_losses_and_gradients(parity_set: Path, mode: str) -> None:
    cases = recorded(parity_set, "discriminator_cases.npz")
    head = head_of(parity_set).train(mode == "train")
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    features = [torch.from_numpy(cases[f"feat{i}_f16"]).float().requires_grad_() for i in range(3)]
    logits = head(features)
    for level, found in enumerate(logits):
        close(found, cases[f"{mode}.logits{level}"], 1e-5)
    for name, target in (("real", 1.0), ("fake", 0.0), ("G", 1.0)):
        loss = multilevel_loss(logits, target)
        close(loss, cases[f"{mode}.loss_{name}"], 1e-5)
        close(loss.mean(), cases[f"{mode}.loss_{name}_mean"], 1e-5)
    multilevel_loss(logits, 0.0).mean().backward()
    gradients = dict(head.named_parameters()) | {f"feat{i}": x for i, x in enumerate(features)}
    _compare_gradients(gradients, cases, f"{mode}.fake_grad")
    after = {name: tensor for name, tensor in head.state_dict().items() if name[-2:] in ("_u", "_v")}
    for name, tensor in after.items():
        close(tensor, cases[f"after_train.{name}"] if mode == "train" else before[name].numpy(), 1e-5)


def _compare_gradients(tensors: Mapping[str, Tensor], cases: Mapping[str, np.ndarray], prefix: str) -> None:
    wanted = {name: cases[_norm_name(name, prefix)] for name in tensors}
    largest = max(float(norm) for norm in wanted.values())
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        norm = float(tensor.grad.norm())
        assert abs(norm - wanted[name]) <= 1e-3 * (wanted[name] + 1e-4 * largest), name
        if f"{prefix}_{name}_first64" in cases:
            first = cases[f"{prefix}_{name}_first64"]
            close(tensor.grad.flatten()[:64], first, 1e-3 * float(np.abs(first).max()))


def _norm_name(name: str, prefix: str) -> str:
    return f"{prefix}_{name}_norm" if name.startswith("feat") else f"{prefix}_norm.{name}"


def test_loss_of_zero_logits(parity_set: Path) -> None:
    cases = recorded(parity_set, "discriminator_cases.npz")
    zeros = [torch.zeros(cases[f"eval.logits{i}"].shape) for i in range(3)]
    close(multilevel_loss(zeros, 1.0), cases["zero_logit_loss"], 1e-6)


def test_state_of_a_discriminator_is_the_published_one(parity_set: Path) -> None:
    path = parity_set / "keys_full.json"
    if not path.exists():
        pytest.skip("this set has no table of keys")
    keys = json.loads(path.read_text())
    judge = Discriminator(nn.Identity(), MultilevelHead((768, 768, 768)))
    shapes = {name: list(tensor.shape) for name, tensor in judge.state_dict().items()}
    assert list(shapes.items()) == list(keys["discriminator_state_dict"].items())
    assert [name for name, _ in judge.named_parameters()] == keys["discriminator_parameters_in_order"]
    count = sum(parameter.numel() for parameter in judge.parameters())
    assert count == keys["counts"]["discriminator_head"]


# DiffAugment


def test_augmentations(parity_set: Path) -> None:
    cases = recorded(parity_set, "discriminator_cases.npz")
    tried = 0
    for shape, policy in _augmentations(cases):
        x = torch.from_numpy(cases[f"aug.{shape}.x_f16"]).float()
        prefix = f"aug.{shape}.{policy}."
        names = {field: prefix + RAW.get(field, field) for field in Draws._fields}
        still = torch.zeros(len(x), dtype=torch.int64)
        drawn = [torch.from_numpy(cases[n]) if n in cases else still for n in names.values()]
        y = augment(x, Draws(*drawn), policy.split("+"))
        if f"{prefix}y" in cases:
            close(y, cases[f"{prefix}y"], 1e-6)
        if f"{prefix}y_strided" in cases:
            close(y[:, :, ::3, ::3], cases[f"{prefix}y_strided"], 1e-6)
        if f"{prefix}y_mean" in cases:
            assert float(y.double().mean()) == pytest.approx(float(cases[f"{prefix}y_mean"]), abs=1e-6)
        tried += 1
    assert tried


def _augmentations(cases: Mapping[str, np.ndarray]) -> set[tuple[str, str]]:
    split = [name.split(".") for name in cases if name.startswith("aug.")]
    return {(parts[1], parts[2]) for parts in split if len(parts) == 4}


# CONCH's trunk


@pytest.fixture(scope="module")
def conch_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Makes a set's formula weights into a file as the published one is wrapped; one file at a time."""
    made: dict[Path, Path] = {}

    def make(folder: Path) -> Path:
        if folder not in made:
            for old in made.values():
                old.unlink(missing_ok=True)
            cases = recorded(folder, "conch_trunk_cases.npz")
            module, salt = formula(folder)
            state = {}
            for key, shape, crc in zip(cases["keys"], cases["shapes"], cases["crc32"], strict=True):
                value = module.formula_array(str(key), [int(n) for n in str(shape).split("x")], salt)
                assert module.checksum(value) == crc, key
                state[f"module.{key}"] = torch.from_numpy(value)
            # Other parts of the published file, that the trunk does not need.
            state["module.visual.proj_contrast"] = torch.zeros(2, 2)
            state["module.logit_scale"] = torch.zeros(())
            path = tmp_path_factory.mktemp("conch") / "pytorch_model.bin"
            torch.save({"state_dict": state}, path)
            made[folder] = path
        return made[folder]

    yield make
    for path in made.values():
        path.unlink()


def conch(path: Path, level2: Any) -> Backbone:
    return make_backbone("conch", weights=path, level2=level2)


def test_trunk_levels_and_logits(parity_set: Path, conch_file: Any) -> None:
    cases = recorded(parity_set, "conch_trunk_cases.npz")
    path = conch_file(parity_set)
    backbone, with_token = conch(path, "first_patch"), conch(path, "cls")
    judge = Discriminator(backbone, head_of(parity_set)).eval()
    shown = [name.removesuffix(".x_uint8") for name in cases if name.endswith(".x_uint8")]
    assert shown
    for image in shown:
        x = torch.from_numpy(cases[f"{image}.x_uint8"]).permute(2, 0, 1)[None] / 255 * 2 - 1
        close(backbone.prepare(x)[:, :, ::16, ::16], cases[f"{image}.normalised_strided"], 2e-5)
        with torch.no_grad():
            levels = backbone(x)
            close(with_token(x)[2], cases[f"{image}.level2_cls_token"], 2e-5)
            logits = judge(x, None)
        close(levels[2], cases[f"{image}.level2.strided"], 2e-5)
        for level in (0, 1):
            prefix = f"{image}.level{level}"
            close(levels[level][:, ::8, ::3, ::3], cases[f"{prefix}.strided"], 2e-5)
            close(levels[level].flatten()[:64], cases[f"{prefix}.first64"], 2e-5)
            values = levels[level].double()
            stats = torch.stack([values.mean(), values.std(correction=0), values.min(), values.max()])
            close(stats, cases[f"{prefix}.stats"], 1e-4)
        for level, found in enumerate(logits):
            close(found, cases[f"{image}.head_logits{level}"], 1e-5)


def test_position_embedding(parity_set: Path, conch_file: Any) -> None:
    cases = recorded(parity_set, "conch_trunk_cases.npz")
    if "pos_embed_14x14.strided" not in cases:
        pytest.skip("this set has no position embedding")
    trunk = conch(conch_file(parity_set), "cls").network.trunk
    table = trunk.pos_embed.clone()
    table[:, :1] += trunk.cls_token
    close(table[:, :, ::8], cases["pos_embed_14x14.strided"], 2e-5)
