"""A real slide through the one-step generator on a CPU: provenance, resuming, equal bytes, clear errors.

Weights are those of the first fixture set (tiny, random): the output is noise in the shape of tissue.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from convert_helpers import digests
from safetensors.torch import save_file

from wsi_pipeline import cli, model_api
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.models.bundle import load_facts
from wsi_pipeline.models.random_weights import TINY_UNET, TINY_VAE, random_weights
from wsi_pipeline.readers import open_slide

CLI = [sys.executable, "-m", "wsi_pipeline.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

CORNER = (2048, 1024)
"""Where four blocks of 1024 px meet, y before x; tissue is a square around it, so few tiles make them all."""

pytestmark = pytest.mark.usefixtures("one_thread")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last JSON line of stdout."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: torch is loaded once, and runs on one thread."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["wsi-pipeline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(caught.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def fixture_set() -> Path:
    root = Path(os.environ.get("WSI_PIPELINE_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
    found = sorted(path.parent for path in root.glob("*/model.pkl"))
    if not found:
        pytest.skip(f"no fixture sets at {root}; set WSI_PIPELINE_PARITY")
    return found[0]


@pytest.fixture(scope="module")
def bundle(fixture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published format on its base, imported as users do."""
    out = tmp_path_factory.mktemp("weights") / "ffpe.safetensors"
    model_api.import_model(fixture_set / "model.pkl", out, base=fixture_set / "tiny-base")
    return out


