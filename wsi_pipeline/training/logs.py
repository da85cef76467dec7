"""What a run leaves for people: a line of JSON for every logged iteration, TensorBoard, and pictures of
samples.

After an interruption the log goes on where the checkpoint stands: lines of iterations that are lost are
dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.training.folder import writing

__all__ = ["RunLog", "save_grid"]

GAP = 8
HEADING = 18


class RunLog:
    """Appends to ``log.jsonl`` and to the folder ``tensorboard`` of a run; begins after iteration
    ``step``."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path = folder / "log.jsonl"
        self._drop_after(step)
        self._board = _board(folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line ``{"step", "kind", ...values}``; values that are no numbers become null.

        Raises OutputError where it cannot be written.
        """
        finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Hand TensorBoard's values, which are written every two minutes, to the disk."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line that was being written when the power went
        partial = self._path.with_suffix(".partial")
        with writing(self._path):
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(partial, self._path)


def _board(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def save_grid(path: Path, headings: Sequence[str], rows: Sequence[Sequence[U8_HWC]]) -> None:
    """A PNG with one row for each sample, all pictures of one size, on white, a heading over each column.

    Raises OutputError where it cannot be written.
    """
    height, width = rows[0][0].shape[:2]
    columns = len(rows[0])
    canvas: npt.NDArray[np.uint8] = np.full(
        (HEADING + len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8
    )
    for r, row in enumerate(rows):
        for c, picture_HWC in enumerate(row):
            y, x = HEADING + r * (height + GAP), c * (width + GAP)
            canvas[y : y + height, x : x + width] = picture_HWC
    picture = Image.fromarray(canvas)
    for c, heading in enumerate(headings):
        ImageDraw.Draw(picture).text((c * (width + GAP), 2), heading, fill=0)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
