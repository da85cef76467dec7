"""The bytes of an output do not depend on batch, order, workers, region of interest or interruptions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from convert_helpers import SLIDE, convert, digests, settings

from wsi_pipeline.core.geometry import BlockIndex
from wsi_pipeline.core.plan import SlidePlan
from wsi_pipeline.pipeline.settings import ConvertConfig, ExecutionConfig
from wsi_pipeline.readers import open_slide

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "a.ome.zarr"
    result = convert(out, settings())
    assert result.status == "converted"
    assert result.tiles > 9
    found = digests(out)
    assert sum(name.startswith("0/c/") for name in found) == 25, "5 x 5 blocks on level 0"
    return found


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batch_size(tmp_path: Path, reference: dict[str, str], batch: int) -> None:
    convert(tmp_path / "a.ome.zarr", settings(run=ExecutionConfig(batch=batch, threads=1)))
    assert digests(tmp_path / "a.ome.zarr") == reference


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_order(
    tmp_path: Path, reference: dict[str, str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = SlidePlan.tiles_for

    def shuffled(plan: SlidePlan, blocks: set[BlockIndex]) -> list[object]:
        tiles = in_order(plan, blocks)
        random.Random(seed).shuffle(tiles)
        return tiles

    monkeypatch.setattr(SlidePlan, "tiles_for", shuffled)
    convert(tmp_path / "a.ome.zarr", settings())
    assert digests(tmp_path / "a.ome.zarr") == reference


@pytest.mark.slow
def test_two_processes(tmp_path: Path, reference: dict[str, str]) -> None:
    convert(tmp_path / "a.ome.zarr", settings(run=ExecutionConfig(workers=2, threads=1)))
    assert digests(tmp_path / "a.ome.zarr") == reference


@pytest.mark.parametrize("background", ["matched", "source", "white"])
def test_roi_blocks_equal_the_whole_slide(tmp_path: Path, background: str) -> None:
    whole, part = tmp_path / "whole.ome.zarr", tmp_path / "part.ome.zarr"
    convert(whole, settings(background=background))
    convert(part, settings(background=background, roi="1500,1100,1700,900"))
    of_whole, of_part = digests(whole), digests(part)
    inside = [name for name in of_part if name.startswith(("0/c/", "labels/disagreement/0/c/"))]
    assert len([name for name in inside if name.startswith("0/")]) == 3, "block rows 1 to 3, column 1"
    assert {name: of_part[name] for name in inside} == {name: of_whole[name] for name in inside}


def test_identity_gives_the_source_back(tmp_path: Path) -> None:
    convert(tmp_path / "a.ome.zarr", settings(generator="identity"))
    output = open_slide(tmp_path / "a.ome.zarr")
    from wsi_pipeline.core.geometry import Region

    for region in (Region(0, 0, 900, 900), Region(2000, 1500, 1300, 1700), Region(4900, 4300, 103, 201)):
        np.testing.assert_array_equal(output.read_level(0, region), SLIDE.read_level(0, region))


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from convert_helpers import convert, settings
from wsi_pipeline.pipeline.settings import ExecutionConfig
convert(Path(sys.argv[2]), settings(run=ExecutionConfig(workers=int(sys.argv[3]))))
"""


def start(out: Path, workers: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(HERE), str(out), str(workers)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )


def recorded(partial: Path) -> int:
    """Blocks in the ledgers of a partial output."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in partial.glob("ledger/*.jsonl"))


def kill_and_resume(out: Path, reference: dict[str, str], kills: int, seed: int) -> int:
    """Kill a conversion at random moments, then let it finish; returns how many kills fell amid blocks."""
    rng, amid = random.Random(seed), 0
    partial = out.with_name(out.name + ".partial")
    for _ in range(kills):
        process, enough = start(out, workers=1), recorded(partial) + rng.randint(0, 8)
        while process.poll() is None and recorded(partial) < enough:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():
            break
        amid += recorded(partial) > 0
    if not out.exists():
        convert(out, settings())
    assert not partial.exists()
    assert digests(out) == reference
    return amid


def test_killed_and_resumed(tmp_path: Path, reference: dict[str, str]) -> None:
    saved = kill_and_resume(tmp_path / "a.ome.zarr", reference, kills=4, seed=7)
    assert saved, "no run was killed amid its blocks: the test proves nothing"


@pytest.mark.slow
def test_killed_at_25_random_moments(tmp_path: Path, reference: dict[str, str]) -> None:
    saved = sum(
        kill_and_resume(tmp_path / f"{seed}.ome.zarr", reference, kills=3, seed=seed) for seed in range(9)
    )
    assert saved >= 9


def test_a_block_that_was_damaged_on_disk_is_made_again(tmp_path: Path, reference: dict[str, str]) -> None:
    out = tmp_path / "a.ome.zarr"
    done = settings()
    convert(out, done)
    partial = tmp_path / "a.ome.zarr.partial"
    out.rename(partial)
    (partial / "0" / "c" / "0" / "2" / "2").write_bytes(b"half a shard")
    (partial / "1" / "c" / "0" / "1" / "1").unlink()
    result = convert(out, done)
    assert result.blocks == 2
    assert digests(out) == reference


def test_settings_of_another_run_are_refused(tmp_path: Path) -> None:
    from wsi_pipeline.errors import FingerprintMismatchError

    out = tmp_path / "a.ome.zarr"
    convert(out, settings())
    out.rename(tmp_path / "a.ome.zarr.partial")
    other: ConvertConfig = settings(generator="identity")
    with pytest.raises(FingerprintMismatchError, match="--restart"):
        convert(out, other)
    assert not out.exists()
