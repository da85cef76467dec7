"""``wsi-pipeline tile`` on real pictures: exit codes, JSON, and going on after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wsi_pipeline.cohorts.tiles import TileReader, load_tiles

CLI = [sys.executable, "-m", "wsi_pipeline.cli"]


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, "tile", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def study(data_dir: Path, tmp_path: Path) -> Path:
    """Two frozen and three FFPE pictures, one of which is too coarse."""
    lines = ["slide,domain,patient,split,mpp"]
    for name in ("TCGA-69-7764-01A-01-TS1", "TCGA-IZ-8196-01A-01-BS1"):
        lines.append(f"{data_dir}/ff/monuseg/{name}.tif,,,train,0.25")
    for name, split, mpp in (("anthra", "train", 0.5), ("chol", "val", 0.5), ("ectopic", "test", 4.0)):
        path = next((data_dir / "ffpe" / "pathologyatlas").glob(f"{name}*.jpg"))
        lines.append(f"{path},FFPE,{name},{split},{mpp}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    return tmp_path


OPTIONS = ("cohort.csv", "-o", "i.parquet", "--tile", "128", "--log-format", "json")


def test_a_cohort_becomes_an_index_and_a_page_and_what_fails_is_told(study: Path) -> None:
    done = run(*OPTIONS, "--set", "filters.min_tissue=0.3", cwd=study)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    told = events(done)
    assert [event["event"] for event in told] == [
        *("checked", *["slidetiled"] * 4, "slidefailed", "result", "error")
    ]
    result = told[-2]
    assert result["slides"] == 4
    assert "ectopic" in "".join(result["failed"])  # type: ignore[arg-type]
    assert "too coarse" in str(result["failed"])
    assert set(result["counts"]) == {"FF/train", "FFPE/train", "FFPE/val"}  # type: ignore[call-overload]
    assert "1 of 5 slides failed" in done.stderr
    tiles = load_tiles(study / "i.parquet").select("FF", "train")
    pixels = TileReader(tiles).read(0)
    assert pixels.shape == (128, 128, 3)
    assert 60 < pixels.mean() < 220
    page = (study / "i.html").read_text()
    assert page.count("<article>") == 4
    assert "for they failed: 1" in page


def test_a_run_that_was_killed_goes_on(study: Path) -> None:
    process = subprocess.Popen(
        [*CLI, "tile", *OPTIONS, "--workers", "2"], cwd=study, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    while "slidetiled" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (study / "i.parquet").exists()
    time.sleep(0.5)  # the workers end with their parent
    finished = len(list((study / "i.parts").glob("*.parquet")))
    assert finished >= 1
    done = run(*OPTIONS, cwd=study)
    assert events(done)[0]["resumed"] >= finished  # type: ignore[operator]
    assert (study / "i.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("absent.csv", "-o", "i.parquet"), 2, "absent.csv: cannot be read"),
        (("cohort.csv", "-o", "i.csv"), 2, "name a .parquet file"),
        (("cohort.csv",), 2, "name the cohort and the index"),
        (
            ("cohort.csv", "-o", "i.parquet", "--set", "filters.min_tisue=1"),
            2,
            "filters.min_tisue: no such setting",
        ),
        (("cohort.csv", "-o", "taken.parquet"), 5, "exists and is no tile index"),
        (("cohort.csv", "-o", "i.parquet", "--workers", "0"), 2, "--workers 0"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(
    study: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    (study / "taken.parquet").write_bytes(b"somebody's")
    done = run(*arguments, cwd=study)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_settings_are_shown_and_accepted_again(tmp_path: Path) -> None:
    shown = run("--show-config", "--set", "filters.preset=ai-ffpe", cwd=tmp_path)
    (tmp_path / "tile.yaml").write_text(shown.stdout)
    again = run("--show-config", "-c", "tile.yaml", cwd=tmp_path)
    assert again.stdout == shown.stdout
    assert "preset: ai-ffpe" in shown.stdout
