"""Training on real tiles through the real command line: killed and resumed, in parts, and what it leaves.

Networks are small and random, so what they make is noise; that training learns is another test's affair.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from wsi_pipeline import cli
from wsi_pipeline.models.bundle import load_facts, save_bundle
from wsi_pipeline.models.random_weights import TINY_UNET, TINY_VAE, random_weights
from wsi_pipeline.training import run as module

CLI = [sys.executable, "-m", "wsi_pipeline.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
UNET = {
    **TINY_UNET,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 2),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
}
VAE = {**TINY_VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: torch is loaded once, and runs on one thread."""

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["wsi-pipeline", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return Done(int(caught.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def cohort(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of frozen and one of FFPE pictures, links to real ones."""
    root = tmp_path_factory.mktemp("cohort")
    for name, domain in (("ff", "ff"), ("ffpe", "ffpe")):
        pictures = sorted((data_dir / domain / "monuseg").glob("*.tif"))[:4]
        if not pictures:
            pytest.skip(f"no pictures in {data_dir / domain / 'monuseg'}")
        (root / name).mkdir()
        for picture in pictures:
            (root / name / picture.name).symlink_to(picture)
    return root


@pytest.fixture(scope="module")
def settings(cohort: Path) -> Path:
    """A complete configuration; every test overrides what it is about."""
    weights = cohort / "begin.safetensors"
    drawn = random_weights(unet_config=UNET, vae_config=VAE, rank_unet=2, rank_vae=2)
    save_bundle(replace(drawn, tile=64), weights)
    document = {
        "data": {"source": str(cohort / "ff"), "target": str(cohort / "ffpe"), "crop": 32},
        "model": {"weights": str(weights), "trainable": "all"},
        "objective": {"adversarial": {"lpips": False, "backbone": {"kind": "tiny"}}},
        "optimiser": {"learning_rate": 1e-4, "ema": 0.5},
        "validation": {"every": 4, "tiles": 2, "split": None, "metric": "fid", "shown": 1},
        "loop": {
            **{"steps": 8, "log_every": 2, "checkpoint_every": 3, "sample_every": 5, "keep": 1},
            **{"device": "cpu", "tensorboard": False, "collapse_change": 0.0},
        },
    }
    path = cohort / "settings.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


QUICK = ("--set", "validation.every=0", "--set", "loop.steps=1")


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def results(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves, but for its settings and its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("train.yaml", "run.lock")
    }


# Killed and resumed


def progress(folder: Path) -> int:
    """Iterations of the newest checkpoint."""
    steps = [int(path.stem[5:]) for path in folder.glob("checkpoints/step-*.safetensors")]
    return max(steps, default=0)


def killed(arguments: list[str], folder: Path, after: int, delay: float, number: int = signal.SIGKILL) -> int:
    """Start a run, end it ``delay`` s after it has saved ``after`` iterations; returns what it had saved."""
    process = subprocess.Popen(
        [*CLI, *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    while process.poll() is None and progress(folder) < after:
        time.sleep(0.005)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):  # it was faster, and is done
        os.killpg(process.pid, number)
    process.wait()
    return progress(folder)


class Killed(NamedTuple):
    folder: Path
    reached: Future[list[int]]


@pytest.fixture(scope="module")
def interrupted(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    """Processes that are killed twice, beside the tests that come before they are needed."""
    folder, draws = tmp_path_factory.mktemp("killed") / "run", random.Random()
    arguments = ["train", str(settings), "--out", str(folder)]

    def twice() -> list[int]:
        return [killed(arguments, folder, after, draws.uniform(0, 0.5)) for after in (2, 5)]

    with ThreadPoolExecutor(1) as pool:
        yield Killed(folder, pool.submit(twice))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def reference(run: Run, settings: Path, finished: Path, interrupted: Killed) -> Path:
    """An uninterrupted run of eight iterations, made once."""
    if not finished.exists():
        done = run("train", settings, "--out", finished)
        assert done.code == 0, done.err
    return finished


def test_a_run_leaves_what_it_says(reference: Path) -> None:
    steps = {
        kind: [line["step"] for line in log_of(reference) if line["kind"] == kind]
        for kind in ("train", "validation")
    }
    assert steps == {"train": [2, 3, 4, 6, 8], "validation": [4, 8]}
    found = results(reference)
    assert {
        "samples/step-00000005.png",
        "samples/step-00000008.png",
    } <= found.keys()
    best = json.loads(found["best.json"])
    validated = {line["step"]: line["fid"] for line in log_of(reference) if line["kind"] == "validation"}
    assert best["value"] == validated[best["step"]] == min(validated.values())
    kept = {f"checkpoints/step-{step:08d}.safetensors" for step in (best["step"], 8)}
    assert {name for name in found if name.startswith("checkpoints/")} == kept
    averaged = {n[4:]: t for n, t in load_file(reference / sorted(kept)[0]).items() if n.startswith("ema/")}
    made = load_file(reference / "generator.safetensors")
    assert averaged
    assert all(torch.equal(made[name], tensor) for name, tensor in averaged.items() if name in made)


def test_a_trained_bundle_converts_and_exports(
    run: Run, reference: Path, cohort: Path, tmp_path: Path
) -> None:
    bundle, picture = reference / "generator.safetensors", sorted((cohort / "ff").iterdir())[0]
    mask = tmp_path / "square.geojson"
    ring = [[400, 400], [460, 400], [460, 460], [400, 460], [400, 400]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    mask.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
    done = run(
        *("convert", picture, "-o", tmp_path / "out.ome.zarr", "--weights", bundle, "--mpp", "0.5"),
        *("--roi", "400,400,64,64", "--mask", mask, "--log-format", "json"),
        *("--set", "output.zarr.block=1024", "--set", "output.qc=false"),
        *("--set", "generator.options.tile=128"),
    )
    assert done.code == 0, done.err
    assert done.events[-1]["status"] == "converted"
    manifest = json.loads((tmp_path / "out.ome.zarr" / "manifest.json").read_text())
    assert manifest["generator"]["context"]["weights"] == load_facts(bundle).identity
    done = run("models", "export", bundle, "-o", tmp_path / "model.pkl", "--format", "diffusion-ffpe")
    assert done.code == 0, done.err
    exported = torch.load(tmp_path / "model.pkl", weights_only=True)
    trained = load_file(bundle)["unet.conv_in.bias"]
    assert any(torch.equal(tensor, trained) for tensor in exported["unet_conv_in"].values())


def test_run_again_it_only_writes_its_bundle(run: Run, settings: Path, reference: Path) -> None:
    before = results(reference)
    (reference / "generator.safetensors").unlink()
    done = run("train", settings, "--out", reference, "--log-format", "json")
    assert done.code == 0, done.err
    assert [event["event"] for event in done.events] == ["started", "notice", "result"]
    assert done.events[0]["step"] == 8
    assert results(reference) == before


# Cut otherwise


def curve(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name not in ("step", "kind")}
        for line in log_of(folder)
        if line["kind"] == "train"
    ]


def assert_same_curve(one: Path, other: Path, within: float = 1e-4) -> None:
    """Norms of gradients in the first iteration only: later, rounding decides the sign of small ones."""
    pairs = list(zip(curve(one), curve(other), strict=True))
    assert len(pairs) > 2
    for step, (a, b) in enumerate(pairs):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if not name.startswith("norm_"):
                assert b[name] == pytest.approx(value, abs=within), (step, name)
            elif step == 0:
                assert b[name] == pytest.approx(value, rel=1e-3), name


# In smaller tiles some of the random network's norms see a few pixels, and enlarge rounding a thousand times.
CUT = ("--set", "validation.every=0", "--set", "loop.log_every=1", "--set", "data.crop=64")
PUBLISHED = ("--set", "optimiser.learning_rate=5.0e-6", "--set", "optimiser.ema=0")


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wholes") / "run"


@pytest.fixture
def whole(run: Run, settings: Path, wholes: Path) -> Path:
    """Three iterations of batch 2 in one process."""
    if not wholes.exists():
        done = run("train", settings, "--out", wholes, *CUT, *PUBLISHED, *loop(steps=3, batch=2))
        assert done.code == 0, done.err
    return wholes


def loop(**values: int) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"loop.{name}={value}")]


@pytest.mark.slow
def test_accumulated_halves_are_the_batch(run: Run, settings: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("train", settings, "--out", out, *CUT, *PUBLISHED, *loop(steps=3, batch=1, accumulate=2))
    assert done.code == 0, done.err
    assert_same_curve(whole, out)
    one, other = (json.loads((folder / "run.json").read_text())["fingerprint"] for folder in (whole, out))
    assert one == other, "the same run: it may be gone on with"


def in_processes(arguments: list[str], count: int = 2) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.run(
        [*launch, "-m", "wsi_pipeline.cli", *arguments], capture_output=True, text=True, env=ONE_THREAD
    )


@pytest.mark.slow
def test_two_processes_are_one(settings: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = in_processes(
        [
            "train",
            str(settings),
            "--out",
            str(out),
            *CUT,
            *PUBLISHED,
            *loop(steps=3, batch=1),
            "--log-format",
            "json",
        ]
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert events[0]["processes"] == 2
    assert [event["event"] for event in events].count("result") == 1, "the main process speaks alone"
    assert_same_curve(whole, out)
    refused = in_processes(["train", str(settings), "--out", str(out), "--set", "loop.seed=7"])
    assert refused.returncode != 0
    assert "belongs to a run with other settings" in refused.stderr
    assert "[rank1]: Traceback" not in refused.stderr, "the other process is told, too"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_validate_resume_and_end_as_without_a_break(
    run: Run, settings: Path, tmp_path: Path
) -> None:
    """Also with a checkpoint of one process, which two go on from."""
    arguments = ["train", str(settings)]
    alone, both = tmp_path / "alone", tmp_path / "both"
    for steps in (5, 8):
        done = in_processes([*arguments, "--out", str(both), *loop(steps=steps)])
        assert done.returncode == 0, done.stderr
    done = in_processes([*arguments, "--out", str(alone), *loop(steps=8)])
    assert done.returncode == 0, done.stderr
    last = "checkpoints/step-00000008.safetensors"
    assert (alone / last).read_bytes() == (both / last).read_bytes()
    lines = [line for line in log_of(both) if line["step"] != 5]
    assert [line for line in log_of(alone) if line["kind"] == "validation"] == [
        line for line in lines if line["kind"] == "validation"
    ]
    done = run(*arguments, "--out", both, *loop(steps=9, batch=2), "--log-format", "json")
    assert done.code == 0, done.err
    assert done.events[0]["step"] == 8


# Errors: one line, and the exit code that the help states


def assert_one_line(done: Done, code: int, *texts: str) -> None:
    assert done.code == code, done.err
    lines = done.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], done.err
    for text in texts:
        assert text in errors[0]


BEFORE = {
    "source": (["data.source=/absent"], "/absent: no such folder or tile index"),
    "no source": (["data.source=''"], "data.source: name a tile index or a folder"),
    "crop": (["data.crop=1024"], "data.crop: 1024 px is larger than"),
    "weights": (["model.weights=/absent.safetensors"], "/absent.safetensors: cannot be read"),
    "lpips": (["objective.adversarial.lpips=true", "objective.adversarial.lpips_vgg=/absent"], "/absent"),
    "metric": (["validation.metric=psnr", "validation.every=1"], "validation.metric: psnr needs pairs"),
    "augment": (["objective.adversarial.augment=[colour]"], "colour"),
    "extractor": (["validation.extractor=vgg", "validation.every=1"], "extractor 'vgg': unknown"),
    "domain": (["data.source_domain=FFPE"], "no tile has domain 'FFPE'"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_what_cannot_work_is_told_before_anything_is_written(
    run: Run, settings: Path, tmp_path: Path, case: str
) -> None:
    overrides, text = BEFORE[case]
    sets = [word for override in overrides for word in ("--set", override)]
    done = run("train", settings, "--out", tmp_path / "run", *QUICK, *sets)
    assert_one_line(done, 2, text)
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_folder(run: Run, settings: Path) -> None:
    assert_one_line(run("train", settings), 2, "--out RUN")


def test_a_full_disk_is_told_before(
    run: Run, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    done = run("train", settings, "--out", tmp_path / "run", *QUICK)
    assert_one_line(done, 2, "the run needs 1.1 GB more", "1.1 GB are free; lower loop.keep")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_settings_need_another_folder_or_a_restart(run: Run, settings: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", ("--set", "loop.seed=5")
    assert run("train", settings, "--out", out, *QUICK).code == 0
    first = results(out)
    assert_one_line(run("train", settings, "--out", out, *QUICK, *other), 5, "other settings", "--restart")
    assert results(out) == first
    done = run("train", settings, "--out", out, *QUICK, *other, "--restart", "--log-format", "json")
    assert done.code == 0, done.err
    assert done.events[0]["step"] == 0
    again = run("train", settings, "--out", out, *QUICK, "--restart")
    assert again.code == 0, again.err
    assert results(out) == first


def test_a_folder_that_is_not_ours_is_left_alone(run: Run, settings: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for more in ([], ["--restart"]):
        assert_one_line(run("train", settings, "--out", tmp_path, *QUICK, *more), 2, "is no training run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_stops_the_run_and_mended_it_goes_on(
    run: Run, settings: Path, cohort: Path, tmp_path: Path
) -> None:
    folder, picture = tmp_path / "ff", sorted((cohort / "ff").iterdir())[0]
    folder.mkdir()
    for side in range(3):
        Image.open(picture).crop((0, 0, 100 + side, 100)).save(folder / f"{side}.png")
    whole, broken = (folder / "1.png").read_bytes(), folder / "1.png"
    broken.write_bytes(whole[: len(whole) // 2])
    arguments = ["train", settings, "--out", tmp_path / "run", *QUICK, "--set", f"data.source={folder}"]
    arguments += loop(steps=3, checkpoint_every=1)
    done = run(*arguments)
    assert_one_line(done, 3, "1.png")
    broken.write_bytes(whole)
    assert run(*arguments).code == 0
    assert progress(tmp_path / "run") == 3


def test_a_rate_that_explodes_is_told(run: Run, settings: Path, tmp_path: Path) -> None:
    done = run(
        "train", settings, "--out", tmp_path / "run", *QUICK, "--set", "optimiser.learning_rate=1.0e+30"
    )
    assert_one_line(done, 4, "are not finite", "lower optimiser.learning_rate")


def test_sigterm_saves_and_stops(run: Run, settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def stop() -> None:
        while not (out / "log.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    arguments = ["train", settings, "--out", out, *QUICK, "--log-format", "json"]
    arguments += loop(steps=1000, log_every=1, checkpoint_every=1000)
    done = run(*arguments)
    assert done.code == 130, done.err
    assert "Run the same command again to continue" in done.err
    assert "Traceback" not in done.err
    assert done.events[-1] == {"event": "stopped"}
    reached = max(line["step"] for line in log_of(out))
    assert progress(out) == reached >= 1, "nothing that was computed is lost"
    assert run(*arguments, *loop(steps=reached + 1)).code == 0


# What ran beside


def test_killed_twice_and_resumed(run: Run, settings: Path, interrupted: Killed, reference: Path) -> None:
    reached = interrupted.reached.result(timeout=280)
    assert reached[0] > 0, "the first kill came amid the run"
    assert reached[1] < 8, "and so did the second"
    done = run("train", settings, "--out", interrupted.folder)
    assert done.code == 0, done.err
    assert results(interrupted.folder) == results(reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twice_in_two_hundred_iterations(run: Run, settings: Path, tmp_path: Path) -> None:
    draws = random.Random()
    changes = [*loop(steps=200, checkpoint_every=20, log_every=10, sample_every=70)]
    for change in ("validation.every=30", "data.workers=1", "data.crop=64"):
        changes += ["--set", change]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train", settings, "--out", whole, *changes).code == 0
    arguments = ["train", str(settings), "--out", str(cut), *changes]
    reached = [killed(arguments, cut, after, draws.uniform(0, 10)) for after in (1, draws.randint(60, 140))]
    assert 0 < reached[0] < reached[1] < 200
    assert run(*arguments).code == 0
    assert results(cut) == results(whole)
