"""Stacks with a t or z axis: metadata, and nothing is thrown away that this program did not make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from ome_zarr_models.v05.image import Image

from wsi_pipeline.errors import OutputExistsError
from wsi_pipeline.writers.stack import open_stack, publish_stack, stack_array


def stack(out: Path, overwrite: bool = False) -> Path:
    folder = open_stack(out, overwrite)
    stack_array(folder, "0", "tcyx", (2, 3, 40, 50))[:] = 7
    stack_array(folder, "1", "tcyx", (2, 3, 20, 25))[:] = 7
    for level, shape in enumerate([(40, 50), (20, 25)]):
        stack_array(folder, f"labels/spread/{level}", "yx", shape)[:] = level
    return publish_stack(
        folder,
        out,
        axes="tcyx",
        scale={"y": 0.5, "x": 0.25},
        levels=2,
        labels={"spread": "of runs"},
        extra={"a": 1},
    )


def test_a_stack_is_a_valid_image_with_times_and_sizes(tmp_path: Path) -> None:
    out = stack(tmp_path / "a.ome.zarr")
    multiscale = Image.from_zarr(zarr.open_group(out, mode="r")).ome_attributes.multiscales[0]
    assert [axis.name for axis in multiscale.axes] == ["t", "c", "y", "x"]
    scales = [dataset.coordinateTransformations[0].scale for dataset in multiscale.datasets]
    assert scales == [[1.0, 1.0, 0.5, 0.25], [1.0, 1.0, 1.0, 0.5]]
    assert np.all(zarr.open_array(out / "0", mode="r")[:] == 7)
    assert json.loads((out / "labels" / "zarr.json").read_text())["attributes"]["ome"]["labels"] == ["spread"]
    assert stack(out, overwrite=True) == out


def test_what_it_did_not_make_stays(tmp_path: Path) -> None:
    mine, partial = tmp_path / "mine.ome.zarr", tmp_path / "big.ome.zarr.partial"
    for folder in (mine, partial):
        folder.mkdir()
        (folder / "notes.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="choose another name"):
        stack(mine, overwrite=True)
    stack(tmp_path / "big.ome.zarr")
    assert (mine / "notes.txt").exists() and (partial / "notes.txt").exists()
