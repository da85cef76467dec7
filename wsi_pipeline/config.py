"""Configuration files: strict YAML plus overrides, resolved into a dataclass such as ``ConvertConfig``.

A key that does not exist is reported by its path; a manifest's ``config`` is itself a valid file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

import pydantic
import yaml

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.runs.settings import RunConfig

__all__ = ["load_config", "load_run_config", "load_settings", "to_yaml"]

_Settings = TypeVar("_Settings")
_LISTS = {
    "ConvertConfig": "config",
    "RunConfig": "config",
    "TrainConfig": "train --show-config",
    "CohortConfig": "tile --show-config",
    "EvaluateConfig": "evaluate --help",
    **dict.fromkeys(("AdmOptions", "BridgeOptions", "Pix2PixOptions"), "models import --help"),
}


def load_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    named: Mapping[str, Any] = MappingProxyType({}),
) -> ConvertConfig:
    """The settings of a conversion; see ``load_settings``."""
    return load_run_config(path, overrides, named).conversion


def load_run_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    named: Mapping[str, Any] = MappingProxyType({}),
) -> RunConfig:
    """The settings of a conversion and of a run over many slides; see ``load_settings``."""
    return load_settings(RunConfig, path, overrides, named)


def load_settings(
    kind: type[_Settings],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    named: Mapping[str, Any] = MappingProxyType({}),
) -> _Settings:
    """Read a YAML (or JSON) file, lay ``named`` values (by dotted key) over it, then the overrides.

    ``overrides`` are ``dotted.key=value``, the value in YAML syntax; they have the last word. A manifest
    and a ``run.json`` are accepted too: their ``config`` is used. Raises ConfigError naming the key.
    """
    values = _read(path) if path is not None else {}
    for key, value in named.items():
        _assign(values, key, value)
    for override in overrides:
        _apply(values, override)
    where = f"{path}: " if path is not None else ""
    if unknown := list(_unknown(values, kind, "")):
        lists = _LISTS.get(kind.__name__, "COMMAND --help")
        raise ConfigError(f"{where}{', '.join(unknown)}: no such setting; `wsi-pipeline {lists}` lists all")
    _texts(values, kind)
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError(where + "; ".join(_explain(e) for e in error.errors())) from error


def to_yaml(config: Any) -> str:
    """The whole configuration with every default spelled out."""
    return yaml.safe_dump(_listed(asdict(config)), sort_keys=False, allow_unicode=True)


def _listed(value: Any) -> Any:
    """Tuples as lists: YAML would write them as Python's."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds no settings, but a {type(document).__name__}")
    if {"notice", "fingerprint"} & set(document) and isinstance(document.get("config"), dict):
        return dict(document["config"])
    return document


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: write it as key.path=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error
    _assign(values, key.strip(), value)


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} holds no settings")
    values[last] = value


def _unknown(values: dict[str, Any], part: type, prefix: str) -> Iterator[str]:
    """Dotted names of keys that the dataclass ``part`` does not have."""
    hints = get_type_hints(part)
    for key, value in values.items():
        if key not in hints:
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and is_dataclass(hints[key]):
            yield from _unknown(value, hints[key], f"{prefix}{key}.")


def _texts(values: dict[str, Any], part: type) -> None:
    """Turn numbers into text where text is chosen from a list: ``ngff=0.4`` means ``'0.4'``."""
    hints = get_type_hints(part)
    for key, value in values.items():
        if isinstance(value, dict) and is_dataclass(hints[key]):
            _texts(value, hints[key])
        elif isinstance(value, float) and get_origin(hints[key]) is Literal:
            values[key] = str(value)


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {message[:1].lower()}{message[1:]}, got {reprlib.repr(error['input'])}"
