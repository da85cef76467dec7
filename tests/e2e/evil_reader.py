"""A reader that crashes, hangs, eats memory or dies at random, by the name of the file that it is given."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.readers.mpp import MppClaim
from wsi_pipeline.readers.synthetic import SyntheticSlide

HOARD: list[object] = []


class EvilSlide(SyntheticSlide):
    """The file holds the seed of a synthetic slide; its name says what goes wrong with it."""

    def __init__(self, path: str, *, mpp: MppClaim | None = None) -> None:
        super().__init__(size=Size(1400, 1300), tissue_share=0.4, seed=int(Path(path).read_text()))
        object.__setattr__(self, "_where", path)

    def read_level(self, level: int, region: Region) -> U8_HWC:
        name = Path(self._where).name  # type: ignore[attr-defined]
        if level == 0 and region.y > 600:
            if name.startswith("crash"):
                os.kill(os.getpid(), signal.SIGSEGV)
            if name.startswith("hang"):
                time.sleep(10_000)
            if name.startswith("hog"):
                HOARD.append(np.ones(2_000_000_000, np.uint8))
            if name.startswith("once") and not Path(self._where + ".died").exists():  # type: ignore[attr-defined]
                Path(self._where + ".died").touch()  # type: ignore[attr-defined]
                os._exit(7)
        return SyntheticSlide.read_level(self, level, region)
