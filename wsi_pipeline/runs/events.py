"""What a run over many slides tells while it works; besides these it passes on notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from wsi_pipeline.pipeline.events import Notice
from wsi_pipeline.runs.records import Status

__all__ = ["RunEmit", "RunEvent", "RunProgress", "SlideChanged", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideChanged:
    """A slide has another status; ``reason`` as in its record."""

    source: str
    status: Status
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """``done`` of ``total`` slides are settled; ``share``: of the work on all of them, 0 to 1, with what is
    half done; ``running``: slides in hand, with their stage."""

    done: int
    total: int
    share: float
    running: tuple[str, ...]


RunEvent: TypeAlias = SlideChanged | RunProgress | Notice
RunEmit: TypeAlias = Callable[[RunEvent], None]


def ignore(event: RunEvent) -> None:
    """The default ``emit``: nobody listens."""
