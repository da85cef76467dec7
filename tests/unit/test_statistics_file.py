"""Statistics files: what is written, what is read of other programs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsi_pipeline.core.fid import frechet_distance, statistics
from wsi_pipeline.errors import ConfigError, OutputError
from wsi_pipeline.evaluation.statistics_file import StoredStatistics, read_statistics, write_statistics

FEATURES = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)


def stored(groups: tuple[str, ...] | None = None) -> StoredStatistics:
    found = statistics(FEATURES, extractor="inception", resize="299 px", encoding="PNG")
    return StoredStatistics(statistics=found, groups=groups, digest="ab" * 32)


def test_the_file_has_the_keys_and_types_of_the_published_format(tmp_path: Path) -> None:
    """T12; diffusion_ffpe 7.3."""
    write_statistics(tmp_path / "a.npz", stored())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert (file["mu"].dtype, file["mu"].shape) == (np.float32, (6,))
        assert (file["sigma"].dtype, file["sigma"].shape) == (np.float64, (6, 6))
        assert (file["features"].dtype, file["features"].shape) == (np.float32, (30, 6))
        assert np.array_equal(file["mu"], FEATURES.mean(axis=0))
        assert np.array_equal(file["sigma"], np.cov(FEATURES, rowvar=False))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    before = stored(tuple(f"TCGA-{i // 3}" for i in range(30)))
    write_statistics(tmp_path / "a.npz", before)
    after = read_statistics(tmp_path / "a.npz")
    assert frechet_distance(before.statistics, after.statistics) < 1e-9
    assert np.array_equal(after.statistics.features, FEATURES)
    facts = after.statistics
    assert (facts.n, facts.extractor, facts.resize, facts.encoding) == (30, "inception", "299 px", "PNG")
    assert after.digest == "ab" * 32
    assert after.groups is not None
    assert len(set(after.groups)) == 10
    assert after.groups[0] == after.groups[2] != after.groups[3]


def test_no_name_of_a_patient_is_in_the_file(tmp_path: Path) -> None:
    write_statistics(tmp_path / "a.npz", stored(tuple("TCGA-18-3408" for _ in range(30))))
    content = (tmp_path / "a.npz").read_bytes()
    assert b"3408" not in content
    assert "3408".encode("utf-32-le") not in content


def test_files_of_diffusion_ffpe_and_clean_fid_are_read(tmp_path: Path) -> None:
    mu, sigma = FEATURES.mean(axis=0), np.cov(FEATURES, rowvar=False)
    np.savez(tmp_path / "valid_statistics.npz", mu=mu, sigma=sigma, features=FEATURES)
    whole = read_statistics(tmp_path / "valid_statistics.npz")
    assert np.array_equal(whole.statistics.features, FEATURES)
    assert (whole.statistics.n, whole.statistics.extractor, whole.groups) == (30, "", None)

    np.savez(tmp_path / "lung_clean_custom_na.npz", mu=mu, sigma=sigma)
    alone = read_statistics(tmp_path / "lung_clean_custom_na.npz")
    assert (alone.statistics.features, alone.statistics.n) == (None, 0)

    np.savez(tmp_path / "lung_clean_custom_na_kid.npz", feats=FEATURES)
    both = read_statistics(tmp_path / "lung_clean_custom_na.npz")
    assert np.array_equal(both.statistics.features, FEATURES)
    only_features = read_statistics(tmp_path / "lung_clean_custom_na_kid.npz")
    assert frechet_distance(only_features.statistics, whole.statistics) < 1e-9


def test_what_is_no_statistics_file_is_refused_in_a_line(tmp_path: Path) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            read_statistics(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)

    refused("absent.npz", "cannot be read")
    (tmp_path / "text.npz").write_text("mu sigma")
    refused("text.npz", "no statistics file")
    np.savez(tmp_path / "whole.npz", mu=np.zeros(3, np.float32))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:100])
    refused("cut.npz", "no statistics file")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    refused("other.npz", "holds images instead of mu, sigma and features")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3, np.float32), sigma=np.eye(4))
    refused("shape.npz", "do not belong together")
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan, np.float32), sigma=np.eye(3))
    refused("nan.npz", "not finite")
    np.savez(tmp_path / "dims.npz", mu=np.zeros((3, 1), np.float32), sigma=np.eye(3))
    refused("dims.npz", "mu is float32")
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    refused("single.npz", "single array")


def test_a_damaged_or_locked_archive_is_refused_in_a_line(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "good.npz", mu=FEATURES.mean(axis=0), sigma=np.cov(FEATURES, rowvar=False))
    good = (tmp_path / "good.npz").read_bytes()
    start, entry = good.index(b"PK\x03\x04"), good.index(b"PK\x01\x02")
    deflated = bytearray(good)
    deflated[60:90] = b"\xff" * 30
    locked, unknown = bytearray(good), bytearray(good)
    locked[start + 6] |= 1
    locked[entry + 8] |= 1
    unknown[start + 8] = unknown[entry + 10] = 99
    for name, content in (("deflated", deflated), ("locked", locked), ("unknown", unknown)):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name}\.npz: is no statistics file") as caught:
            read_statistics(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)


def test_numbers_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    mu, sigma = FEATURES.mean(axis=0), np.cov(FEATURES, rowvar=False)
    np.savez(tmp_path / "negative.npz", mu=mu, sigma=-sigma, features=FEATURES)
    with pytest.raises(ConfigError, match=r"negative\.npz: sigma is no covariance"):
        read_statistics(tmp_path / "negative.npz")
    np.savez(tmp_path / "other.npz", mu=mu, sigma=sigma, features=FEATURES[:, ::-1])
    with pytest.raises(ConfigError, match=r"other\.npz: mu is not the mean of the features"):
        read_statistics(tmp_path / "other.npz")
    few = FEATURES[:3]  # rank 2 of 6, stored in float32: rounding alone makes eigenvalues negative
    sigma = np.cov(few, rowvar=False).astype(np.float32)
    np.savez(tmp_path / "few.npz", mu=few.mean(axis=0), sigma=sigma, features=few)
    assert read_statistics(tmp_path / "few.npz").statistics.n == 3


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("the pickle was run",))

    trap = np.empty(1, object)
    trap[0] = Trap()
    np.savez(tmp_path / "trap.npz", mu=trap, sigma=np.eye(1))
    with pytest.raises(ConfigError, match="no statistics file"):
        read_statistics(tmp_path / "trap.npz")


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_statistics(tmp_path / "absent" / "a.npz", stored())
