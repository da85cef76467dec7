"""What an audit found. Nothing here may hold a secret of the slide: texts are masked before they come in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

__all__ = ["AuditResult", "Finding", "FindingKind", "masked"]

FindingKind: TypeAlias = Literal["text", "picture", "unknown"]
"""``text``: a text of the slide; ``picture``: its label, macro or another picture beside the scan;
``unknown``: a file, page or part that no output of this program has, so nothing is proven about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that must not be there. ``where``: file of the output, then the part inside it."""

    kind: FindingKind
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """The outcome of one audit.

    ``files`` and ``bytes_searched``: of the output, every byte; ``texts``, ``pictures``: how many of the
    slide were searched for; ``pixels``: decoded pixels that were looked at; ``findings``: what must not be
    there; ``remarks``: what is kept on purpose and what could not be searched for; ``proven``,
    ``not_proven``: what this audit says and what it leaves open, for people.
    """

    output: Path
    slide: str
    files: int
    bytes_searched: int
    texts: int
    pictures: int
    pixels: int
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]
    proven: tuple[str, ...]
    not_proven: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.findings


def masked(text: str) -> str:
    """A secret as a report may show it: its first two characters and its length."""
    return f"{text[:2]}... ({len(text)} characters)"
