"""Weights to begin with: fresh adapters change nothing; a tensor depends on its name and seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.assemble import with_adapters, without_adapters
from wsi_pipeline.models.base_model import Base
from wsi_pipeline.models.fresh import fresh_adapters, from_scratch
from wsi_pipeline.models.layout import DIRECTIONS, SKIP_INIT, VAES
from wsi_pipeline.models.mini import MINI_UNET, MINI_VAE
from wsi_pipeline.models.random_weights import TINY_UNET, TINY_VAE, random_weights
from wsi_pipeline.models.weights import Prompt, TurboWeights, tensors_digest

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = ("vae_b2a", "vae_patch", "vae_b2a_patch")


@pytest.fixture(scope="module")
def base() -> Base:
    """The base networks of random weights, without skip convolutions."""
    tensors = random_weights(multi_view=False).tensors
    unet = {n.removeprefix("unet."): tensors[n] for n in tensors if n.startswith("unet.")}
    vae = {n.removeprefix("vae."): tensors[n] for n in tensors if n.startswith("vae.")}
    return Base(
        name="base",
        digest="0" * 64,
        unet_config=TINY_UNET,
        vae_config=TINY_VAE,
        unet={key: tensor for key, tensor in unet.items() if ".lora_" not in key},
        vae={key: t for key, t in vae.items() if ".lora_" not in key and ".skip_conv_" not in key},
    )


def prompts() -> dict[str, Prompt]:
    random = torch.Generator().manual_seed(0)
    return {d: Prompt(text=d, embedding=torch.randn(1, 77, 32, generator=random)) for d in DIRECTIONS}


def fresh(base: Base, **options: Any) -> TurboWeights:
    values = {"rank_unet": 4, "rank_vae": 4, "multi_view": True, "seed": 7, "mpp": 0.5, "tile": 64}
    return fresh_adapters(base, options.pop("prompts", prompts()), licence="none", **(values | options))


@pytest.fixture(scope="module")
def weights(base: Base) -> TurboWeights:
    return fresh(base)


def test_fresh_adapters_change_no_bit(weights: TurboWeights) -> None:
    """Live adapters against plain layers without any: both from one base."""
    adapted, bare = with_adapters(weights, DIRECTIONS), without_adapters(weights, DIRECTIONS)
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    for direction in DIRECTIONS:
        with torch.no_grad():
            assert torch.equal(adapted[direction](x), bare[direction](x))


def test_the_base_is_the_base(base: Base, weights: TurboWeights) -> None:
    for part, tensors in (("unet", base.unet), ("vae", base.vae), ("vae_b2a_patch", base.vae)):
        for key, tensor in tensors.items():
            assert torch.equal(weights.tensors[f"{part}.{key}"], tensor), key
    skip = weights.tensors["vae.decoder.skip_conv_2.weight"]
    assert torch.equal(skip, torch.full_like(skip, SKIP_INIT))
    assert (weights.unet_scale, weights.vae_scale) == (1.0, 2.0)


def test_the_four_autoencoders_begin_alike(weights: TurboWeights) -> None:
    names = [name for name in weights.tensors if name.startswith("vae.")]
    assert names
    for name in names:
        for other in OTHERS:
            same = weights.tensors[f"{other}.{name.removeprefix('vae.')}"]
            assert torch.equal(same, weights.tensors[name]), name


@pytest.mark.parametrize(("part", "rank"), [("unet", 4), ("vae", 4)])
def test_a_has_the_deviation_of_one_over_its_rank(weights: TurboWeights, part: str, rank: int) -> None:
    mine = {name: t for name, t in weights.tensors.items() if name.startswith(f"{part}.")}
    values = torch.cat([t.flatten() for name, t in mine.items() if ".lora_A." in name])
    assert float(values.std()) == pytest.approx(1 / rank, rel=0.02)
    assert float(values.mean()) == pytest.approx(0.0, abs=0.01)
    assert not any(t.any() for name, t in mine.items() if ".lora_B." in name)


def test_a_tensor_depends_on_its_name_and_the_seed_alone(base: Base, weights: TurboWeights) -> None:
    again, other = fresh(base), fresh(base, seed=8)
    assert again.digest == weights.digest != other.digest
    one_way = fresh(base, multi_view=False, prompts={"a2b": prompts()["a2b"]})
    assert one_way.layout.vaes == ("vae",)
    assert one_way.directions == ("a2b",)
    for name, tensor in one_way.tensors.items():
        assert torch.equal(tensor, weights.tensors[name]), name


def test_the_global_generator_decides_nothing(base: Base, weights: TurboWeights) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert fresh(base).digest == weights.digest
    assert torch.equal(torch.get_rng_state(), before)


# A small network from nothing


def scratch(**options: Any) -> TurboWeights:
    values: dict[str, Any] = {"unet_config": MINI_UNET, "vae_config": MINI_VAE, "captions": {"a2b": "to"}}
    values |= {"rank_unet": 1, "rank_vae": 1, "multi_view": False, "seed": 7, "mpp": 0.5, "tile": 128}
    values |= options
    configs = values.pop("unet_config"), values.pop("vae_config"), values.pop("captions")
    return from_scratch(*configs, licence="none", **values)


@pytest.mark.parametrize("multi_view", [False, True])
def test_a_network_from_nothing_begins_near_the_identity(multi_view: bool) -> None:
    net = without_adapters(scratch(multi_view=multi_view), ("a2b",))["a2b"]
    y, x = torch.meshgrid(torch.linspace(-0.8, 0.8, 64), torch.linspace(-0.6, 0.6, 64), indexing="ij")
    picture = torch.stack([y, x, -y])[None]
    with torch.no_grad():
        made = net(picture)
    assert float((made - picture).abs().mean()) < 0.05


def test_a_network_from_nothing_is_deterministic_by_name() -> None:
    one, again, other = scratch(), scratch(), scratch(seed=8)
    assert one.digest == again.digest == tensors_digest(one.tensors) != other.digest
    both = scratch(captions={"a2b": "to", "b2a": "back"})
    assert both.layout.vaes == tuple(VAES[d][0] for d in DIRECTIONS)
    assert all(torch.equal(tensor, both.tensors[name]) for name, tensor in one.tensors.items())
    assert torch.equal(both.prompts["a2b"].embedding, one.prompts["a2b"].embedding)
    assert not torch.equal(both.prompts["b2a"].embedding, one.prompts["a2b"].embedding)


@pytest.mark.parametrize("change", [{"norm_num_groups": 4}, {"block_out_channels": (16, 16, 48, 64)}])
def test_an_autoencoder_that_cannot_carry_the_picture_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="norms of one group"):
        scratch(vae_config={**MINI_VAE, **change})
