"""The head and its spectral norms: names, sizes, state; the loss; a frozen backbone inside."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.backbones import make_backbone
from wsi_pipeline.models.diff_augment import draw
from wsi_pipeline.models.discriminator import (
    MIN_GRID,
    Discriminator,
    MultilevelHead,
    SpectralLayer,
    multilevel_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def features(count: int, width: int, side: int = 8) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = [(count, width, side, side), (count, width, side, side), (count, width)]
    return [torch.randn(shape, generator=rng) for shape in shapes]


def tiny(seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    backbone = make_backbone("tiny")
    return Discriminator(backbone, MultilevelHead(backbone.widths, hidden=16))


def test_published_size_and_names() -> None:
    head = MultilevelHead((768, 768, 768))
    assert sum(parameter.numel() for parameter in head.parameters()) == 1_868_547
    state = Discriminator(nn.Identity(), head).state_dict()
    assert len(state) == 28
    assert tuple(state["decoder.0.decoder.1.1.weight_v"].shape) == (6912,)
    parameters = [name for name, _ in head.named_parameters()]
    assert parameters[:4] == [
        "decoder.0.1.bias",
        "decoder.0.1.weight_orig",
        "decoder.0.4.bias",
        "decoder.0.4.weight_orig",
    ]


def test_sides_of_the_published_grid() -> None:
    head = MultilevelHead((8, 8, 8), hidden=4)
    sides = []
    for layer in head.decoder[0]:
        layer.register_forward_hook(lambda _, __, y: sides.append(y.shape[-1]))
    head(features(1, 8, 14))
    assert sides == [15, 7, 7, 6, 3]


@settings(max_examples=20, deadline=None)
@given(height=st.integers(MIN_GRID, 20), width=st.integers(MIN_GRID, 20))
def test_any_grid_leaves_logits(height: int, width: int) -> None:
    head = MultilevelHead((4, 6, 5), hidden=4)
    maps = [torch.randn(2, channels, height, width) for channels in (4, 6)]
    logits = head([*maps, torch.randn(2, 5)])
    sides = (height // 2 // 2, width // 2 // 2)
    assert [tuple(level.shape) for level in logits] == [(2, *sides), (2, *sides), (2, 1)]


def test_a_grid_that_leaves_no_logit_is_refused() -> None:
    with pytest.raises(ValueError, match="feature map of 3 x 3"):
        MultilevelHead((4, 4, 4))(features(1, 4, side=3))


def test_blur_keeps_a_flat_map_and_its_channels_apart() -> None:
    blur = MultilevelHead((3, 3, 3)).decoder[0][0]
    x = torch.tensor([1.0, 2.0, -3.0])[None, :, None, None].expand(1, 3, 9, 9)
    inside = blur(x)[:, :, 3:-3, 3:-3]
    assert torch.allclose(inside, x[:, :, :4, :4])


@pytest.mark.parametrize("shape", [(16, 12, 3, 3), (16, 40)])
def test_the_largest_singular_value_becomes_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    layer = SpectralLayer(shape)
    with torch.no_grad():
        layer.weight_orig.mul_(30)
        for _ in range(200):
            weight = layer.weight()
    assert torch.linalg.matrix_norm(weight.flatten(1), 2) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("linear", [False, True])
def test_three_steps_equal_those_of_torch(linear: bool) -> None:
    torch.manual_seed(5)
    shape = (6, 20) if linear else (6, 5, 3, 3)
    ours = SpectralLayer(shape, stride=2)
    theirs = nn.Linear(20, 6) if linear else nn.Conv2d(5, 6, 3, stride=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.nn.utils.spectral_norm(theirs)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 20) if linear else torch.randn(3, 5, 9, 9)
        for _ in range(3):
            for layer in (ours, theirs):
                layer.zero_grad()
                layer(x).square().sum().backward()
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter -= 0.01 * parameter.grad
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_norms_move_in_training_mode_alone_and_once_a_pass() -> None:
    torch.manual_seed(0)
    head = MultilevelHead((4, 4, 4), hidden=4)
    level = features(1, 4)
    before = copy.deepcopy(head.state_dict())
    head.eval()(level)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    head.train()(level)
    moved = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= {name for name in before if name.endswith(("_u", "_v"))}
    assert len(moved) >= 8  # a vector of length one does not move
    matrix = before["decoder.2.0.weight_orig"]
    v = nn.functional.normalize(matrix.t() @ before["decoder.2.0.weight_u"], dim=0)
    torch.testing.assert_close(head.decoder[2][0].weight_v, v)


def test_two_passes_before_one_backward() -> None:
    head = MultilevelHead((4, 4, 4), hidden=4)
    first, second = features(2, 4), features(2, 4)
    loss = multilevel_loss(head(first), 1.0) + multilevel_loss(head(second), 0.0)
    loss.mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_loss_at_zero_and_its_levels() -> None:
    zero = [torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), torch.zeros(2, 1)]
    for target in (0.0, 1.0):
        torch.testing.assert_close(multilevel_loss(zero, target), torch.full((2,), 3 * math.log(2)))
    # A map counts as much as the vector, whatever its size, and samples do not mix.
    uneven = [torch.zeros(2, 3, 3), torch.zeros(2, 2, 5), torch.zeros(2, 1)]
    uneven[1][1] = 2.0
    wanted = 3 * math.log(2) + (math.log1p(math.exp(2.0)) - math.log(2)) * np.array([0, 1])
    np.testing.assert_allclose(multilevel_loss(uneven, 0.0).numpy(), wanted, rtol=1e-6)


def test_loss_pushes_towards_its_target_and_survives_large_logits() -> None:
    logits = [torch.full((1, 1), 200.0, requires_grad=True) for _ in range(3)]
    assert multilevel_loss(logits, 0.0).item() == pytest.approx(600.0)
    assert multilevel_loss(logits, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    multilevel_loss(logits, 0.0).sum().backward()
    assert all(level.grad.item() > 0 for level in logits)


def test_the_backbone_is_no_part_of_what_learns_or_is_saved() -> None:
    judge = tiny().train()
    assert all(name.startswith("decoder.0.") for name in judge.state_dict())
    assert all(name.startswith("decoder.0.") for name, _ in judge.named_parameters())
    assert not judge.backbone.training and judge.decoder[0].training
    assert not any(parameter.requires_grad for parameter in judge.backbone.parameters())


def test_the_backbone_moves_with_the_discriminator() -> None:
    judge = tiny().to("meta")
    assert {tensor.device.type for tensor in judge.backbone.parameters()} == {"meta"}
    assert judge.backbone.mean.device.type == "meta"


def test_gradients_reach_image_and_head() -> None:
    judge = tiny()
    x = (torch.rand(2, 3, 96, 80) * 2 - 1).requires_grad_()
    drawn = draw([np.random.default_rng(b) for b in range(2)], 96, 80)
    multilevel_loss(judge(x, drawn), 1.0).mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in judge.parameters())
    assert all(parameter.grad is None for parameter in judge.backbone.parameters())


def test_a_frozen_head_gives_the_image_the_same_gradient() -> None:
    gradients = []
    for frozen in (False, True):
        judge = tiny(seed=4)
        for parameter in judge.parameters():
            parameter.requires_grad_(not frozen)
        x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64).requires_grad_()
        multilevel_loss(judge(x, None), 1.0).mean().backward()
        gradients.append(x.grad)
        assert all((parameter.grad is None) == frozen for parameter in judge.parameters())
    assert torch.equal(*gradients)


def test_policy_and_draws_decide_the_augmentation() -> None:
    x = torch.rand(1, 3, 64, 64)
    drawn = draw([np.random.default_rng(0)], 64, 64)
    backbone = make_backbone("tiny")
    head = MultilevelHead(backbone.widths, hidden=8).eval()
    bare = Discriminator(backbone, head, policy=())
    full = Discriminator(backbone, head)
    same, other = bare(x, drawn), full(x, drawn)
    assert all(torch.equal(a, b) for a, b in zip(same, full(x, None), strict=True))
    assert not torch.equal(same[0], other[0])
    with pytest.raises(ConfigError, match="no blur"):
        Discriminator(backbone, head, policy=("blur",))


def test_copies_and_pickles_judge_alike() -> None:
    judge = tiny().eval()
    x = torch.rand(1, 3, 64, 64)
    for other in (copy.deepcopy(judge), pickle.loads(pickle.dumps(judge))):  # noqa: S301 (our own bytes)
        assert all(torch.equal(a, b) for a, b in zip(judge(x, None), other(x, None), strict=True))
