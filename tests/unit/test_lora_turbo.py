"""The one-step network: formula, cells, adapters, fusion, skips, sizes; references are written out here."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from wsi_pipeline.models.assemble import assemble, merged_tensor, with_adapters
from wsi_pipeline.models.layout import DIRECTIONS, VAES, Direction
from wsi_pipeline.models.lora_turbo import ALPHA_BAR, Translator, cut_cells, join_cells, one_step
from wsi_pipeline.models.random_weights import random_weights
from wsi_pipeline.models.weights import TurboWeights

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(**options: Any) -> TurboWeights:
    """Random weights with all of their tensors in memory."""
    weights = random_weights(**options)
    return replace(weights, tensors=dict(weights.tensors))


def changed(weights: TurboWeights, ending: str, value: float) -> TurboWeights:
    """Every tensor whose name ends so filled with one value."""
    tensors = {
        name: torch.full_like(tensor, value) if name.endswith(ending) else tensor
        for name, tensor in weights.tensors.items()
    }
    return replace(weights, tensors=tensors)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def weights() -> TurboWeights:
    return drawn()


@pytest.fixture(scope="module")
def nets(weights: TurboWeights) -> dict[Direction, Translator]:
    return {direction: assemble(weights, direction) for direction in DIRECTIONS}


@pytest.fixture(scope="module")
def live(weights: TurboWeights) -> dict[Direction, Translator]:
    """Both directions with live adapters and one UNet between them."""
    return {direction: net.eval() for direction, net in with_adapters(weights, DIRECTIONS).items()}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def stock_vae(weights: TurboWeights, name: str = "vae") -> Any:
    """diffusers' own autoencoder, without skips, with the merged weights of one of ours."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config(dict(weights.layout.vae_config)).eval()
    vae.load_state_dict({key: merged_tensor(weights, f"{name}.{key}") for key in vae.state_dict()})
    return vae


# T2: the one-step formula


def test_the_schedule_is_sd_turbos() -> None:
    assert pytest.approx(0.00466009508818388, rel=1e-7) == ALPHA_BAR


def test_the_one_step_formula() -> None:
    one, zero = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    torch.testing.assert_close(one_step(one, zero), 14.648819 * one, rtol=1e-6, atol=0)
    torch.testing.assert_close(one_step(zero, one), -14.614647 * one, rtol=1e-6, atol=0)
    assert one_step(10 * one, zero).min() > 146, "clipping would destroy the result"


def test_the_one_step_formula_is_float32_whatever_it_is_given() -> None:
    z, eps = images(1, 4, 8, 8).bfloat16(), images(1, 4, 8, 8, seed=1).bfloat16()
    x0 = one_step(z, eps)
    assert x0.dtype == torch.float32
    wanted = (z.double() - (1 - ALPHA_BAR) ** 0.5 * eps.double()) / ALPHA_BAR**0.5
    torch.testing.assert_close(x0.double(), wanted, rtol=0, atol=1e-5)


# T4: cells

sizes = st.integers(1, 5)


@given(b=sizes, channels=sizes, height=sizes, width=sizes)
def test_cutting_is_a_bijection_in_the_published_order(
    b: int, channels: int, height: int, width: int
) -> None:
    x = torch.arange(b * channels * 16 * height * width).reshape(b, channels, 4 * height, 4 * width)
    cells = cut_cells(x)
    assert cells.shape == (16 * b, channels, height, width)
    assert torch.equal(join_cells(cells), x)
    for sample in range(b):
        for row in range(4):
            for col in range(4):
                wanted = x[sample, :, row * height : (row + 1) * height, col * width : (col + 1) * width]
                assert torch.equal(cells[16 * sample + 4 * row + col], wanted)


# T5: adapters


