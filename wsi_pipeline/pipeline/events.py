"""What a run tells the outside while it works: frozen values handed to an injected ``emit``.

The library never prints and draws no bar; the command line renders these as a bar or as JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Emit", "Event", "Notice", "Planned", "Progress", "Stage", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A named part of the work begins."""

    slide_id: str
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan stands; ``blocks`` counts all levels, ``resumed`` those that an earlier run committed."""

    slide_id: str
    tiles: int
    blocks: int
    resumed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """``done`` of ``total`` steps of the current stage: each tile that was generated and each block that is
    on disk (with several processes only the blocks), or each TIFF tile that was exported."""

    slide_id: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that the user should know, in one line."""

    slide_id: str
    message: str


Event: TypeAlias = Stage | Planned | Progress | Notice
Emit: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default ``emit``: nobody listens."""
