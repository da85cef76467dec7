"""What the making of an index tells the outside: frozen values handed to an injected ``emit``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Checked", "CohortEmit", "CohortEvent", "SlideFailed", "SlideTiled", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The cohort is sound: ``slides`` to tile, of which an earlier run finished ``resumed``."""

    slides: int
    resumed: int
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideTiled:
    """One more slide is finished, ``done`` of ``total``; ``reason``: why it has no tissue, or None;
    ``astray``: tiles that were not made, for there the transform is not in register."""

    slide: str
    tiles: int
    seconds: float
    reason: str | None
    astray: int
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideFailed:
    """One slide cannot be tiled; the others go on."""

    slide: str
    message: str
    done: int
    total: int


CohortEvent: TypeAlias = Checked | SlideTiled | SlideFailed
CohortEmit: TypeAlias = Callable[[CohortEvent], None]


def ignore(event: CohortEvent) -> None:
    """The default ``emit``: nobody listens."""
