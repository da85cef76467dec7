"""A real slide through I2SB, cWDM and pix2pix on a CPU: equal bytes for every batch and after kills; series.

Weights are random: the output is noise in the shape of tissue.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from convert_helpers import digests
from tiny_translators import SYSTEMS, bundle

from wsi_pipeline import cli
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.readers import open_slide
from wsi_pipeline.writers.omezarr import read_label

CLI = [sys.executable, "-m", "wsi_pipeline.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
CORNER, REACH = (2048, 1024), 110
"""Where four blocks of 1024 px meet, y before x; tissue is a square around it, so few tiles make them all."""

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process; returns its exit code."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["wsi-pipeline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return call


@pytest.fixture(scope="module")
def place(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Slide and options of a conversion of some tens of small tiles."""
    mask = tmp_path_factory.mktemp("mask") / "square.geojson"
    y, x = CORNER
    ring = [[x + i * REACH, y + j * REACH] for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    mask.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
    return [
        str(data_dir / "slides" / "CMU-1-Small-Region.svs"),
        *("--set", f"input.mask='{mask}'", "--set", f"input.roi='{y - 100},{x - 100},200,200'"),
        *("--set", "output.zarr.block=1024", "--set", "output.qc=false", "--set", "run.workers=1"),
        *("--set", "generator.options.device=cpu"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("system", [*SYSTEMS, "pix2pix"])
def test_equal_bytes_for_every_batch_and_after_kills(
    system: str, run: Run, place: list[str], tmp_path: Path
) -> None:
    weights = str(bundle(tmp_path, system, tile=64, nfe=5))
    command = ["convert", *place, "--weights", weights]
    outputs = {}
    for batch in (1, 4):
        outputs[batch] = tmp_path / f"{batch}.ome.zarr"
        assert run(*command, "-o", outputs[batch], "--set", f"run.batch={batch}") == 0
    assert digests(outputs[1]) == digests(outputs[4])
    out, kills = tmp_path / "killed.ome.zarr", 0
    partial = out.with_name(f"{out.name}.partial")
    for blocks in (1, 2):
        process = started(command, out)
        while process.poll() is None and recorded(partial) < blocks:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += partial.exists() and recorded(partial) > 0
    assert kills, "no kill fell amid its blocks: the test proves nothing"
    assert out.exists() or run(*command, "-o", out) == 0
    assert digests(out) == digests(outputs[1])


def started(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, to be killed."""
    return subprocess.Popen(
        [*CLI, *command, "-o", str(out)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )


def recorded(partial: Path) -> int:
    """Blocks in the ledgers of a partial output."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in partial.glob("ledger/*.jsonl"))


@pytest.mark.slow
def test_a_series_leads_from_the_source_to_the_result(run: Run, place: list[str], tmp_path: Path) -> None:
    weights = bundle(tmp_path, "i2sb", tile=64, nfe=2)
    out = tmp_path / "way.ome.zarr"
    assert run("series", *place, "-o", out, "--weights", weights, "--stops", "0,1,2") == 0
    assert run("convert", *place, "-o", tmp_path / "end.ome.zarr", "--weights", weights) == 0
    way = zarr.open_array(out / "0", mode="r")
    end = zarr.open_array(tmp_path / "end.ome.zarr" / "0", mode="r")
    assert way.shape == (3, *end.shape)
    assert np.array_equal(way[2], end[:])
    y, x = CORNER
    spot = (slice(y - 40, y + 40), slice(x - 40, x + 40))
    slide = open_slide(place[0])
    with contextlib.closing(slide):
        source_HWC = slide.read_level(0, Region(y - 40, x - 40, 80, 80))
    assert np.array_equal(np.moveaxis(way[0][:, *spot], 0, -1), source_HWC)
    assert json.loads((out / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]["axes"][0] == {
        "name": "t",
        "type": "time",
    }


@pytest.mark.slow
def test_several_runs_have_a_label_of_their_spread(run: Run, place: list[str], tmp_path: Path) -> None:
    weights = bundle(tmp_path, "i2sb", tile=64, nfe=2)
    out = tmp_path / "runs.ome.zarr"
    assert run("series", *place, "-o", out, "--weights", weights, "--runs", "2") == 0
    spread, pixels = read_label(out, "spread"), zarr.open_array(out / "0", mode="r")
    y, x = CORNER
    assert spread[y, x] > 0
    assert spread[0, 0] == 0, "background is the source in every run"
    both = np.asarray(pixels[:, :, y, x], np.float64)
    assert abs(both.std(axis=0).mean() - spread[y, x]) <= 0.5
    assert run("series", *place, "-o", out, "--weights", weights, "--runs", "2") == 5
    assert run("series", *place, "-o", tmp_path / "b.ome.zarr", "--weights", weights, "--runs", "1") == 2


@pytest.mark.slow
def test_a_series_goes_on_after_a_kill_with_members_as_they_are(
    run: Run, place: list[str], tmp_path: Path
) -> None:
    weights = str(bundle(tmp_path, "i2sb", tile=64, nfe=2))
    command = ["series", *place, "--weights", weights, "--runs", "2"]
    assert run(*command, "-o", tmp_path / "whole.ome.zarr") == 0
    out = tmp_path / "killed.ome.zarr"
    first = out.with_name(f"{out.name}.members") / "run-0.ome.zarr"
    process = started(command, out)
    while process.poll() is None and not first.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists() and not out.exists(), "the kill fell elsewhere: the test proves nothing"
    assert run(*command, "-o", out) == 0
    assert digests(out) == digests(tmp_path / "whole.ome.zarr")
    assert not first.exists()
