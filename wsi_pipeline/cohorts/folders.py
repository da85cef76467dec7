"""The files below a folder, for slides and for tiles alike.

Links are followed, for cohorts are often folders of links; a folder that was seen already, under whatever
name, is passed over, so that a link that leads back ends the walk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["walk"]


def walk(folder: Path) -> Iterator[tuple[tuple[str, ...], list[str], list[str]]]:
    """Each folder below (its names from ``folder`` on), its folders and its files, all sorted.

    What is hidden is left out. Who takes a name out of the folders keeps the walk from going there.
    """
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in files if not name.startswith("."))
        yield Path(root).relative_to(folder).parts, folders, shown
