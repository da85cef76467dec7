"""Inception score, masked figures, MS-SSIM, diversity, tissue F1, equivariance; features of sFID."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from wsi_pipeline.core.inception_score import inception_score, inception_score_in_runs
from wsi_pipeline.core.paired import (
    confusion,
    diversity,
    equivariance_error,
    mae,
    ms_ssim,
    mutual_information,
    placed,
    tissue_f1,
)
from wsi_pipeline.core.structure import psnr, ssim
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.features import clean_resize, make_extractor

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(seed: int, side: int = 128) -> np.ndarray:
    """Smooth blobs, [side, side, 3] in 0 to 1."""
    noise = np.random.default_rng(seed).standard_normal((side, side, 3))
    smooth = gaussian_filter(noise, (3, 3, 0))
    return np.clip(0.5 + 0.5 * smooth / np.abs(smooth).max(), 0, 1)


def test_inception_score_of_even_and_of_certain_classes() -> None:
    """M4, in both conventions."""
    even = np.zeros((70, 7))
    certain = 1e4 * np.tile(np.eye(7), (10, 1))
    for found, wanted in ((even, 1.0), (certain, 7.0)):
        assert inception_score(found, splits=10, seed=None) == pytest.approx((wanted, 0.0), abs=1e-6)
        assert inception_score_in_runs(found, size=35) == pytest.approx(wanted, abs=1e-6)


def test_a_short_last_run_counts_in_full_and_parts_differ() -> None:
    logits = 1e4 * np.concatenate([np.eye(3), np.eye(3), np.eye(3)[:1]])
    assert inception_score_in_runs(logits, size=3) == pytest.approx((3 + 3 + 1) / 3)
    # Borders 0, 3, 7: four images, of which two are of one class.
    second = math.exp(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))
    score, spread = inception_score(logits, splits=2, seed=None)
    assert score == pytest.approx((3 + second) / 2)
    assert spread == pytest.approx((3 - second) / 2)
    with pytest.raises(ConfigError, match="7 images in 8 parts"):
        inception_score(logits, splits=8)


def test_masked_figures_look_at_valid_pixels_only() -> None:
    truth = (255 * picture(0)).astype(np.uint8)
    output = np.clip(truth.astype(int) + 3, 0, 255).astype(np.uint8)
    valid = np.zeros(truth.shape[:2], np.bool_)
    valid[10:90, 20:100] = True
    spoilt = np.where(valid[..., None], output, 255 - truth).astype(np.uint8)
    assert mae(truth, spoilt, valid) == pytest.approx(3.0)
    assert psnr(truth, spoilt, valid_HW=valid) == pytest.approx(10 * math.log10(255**2 / 9))
    inside = (slice(10, 90), slice(20, 100))
    assert ssim(truth, spoilt, valid_HW=valid) == pytest.approx(ssim(truth[inside], output[inside]), abs=1e-6)
    assert mutual_information(truth, spoilt, valid) == pytest.approx(
        mutual_information(truth[inside], output[inside], np.ones((80, 80), np.bool_))
    )
    assert mae(truth, spoilt, ~valid) > 10
    nothing = np.zeros_like(valid)
    for figure in (mae(truth, output, nothing), mutual_information(truth, output, nothing)):
        assert math.isnan(figure)
    assert math.isnan(psnr(truth, output, valid_HW=nothing))
    assert math.isnan(ssim(truth, output, valid_HW=nothing))


def test_mutual_information_knows_no_colours() -> None:
    all_of_it = np.ones((40, 40), np.bool_)
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    stains = grey // 64 * 60
    assert mutual_information(stains, 255 - stains, all_of_it) == pytest.approx(2.0)
    # 1600 pixels: floor(sqrt(320)) = 17 bins; independent noise fills them, one value shares nothing.
    other = np.random.default_rng(1).integers(0, 256, (40, 40), dtype=np.uint8)
    assert 1.0 < mutual_information(grey, other, all_of_it) < 1.1
    assert mutual_information(grey, np.full_like(grey, 7), all_of_it) == pytest.approx(1.0)
    assert math.isnan(mutual_information(np.zeros_like(grey), np.zeros_like(grey), all_of_it))
    # Four valid pixels: two bins. By hand: H(a) = ln 2, H(b) = H(a, b) = 0.5623.
    few = np.zeros((2, 3), np.bool_)
    few[:, :2] = True
    a, b = np.array([[0, 0, 9], [200, 200, 9]], np.uint8), np.array([[0, 0, 9], [0, 90, 9]], np.uint8)
    h_b = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    h_ab = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert mutual_information(a, b, few) == pytest.approx((math.log(2) + h_b) / h_ab)


def test_ms_ssim_in_two_dimensions_is_that_of_a_volume_without_depth() -> None:
    """The fixtures hold volumes; a volume of equal planes has the figure of its plane."""
    a, b = picture(0, 120)[..., 0], picture(1, 120)[..., 0]
    volumes = [np.repeat(plane[None], 112, axis=0) for plane in (a, b)]
    assert ms_ssim(a, b) == pytest.approx(ms_ssim(*volumes, dims=3), abs=1e-5)


def test_ms_ssim_falls_with_damage_and_knows_the_range() -> None:
    a = picture(0)
    worse = [ms_ssim(a, gaussian_filter(a, (sigma, sigma, 0))) for sigma in (0.0, 1.0, 3.0, 6.0)]
    assert worse[0] == pytest.approx(1.0, abs=1e-6)
    assert worse == sorted(worse, reverse=True)
    assert worse[-1] < 0.8
    b = picture(1)
    assert ms_ssim(255 * a, 255 * b, peak=255.0) == pytest.approx(ms_ssim(a, b), abs=1e-6)
    # Channels are averaged at each scale, so three equal ones are one.
    grey = [np.repeat(x[..., :1], 3, axis=2) for x in (a, b)]
    assert ms_ssim(*grey) == pytest.approx(ms_ssim(a[..., 0], b[..., 0]), abs=1e-6)
    with pytest.raises(ConfigError, match="112 px or more"):
        ms_ssim(a[:111], b[:111])
    with pytest.raises(ConfigError, match="one shape"):
        ms_ssim(a, b[:120])


def test_diversity_is_the_mean_over_seeded_pairs() -> None:
    tiles = [picture(seed, 112) for seed in range(4)]
    pairs = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    each = [ms_ssim(tiles[i], tiles[j]) for i, j in pairs]
    read = tiles.__getitem__
    assert diversity(read, 4, pairs=6, seed=0) == pytest.approx(np.mean(each))
    assert diversity(read, 4, pairs=99, seed=5) == pytest.approx(np.mean(each))
    one = {diversity(read, 4, pairs=1, seed=seed) for seed in range(12)}
    assert 2 < len(one) <= 6
    assert all(min(abs(value - np.array(each))) < 1e-12 for value in one)
    assert diversity(read, 4, pairs=3, seed=2) == diversity(read, 4, pairs=3, seed=2)
    with pytest.raises(ConfigError, match="1 pictures make no pair"):
        diversity(read, 1, pairs=1, seed=0)


def test_tissue_f1_by_hand() -> None:
    """M5: two classes swapped in part on a 4 x 4 map; 0 is background."""
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 2, 3, 0]])
    found = np.array([[0, 1, 1, 1], [0, 0, 2, 2], [1, 2, 1, 1], [2, 2, 3, 0]])
    table = confusion(truth, found, classes=5)
    assert table.sum() == 16
    assert (table[1, 2], table[2, 1], table[0, 1]) == (2, 1, 1)
    scores = tissue_f1(table)
    # Class 1: 4 found, 2 missed, 2 false; class 2: 3, 1 missed, 2 false; class 3: all.
    assert scores.per_class == {1: 8 / 12, 2: 6 / 9, 3: 1.0}
    assert scores.weighted == (6 * 8 / 12 + 4 * 6 / 9 + 1) / 11


def test_tissue_f1_of_equal_and_of_swapped_maps() -> None:
    """T10."""
    truth = np.array([[0, 1], [2, 2]])
    same = tissue_f1(confusion(truth, truth, classes=3))
    assert (same.per_class, same.weighted) == ({1: 1.0, 2: 1.0}, 1.0)
    swapped = tissue_f1(confusion(truth, np.array([0, 2, 1])[truth], classes=3))
    assert (swapped.per_class, swapped.weighted) == ({1: 0.0, 2: 0.0}, 0.0)
    blank = tissue_f1(confusion(truth, np.zeros_like(truth), classes=3))
    assert blank.weighted == 0.0, "what is taken for background is missed"
    assert math.isnan(tissue_f1(confusion(truth * 0, truth * 0, classes=3)).weighted)
    assert placed(0.8, floor=0.4, ceiling=0.9) == pytest.approx(0.8)
    assert math.isnan(placed(0.8, floor=0.9, ceiling=0.9))


@pytest.mark.parametrize(
    "found", [np.zeros((2, 3), np.int64), np.zeros((2, 2)), np.full((2, 2), 3), np.full((2, 2), -1)]
)
def test_maps_that_are_none_are_refused(found: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="one whole number from 0 to 2 for each pixel"):
        confusion(np.zeros((2, 2), np.int64), found, classes=3)


def test_equivariance_error() -> None:
    """D3."""
    x = np.random.default_rng(0).standard_normal((2, 24, 24, 3))

    def blur(images: np.ndarray) -> np.ndarray:
        near = [np.roll(images, step, axis) for axis in (1, 2) for step in (1, -1)]
        return (images + sum(near)) / 5

    assert equivariance_error(np.tanh, x) == 0.0
    assert equivariance_error(blur, x) < 1e-15
    assert equivariance_error(lambda images: np.roll(images, 1, axis=2), x) > 0.5
    brighter_left = np.linspace(0, 1, 24)[:, None]
    # Six of the eight poses turn or mirror left and right; by hand for the mirrored ones |2 l - 1|.
    error = equivariance_error(lambda images: images + brighter_left, x)
    ramp = np.abs(2 * brighter_left - 1).mean()
    turned = np.abs(brighter_left - brighter_left.T).mean()
    assert error == pytest.approx((2 * ramp + 4 * turned) / 8)


def test_uint8_tiles_do_not_wrap() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    tiles[0, 0] = 255
    error = equivariance_error(lambda x: np.roll(x, 1, axis=1), tiles)
    assert 20 < error < 150


class _Block(torch.nn.Module):
    """Stands for ``mixed_6``: its part ``conv`` is what sFID looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 9, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()


