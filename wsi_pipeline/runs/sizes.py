"""Sizes and times as people write them, and sizes as they read them.

Why decimal: disks are sold and ``df -H`` counts in powers of ten, so ``64GB`` is 64 * 10^9 bytes; who means
2^30 writes ``GiB``.
"""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta
from decimal import Decimal

from wsi_pipeline.errors import ConfigError

__all__ = ["parse_deadline", "parse_size", "show_size"]

_LETTERS = "KMGTP"
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate(_LETTERS, 1)
    for ending, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})\s*")
_DURATION = re.compile(
    r"(?:([0-9]{1,6}(?:\.[0-9]+)?)d)?(?:([0-9]{1,6}(?:\.[0-9]+)?)h)?"
    r"(?:([0-9]{1,6}(?:\.[0-9]+)?)m(?:in)?)?(?:([0-9]{1,9}(?:\.[0-9]+)?)s)?"
)
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?")
_LARGEST = 2**63 - 1


def parse_size(text: str, name: str) -> int:
    """Bytes of ``64GB`` (10^9), ``500MiB`` (2^20), ``1.5 TB`` or ``1000000``; ``64G`` is ``64GB``.

    Raises ConfigError that names the setting ``name``.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{name}: {text!r} is no size; write it as 64GB, 500MiB or a number of bytes")
    count = int(Decimal(match[1]) * unit)
    if count > _LARGEST:
        raise ConfigError(f"{name}: {text!r} is more than any disk holds; write it as 64GB or 500MiB")
    return count


def parse_deadline(text: str, now: datetime) -> datetime:
    """When to stop, in local time without zone as ``now`` is.

    ``06:30``: the next time that a clock shows that; ``2026-11-26T06:30``: then (a zone is converted);
    ``8h``, ``90m``, ``1h30m``, ``3600s``, ``2d``: so long from now. Raises ConfigError, also for the past.
    """
    wish = text.strip()
    try:
        if match := _CLOCK.fullmatch(wish):
            clock = time(int(match[1]), int(match[2]), int(match[3] or 0))
            today = datetime.combine(now.date(), clock)
            return today if today > now else today + timedelta(days=1)
        if duration := _duration(wish):
            return now + duration
        deadline = datetime.fromisoformat(wish)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"directory.deadline: {text!r} is no time; write it as 06:30, 2026-11-26T06:30 or 8h"
        ) from None
    if deadline.tzinfo is not None:
        deadline = deadline.astimezone().replace(tzinfo=None)
    if deadline <= now:
        raise ConfigError(f"directory.deadline: {text!r} is over; name a time to come, or a duration as 8h")
    return deadline


def _duration(text: str) -> timedelta | None:
    match = _DURATION.fullmatch(text.replace(" ", "").lower())
    if match is None or not any(match.groups()):
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds) or None


def show_size(count: int) -> str:
    """Bytes with three digits that count: ``1.5 GB``, ``640 MB``, ``12 B``."""
    value, unit = float(count), "B"
    for letter in _LETTERS:
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, f"{letter if letter != 'K' else 'k'}B"
    if unit == "B" or abs(value) >= 99.95:
        return f"{value:.0f} {unit}"
    digits = 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") + f" {unit}"
