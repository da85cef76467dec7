"""What a training run tells the outside while it works: frozen values handed to an injected ``emit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

__all__ = ["Emit", "Event", "Finished", "Notice", "Saved", "Started", "Stepped", "Validated", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """``step``: iterations done by earlier runs; ``learning``: trained values of each group."""

    step: int
    steps: int
    learning: Mapping[str, int]
    device: str
    processes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """An iteration is done. ``logs`` is empty but every ``loop.log_every`` iterations."""

    step: int
    steps: int
    logs: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """``figures`` by name; ``best``: better than all before."""

    step: int
    figures: Mapping[str, float]
    best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint or a picture of samples is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """``bundle``: the generator, with the weights of iteration ``step`` and ``figures`` of its validation."""

    bundle: Path
    step: int
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that the user should know, in one line."""

    message: str


Event: TypeAlias = Started | Stepped | Validated | Saved | Notice | Finished
Emit: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default ``emit``: nobody listens."""