class _Network(torch.nn.Module):
    """Stands for the file of Inception: named layers, one of them ``mixed_6``, and a last ``output``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential()
        self.layers.add_module("conv", torch.nn.Conv2d(3, 4, 3))
        self.layers.add_module("pool0", torch.nn.AdaptiveAvgPool2d(17))
        self.layers.add_module("mixed_6", _Block())
        self.layers.add_module("pool2", torch.nn.AdaptiveAvgPool2d(1))
        self.output = torch.nn.Linear(9, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(x).flatten(1))


def scripted(network: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(str(path))
    return path


def test_features_of_sfid_and_logits(tmp_path: Path) -> None:
    network = _Network()
    path = scripted(network, tmp_path / "i.pt")
    tiles = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    x = torch.from_numpy(np.stack([clean_resize(tile, 299) for tile in tiles])).permute(0, 3, 1, 2)
    with torch.no_grad():
        x = (x - 128) / 128
        spatial = network.layers.mixed_6.conv(network.layers.pool0(network.layers.conv(x)))[:, :7]
        logits = network.layers(x).flatten(1) @ network.output.weight.T
    extract = make_extractor("inception_spatial", weights=path, trust=True)
    assert (extract.name, extract.dims) == ("inception_spatial", 2023)
    assert np.abs(extract(tiles) - spatial.flatten(1).numpy()).max() < 1e-5
    extract = make_extractor("inception_logits", weights=path, trust=True)
    assert (extract.name, extract.dims) == ("inception_logits", 12)
    assert np.abs(extract(tiles) - logits.numpy()).max() < 1e-5, "without the bias"


def test_files_without_the_layers_are_refused(tmp_path: Path) -> None:
    network = _Network()
    del network.layers.mixed_6.conv
    network.layers.mixed_6 = torch.nn.Identity()
    network.output = torch.nn.Identity()
    path = scripted(network, tmp_path / "i.pt")
    for kind in ("inception_spatial", "inception_logits"):
        with pytest.raises(CheckpointError, match=r"no part '(layers.mixed_6.conv|output.weight)'"):
            make_extractor(kind, weights=path, trust=True)
        with pytest.raises(CheckpointError, match="SHA-256 .* runs its code"):
            make_extractor(kind, weights=path)
