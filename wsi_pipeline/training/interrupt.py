"""Ctrl-C and a scheduler's "terminate" between two iterations: what was computed is saved first.

The first signal only asks; the iteration that is under way ends, its checkpoint is written, and then the
usual KeyboardInterrupt rises. A second signal does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

__all__ = ["CutShort", "Interrupt", "asking"]

_Item = TypeVar("_Item")


class CutShort(Exception):
    """Somebody wants to stop in the middle of something that can be done again."""


class Interrupt:
    """``asked``: somebody wants to stop."""

    asked = False

    def watching(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items, one by one; raises CutShort once ``asked``."""
        for item in items:
            if self.asked:
                raise CutShort
            yield item


@contextmanager
def asking(enabled: bool) -> Iterator[Interrupt]:
    """Inside, SIGINT and SIGTERM set ``asked``, the second of them raises KeyboardInterrupt.

    Not ``enabled``, or outside the main thread, signals do what they did: several processes would stop after
    different iterations and wait for each other.
    """
    interrupt = Interrupt()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
