"""Statistics files: features of a set of tiles in an .npz, so that a reference is computed once.

Written: ``mu`` [D] f4, ``sigma`` [D, D] f8, ``features`` [N, D] f4 (uncompressed, the format of
Diffusion-FFPE's evaluation), and beside them facts that other programs pass over: ``extractor``, ``digest``,
``resize``, ``encoding``, and ``group`` [N], the number of each tile's patient.

Read: the same; and the two custom files of clean-fid, ``NAME.npz`` (mu, sigma) and ``NAME_kid.npz``
(``feats``), one at a time or, if they lie side by side, together.

Why numbers in place of patients: the file is meant to be passed on, names are not. Nothing in it is pickled,
and nothing pickled is read.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.bootstrap import group_numbers
from wsi_pipeline.core.fid import Statistics, statistics
from wsi_pipeline.errors import ConfigError, OutputError

__all__ = ["StoredStatistics", "read_statistics", "write_statistics"]

_KID_ENDING = "_kid"
_NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, RuntimeError)
"""Of zipfile: no archive, damaged, encrypted or compressed in a way that it does not know."""
_FACTS = ("extractor", "digest", "resize", "encoding")
_MAX_DIMS = 1 << 16
_NEGATIVE = 1e-6
"""Eigenvalues of a covariance below 0 by less than this share of the largest are rounding."""
_DRIFT = 1e-3
"""What float32 sums of many features may be off, as a share of a feature's size and spread."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredStatistics:
    """Statistics with what an interval needs: ``groups``, the patient of each row of the features (None
    where unknown), and ``digest``, SHA-256 of the extractor's weights ("" where unknown)."""

    statistics: Statistics
    groups: tuple[str, ...] | None = None
    digest: str = ""


def write_statistics(path: Path, stored: StoredStatistics) -> None:
    """Replace the file in one step; OutputError where it cannot be written."""
    found = stored.statistics
    arrays: dict[str, npt.NDArray[Any]] = {
        "mu": found.mu.astype(np.float32),
        "sigma": found.sigma.astype(np.float64),
    }
    if found.features is not None:
        arrays["features"] = found.features.astype(np.float32)
    facts = {name: getattr(found, name, stored.digest) for name in _FACTS}
    arrays |= {name: np.array(value, np.str_) for name, value in facts.items()}
    if stored.groups is not None:
        arrays["group"] = group_numbers([stored.groups])[1][0]
    fresh = path.with_name(f".{path.name}.partial")
    try:
        with fresh.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        fresh.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); check permissions and space", path=path
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def read_statistics(path: Path) -> StoredStatistics:
    """Statistics of any of the formats above; ConfigError where the file is none of them."""
    arrays = _arrays(path)
    features = arrays.get("features", arrays.get("feats"))
    if features is None and (beside := _kid_file(path)).is_file():
        features = _arrays(beside).get("feats")
    if features is not None:
        features = _numbers(features, path, "features", 2, np.float32)
    if "mu" in arrays and "sigma" in arrays:
        mu = _numbers(arrays["mu"], path, "mu", 1, None)
        found = Statistics(
            mu=mu, sigma=_numbers(arrays["sigma"], path, "sigma", 2, np.float64), features=features
        )
    elif features is not None:
        found = statistics(features)
    else:
        names = ", ".join(sorted(arrays)[:6]) or "nothing"
        raise ConfigError(
            f"{path}: holds {names} instead of mu, sigma and features; make it with --save-stats FILE.npz"
        )
    _check_shapes(path, found)
    facts = {name: str(arrays[name]) if name in arrays and arrays[name].ndim == 0 else "" for name in _FACTS}
    found = replace(
        found,
        n=0 if features is None else len(features),
        extractor=facts["extractor"],
        resize=facts["resize"],
        encoding=facts["encoding"],
    )
    return StoredStatistics(statistics=found, groups=_groups(arrays, features), digest=facts["digest"])


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        # Opened here: numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.lib.npyio.NpzFile):
                return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, EOFError, KeyError, MemoryError, *_NO_ARCHIVE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path}: is no statistics file ({reason}); make it again with --save-stats"
        ) from error
    raise ConfigError(f"{path}: is a single array, not an .npz; make it with --save-stats FILE.npz")


def _kid_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}{_KID_ENDING}{path.suffix}")


def _numbers(array: npt.NDArray[Any], path: Path, name: str, ndim: int, dtype: Any) -> npt.NDArray[Any]:
    if array.ndim != ndim or array.dtype.kind != "f" or array.shape[-1] > _MAX_DIMS:
        raise ConfigError(
            f"{path}: {name} is {array.dtype} {array.shape}; make the file again with --save-stats"
        )
    if not np.isfinite(array).all():
        raise ConfigError(f"{path}: {name} has values that are not finite; make the file again")
    return array if dtype is None else array.astype(dtype)


def _check_shapes(path: Path, found: Statistics) -> None:
    dims = found.dims
    features_fit = found.features is None or (found.features.shape[1] == dims and len(found.features) > 1)
    if found.sigma.shape != (dims, dims) or not features_fit:
        raise ConfigError(f"{path}: mu, sigma and features do not belong together; make the file again")
    values = np.linalg.eigvalsh((found.sigma + found.sigma.T) / 2.0)
    if values[0] < -_NEGATIVE * np.abs(values).max():
        raise ConfigError(
            f"{path}: sigma is no covariance (an eigenvalue of {values[0]:.3g}); make the file again with "
            "--save-stats"
        )
    if found.features is not None:
        mean = found.features.mean(axis=0, dtype=np.float64)
        spread = found.features.std(axis=0, dtype=np.float64)
        if (np.abs(found.mu - mean) > _DRIFT * (np.abs(mean) + spread)).any():
            raise ConfigError(
                f"{path}: mu is not the mean of the features that go with it; make the file again with "
                "--save-stats"
            )


def _groups(arrays: dict[str, npt.NDArray[Any]], features: npt.NDArray[Any] | None) -> tuple[str, ...] | None:
    group = arrays.get("group")
    if group is None or features is None or group.shape != (len(features),):
        return None
    return tuple(f"stored {number}" for number in group.tolist())
