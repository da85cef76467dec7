"""Resize, FID, KID and DINO-structure against the published programs: every case of every fixture set."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_pipeline.core.fid import factor, frechet_between, frechet_distance, kernel_distance, statistics
from wsi_pipeline.models.dino import keys_of, self_similarity, structure_score
from wsi_pipeline.models.features import clean_resize

SIDE = 299
STRIDE = 13

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _recorded(folder: Path) -> Mapping[str, np.ndarray]:
    with np.load(folder / "metrics_cases.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def recorded(parity_set: Path) -> Mapping[str, np.ndarray]:
    if not (parity_set / "metrics_cases.npz").is_file():
        pytest.skip("the set has no metric cases")
    return _recorded(parity_set)


def need(recorded: Mapping[str, np.ndarray], *names: str) -> list[np.ndarray]:
    if lacking := [name for name in names if name not in recorded]:
        pytest.skip(f"the set has no {', '.join(lacking)}")
    return [recorded[name] for name in names]


def test_resize(recorded: Mapping[str, np.ndarray]) -> None:
    cases = [name.removesuffix(".image_uint8") for name in recorded if name.endswith(".image_uint8")]
    cases = [case for case in cases if case.startswith("resize.")]
    if not cases:
        pytest.skip("the set has no resize cases")
    for case in cases:
        resized = clean_resize(recorded[f"{case}.image_uint8"], SIDE)
        assert resized.dtype == np.float32
        assert np.abs(resized[::STRIDE, ::STRIDE] - recorded[f"{case}.strided"]).max() <= 1e-3, case
        if f"{case}.full" in recorded:
            assert np.abs(resized - recorded[f"{case}.full"]).max() <= 1e-3, case
        if f"{case}.channel_means" in recorded:
            means = resized.mean(axis=(0, 1), dtype=np.float64)
            assert np.abs(means - recorded[f"{case}.channel_means"]).max() <= 1e-3, case


@pytest.mark.parametrize("side", ["reference", "generated"])
def test_mean_and_covariance(recorded: Mapping[str, np.ndarray], side: str) -> None:
    features, mu, sigma = need(recorded, f"feat.{side}", f"feat.{side}.mu", f"feat.{side}.sigma")
    found = statistics(features)
    assert (found.mu.dtype, found.sigma.dtype) == (mu.dtype, sigma.dtype)
    assert np.abs(found.mu - mu).max() <= 1e-6
    assert np.abs(found.sigma - sigma).max() <= 1e-6


def test_fid(recorded: Mapping[str, np.ndarray]) -> None:
    reference, generated, wanted = need(recorded, "feat.reference", "feat.generated", "fid")
    found = frechet_distance(statistics(reference), statistics(generated))
    assert abs(found - float(wanted)) <= 1e-4
    by_factors = [factor(rows, np.ones(len(rows), np.int64)) for rows in (reference, generated)]
    assert abs(frechet_between(*by_factors) - float(wanted)) <= 1e-3


def test_fid_of_a_set_with_itself(recorded: Mapping[str, np.ndarray]) -> None:
    """T12."""
    (reference,) = need(recorded, "feat.reference")
    found = statistics(reference)
    assert abs(frechet_distance(found, found)) < 1e-3


def test_fid_of_few_samples(recorded: Mapping[str, np.ndarray]) -> None:
    names = [name for name in recorded if name.startswith("fid_rank_deficient_first")]
    if not names:
        pytest.skip("the set has no rank-deficient case")
    reference, generated = need(recorded, "feat.reference", "feat.generated")
    for name in names:
        few = statistics(generated[: int(name.removeprefix("fid_rank_deficient_first"))])
        assert abs(frechet_distance(statistics(reference), few) - float(recorded[name])) <= 1e-3


def test_kid(recorded: Mapping[str, np.ndarray]) -> None:
    names = [name.removesuffix(".numpy_seed") for name in recorded if name.endswith(".numpy_seed")]
    if not names:
        pytest.skip("the set has no KID cases")
    reference, generated = need(recorded, "feat.reference", "feat.generated")
    for name in names:
        # The recorded rows say how many subsets of which size were drawn.
        subsets, size = recorded[f"{name}.generated_rows"].shape
        found = kernel_distance(
            generated, reference, subsets=subsets, size=size, seed=int(recorded[f"{name}.numpy_seed"])
        )
        assert abs(found - float(recorded[name])) <= 1e-4, name


def test_default_kid_is_a_hundred_subsets_of_at_most_a_thousand(recorded: Mapping[str, np.ndarray]) -> None:
    reference, generated, wanted, seed = need(
        recorded, "feat.reference", "feat.generated", "kid_default", "kid_default.numpy_seed"
    )
    assert abs(kernel_distance(generated, reference, seed=int(seed)) - float(wanted)) <= 1e-4


def test_dino_structure(recorded: Mapping[str, np.ndarray]) -> None:
    real, fake, wanted = need(recorded, "dino.keys_real", "dino.keys_fake", "dino.score")
    keys = [torch.from_numpy(array.astype(np.float32))[None] for array in (real, fake)]
    assert abs(float(structure_score(*keys)[0]) - float(wanted)) <= 1e-6
    if "dino.self_similarity_real_strided" in recorded:
        strided = recorded["dino.self_similarity_real_strided"]
        similarity = self_similarity(keys[0])[0].numpy()
        step = -(-len(similarity) // len(strided))
        assert np.abs(similarity[::step, ::step] - strided).max() <= 1e-6


def test_keys_of_a_joint_projection(recorded: Mapping[str, np.ndarray]) -> None:
    qkv, wanted = need(recorded, "dino.qkv_f16", "dino.keys_from_qkv")
    found = keys_of(torch.from_numpy(qkv.astype(np.float32)), heads=len(wanted))
    assert np.abs(found[0].numpy() - wanted).max() <= 1e-6
