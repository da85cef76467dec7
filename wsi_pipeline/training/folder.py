"""The folder of a run: which settings it belongs to, and where its parts lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from wsi_pipeline._version import __version__
from wsi_pipeline.errors import ConfigError, FingerprintMismatchError, OutputError
from wsi_pipeline.training.config import TrainConfig

__all__ = ["RunFolder"]

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
    "data": ("workers", "prefetch", "open_slides", "cache", "cache_gib"),
    "validation": ("every", "shown", "choose"),
    "model": ("recompute", "licence"),
}
_OURS = (
    "train.yaml",
    "run.json",
    "best.json",
    "log.jsonl",
    "generator.safetensors",
    "checkpoints",
    "samples",
    "tensorboard",
)


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
        self._settings = asdict(config)
        self.fingerprint = _fingerprint(self._settings, digest, processes)

    def open(self, restart: bool) -> None:
        """Make the folder, or check that it is this run's. Raises FingerprintMismatchError, OutputError."""
        record = self.path / "run.json"
        if restart and record.exists():
            for name in _OURS:
                shutil.rmtree(self.path / name) if (self.path / name).is_dir() else (
                    (self.path / name).unlink(missing_ok=True)
                )
        try:
            if record.exists():
                self._check(record)
            elif self.path.exists() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path}: is no training run and not empty; choose another folder")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._write(self.path / "train.yaml", yaml.safe_dump(_plain(self._settings), sort_keys=False))
            self._write(record, json.dumps({"fingerprint": self.fingerprint, "version": __version__}))
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder", path=self.path
            ) from error

    def _check(self, record: Path) -> None:
        try:
            found = json.loads(record.read_text(encoding="utf-8"))["fingerprint"]
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{record}: is damaged ({error!r}); start again with --restart") from error
        if found != self.fingerprint:
            raise FingerprintMismatchError(
                f"{self.path}: belongs to a run with other settings (see its train.yaml); train into another "
                "folder, or throw it away with --restart",
                path=self.path,
            )

    def has_checkpoint(self, step: int) -> bool:
        return (self.checkpoints / f"step-{step:08d}.safetensors").exists()

    def best(self) -> tuple[int, float, dict[str, float]] | None:
        """Step, value of the metric and all figures of the best validation."""
        try:
            found = json.loads((self.path / "best.json").read_text(encoding="utf-8"))
            return int(found["step"]), float(found["value"]), dict(found["figures"])
        except (OSError, ValueError, KeyError):
            return None

    def set_best(self, step: int, value: float, figures: dict[str, float]) -> None:
        self._write(self.path / "best.json", json.dumps({"step": step, "value": value, "figures": figures}))

    @staticmethod
    def _write(path: Path, text: str) -> None:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def _fingerprint(settings: dict[str, Any], digest: str, processes: int) -> str:
    deciding = {
        part: {key: value for key, value in values.items() if key not in _FREE.get(part, ())}
        for part, values in settings.items()
    }
    deciding["loop"]["samples"] = settings["loop"]["batch"] * settings["loop"]["accumulate"] * processes
    if settings["optimiser"]["schedule"] == "constant":
        del deciding["loop"]["steps"]  # a longer run is the same run, gone on with
    text = json.dumps([deciding, digest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Settings as YAML knows them: tuples become lists, paths text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
