"""The folder of a run: which settings it belongs to, where its parts lie, and who may write into it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from wsi_pipeline._version import __version__
from wsi_pipeline.errors import ConfigError, FingerprintMismatchError, OutputError
from wsi_pipeline.training.config import TrainConfig

__all__ = ["Best", "RunFolder", "writing"]

# What decides no weight: speed, place and what is shown.
_FREE = {
    "loop": (
        *(
            "batch",
            "accumulate",
            "device",
            "log_every",
            "sample_every",
            "checkpoint_every",
            "keep",
            "tensorboard",
        ),
        *("on_collapse", "collapse_change", "collapse_steps"),
    ),
    "data": ("workers", "prefetch", "cache", "cache_gib"),
    "validation": ("every", "shown", "choose"),
    "model": ("recompute", "licence"),
}
_RECORD = "run.json"
_LOCK = "run.lock"
_OURS = (
    "train.yaml",
    "best.json",
    "log.jsonl",
    "generator.safetensors",
    "checkpoints",
    "samples",
    "tensorboard",
    _RECORD,  # the last to go: while it is there, the folder is known to be a run
)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the operating system become one OutputError that names ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free space, or choose another folder",
            path=path,
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best validation so far: ``value`` of the metric, and all ``figures``, after ``step`` iterations."""

    step: int
    value: float
    figures: dict[str, float]


class RunFolder:
    """Names of a run's files, its fingerprint, and the record of its best checkpoint.

    ``digest``: of the weights that training begins with. The size of a whole batch over all processes decides
    weights; how it is cut does not (but for rounding).
    """

    def __init__(self, path: Path, config: TrainConfig, digest: str, processes: int) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.bundle = path / "generator.safetensors"
        self._lock: TextIO | None = None
        self._settings = asdict(config)
        self._deciding = _deciding(self._settings, processes)
        self.fingerprint = _fingerprint(self._deciding, digest)

    def check(self, restart: bool) -> None:
        """Whether a run may write here; changes nothing.

        Raises FingerprintMismatchError for the run of other settings (not with ``restart``, which throws it
        away), ConfigError for a folder that is no run's.
        """
        record = self.path / _RECORD
        with writing(self.path):
            if record.exists():
                if not restart:
                    self._check(record)
            elif self.path.exists():
                # What a run leaves that was killed before it had a record is no reason to refuse.
                foreign = {p.name for p in self.path.iterdir()} - {f"{_RECORD}.partial", _LOCK}
                if foreign:
                    raise ConfigError(f"{self.path}: is no training run and not empty; choose another folder")

    def open(self, restart: bool) -> None:
        """Make the folder, or throw away what it holds; for this process alone until ``close``.

        Raises what ``check`` does, and OutputError where another process trains in it or it cannot be
        written.
        """
        self.check(restart)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            try:
                self._fill(restart)
            except BaseException:
                self.close()
                raise

    def _fill(self, restart: bool) -> None:
        if restart and (self.path / _RECORD).exists():
            for name in _OURS:
                _remove(self.path / name)
        self._write(
            self.path / _RECORD,
            {"fingerprint": self.fingerprint, "version": __version__, "deciding": self._deciding},
        )
        self.checkpoints.mkdir(exist_ok=True)
        for partial in self.checkpoints.glob("*.partial"):
            partial.unlink()  # of a run that was killed as it wrote
        self._write(self.path / "train.yaml", yaml.safe_dump(_plain(self._settings), sort_keys=False))

    def close(self) -> None:
        """Let others write into it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _locked(self) -> TextIO:
        """A lock that ends with this process, however it ends; none where the file system has no locks."""
        lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise OutputError(
                f"{self.path}: another process trains in it; wait for that process or stop it", path=self.path
            ) from None
        except OSError:
            pass
        return lock

    def _check(self, record: Path) -> None:
        try:
            made = json.loads(record.read_text(encoding="utf-8"))
            found, theirs = made["fingerprint"], made.get("deciding", {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{record}: is damaged ({error!r}); start again with --restart") from error
        if found != self.fingerprint:
            other = ", ".join(sorted(_differing(theirs, json.loads(json.dumps(self._deciding, default=str)))))
            what = f"other settings ({other})" if other else "other tiles, or other weights to begin with"
            raise FingerprintMismatchError(
                f"{self.path}: belongs to a run with {what}; train into another folder, or throw it away "
                "with --restart",
                path=self.path,
            )

    @property
    def used(self) -> int:
        """Bytes of checkpoints and bundle that are there; what is written next replaces some of them."""
        return sum(
            path.stat().st_size for path in (*self.checkpoints.glob("*"), self.bundle) if path.exists()
        )

    def show_best(self, best: Best | None) -> None:
        """Write ``best.json``, for people: a resumed run reads the checkpoint."""
        path = self.path / "best.json"
        with writing(path):
            if best is None:
                path.unlink(missing_ok=True)
            else:
                self._write(path, asdict(best))

    @staticmethod
    def _write(path: Path, content: str | dict[str, Any]) -> None:
        partial = path.with_name(f"{path.name}.partial")
        text = content if isinstance(content, str) else json.dumps(content)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _deciding(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """The settings that decide weights."""
    deciding = {
        part: {key: value for key, value in values.items() if key not in _FREE.get(part, ())}
        for part, values in settings.items()
    }
    # What is not used decides nothing, nor does a change of its defaults in another version.
    used = settings["objective"]["kind"]
    deciding["objective"] = {"kind": used, used: settings["objective"][used]}
    if settings["data"]["pairing"] != "simulated":
        del deciding["data"]["frozen"]
    deciding["loop"]["samples"] = settings["loop"]["batch"] * settings["loop"]["accumulate"] * processes
    if settings["optimiser"]["schedule"] == "constant":
        del deciding["loop"]["steps"]  # a longer run is the same run, gone on with
    return deciding


def _fingerprint(deciding: dict[str, Any], digest: str) -> str:
    text = json.dumps([deciding, digest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _differing(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Dotted names of settings that two runs do not share."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differing(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
    elif a != b:
        yield name


def _plain(value: Any) -> Any:
    """Settings as YAML knows them: tuples become lists, paths text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
