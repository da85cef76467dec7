"""`wsi-pipeline models`: a published checkpoint to a bundle and back; errors are one line, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wsi_pipeline import cli, convert_cli, model_api
from wsi_pipeline.models.assemble import assemble
from wsi_pipeline.models.bundle import load_bundle, load_facts
from wsi_pipeline.models.hub import FILES, load_base
from wsi_pipeline.models.published import import_checkpoint
from wsi_pipeline.models.weights import tensors_digest


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def lines(self) -> list[dict[str, Any]]:
        """JSON objects of stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: torch is loaded once."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["wsi-pipeline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(caught.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Fixture set -> its bundle, for ``imported``."""
    return {Path(): tmp_path_factory.mktemp("bundles")}


@pytest.fixture
def imported(bundles: dict[Path, Path], parity_set: Path) -> Path:
    """A bundle of the fixture set, made once; not to be changed."""
    if parity_set not in bundles:
        out = bundles[Path()] / f"{parity_set.name}.safetensors"
        model_api.import_model(parity_set / "model.pkl", out, base=parity_set / "tiny-base")
        bundles[parity_set] = out
    return bundles[parity_set]


def error_line(done: Done) -> str:
    assert done.code == 2, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    return lines[0].removeprefix("Error: ")


def test_an_import_says_what_it_made_and_what_comes_next(run: Run, parity_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "my ffpe.safetensors"
    arguments = ["models", "import", parity_set / "model.pkl", "--base", parity_set / "tiny-base", "-o", out]
    done = run(*arguments)
    facts = load_facts(out)
    said = " ".join(done.out.split())
    assert (facts.mpp, facts.tile, facts.base_name, facts.source) == (0.5, 512, "tiny-base", "diffusion-ffpe")
    for part in (
        facts.identity,
        facts.base_digest,
        "CC-BY-NC-ND 4.0",
        "stability.ai/license",
        "paraffin section",
    ):
        assert part in said
    assert done.out.splitlines()[-1].endswith(f"--weights '{out}'")
    again = run(*arguments, "--overwrite", "--log-format", "json", "--mpp", "0.25", "--tile", "256")
    (values,) = again.lines()
    assert values["status"] == "imported"
    assert values["digest"] == facts.digest
    assert (values["mpp"], values["tile"], values["directions"]) == (0.25, 256, ["a2b", "b2a"])


def test_a_bundle_is_the_checkpoint_on_its_base(imported: Path, parity_set: Path) -> None:
    found = import_checkpoint(parity_set / "model.pkl", load_base(parity_set / "tiny-base"))
    bundle = load_bundle(imported)
    assert tensors_digest(bundle.tensors) == tensors_digest(found.tensors) == bundle.digest
    stored = sum(t.nbytes for t in load_file(imported).values())
    assert stored < sum(t.nbytes for t in found.tensors.values()), "shared tensors are stored once"


def test_a_bundle_alone_reproduces_the_published_output(imported: Path, parity_set: Path) -> None:
    cases = np.load(parity_set / "generator_cases.npz")
    bundle = load_bundle(imported)
    for direction in bundle.directions:
        net = assemble(bundle, direction)
        with torch.no_grad():
            y = net(torch.from_numpy(cases["x"][:1]))
        assert np.abs(y.numpy() - cases[f"multi.{direction}.mode.y"][:1]).max() <= 1e-4


def test_another_caption_is_another_generator(
    imported: Path, run: Run, parity_set: Path, tmp_path: Path
) -> None:
    out = tmp_path / "other.safetensors"
    run(
        *("models", "import", parity_set / "model.pkl", "--base", parity_set / "tiny-base", "-o", out),
        *("--prompt-a2b", "frozen paraffin"),
    )
    facts, other = load_facts(imported), load_facts(out)
    assert other.prompts == {"a2b": "frozen paraffin", "b2a": "frozen section"}
    assert other.digest == facts.digest
    assert other.identity != facts.identity


def test_export_gives_the_checkpoint_back(imported: Path, run: Run, parity_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pkl"
    (values,) = run("models", "export", imported, "-o", out, "--log-format", "json").lines()
    assert (values["status"], values["path"], values["format"]) == ("exported", str(out), "diffusion-ffpe")
    base = load_base(parity_set / "tiny-base")
    assert tensors_digest(import_checkpoint(out, base).tensors) == load_facts(imported).digest
    content = out.read_bytes()
    assert "--overwrite" in error_line(run("models", "export", imported, "-o", out))
    assert out.read_bytes() == content
    assert run("models", "export", imported, "-o", out, "--overwrite", "--format", "diffusion-ffpe").code == 0
    assert run("models", "export", imported, "-o", out, "--format", "onnx").code == 2


def test_show_names_everything(imported: Path, run: Run) -> None:
    facts = load_facts(imported)
    said = " ".join(run("models", "show", imported).out.split())
    assert all(
        text in said for text in (facts.identity, facts.base_name, facts.licence, "0.5 µm/px", "512 px")
    )
    (values,) = run("models", "show", imported, "--log-format", "json").lines()
    assert values["identity"] == facts.identity
    assert values["directions"] == ["a2b", "b2a"]


def test_the_list_of_generators(run: Run) -> None:
    names = [line["name"] for line in run("models", "--log-format", "json").lines()]
    assert {"identity", "stain_transfer"} <= set(names)
    assert [line["name"] for line in run("models", "list", "--log-format", "json").lines()] == names
    assert run("models").out == run("models", "list").out
    assert all(name in run("models").out for name in names)


@pytest.mark.parametrize(
    ("tile", "nearest"), [("500", "480 or 512"), ("10", "32"), ("0", "32"), ("-7", "32")]
)
def test_tiles_must_fit_the_networks(run: Run, tmp_path: Path, tile: str, nearest: str) -> None:
    line = error_line(run("models", "import", "x.pkl", "-o", tmp_path / "x.safetensors", "--tile", tile))
    assert line == f"--tile {tile}: is not a multiple of 32; give {nearest}"


@pytest.mark.parametrize("mpp", ["0", "-1", "nan", "inf"])
def test_a_pixel_size_must_be_one(run: Run, tmp_path: Path, mpp: str) -> None:
    line = error_line(run("models", "import", "x.pkl", "-o", tmp_path / "x.safetensors", "--mpp", mpp))
    assert line.startswith("--mpp ")


def test_wrong_files_are_one_line(run: Run, parity_set: Path, tmp_path: Path) -> None:
    base, out = parity_set / "tiny-base", tmp_path / "x.safetensors"
    checkpoint = (parity_set / "model.pkl").read_bytes()
    broken = {
        "text.pkl": b"not weights",
        "page.pkl": b"<!DOCTYPE html><html></html>",
        "cut.pkl": checkpoint[: len(checkpoint) // 2],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    for name in (*broken, "absent.pkl"):
        line = error_line(run("models", "import", tmp_path / name, "--base", base, "-o", out))
        assert line.startswith(f"{tmp_path / name}: ")
    for command in (["show"], ["export", "-o", tmp_path / "y.pkl"]):
        line = error_line(run("models", command[0], tmp_path / "cut.pkl", *command[1:]))
        assert line.startswith(f"{tmp_path / 'cut.pkl'}: is no safetensors file but a pickled checkpoint; ")
    assert "must end in" in error_line(
        run("models", "import", parity_set / "model.pkl", "-o", tmp_path / "x.pt")
    )
    assert not out.exists()


def test_code_in_a_checkpoint_is_not_run(run: Run, parity_set: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"rank_unet": Evil()}, tmp_path / "evil.pkl")
    out = tmp_path / "x.safetensors"
    line = error_line(
        run("models", "import", tmp_path / "evil.pkl", "--base", parity_set / "tiny-base", "-o", out)
    )
    assert "refused" in line
    assert not (tmp_path / "owned").exists()
    assert not out.exists()


def test_a_base_that_does_not_match(run: Run, parity_set: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "x.safetensors"
    for folder in (parity_set / "tiny-base").iterdir():
        shutil.copytree(folder, base / folder.name)
    for path in (base, *base.rglob("*")):
        path.chmod(0o755)
    arguments = ["models", "import", parity_set / "model.pkl", "--base", base, "-o", out]
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    assert error_line(run(*arguments)).startswith(f"{base / 'vae'}: its weights do not fit its config.json")
    weights.write_bytes((parity_set / "tiny-base" / "vae" / weights.name).read_bytes())
    scheduler = base / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    assert "v_prediction" in error_line(run(*arguments))
    shutil.rmtree(base)
    assert "models fetch" in error_line(run(*arguments[:-3], "someone/absent-turbo", *arguments[-2:]))
    assert not out.exists()


def test_fetch_says_where_it_is_or_what_to_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr(model_api, "fetch_base", lambda hub_id: tmp_path)
    (values,) = run("models", "fetch", "--log-format", "json").lines()
    assert (values["hub_id"], values["folder"]) == ("stabilityai/sd-turbo", str(tmp_path))
    assert values["size_bytes"] == 1000
    assert "--base" not in run("models", "fetch").out
    assert "models import model.pkl --base other/turbo -o" in run("models", "fetch", "other/turbo").out


def test_fetch_offline_lists_the_files(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "wsi_pipeline.cli", "models", "fetch", "--log-format=json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    line = error_line(Done(done.returncode, done.stdout, done.stderr))
    assert "HF_HUB_OFFLINE is set" in line
    assert all(name in line for name in FILES)
    assert json.loads(done.stdout)["exit_code"] == 2


def test_without_the_frameworks_the_remedy_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_api, "FRAMEWORKS", ("torch", "no_such_framework"))
    for command in (["import", "x.pkl", "-o", tmp_path / "x.safetensors"], ["fetch"]):
        line = error_line(run("models", *command))
        assert "no_such_framework" in line
        assert "pip install -c constraints.txt '.[models]'" in line


def test_weights_imply_their_generator(tmp_path: Path) -> None:
    def resolved(
        path: Path | None = None,
        name: str | None = None,
        weights: Path | None = Path("w.safetensors"),
        settings: list[str] | None = None,
    ) -> tuple[str, Any]:
        named = convert_cli._generator(path, name, weights, device=None, max_vram=None)
        config = convert_cli._configured(path, settings, named)
        return config.generator.name, config.generator.options.get("weights")

    assert resolved() == ("lora_turbo", "w.safetensors")
    assert resolved(weights=None) == ("stain_transfer", None)
    assert resolved(name="my_lab.gan:MyGan") == ("my_lab.gan:MyGan", "w.safetensors")
    assert resolved(settings=["generator.name=identity"])[0] == "identity"
    file = tmp_path / "c.yaml"
    file.write_text("generator: {name: 'my_lab.gan:MyGan', options: {weights: old}}")
    assert resolved(path=file) == ("my_lab.gan:MyGan", "w.safetensors")
    file.write_text("tiling: {overlap: 96}")
    assert resolved(path=file) == ("lora_turbo", "w.safetensors")