@pytest.fixture(scope="module")
def slide(data_dir: Path) -> Path:
    return data_dir / "slides" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def command(slide: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a conversion of some thirty small tiles; the output and more options follow."""
    mask = tmp_path_factory.mktemp("mask") / "square.geojson"
    (y, x), reach = CORNER, 110
    ring = [[x + i * reach, y + j * reach] for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    mask.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
    return [
        *("convert", str(slide), "--weights", str(bundle), "--mask", str(mask)),
        *("--roi", f"{y - 100},{x - 100},200,200", "--log-format", "json"),
        *("--set", "output.zarr.block=1024", "--set", "output.qc=false"),
        *("--set", "generator.options.tile=128", "--set", "generator.options.device=cpu"),
    ]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Latent -> uninterrupted output, filled by ``reference``."""
    return {"": tmp_path_factory.mktemp("reference")}


Reference = Callable[[str], Path]


@pytest.fixture
def reference(run: Run, command: list[str], references: dict[str, Path]) -> Reference:
    """The uninterrupted output for a latent, made once, on one thread."""

    def call(latent: str = "mode") -> Path:
        if latent not in references:
            out = references[""] / f"{latent}.ome.zarr"
            done = run(*command, "-o", out, *sampled(latent))
            assert done.code == 0, done.err
            assert done.result["status"] == "converted"
            assert 20 <= done.result["tiles"] <= 60
            references[latent] = out
        return references[latent]

    return call


def sampled(latent: str) -> tuple[str, str]:
    return ("--set", f"generator.options.latent={latent}")


class Killed(NamedTuple):
    out: Path
    amid_blocks: Future[bool]


@pytest.fixture(scope="module")
def interrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    """A process of its own that is killed amid its blocks, beside the tests that come before it is needed."""
    out = tmp_path_factory.mktemp("killed") / "a.ome.zarr"
    arguments = [*command, "-o", str(out), *sampled("mode")]
    with ThreadPoolExecutor(1) as pool:
        yield Killed(out, pool.submit(killed, arguments, partial_of(out), blocks=1, delay=0.0))


def test_a_real_slide_is_converted_and_the_manifest_names_its_origin(
    interrupted: Killed, reference: Reference, bundle: Path, slide: Path
) -> None:
    out, facts = reference("mode"), load_facts(bundle)
    document = json.loads((out / "manifest.json").read_text())
    context = document["generator"]["context"]
    assert context["weights"] == facts.identity
    assert context["base"] == facts.base_digest
    assert (context["base_name"], context["prompt"]) == ("tiny-base", "paraffin section")
    assert (context["direction"], context["latent"], context["device"]) == ("a2b", "mode", "cpu")
    assert context["dtype"] in ("float32", "bfloat16")
    assert (document["generator"]["kind"], document["generator"]["exact"]) == ("lora_turbo", True)
    assert document["config"]["generator"]["options"]["weights"] == str(bundle)
    assert "not for primary diagnosis" in document["notice"]
    assert (document["plan"]["tile"], document["plan"]["overlap"]) == (128, 64)
    assert document["slide"]["mpp"] == [0.499, 0.499], "0.5 of the weights is near enough"
    assert sum(name.startswith("0/c/") for name in digests(out)) == 4
    tissue = Region(CORNER[0] - 100, CORNER[1] - 100, 200, 200)
    made, source = (open_slide(path).read_level(0, tissue) for path in (out, slide))
    assert np.abs(made.astype(int) - source).mean() > 10


def test_another_latent_is_another_output(reference: Reference) -> None:
    one, other = (digests(reference(latent)) for latent in ("mode", "sample"))
    assert {name for name in one if one[name] != other[name]} >= {
        f"0/c/0/{r}/{c}" for r in (1, 2) for c in (0, 1)
    }
    manifest = json.loads((reference("sample") / "manifest.json").read_text())
    assert manifest["generator"]["context"]["latent"] == "sample"


@pytest.mark.parametrize(
    ("latent", "batch"), [("mode", 3), ("sample", 3), pytest.param("sample", 8, marks=pytest.mark.slow)]
)
def test_batch_size(
    run: Run, command: list[str], tmp_path: Path, reference: Reference, latent: str, batch: int
) -> None:
    out = tmp_path / "a.ome.zarr"
    assert run(*command, "-o", out, *sampled(latent), "--set", f"run.batch={batch}").code == 0
    assert digests(out) == digests(reference(latent))


@pytest.mark.slow
@pytest.mark.parametrize("latent", ["mode", "sample"])
def test_two_workers(run: Run, command: list[str], tmp_path: Path, reference: Reference, latent: str) -> None:
    out = tmp_path / "a.ome.zarr"
    done = run(*command, "-o", out, *sampled(latent), "--workers", "2", "--set", "run.batch=3")
    assert done.code == 0, done.err
    assert digests(out) == digests(reference(latent))


@pytest.mark.slow
def test_a_process_with_two_threads(
    run: Run, command: list[str], tmp_path: Path, reference: Reference
) -> None:
    """What one worker does on two cores must be what two workers do."""
    wanted, out = digests(reference("mode")), tmp_path / "a.ome.zarr"
    torch.set_num_threads(2)
    assert run(*command, "-o", out, *sampled("mode")).code == 0
    assert digests(out) == wanted


# Interruptions


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def recorded(partial: Path) -> int:
    """Blocks in the ledgers of a partial output."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in partial.glob("ledger/*.jsonl"))


def killed(arguments: list[str], partial: Path, blocks: int, delay: float) -> bool:
    """Start a conversion and kill it once it has recorded so many blocks more; whether it fell amid them."""
    process = subprocess.Popen(
        [*CLI, *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    enough = recorded(partial) + blocks
    while process.poll() is None and recorded(partial) < enough:
        time.sleep(0.002)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):  # it was faster, and is done
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return partial.exists() and recorded(partial) > 0


@pytest.mark.slow
@pytest.mark.parametrize("latent", ["mode", "sample"])
def test_killed_at_random_moments(
    run: Run, command: list[str], tmp_path: Path, reference: Reference, latent: str
) -> None:
    rng, amid = random.Random(latent), 0
    for attempt in range(3):
        out = tmp_path / f"{attempt}.ome.zarr"
        partial = partial_of(out)
        arguments = [*command, "-o", str(out), *sampled(latent)]
        for _ in range(2):
            amid += killed(arguments, partial, rng.randint(0, 2), rng.uniform(0, 0.5))
            if out.exists():
                break
        if not out.exists():
            assert run(*arguments).code == 0
        assert digests(out) == digests(reference(latent))
        assert not partial.exists()
    assert amid >= 2, "the test proves nothing"


def test_another_latent_does_not_continue_an_output(
    run: Run, command: list[str], tmp_path: Path, reference: Reference
) -> None:
    shutil.copytree(reference("mode"), tmp_path / "a.ome.zarr.partial")
    done = run(*command, "-o", tmp_path / "a.ome.zarr", *sampled("sample"))
    assert done.code == 5
    assert "--restart" in done.err


# Errors: one line, exit code 2


def other_base(fixture_set: Path, folder: Path) -> Path:
    """A complete base model of other widths than the checkpoint was trained on."""
    for part in ("scheduler", "text_encoder", "tokenizer"):
        shutil.copytree(fixture_set / "tiny-base" / part, folder / part)
    weights = random_weights(
        unet_config={**TINY_UNET, "block_out_channels": (24, 40, 48, 56), "attention_head_dim": (3, 5, 6, 7)},
        vae_config={**TINY_VAE, "block_out_channels": (12, 20, 36, 44)},
    )
    networks = {
        "unet": ("UNet2DConditionModel", weights.layout.unet_config, weights.layout.unet_base),
        "vae": ("AutoencoderKL", weights.layout.vae_config, weights.layout.vae_base),
    }
    for part, (kind, config, shapes) in networks.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
        stock = [key for key in shapes if ".skip_conv_" not in key]
        tensors = {key: weights.tensors[f"{part}.{key}"] for key in stock}
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors")
    return folder


ERRORS = {
    "no weights": "generator lora_turbo: option weights is required",
    "absent file": "absent.safetensors: cannot be read",
    "another kind of file": "model.pkl: is no safetensors file but a pickled checkpoint; ",
    "truncated": "cut.safetensors: is truncated",
    "another program's": "foreign.safetensors: is no bundle",
    "tile": "tile=500: must be a multiple of 32; give 480 or 512",
    "device": "device 'cuda:99': is not there",
    "base": "model.pkl: ",
}


@pytest.fixture(scope="module")
def refused(
    slide: Path, bundle: Path, fixture_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Case of ``ERRORS`` -> arguments; every output would lie in one folder."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "cut.safetensors").write_bytes(bundle.read_bytes()[:-1000])
    save_file({"x": torch.zeros(3)}, folder / "foreign.safetensors")
    checkpoint, base = str(fixture_set / "model.pkl"), other_base(fixture_set, folder / "base")
    convert = ["convert", str(slide), "-o", str(folder / "out.ome.zarr"), "--weights"]
    return {
        "no weights": [*convert[:-1], "--generator", "lora_turbo"],
        "absent file": [*convert, str(folder / "absent.safetensors")],
        "another kind of file": [*convert, checkpoint],
        "truncated": [*convert, str(folder / "cut.safetensors")],
        "another program's": [*convert, str(folder / "foreign.safetensors")],
        "tile": [*convert, str(bundle), "--set", "generator.options.tile=500"],
        "device": [*convert, str(bundle), "--set", "generator.options.device=cuda:99"],
        "base": ["models", "import", checkpoint, "--base", str(base), "-o", str(folder / "out.safetensors")],
    }


def assert_one_line(code: int, err: str, case: str) -> None:
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    assert ERRORS[case] in lines[0]


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_exit_code_2(run: Run, refused: dict[str, list[str]], case: str) -> None:
    done = run(*refused[case])
    assert_one_line(done.code, done.err, case)
    assert not list(Path(refused["truncated"][3]).parent.glob("out.*")), "something was begun"


@pytest.mark.parametrize(
    "case", [c if c == "truncated" else pytest.param(c, marks=pytest.mark.slow) for c in ERRORS]
)
def test_errors_of_a_process_of_its_own(refused: dict[str, list[str]], case: str) -> None:
    """Nothing that a library says on stderr stands beside the line."""
    done = subprocess.run([*CLI, *refused[case]], capture_output=True, text=True, env=ONE_THREAD)
    assert_one_line(done.returncode, done.stderr, case)


# What ran beside


def test_killed_and_resumed(run: Run, command: list[str], interrupted: Killed, reference: Reference) -> None:
    assert interrupted.amid_blocks.result(timeout=200)
    done = run(*command, "-o", interrupted.out, *sampled("mode"))
    assert done.code == 0, done.err
    assert done.result["resumed"] >= 1
    assert done.result["tiles"] > 0, "the kill came amid the blocks"
    assert digests(interrupted.out) == digests(reference("mode"))
