"""The log of a run: after an interruption it goes on where the checkpoint stands; pictures of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.errors import OutputError
from wsi_pipeline.training.logs import GAP, HEADING, RunLog, save_grid


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def log(folder: Path, step: int = 0) -> RunLog:
    return RunLog(folder, step, tensorboard=False)


def test_a_line_is_a_json_object(tmp_path: Path) -> None:
    log(tmp_path).write(3, "train", {"loss": 0.5, "nothing": float("nan"), "endless": float("inf")})
    assert lines(tmp_path) == [{"step": 3, "kind": "train", "loss": 0.5, "nothing": None, "endless": None}]


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path, step: int) -> None:
    first = log(tmp_path)
    for number in (1, 2, 3):
        first.write(number, "train", {"loss": 1.0})
        first.write(number, "validation", {"fid": 2.0})
    log(tmp_path, step).write(step + 1, "train", {"loss": 3.0})
    kept = [n for n in (1, 1, 2, 2, 3, 3) if n <= step]
    assert [line["step"] for line in lines(tmp_path)] == [*kept, step + 1]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", [b'{"step": 2, "kind": "tr', b"\x00\x00\x00", b"\xff\xfe{", b"7\n", b"\n"])
def test_a_line_that_was_being_written_is_dropped(tmp_path: Path, torn: bytes) -> None:
    log(tmp_path).write(1, "train", {"loss": 1.0})
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(torn)
    log(tmp_path, 2).write(3, "train", {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_a_line_without_its_end_is_whole(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "kind": "train"}')
    log(tmp_path, 1).write(2, "train", {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_log_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"log\.jsonl: cannot be written"):
        log(tmp_path / "absent").write(1, "train", {})


def test_tensorboard_goes_on_after_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, numbers in ((0, (1, 2, 3)), (2, (3, 4))):
        some = RunLog(tmp_path, step, tensorboard=True)
        for number in numbers:
            some.write(number, "train", {"loss": 10.0 * step + number})
        some.flush()
        some.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert values == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_a_grid_shows_a_row_for_each_sample(tmp_path: Path) -> None:
    rows = [[np.full((6, 5, 3), 10 * r + c, np.uint8) for c in range(3)] for r in range(2)]
    save_grid(tmp_path / "samples" / "grid.png", ["source", "output"], rows)
    grid = np.asarray(Image.open(tmp_path / "samples" / "grid.png"))
    assert grid.shape == (HEADING + 12 + GAP, 15 + 2 * GAP, 3)
    assert (grid[:HEADING] < 128).any()
    grid = grid[HEADING:]
    for r in range(2):
        for c in range(3):
            y, x = r * (6 + GAP), c * (5 + GAP)
            assert (grid[y : y + 6, x : x + 5] == 10 * r + c).all()
    assert (grid[6 : 6 + GAP] == 255).all()
