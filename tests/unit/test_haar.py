"""Haar coefficients: invertible, orthonormal, and where each one lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators import losses, parts, paths
from wsi_pipeline.translators.representations import Representation, make_representation
from wsi_pipeline.translators.settings import (
    DiffusionConfig,
    PathConfig,
    RepresentationConfig,
    WeightConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

AXES = (("y", "x"), ("z", "y", "x"), ("x",), ("z",), ("z", "x"))


def haar(*axes: str, **given: object) -> Representation:
    return make_representation(RepresentationConfig(kind="haar", axes=axes or ("y", "x"), **given))


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    axes=st.sampled_from(AXES),
    levels=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
    colours=st.integers(1, 3),
    scale=st.sampled_from([None, 1.0, 3.0]),
)
def test_coefficients_keep_everything(
    axes: tuple[str, ...], levels: int, sizes: tuple[int, int, int], colours: int, scale: float | None
) -> None:
    rep = haar(*axes, levels=levels, ll_scale=scale)
    shape = [size * rep.alignment if axis in axes else size for axis, size in zip("zyx", sizes, strict=True)]
    x = normals(2, colours, *shape)
    h, plain = rep.encode(x), rep.encode_noise(x)
    assert h.shape == (2, rep.channels(colours), *sizes)
    assert h.numel() == x.numel()
    torch.testing.assert_close(rep.decode(h), x, atol=1e-12, rtol=0)
    assert float((plain**2).sum()) == pytest.approx(float((x**2).sum()), rel=1e-12)
    divisors = rep.divisors(h.shape[1]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(h * divisors, plain, atol=1e-12, rtol=0)


def test_reconstruction_and_energy_of_a_volume() -> None:
    rep, x = haar("z", "y", "x", ll_scale=1.0), normals(1, 1, 8, 16, 12)
    h = rep.encode(x)
    torch.testing.assert_close(rep.decode(h), x, atol=1e-12, rtol=0)
    assert abs(float((h**2).sum() - (x**2).sum())) < 1e-12 * x.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_widths_stay(dtype: torch.dtype) -> None:
    x = normals(1, 3, 8, 8).to(dtype)
    h = haar().encode(x)
    assert h.dtype == dtype
    torch.testing.assert_close(haar().decode(h), x, atol=16 * torch.finfo(dtype).eps, rtol=0)


def test_a_constant_has_one_coefficient() -> None:
    for rep, shape, wanted in (
        (haar(ll_scale=1.0), (1, 1, 4, 4), 2.0),
        (haar("z", "y", "x", ll_scale=1.0), (1, 1, 4, 4, 4), 2.8284271247461903),
        (haar(ll_scale=1.0, levels=2), (1, 1, 8, 8), 4.0),
    ):
        h = rep.encode(torch.ones(shape, dtype=torch.float64))
        assert float((h[:, 0] - wanted).abs().max()) < 1e-12 and float(h[:, 1:].abs().max()) < 1e-12
    usual = haar(levels=2).encode(torch.full((1, 3, 8, 8), -0.7))
    torch.testing.assert_close(usual[:, :3], torch.full((1, 3, 2, 2), -0.7))


def test_the_order_of_channels() -> None:
    """Bands LL, LH, HL, HH with the letters (height, width); colours within a band."""
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])  # changes along the width, in the second colour
    h = haar().encode(x).flatten()
    assert h.nonzero().flatten().tolist() == [3 + 1] and float(h[4]) == pytest.approx(2.0)
    x[0, 1] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert haar().encode(x).flatten().nonzero().flatten().tolist() == [6 + 1]
    x = torch.zeros(1, 1, 2, 2, 2)
    x[:, :, 0], x[:, :, 1] = 1.0, -1.0
    assert haar("z", "y", "x").encode(x).flatten().nonzero().flatten().tolist() == [4]


def test_two_levels_share_one_grid() -> None:
    """LL LL, LL LH, LL HL, LL HH, then LH, HL, HH of the finer level by phases; each with all colours."""
    x = normals(1, 3, 8, 12)
    one, two = haar(ll_scale=1.0).encode(x), haar(ll_scale=1.0, levels=2).encode(x)
    assert two.shape == (1, 48, 2, 3)
    torch.testing.assert_close(two[:, :12], haar(ll_scale=1.0).encode(one[:, :3]))
    for band in (1, 2, 3):
        for phase in range(4):
            wanted = one[:, 3 * band : 3 * band + 3, phase // 2 :: 2, phase % 2 :: 2]
            start = 12 * band + 3 * phase
            assert torch.equal(two[:, start : start + 3], wanted), (band, phase)
    # a coefficient never leaves its place: an impulse touches its own 4 x 4 pixels only
    impulse = torch.zeros_like(two)
    impulse[0, :, 1, 2] = 1.0
    support = haar(ll_scale=1.0, levels=2).decode(impulse)[0].abs().amax(0).nonzero()
    assert support.amin(0).tolist() == [4, 8] and support.amax(0).tolist() == [7, 11]


@pytest.mark.parametrize("depth", [1, 3])
def test_planes_of_a_stack_are_left_alone(depth: int) -> None:
    rep, x = haar(), normals(1, 3, depth, 16, 16)
    h = rep.encode(x)
    assert h.shape == (1, 12, depth, 8, 8)
    for z in range(depth):
        torch.testing.assert_close(h[:, :, z], rep.encode(x[:, :, z]))
    torch.testing.assert_close(rep.decode(h), x, atol=1e-12, rtol=0)


def test_lengths_that_cannot_be_halved_are_refused() -> None:
    for rep, shape, words in (
        (haar(), (1, 3, 16, 15), "axis x .* 15 is no multiple of 2"),
        (haar(levels=2), (1, 3, 14, 16), "axis y 2 times, .* 14 is no multiple of 4"),
        (haar("z", "y", "x"), (1, 3, 3, 16, 16), "axis z"),
        (haar("z", "y", "x"), (1, 4, 16, 16), "no axis z"),
    ):
        with pytest.raises(ConfigError, match=words):
            rep.encode(torch.zeros(shape))
    with pytest.raises(ConfigError, match="13 channels"):
        haar().decode(torch.zeros(1, 13, 4, 4))


def test_clamping_acts_on_pixels() -> None:
    rep, x = haar(levels=2), 3 * normals(2, 3, 8, 8)
    h = rep.clamp(rep.encode(x), -1.0, 0.5)
    torch.testing.assert_close(rep.decode(h), x.clamp(-1.0, 0.5), atol=1e-12, rtol=0)
    torch.testing.assert_close(rep.clamp(h, -1.0, 0.5), h, atol=1e-12, rtol=0)


def test_noise_stays_white() -> None:
    h = haar(levels=2).encode_noise(normals(16, 3, 64, 64))
    per_channel = h.transpose(0, 1).flatten(1)
    assert float(per_channel.mean(1).abs().max()) < 5 / per_channel.shape[1] ** 0.5
    assert float((per_channel.std(1) - 1).abs().max()) < 5 / (2 * per_channel.shape[1]) ** 0.5
    correlation = torch.corrcoef(per_channel) - torch.eye(48)
    assert float(correlation.abs().max()) < 5 / per_channel.shape[1] ** 0.5


def test_gradients_pass() -> None:
    rep = haar(levels=2)
    x = normals(1, 1, 4, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rep.decode(rep.encode(x) ** 2), (x,))


def test_standard_deviations_divide_all_bands() -> None:
    stds = tuple(0.1 * (i + 1) for i in range(12))
    rep, x = haar(band_std=stds), normals(1, 3, 4, 4)
    wanted = haar(ll_scale=1.0).encode(x) / torch.tensor(stds, dtype=torch.float64).reshape(-1, 1, 1)
    torch.testing.assert_close(rep.encode(x), wanted)
    torch.testing.assert_close(rep.decode(rep.encode(x)), x, atol=1e-12, rtol=0)
    with pytest.raises(ConfigError, match="band_std: 12 values for 4 channels"):
        rep.encode(x[:, :1])


@pytest.mark.parametrize(
    "rep",
    [
        haar(),
        haar("z", "y", "x"),
        haar(ll_scale=3.0),
        haar(levels=2),
        haar(band_std=tuple(0.2 + 0.1 * i for i in range(8))),
        make_representation(RepresentationConfig()),
    ],
    ids=["2d", "3d", "3", "levels", "std", "pixels"],
)
def test_parseval_weights_give_the_loss_of_pixels(rep: Representation) -> None:
    made = parts.make_parts(
        DiffusionConfig(path=PathConfig(kind="vp", prediction="sample"), representation=rep.config)
    )
    x0, z, guess = (normals(2, 2, 4, 8, 8, seed=seed) for seed in (1, 2, 3))
    n = torch.tensor([3, 700])

    def loss(bands: object) -> float:
        weight = WeightConfig(kind="bands", bands=bands)
        answer = rep.encode(guess)
        return float(
            losses.path_loss(
                lambda x, t, label: answer, made, weight, x0=x0, source=None, label=None, n=n, z=z
            )[0]
        )

    pixels = float(((guess - x0) ** 2).mean())
    assert loss("parseval") == pytest.approx(pixels, abs=1e-12)
    if rep.bands > 1:
        assert abs(loss("equal") - pixels) > 0.01
    assert loss((2.0,) * rep.bands) == pytest.approx(2 * loss("equal"), rel=1e-12)
    with pytest.raises(ConfigError, match="weight.bands"):
        loss((1.0,) * (rep.bands + 1))


def test_the_path_and_the_transform_commute() -> None:
    rep = haar(ll_scale=1.0)
    x0, x1, z = (normals(2, 3, 8, 8, seed=seed) for seed in (1, 2, 3))
    for path in (paths.BridgePath(PathConfig()), paths.VPPath(PathConfig(kind="vp"))):
        for n in (0, 400, 999):
            outside = rep.encode(path.sample(n, x0, x1, z))
            inside = path.sample(n, rep.encode(x0), rep.encode(x1), rep.encode_noise(z))
            torch.testing.assert_close(inside, outside, atol=1e-12, rtol=0)


def test_learned_variances_are_refused() -> None:
    """Their bound counts grey levels of pixels."""
    path = PathConfig(kind="vp", variance="learned_range")
    with pytest.raises(ConfigError, match="path.variance"):
        DiffusionConfig(path=path, representation=RepresentationConfig(kind="haar"))


def test_another_implementation_agrees() -> None:
    pywt = pytest.importorskip("pywt")
    x = normals(1, 1, 8, 12)
    low, (along_y, along_x, both) = pywt.dwt2(x[0, 0].numpy(), "haar", mode="periodization")
    h = haar(ll_scale=1.0).encode(x)[0]
    for band, wanted in zip(
        h, (low, along_x, along_y, both), strict=True
    ):  # its first detail is high along y
        torch.testing.assert_close(band, torch.from_numpy(wanted), atol=1e-12, rtol=0)
