"""The network as something that learns: which tensors do, what recomputing and bfloat16 change, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wsi_pipeline import model_api
from wsi_pipeline.models.assemble import assemble
from wsi_pipeline.models.bundle import load_bundle, save_bundle
from wsi_pipeline.models.layout import DIRECTIONS, SD_TURBO_UNET, SD_TURBO_VAE, Layout
from wsi_pipeline.models.random_weights import random_weights
from wsi_pipeline.models.trainable import TurboNetwork
from wsi_pipeline.models.weights import TurboWeights, tensors_digest

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_VAES = ("vae", "vae_b2a", "vae_patch", "vae_b2a_patch")
SKIP_BASES = 8  # of the published optimiser's list, which holds them without their ever having a gradient


def images(seed: int = 0) -> Tensor:
    return torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gradients(network: TurboNetwork) -> dict[str, Tensor | None]:
    """Gradients of a loss through both directions."""
    network(network(images(), "a2b"), "b2a").square().mean().backward()
    found = {name: p.grad for name, p in network.learning.items()}
    for parameter in network.learning.values():
        parameter.grad = None
    return found


def stepped(network: TurboNetwork) -> TurboNetwork:
    """The network after one step."""
    optimiser = torch.optim.AdamW(network.learning.values(), lr=1e-2)
    network(images(), "a2b").sub(network(images(seed=1), "b2a")).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return network


# A network takes seconds to build, so those that no test changes are shared.


@pytest.fixture(scope="module")
def weights() -> TurboWeights:
    made = random_weights()
    return replace(made, tensors=dict(made.tensors))


@pytest.fixture(scope="module")
def plain(weights: TurboWeights) -> TurboNetwork:
    return TurboNetwork(weights).train()


@pytest.fixture(scope="module")
def local(weights: TurboWeights) -> TurboNetwork:
    return TurboNetwork(weights, train_local=True).train()


@pytest.fixture(scope="module")
def recomputing(weights: TurboWeights) -> TurboNetwork:
    return TurboNetwork(weights, recompute=True).train()


@pytest.fixture(scope="module")
def trained(weights: TurboWeights) -> TurboNetwork:
    return stepped(TurboNetwork(weights).train())


# Which tensors learn


def test_as_many_tensors_learn_as_the_published_optimiser_steps(plain: TurboNetwork) -> None:
    """The small layout has the topology of the published one, and so its names."""
    assert len(plain.learning) == 822 - SKIP_BASES
    full = Layout(
        unet_config=SD_TURBO_UNET, vae_config=SD_TURBO_VAE, rank_unet=128, rank_vae=4, vaes=ALL_VAES
    ).canonical()
    adapters_of_unet = 40_120_832 + 77_234_176 + 12_427_776
    conv_in, adapters_of_vae = 320 * 4 * 9 + 320, 893_224
    values = sum(int(np.prod(full[name])) for name in plain.learning)
    assert values == adapters_of_unet + conv_in + 2 * adapters_of_vae


def test_bases_are_frozen_and_local_encoders_learn_only_if_told(
    plain: TurboNetwork, local: TurboNetwork
) -> None:
    learning = {id(p) for p in plain.learning.values()}
    assert {id(p) for p in plain.parameters() if p.requires_grad} == learning
    assert not any(name.startswith(("vae_patch.", "vae_b2a_patch.")) for name in plain.learning)
    base = {name for name in plain.learning if ".lora_" not in name}
    assert base == {"unet.conv_in.weight", "unet.conv_in.bias"}
    more = local.learning.keys() - plain.learning.keys()
    assert len(more) == 2 * 2 * 31, "the encoders' 31 adapted modules, for two directions"
    assert all(name.split(".")[0] in ("vae_patch", "vae_b2a_patch") and ".lora_" in name for name in more)


@pytest.mark.parametrize("kind", ["plain", "local"])
def test_gradients_reach_exactly_what_learns(request: pytest.FixtureRequest, kind: str) -> None:
    network: TurboNetwork = request.getfixturevalue(kind)
    assert all(gradient is not None for gradient in gradients(network).values())
    assert all(p.grad is None for p in network.parameters())


def test_only_what_learns_moves(weights: TurboWeights, trained: TurboNetwork) -> None:
    moved = trained.weights().tensors
    changed = {name for name, tensor in weights.tensors.items() if not torch.equal(tensor, moved[name])}
    assert changed == trained.learning.keys()


# Memory and precision


def test_recomputing_gives_the_same_gradients(plain: TurboNetwork, recomputing: TurboNetwork) -> None:
    kept, recomputed = gradients(plain), gradients(recomputing)
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_recomputing_keeps_fewer_activations(plain: TurboNetwork, recomputing: TurboNetwork) -> None:
    assert saved_bytes(recomputing) < 0.5 * saved_bytes(plain)


def saved_bytes(network: TurboNetwork) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = network(images(), "a2b")
    assert made.requires_grad
    return sum(kept.values())


def test_bfloat16_spares_the_last_layer_and_the_weights(weights: TurboWeights, plain: TurboNetwork) -> None:
    network = TurboNetwork(weights, bf16=True).train()
    unet, seen = network.translators["a2b"].unet, {}
    for name, layer in (("first", unet.conv_in), ("last", unet.conv_out)):
        layer.base_layer.register_forward_hook(
            lambda _, given, made, name=name: seen.update({name: (given[0].dtype, made.dtype)})
        )
    made = network(images(), "a2b")
    assert seen["first"][1] == torch.bfloat16
    assert seen["last"] == (torch.float32, torch.float32)
    assert made.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in network.parameters())
    made.square().mean().backward()
    moved = [p.grad for p in network.learning.values() if p.grad is not None]
    assert moved
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in moved)
    with torch.no_grad():
        assert 0 < float((made - plain(images(), "a2b")).abs().mean()) < 0.05


# Back to weights


@pytest.mark.parametrize("kind", ["plain", "local"])
def test_an_untouched_network_is_its_weights(
    request: pytest.FixtureRequest, weights: TurboWeights, kind: str
) -> None:
    found = request.getfixturevalue(kind).weights()
    assert found.digest == weights.digest == tensors_digest(found.tensors)


def test_learned_tensors_take_the_place_of_their_names(plain: TurboNetwork, weights: TurboWeights) -> None:
    name = "vae.decoder.skip_conv_1.lora_B.weight"
    learned = {name: torch.full_like(plain.learning[name], 0.5)}
    found = plain.weights(learned)
    assert torch.equal(found.tensors[name], learned[name])
    assert found.digest == tensors_digest(found.tensors) != weights.digest


def same_as_merged(network: TurboNetwork) -> None:
    found = network.weights()
    for direction in DIRECTIONS:
        with torch.no_grad():
            wanted = network(images(seed=2), direction)
            made = assemble(found, direction)(images(seed=2))
        assert torch.allclose(made, wanted, atol=2e-4), direction


def test_merged_weights_do_what_the_network_does(trained: TurboNetwork) -> None:
    same_as_merged(trained)


def test_training_everything_reaches_every_part_that_is_used(weights: TurboWeights) -> None:
    network = TurboNetwork(weights, trainable="all").train()
    assert all(p.requires_grad for p in network.parameters())
    assert all(gradient is not None for gradient in gradients(network).values())
    same_as_merged(stepped(network))
    found = network.weights().tensors
    assert found.keys() == set(weights.layout.canonical())
    assert not any(tensor.any() for name, tensor in found.items() if ".lora_B." in name)
    for name in ("decoder.conv_out.weight", "quant_conv.weight"):
        assert torch.equal(found[f"vae_patch.{name}"], found[f"vae.{name}"])


def test_trained_weights_survive_a_bundle_and_the_published_format(
    weights: TurboWeights, trained: TurboNetwork, tmp_path: Path
) -> None:
    bundle, name = tmp_path / "trained.safetensors", "unet.conv_in.weight"
    found = trained.weights()
    save_bundle(found, bundle)
    assert load_bundle(bundle).digest == found.digest
    exported = torch.load(model_api.export_model(bundle, tmp_path / "model.pkl"), weights_only=True)
    stored = next(v for k, v in exported["unet_conv_in"].items() if k.endswith("weight") and "lora" not in k)
    assert torch.equal(stored, found.tensors[name])
    assert not torch.equal(stored, weights.tensors[name])
