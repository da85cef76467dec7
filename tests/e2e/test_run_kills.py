"""Workers, a run and a cluster's client are killed at random: running again ends with the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from run_helpers import contents, make_slide, records, run

from wsi_pipeline.pipeline.verify import verify_output

SLIDES = 4
SECONDS = 9.0
"""Within which a kill comes; a run takes about ten."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed in range(SLIDES):
        make_slide(folder / f"s{seed}.ome.tif", seed, side=2200 if seed % 2 else 1300)
    return folder


@pytest.fixture(scope="module")
def whole(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Contents of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    run(slides, out)
    return contents(out)


def command(slides: Path, out: Path, *options: str) -> list[str]:
    settings = ["--set", "output.zarr.block=1024", "-g", "identity"]
    return [
        sys.executable, "-m", "wsi_pipeline.cli", "convert", str(slides), "-o", str(out), *settings, *options
    ]  # fmt: skip


def check_nothing_half_done(out: Path) -> None:
    """Whatever has a final name is finished and intact."""
    for store in out.glob("*.ome.zarr"):
        assert verify_output(store).ok


def killed(
    arguments: list[str], out: Path, rng: random.Random, victim: Callable[[psutil.Process], None]
) -> None:
    """Start a run, let ``victim`` kill something of it at a random moment, and wait for its end."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(1.0, SECONDS))
    if process.poll() is None:
        victim(psutil.Process(process.pid))
    process.wait(120)
    check_nothing_half_done(out)


def kill_run(process: psutil.Process) -> None:
    process.kill()


def kill_worker(process: psutil.Process) -> None:
    lanes = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    if lanes:
        random.choice(lanes).kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_and_run_again(
    slides: Path, whole: dict[str, str], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    arguments = command(slides, tmp_path, "--workers", "2")
    for victim in (kill_worker, kill_run) if seed % 2 else (kill_run,):
        killed(arguments, tmp_path, rng, victim)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert not left, "no worker outlives its run"
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == 0
    assert contents(tmp_path) == whole
    check_nothing_half_done(tmp_path)
    assert not list((tmp_path / ".wsi_run" / "work").iterdir())


def test_ctrl_c_stops_at_once_and_tells_how_to_go_on(
    slides: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    arguments = command(slides, tmp_path, "--workers", "2")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".wsi_run/beats/*.json")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in out + err
    assert json.loads((tmp_path / "run.json").read_text())["why"] == "stopped"
    assert {record.status for record in records(tmp_path).values()} <= {"queued", "done"}
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == 0
    assert contents(tmp_path) == whole


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A dask scheduler with two worker processes that offer a GPU each; its scheduler file."""
    file = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run_dask = [sys.executable, "-m", "dask"]
    parts = [
        [*run_dask, "scheduler", "--scheduler-file", str(file), "--port", "0", "--no-dashboard"],
        [
            *(*run_dask, "worker", "--scheduler-file", str(file), "--nworkers", "2", "--nthreads", "1"),
            *("--resources", "GPU=1", "--no-dashboard", "--local-directory", str(tmp_path / "dask")),
        ],
    ]
    processes = [subprocess.Popen(part, **quiet) for part in parts]  # type: ignore[call-overload]
    yield str(file)
    for process in processes:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_the_client_of_a_cluster_is_killed(
    slides: Path, whole: dict[str, str], tmp_path: Path, cluster: str, seed: int
) -> None:
    """Its tasks live on for a while: late writers, while the next client's do the same work."""
    deadline = time.monotonic() + 60
    while not Path(cluster).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    out = tmp_path / "out"
    arguments = command(slides, out, "--scheduler", cluster)
    killed(arguments, out, random.Random(seed), kill_run)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == whole
    check_nothing_half_done(out)