@pytest.mark.slow
def test_an_untrained_adapter_changes_no_bit(weights: TurboWeights) -> None:
    fresh = changed(weights, ".lora_B.weight", 0.0)
    plain = {name: tensor for name, tensor in weights.tensors.items() if ".lora_" not in name}
    without = replace(weights, tensors=plain, layout=replace(weights.layout, rank_unet=0, rank_vae=0))
    x, noise = images(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    live = with_adapters(fresh, DIRECTIONS)
    for direction in DIRECTIONS:
        wanted = assemble(without, direction)(x, noise)
        assert torch.equal(assemble(fresh, direction)(x, noise), wanted)
        assert torch.equal(live[direction].eval()(x, noise), wanted)
        assert not torch.equal(assemble(weights, direction)(x, noise), wanted)


@pytest.mark.parametrize("module", ["mid_block.attentions.0.proj_in", "up_blocks.3.attentions.2.proj_out"])
def test_merging_a_linear_layer(weights: TurboWeights, module: str) -> None:
    for matrix in (weights, changed(weights, ".lora_B.weight", 1.0)):
        w, a, b = parts(matrix, f"unet.{module}")
        assert w.dim() == 2
        merged = merged_tensor(matrix, f"unet.{module}.weight")
        torch.testing.assert_close(merged, w + 1.0 * b @ a, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "stride"),
    [
        ("unet.down_blocks.0.downsamplers.0.conv", 1.0, 2),
        ("unet.conv_in", 1.0, 1),
        ("vae_b2a.encoder.down_blocks.1.downsamplers.0.conv", 2.0, 2),
        ("vae_patch.encoder.down_blocks.1.resnets.0.conv_shortcut", 2.0, 1),
        ("vae.decoder.skip_conv_2", 2.0, 1),
    ],
)
def test_merging_a_convolution(weights: TurboWeights, name: str, scale: float, stride: int) -> None:
    for matrix in (weights, changed(weights, ".lora_B.weight", 1.0)):
        w, a, b = parts(matrix, name)
        merged = merged_tensor(matrix, f"{name}.weight")
        delta = torch.einsum("or,riuv->oiuv", b[:, :, 0, 0], a)
        torch.testing.assert_close(merged, w + scale * delta, rtol=0, atol=1e-5)
        x, how = images(2, w.shape[1], 11, 13), {"stride": stride, "padding": w.shape[-1] // 2}
        apart = F.conv2d(x, w, **how) + scale * F.conv2d(F.conv2d(x, a, **how), b)
        torch.testing.assert_close(F.conv2d(x, merged, **how), apart, rtol=1e-5, atol=1e-4)


def parts(weights: TurboWeights, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B of an adapted layer."""
    names = (f"{module}.weight", f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    w, a, b = (weights.tensors[name] for name in names)
    return w, a, b


def test_what_has_no_adapter_is_the_base(weights: TurboWeights) -> None:
    for name in ("unet.time_embedding.linear_1.weight", "unet.conv_in.bias", "vae.quant_conv.weight"):
        assert torch.equal(merged_tensor(weights, name), weights.tensors[name])


def test_live_adapters_equal_merged_ones() -> None:
    weights = drawn(rank_unet=3, rank_vae=2)
    assert weights.vae_scale == 4.0
    x, live = images(2, 3, 64, 96), with_adapters(weights, ["b2a"])["b2a"]
    torch.testing.assert_close(assemble(weights, "b2a")(x), live.eval()(x), rtol=0, atol=1e-4)


def test_directions_with_adapters_share_one_unet_and_can_be_trained(
    live: Mapping[Direction, Translator],
) -> None:
    assert live["a2b"].unet is live["b2a"].unet
    with torch.enable_grad():
        live["a2b"](images(1, 3, 64, 64)).mean().backward()
    trained = [name for name, p in live["a2b"].named_parameters() if "lora_B" in name and p.grad is not None]
    for part in ("unet", "encoder", "decoder", "local_encoder"):
        assert any(name.startswith(f"{part}.") for name in trained), part


# T6: fusion and skips


def reference_features(weights: TurboWeights, x: Tensor) -> Tensor:
    """What both encoders of a2b make of x, summed; cells are cut and encoded one by one."""
    whole, local = (stock_vae(weights, name).encoder for name in VAES["a2b"])
    h = whole(x)
    height, width = x.shape[2] // 4, x.shape[3] // 4
    for row in range(4):
        for col in range(4):
            ys, xs = slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width)
            cell = local(x[:, :, ys, xs])
            at_y = slice(row * height // 8, (row + 1) * height // 8)
            h[:, :, at_y, col * width // 8 : (col + 1) * width // 8] += cell
    return h


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (32, 128)])
def test_fusion_of_any_shape(
    weights: TurboWeights, nets: Mapping[Direction, Translator], height: int, width: int
) -> None:
    """Cells are H/4 x W/4, for squares as published; the bias of quant_conv counts once."""
    net, x = nets["a2b"], images(2, 3, height, width)
    features = net.encode(x)
    h = reference_features(weights, x)
    torch.testing.assert_close(features.h, h, rtol=1e-5, atol=1e-5)
    w, b = (weights.tensors[f"vae.quant_conv.{leaf}"] for leaf in ("weight", "bias"))
    mean, logvar = (torch.einsum("oi,bihw->bohw", w[:, :, 0, 0], h) + b[:, None, None]).chunk(2, dim=1)
    z = net.latent(net.posterior(features.h))
    torch.testing.assert_close(z, 0.18215 * mean, rtol=1e-5, atol=1e-5)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    sampled = net.latent(net.posterior(features.h), noise)
    wanted = 0.18215 * (mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise)
    torch.testing.assert_close(sampled, wanted, rtol=1e-5, atol=1e-5)
    expected = [(2, c, height // s, width // s) for c, s in ((8, 1), (8, 2), (16, 4), (32, 8))]
    assert [tuple(skip.shape) for skip in features.skips] == expected
    y = net(x)
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    assert -1 <= y.min() < y.max() <= 1
    torch.testing.assert_close(net(x[1:]), y[1:], rtol=0, atol=1e-4)


def test_skips_at_the_start_of_training(weights: TurboWeights) -> None:
    """Each skip convolution adds 1e-5 times the sum of its input's channels to all of its outputs."""
    net = assemble(changed(weights, ".lora_B.weight", 0.0), "a2b")
    skips = net.encode(images(1, 3, 64, 64)).skips
    for k, skip in enumerate(reversed(skips), start=1):
        added = getattr(net.decoder, f"skip_conv_{k}")(skip)
        wanted = 1e-5 * skip.sum(dim=1, keepdim=True)
        torch.testing.assert_close(added, wanted.expand_as(added), rtol=1e-4, atol=1e-8)


def test_gamma_is_the_strength_of_the_skips(
    weights: TurboWeights, nets: Mapping[Direction, Translator]
) -> None:
    net, x0 = nets["b2a"], 0.5 * images(1, 4, 12, 8, seed=2)
    skips = net.encode(images(1, 3, 96, 64)).skips
    vae = stock_vae(weights, "vae_b2a")
    without = vae.decoder(vae.post_quant_conv(x0 / 0.18215))
    torch.testing.assert_close(net.decode(x0, skips, gamma=0.0), without, rtol=1e-5, atol=1e-5)
    full = net.decode(x0, skips)
    assert (full - without).abs().max() > 0.01
    doubled = net.decode(x0, tuple(2 * skip for skip in skips))
    torch.testing.assert_close(net.decode(x0, skips, gamma=2.0), doubled, rtol=0, atol=1e-5)


# Sizes, views, threads


@pytest.mark.parametrize(("height", "width"), [(500, 500), (64, 80), (48, 64), (8, 32)])
def test_other_sizes_are_refused(nets: Mapping[Direction, Translator], height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height} x {width}.*multiples of 32"):
        nets["a2b"](torch.zeros(1, 3, height, width))


def test_a_single_view_sees_the_whole_tile_only() -> None:
    weights, x = drawn(multi_view=False), images(1, 3, 64, 96)
    assert not weights.multi_view("a2b")
    net = assemble(weights, "a2b")
    assert net.local_encoder is None
    torch.testing.assert_close(net.encode(x).h, stock_vae(weights).encoder(x), rtol=1e-5, atol=1e-5)
    assert with_adapters(weights, ["a2b"])["a2b"].local_encoder is None


def test_one_network_serves_several_threads(live: Mapping[Direction, Translator]) -> None:
    """Two directions with one UNet, each in two threads with images of its own."""
    jobs = [(live[direction], images(1, 3, 64, 64, seed=k)) for k in (1, 2) for direction in DIRECTIONS]
    alone = [net(x) for net, x in jobs]
    found: list[list[Tensor]] = [[] for _ in jobs]
    together = threading.Barrier(len(jobs))

    def work(k: int) -> None:
        net, x = jobs[k]
        together.wait(timeout=60)
        for _ in range(4):
            with torch.inference_mode():
                found[k].append(net(x))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [len(results) for results in found] == [4] * len(jobs)
    assert all(torch.equal(y, wanted) for results, wanted in zip(found, alone, strict=True) for y in results)


# Types and memory


def test_bfloat16_is_near_float32(weights: TurboWeights) -> None:
    """Loose: tiny random networks with few channels enlarge rounding more than those of full size."""
    x = F.interpolate(images(2, 3, 16, 16), scale_factor=8, mode="bicubic").clamp(-1, 1)
    half = assemble(weights, "a2b", dtype=torch.bfloat16)
    levels = 127.5 * (half(x) - assemble(weights, "a2b")(x)).abs()
    assert 0 < levels.mean() < 4, "1.5 measured"
    assert levels.max() < 60, "16 measured"


def test_what_stays_in_float32(weights: TurboWeights) -> None:
    net = assemble(weights, "a2b", dtype=torch.bfloat16, unet_dtype=torch.bfloat16)
    last = (net.unet.conv_out, net.decoder.conv_out, net.quant_conv, net.post_quant_conv)
    assert {p.dtype for module in last for p in module.parameters()} == {torch.float32}
    blocks = (
        net.unet.down_blocks,
        net.encoder.down_blocks,
        net.local_encoder.down_blocks,
        net.decoder.up_blocks,
    )
    for module in blocks:
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    x = images(1, 3, 64, 64)
    z = net.latent(net.posterior(net.encode(x).h))
    eps = net.denoise(z)
    y = net(x)
    assert {z.dtype, eps.dtype, y.dtype} == {torch.float32}
    assert np.isfinite(y.numpy()).all()


class Recorded(Mapping[str, Tensor]):
    """Remembers which tensors were taken."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.taken: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.taken.append(name)
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("multi_view", [True, False])
def test_only_what_a_direction_needs_is_read_and_kept(multi_view: bool) -> None:
    weights = drawn(multi_view=multi_view)
    layout, recorded = weights.layout, Recorded(weights.tensors)
    net = assemble(replace(weights, tensors=recorded), "b2a")
    encoder = {key: shape for key, shape in layout.vae_base.items() if key.startswith("encoder.")}
    wanted = layout.count(layout.unet_base) + layout.count(layout.vae_base)
    wanted += layout.count(encoder) if multi_view else 0
    assert sum(p.numel() for p in net.parameters()) == wanted
    assert not any(p.requires_grad for p in net.parameters())
    assert len(recorded.taken) == len(set(recorded.taken))
    read = {tuple(name.split(".")[: 1 if name.startswith("unet.") else 2]) for name in recorded.taken}
    parts_read = {
        ("unet",),
        *(("vae_b2a", part) for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")),
    }
    assert read == parts_read | ({("vae_b2a_patch", "encoder")} if multi_view else set())


def test_live_adapters_leave_the_local_decoder_out(
    weights: TurboWeights, live: Mapping[Direction, Translator]
) -> None:
    layout, net = weights.layout, live["a2b"]
    base = {name: tuple(p.shape) for name, p in net.named_parameters() if ".lora_" not in name}
    encoder = {key: shape for key, shape in layout.vae_base.items() if key.startswith("encoder.")}
    wanted = sum(layout.count(shapes) for shapes in (layout.unet_base, layout.vae_base, encoder))
    assert layout.count(base) == wanted
    adapters = sum(p.numel() for name, p in net.named_parameters() if ".lora_" in name)
    used = ("unet.", "vae.", "vae_patch.encoder.")
    named = {n: s for n, s in layout.canonical().items() if ".lora_" in n and n.startswith(used)}
    assert adapters == layout.count(named)
