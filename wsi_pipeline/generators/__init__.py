"""The generators: uint8 tiles in, uint8 tiles out; whatever makes them stays inside.

A member is a frozen dataclass whose fields are its options and which has ``spec``, ``prepare``,
``background`` and ``__call__`` (``core.protocols.Generator``). Members are named as strings
and imported on use, so that ``wsi-pipeline --help`` loads no framework. To add one: a module, a line in
``GENERATORS``, and a class in ``tests/contract`` that inherits the contract. A config may also name
``my_lab.gan:MyGan``.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wsi_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from wsi_pipeline.core.protocols import Generator

__all__ = ["GENERATORS", "GeneratorDescription", "OptionDescription", "describe", "make_generator"]

GENERATORS: dict[str, str] = {
    "ffpe_mini": "wsi_pipeline.generators.ffpe_mini:FfpeMini",
    "identity": "wsi_pipeline.generators.identity:Identity",
    "lora_turbo": "wsi_pipeline.generators.lora_turbo:LoraTurbo",
    "stain_transfer": "wsi_pipeline.generators.stain_transfer:StainTransfer",
    "translator": "wsi_pipeline.generators.translator:Translator",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptionDescription:
    """One option of a generator; ``default`` is None with ``required`` true where there is no default."""

    name: str
    kind: str
    default: Any
    required: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorDescription:
    """What ``wsi-pipeline models`` shows; ``problem`` says why a member cannot be used here, "" if it can."""

    name: str
    summary: str
    options: tuple[OptionDescription, ...]
    problem: str = ""


def make_generator(name: str, options: Mapping[str, Any]) -> Generator:
    """Build a generator by its name in ``GENERATORS`` or as ``package.module:Class``.

    Raises ConfigError for an unknown name, a class that cannot be imported or is no generator, an unknown
    option, or a value of the wrong type.
    """
    member = _import(name)
    fields = {field.name: field for field in dataclasses.fields(member) if field.init}
    unknown = sorted(set(options) - set(fields))
    if unknown:
        known = ", ".join(sorted(fields)) or "none"
        raise ConfigError(f"generator {name}: unknown option {', '.join(unknown)}; valid options: {known}")
    missing = sorted(key for key, field in fields.items() if _required(field) and key not in options)
    if missing:
        remedy = "; give --weights FILE, made by `wsi-pipeline models import`" if "weights" in missing else ""
        raise ConfigError(
            f"generator {name}: option {', '.join(missing)} is required and has no default{remedy}"
        )
    hints = typing.get_type_hints(member)
    generator = member(**{key: _checked(name, key, value, hints[key]) for key, value in options.items()})
    from wsi_pipeline.core.protocols import Generator

    if not isinstance(generator, Generator):
        raise ConfigError(f"generator {name}: {member.__name__} lacks spec, prepare, background or __call__")
    return generator


def describe() -> list[GeneratorDescription]:
    """Name, first line of the docstring, and options with defaults of every member of ``GENERATORS``."""
    return [_described(name) for name in GENERATORS]


def _described(name: str) -> GeneratorDescription:
    try:
        member = _import(name)
    except ConfigError as error:
        return GeneratorDescription(name=name, summary="", options=(), problem=str(error))
    options = tuple(
        OptionDescription(
            name=field.name,
            kind=str(field.type),
            default=None if _required(field) else _default(field),
            required=_required(field),
        )
        for field in dataclasses.fields(member)
        if field.init
    )
    summary = (member.__doc__ or "").strip().splitlines()[0]
    return GeneratorDescription(name=name, summary=summary, options=options)


def _import(name: str) -> type[Any]:
    target = GENERATORS.get(name, name)
    module_name, _, class_name = target.partition(":")
    if not module_name or not class_name:
        known = ", ".join(sorted(GENERATORS))
        raise ConfigError(f"generator {name}: no such generator; choose {known}, or package.module:Class")
    try:
        member = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        remedy = "check the spelling, or install the package that provides it"
        if name in GENERATORS:
            remedy = "in the program's folder, pip install -c constraints.txt '.[models]'"
        raise ConfigError(
            f"generator {name}: {module_name} cannot be imported ({error}); {remedy}"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"generator {name}: {module_name} has no class {class_name}; check it") from error
    if not (isinstance(member, type) and dataclasses.is_dataclass(member)):
        raise ConfigError(f"generator {name}: {class_name} must be a dataclass whose fields are its options")
    return member


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _checked(name: str, key: str, value: Any, hint: Any) -> Any:
    import pydantic  # here, because it is slow to import and listing generators does not need it

    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(f"generator {name}: option {key}={value!r}: {problem}") from error
