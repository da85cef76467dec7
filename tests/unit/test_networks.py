"""Networks of the other translators: shapes, what a setting changes, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.network_config import Family, NetworkConfig
from wsi_pipeline.models.networks import build_network
from wsi_pipeline.models.pix2pix import PatchGAN

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[Family, dict[str, Any]] = {
    "unet2d": {"base": 8, "mult": (1, 2), "blocks": 1, "groups": 4, "attention": (1,), "head_width": 8},
    "unet3d": {"base": 8, "mult": (1, 2), "blocks": 1, "groups": 4},
    "unet": {"base": 8, "mult": (1, 2), "groups": 4},
    "pix2pix": {"base": 4, "mult": (1, 2, 4)},
    "resnet": {"base": 4, "blocks": 2},
}


def built(family: Family, taken: int = 3, given: int = 3, classes: int = 0, **settings: Any) -> nn.Module:
    config = NetworkConfig(family=family, **(SMALL[family] | settings))
    torch.manual_seed(7)
    network = build_network(config, in_channels=taken, out_channels=given, classes=classes).eval()
    for parameter in network.parameters():  # some begin as zeros, and would hide what lies before them
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", SMALL)
def test_every_family_makes_the_channels_that_were_asked_for_on_its_smallest_sides(family: Family) -> None:
    network = built(family, taken=6, given=2)
    sides = (NetworkConfig(family=family, **SMALL[family]).multiple,) * (3 if family == "unet3d" else 2)
    x = image(2, 6, *(2 * side for side in sides))
    with torch.no_grad():
        made = network(x, torch.tensor([0.5, 900.0])) if family.endswith("d") else network(x)
    assert made.shape == (2, 2, *x.shape[2:])
    assert made.isfinite().all() and made.std() > 0


@pytest.mark.parametrize("family", ["unet2d", "unet3d"])
def test_a_denoiser_follows_step_and_label_and_no_label_is_its_last_class(family: Family) -> None:
    network = built(family, classes=2)
    x, t = image(2, 3, *((4,) * (3 if family == "unet3d" else 2))), torch.tensor([10.0, 10.0])
    with torch.no_grad():
        none = network(x, t)
        assert torch.equal(none, network(x, t, torch.tensor([2, 2])))
        assert not torch.equal(none, network(x, t, torch.tensor([0, 1])))
        assert not torch.equal(none, network(x, t + 0.5))


@pytest.mark.parametrize("family", ["unet2d", "unet3d"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_scale_and_shift_need_twice_the_channels(family: Family, scale_shift: bool) -> None:
    network = built(family, scale_shift=scale_shift)
    wide = [
        tuple(p.shape) for n, p in network.named_parameters() if "emb_proj.w" in n or "emb_layers.1.w" in n
    ]
    assert ((2 if scale_shift else 1) * 8, 32) in wide
    with torch.no_grad():
        x = image(1, 3, *((4,) * (3 if family == "unet3d" else 2)))
        assert network(x, torch.zeros(1)).isfinite().all()


def test_a_denoiser_of_diffusers_keeps_its_keys_and_moves_copies_and_trains_as_one() -> None:
    from diffusers import UNet2DModel

    network = built("unet2d", classes=1)
    inner = network.inner
    assert isinstance(inner, UNet2DModel) and list(network.state_dict()) == list(inner.state_dict())
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in inner.parameters())
    x, t = image(1, 3, 4, 4), torch.ones(1)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        before = network(x, t)
        next(twin.parameters()).add_(1.0)
        assert torch.equal(network(x, t), before) and not torch.equal(twin(x, t), before)
    network(x, t).square().mean().backward()
    lacking = {name for name, p in network.named_parameters() if p.grad is None}
    assert not lacking
    assert network.double()(x.double(), t.double()).dtype == torch.float64


def test_heads_change_the_output_and_no_tensor() -> None:
    one, other = built("unet2d", heads=4), built("unet2d", head_width=8)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        made = [network(image(1, 3, 8, 8), torch.ones(1)) for network in (one, other)]
    assert (made[0] - made[1]).abs().max() > 1e-5


def test_a_stack_of_few_sections_keeps_its_depth() -> None:
    x, t = image(1, 3, 1, 8, 8), torch.ones(1)
    with torch.no_grad():
        assert built("unet3d", halve_depth=False)(x, t).shape == x.shape
    with pytest.raises(RuntimeError):
        built("unet3d")(x, t)


def test_additive_skips_are_means_and_need_less_weights() -> None:
    added, joined = (built("unet3d", additive_skips=flag) for flag in (True, False))
    assert sum(p.numel() for p in added.parameters()) < sum(p.numel() for p in joined.parameters())


@pytest.mark.parametrize("family", ["pix2pix", "resnet"])
@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
def test_each_norm_of_pix2pix_has_the_parameters_it_should(family: Family, norm: Any) -> None:
    names = built(family, norm=norm).state_dict()
    assert any("running_var" in name for name in names) == (norm == "batch")
    first = "model.model.0.bias" if family == "pix2pix" else "model.1.bias"
    assert (first in names) == (norm in ("instance", "none"))
    vectors = [name for name, tensor in names.items() if name.endswith(".weight") and tensor.dim() == 1]
    assert bool(vectors) == (norm in ("batch", "group"))


@pytest.mark.parametrize("family", ["pix2pix", "resnet"])
def test_tanh_bounds_and_its_absence_does_not(family: Family) -> None:
    x = 50 * image(1, 3, 16, 16)
    bound, free = (built(family, norm="none", tanh=flag) for flag in (True, False))
    free.load_state_dict(bound.state_dict())
    with torch.no_grad():
        assert torch.allclose(free(x).tanh(), bound(x), atol=1e-6)


def test_dropout_of_the_u_net_lies_just_outside_the_innermost_level() -> None:
    config = NetworkConfig(family="pix2pix", base=2, mult=(1, 2, 4, 8, 8, 8, 8, 8), dropout=0.5)
    network = build_network(config, in_channels=3, out_channels=3)
    levels = [name.count(".3.") + 1 for name, m in network.named_modules() if isinstance(m, nn.Dropout)]
    assert sorted(levels) == [4, 5, 6]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_in_evaluation_an_image_does_not_depend_on_its_batch(norm: Any) -> None:
    network, x = built("pix2pix", norm=norm, dropout=0.5), image(3, 3, 16, 16)
    with torch.no_grad():
        alone = torch.cat([network(x[k : k + 1]) for k in range(3)])
        assert torch.allclose(network(x), alone, atol=1e-6)
        if norm == "batch":
            network.train()
            assert not torch.allclose(network(x)[:1], network(x[:1]), atol=1e-3)


def test_a_logit_of_the_judge_sees_70_by_70_pixels() -> None:
    judge = PatchGAN(base=4, norm="none").eval()
    for module in judge.modules():
        if isinstance(module, nn.Conv2d):  # no weight is zero by chance, none cancels another
            nn.init.uniform_(module.weight, 0.1, 1.0)
    x = image(1, 6, 256, 256).requires_grad_()
    logits = judge(x)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    assert x.grad is not None
    seen_HW = (x.grad[0] != 0).any(dim=0)
    rows, columns = seen_HW.any(dim=1).nonzero().flatten(), seen_HW.any(dim=0).nonzero().flatten()
    assert len(rows) == len(columns) == 70 and int(seen_HW.sum()) == 70 * 70
    assert int(rows[-1] - rows[0]) == 69


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"family": "unet2d", "base": 6, "groups": 4}, "groups"),
        ({"family": "unet2d", "head_width": 5}, "head"),
        ({"family": "unet2d", "heads": 3}, "heads"),
        ({"family": "unet3d", "attention": (1,)}, "network.attention"),
        ({"family": "unet3d", "base": 6}, "groups"),
        ({"family": "pix2pix", "mult": (1,)}, "network.mult"),
        ({"family": "resnet", "classes": 3}, "no class"),
        ({"family": "pix2pix", "base": 0}, "base"),
    ],
)
def test_settings_that_make_no_network_are_told_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(**settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)
