"""What a run says about itself as a whole, for the head of its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["RunFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the head of a report says.

    ``title``: name of the input folder or table; ``started`` and ``updated``: ISO date and time; ``why`` a
    run stopped, e.g. ``deadline``; ``peak_ram_bytes`` of all processes together and ``disk_bytes`` of what
    the run wrote, 0 where not measured; ``budgets``: name of a budget -> what was promised and what was
    measured; ``notices``: sentences about the whole run.
    """

    title: str
    started: str
    updated: str
    state: Literal["running", "finished", "stopped"]
    why: str = ""
    generator: str
    executor: str
    workers: int
    version: str
    peak_ram_bytes: int = 0
    disk_bytes: int = 0
    budgets: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
