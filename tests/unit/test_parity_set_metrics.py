"""Precision and recall, density and coverage, Frechet, KID, inception score and MS-SSIM against the published
programs: every case of every fixture set."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from parity_other import Arrays, arrays, prefixes

from wsi_pipeline.core.fid import frechet_distance, kernel_distance, statistics
from wsi_pipeline.core.inception_score import inception_score, inception_score_in_runs
from wsi_pipeline.core.manifold import overlap, realism, squared_radii
from wsi_pipeline.core.paired import diversity, ms_ssim


@pytest.fixture
def recorded(other_set: Path) -> Arrays:
    return arrays(other_set, "metrics_cases")


def features(recorded: Arrays, regime: str) -> tuple[np.ndarray, np.ndarray]:
    """Generated and real features of a regime; "identical" is the real set itself."""
    real = recorded["features.real"]
    return (real if regime == "identical" else recorded[f"features.{regime}"]), real


def regimes(recorded: Arrays, end: str) -> list[str]:
    return [name.removesuffix(end) for name in prefixes(recorded, "", end)]


def test_parity_of_precision_and_recall(recorded: Arrays) -> None:
    names = [re.fullmatch(r"(\w+)\.precision\.k(\d+)", name) for name in recorded]
    cases = [(match[1], int(match[2])) for match in names if match]
    if not cases:
        pytest.skip("the set has no precision")
    for regime, k in cases:
        found = overlap(*features(recorded, regime), k=k)
        for name in ("precision", "recall"):
            assert getattr(found, name).mean() == float(recorded[f"{regime}.{name}.k{k}"]), (regime, k)


def test_parity_of_maps_and_radii(recorded: Arrays) -> None:
    for regime in regimes(recorded, ".inside_real_manifold"):
        found = overlap(*features(recorded, regime), k=3)
        assert np.array_equal(found.precision, recorded[f"{regime}.inside_real_manifold"]), regime
        assert np.array_equal(found.recall, recorded[f"{regime}.inside_fake_manifold"]), regime
    for name in [name for name in recorded if re.fullmatch(r"real\.radius_squared_k\d+", name)]:
        radii = squared_radii(recorded["features.real"], int(name.rpartition("k")[2]))[0]
        assert np.abs(radii / recorded[name] - 1).max() < 1e-5


def test_parity_of_realism(recorded: Arrays) -> None:
    for regime in regimes(recorded, ".realism_score"):
        found = realism(*features(recorded, regime), k=3)
        assert np.abs(found / recorded[f"{regime}.realism_score"] - 1).max() < 1e-5, regime


def test_parity_with_torch_fidelity(recorded: Arrays) -> None:
    """Its precision and recall are those of version 0.4 and later."""
    for regime in regimes(recorded, ".torch_fidelity.precision"):
        found = overlap(*features(recorded, regime), k=3)
        for name in ("precision", "recall"):
            wanted = float(recorded[f"{regime}.torch_fidelity.{name}"])
            assert getattr(found, name).mean() == pytest.approx(wanted, abs=1e-7), regime


def test_parity_of_density_and_coverage(recorded: Arrays) -> None:
    names = [re.fullmatch(r"(\w+)\.prdc_k(\d+)\.density", name) for name in recorded]
    cases = [(match[1], int(match[2])) for match in names if match]
    if not cases:
        pytest.skip("the set has no density")
    for regime, k in cases:
        found = overlap(*features(recorded, regime), k=k, k_density=k)
        for name in ("precision", "recall", "density", "coverage"):
            wanted = float(recorded[f"{regime}.prdc_k{k}.{name}"])
            # A count by k and N: only the order of the sum may differ.
            assert getattr(found, name).mean() == pytest.approx(wanted, rel=1e-14, abs=1e-15), (regime, k)


def test_parity_of_frechet(recorded: Arrays) -> None:
    for name in [name for name in recorded if re.fullmatch(r"\w+\.frechet\.\w+", name)]:
        regime = name.partition(".")[0]
        if regime == "spatial":
            continue
        made, real = (statistics(x.astype(np.float64)) for x in features(recorded, regime))
        assert frechet_distance(made, real) == pytest.approx(float(recorded[name]), abs=1e-5), name


def test_parity_of_spatial_frechet(recorded: Arrays) -> None:
    """sFID: the same distance on flattened features, whichever the order."""
    prefixes(recorded, "spatial.", ".real")
    sides = [recorded[f"spatial.{side}"].astype(np.float64) for side in ("fake", "real")]
    rows = [side.reshape(len(side), -1) for side in sides]
    first = [np.moveaxis(side, -1, 1).reshape(len(side), -1) for side in sides]
    for name in [name for name in recorded if name.startswith("spatial.frechet")]:
        wanted, ending = float(recorded[name]), name.removeprefix("spatial.frechet")
        few = re.search(r"rank_deficient_first(\d+)", ending)
        if ending == "_self":
            found = frechet_distance(*(statistics(rows[1]),) * 2)
        elif few:
            found = frechet_distance(statistics(rows[0][: int(few[1])]), statistics(rows[1]))
        else:
            found = frechet_distance(*map(statistics, first if "channel_first" in ending else rows))
        assert found == pytest.approx(wanted, abs=1e-3 if few else 1e-5), name


def test_parity_of_kid(recorded: Arrays) -> None:
    (subsets, size, seed) = recorded["kid.subsets_subset_size_seed"].tolist()
    for regime in regimes(recorded, ".kid.mean"):
        made, real = features(recorded, regime)
        found = kernel_distance(made, real, subsets=subsets, size=size, seed=seed)
        assert found == pytest.approx(float(recorded[f"{regime}.kid.mean"]), rel=1e-5, abs=1e-5), regime


def test_parity_of_the_inception_score_of_adm(recorded: Arrays) -> None:
    for name in [name for name in recorded if re.fullmatch(r"is\.adm\.split_size\d+", name)]:
        found = inception_score_in_runs(recorded["is.logits"], size=int(name.rpartition("size")[2]))
        assert found == pytest.approx(float(recorded[name]), abs=1e-5), name


def test_parity_of_the_inception_score_of_torch_fidelity(recorded: Arrays) -> None:
    for case in prefixes(recorded, "is.torch_fidelity.", ".mean"):
        words = case.removeprefix("is.torch_fidelity.")
        splits = int(re.search(r"(\d+)_split", words)[1])  # type: ignore[index]
        seed = re.search(r"seed(\d+)", words)
        score, spread = inception_score(
            recorded["is.logits"], splits=splits, seed=int(seed[1]) if seed else None
        )
        # One part needs no order, whatever was recorded.
        assert score == pytest.approx(float(recorded[f"{case}.mean"]), abs=1e-5), case
        assert spread == pytest.approx(float(recorded[f"{case}.std"]), abs=1e-5), case
        if words.startswith("default"):
            assert inception_score(recorded["is.logits"]) == (score, spread)


def _volumes(folder: Path, shape: list[int], crc: list[int]) -> list[np.ndarray]:
    spec = importlib.util.spec_from_file_location("formula_weights", folder / "formula_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unit: Callable[..., np.ndarray] = module.unit_values
    factors = [-(-112 // side) for side in shape]

    def up(name: str, salt: str) -> np.ndarray:
        low = unit(name, tuple(shape), salt) / (2 * np.sqrt(3.0)) + 0.5
        for axis, factor in enumerate(factors):
            low = low.repeat(factor, axis)
        return low

    for salt in (f"other-{folder.name}/metrics/", "other-dev/metrics/"):
        common = up("msssim.common", salt)
        volumes = [
            (0.35 * up(f"msssim.volume{i}", salt) + 0.65 * common).astype(np.float32) for i in range(len(crc))
        ]
        if [zlib.crc32(volume.tobytes()) for volume in volumes] == crc:
            return volumes
    pytest.fail("the volumes are not those that the set was made with")


def test_parity_of_ms_ssim(other_set: Path, recorded: Arrays) -> None:
    prefixes(recorded, "msssim.crc32_of", "_volumes")
    volumes = _volumes(
        other_set, recorded["msssim.low_shape"].tolist(), recorded["msssim.crc32_of_volumes"].tolist()
    )
    pairs = [(i, j) for i in range(len(volumes)) for j in range(i + 1, len(volumes))]
    found = np.array([ms_ssim(volumes[i], volumes[j], dims=3) for i, j in pairs])
    for name in [name for name in recorded if name.endswith(".pairs_upper_triangle")]:
        assert np.abs(found - recorded[name]).max() <= 5e-5, name
        mean = float(recorded[name.replace("pairs_upper_triangle", "mean_over_ordered_pairs")])
        assert found.mean() == pytest.approx(mean, abs=5e-5)
    some = diversity(lambda row: volumes[row], len(volumes), pairs=2, seed=1, dims=3)
    assert min(abs(some - found[[i, j]].mean()) for i in range(6) for j in range(i)) < 1e-9
