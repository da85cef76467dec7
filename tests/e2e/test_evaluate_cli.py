"""`wsi-pipeline evaluate` on real tiles and slides: text, JSON, report, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from wsi_pipeline import cli

pytestmark = pytest.mark.usefixtures("one_thread")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last JSON object of stdout."""
        document: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return document


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: torch is loaded once."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["wsi-pipeline", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(caught.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def tiles(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders frozen and ffpe: four tiles of 256 px of each of six real pictures."""
    root = tmp_path_factory.mktemp("tiles")
    for name, folder in (("frozen", "ff"), ("ffpe", "ffpe")):
        files = sorted((data_dir / folder / "monuseg").glob("*.tif"))[:6]
        if not files:
            pytest.skip("no real tiles")
        (root / name).mkdir()
        for path in files:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            for number, (y, x) in enumerate([(0, 0), (0, 256), (256, 0), (256, 256)]):
                Image.fromarray(pixels[y : y + 256, x : x + 256]).save(
                    root / name / f"{path.stem}_{number}.png"
                )
    return root


def test_real_tiles_end_to_end(run: Run, tiles: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run(
        *(tiles / "frozen", "--reference", tiles / "ffpe", "--source", tiles / "frozen"),
        *("--draws", "20", "--report", page, "--save-stats", tmp_path / "frozen.npz"),
    )
    assert done.code == 0, done.err
    assert "generated  24 tiles of 256 x 256 px, PNG, 6 patients (TCGA barcode)" in done.out
    assert "extractor  tiny, 64 features, resize none" in done.out
    assert "Haematoxylin similarity to source" in done.out
    assert f"Wrote {page}" in done.out
    assert "rank-deficient" in " ".join(done.err.split())
    figures = json.loads(page.with_suffix(".json").read_text())["figures"]
    assert figures["fid"]["value"] == figures["fid_source"]["value"] > 0.5
    assert figures["structure_ssim"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert figures["fid"]["patients"] == 12
    assert page.stat().st_size > 500_000
    with Image.open(page.with_suffix(".png")) as picture:
        assert picture.width > 900

    again = run(
        tiles / "frozen", "--reference", tmp_path / "frozen.npz", "--draws", "0", "--log-format", "json"
    )
    assert again.result["figures"]["fid"]["value"] == pytest.approx(0.0, abs=1e-3)
    assert again.result["sides"]["reference"]["encoding"] == "PNG"


def test_published_example_outputs_keep_their_structure(run: Run, data_dir: Path) -> None:
    """The two example outputs of Diffusion-FFPE against their frozen inputs."""
    inputs, outputs = data_dir / "ff" / "diffusion-ffpe", data_dir / "reference" / "diffusion-ffpe_generated"
    if not outputs.is_dir():
        pytest.skip("no published outputs")
    done = run(outputs, "--source", inputs, "--log-format", "json", "--set", "workers=1")
    figures = done.result["figures"]
    assert 0.6 < figures["structure_ssim"]["value"] < 0.99
    assert figures["shift_median"]["value"] < 0.2
    assert "fid" not in figures
    assert "JPEG of quality" in done.result["sides"]["generated"]["encoding"]


@pytest.fixture(scope="module")
def slide(data_dir: Path) -> Path:
    path = data_dir / "slides" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip("no real slide")
    return path


@pytest.fixture(scope="module")
def converted(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from wsi_pipeline import api
    from wsi_pipeline.config import load_config

    out = tmp_path_factory.mktemp("slide") / "out.ome.zarr"
    api.convert(str(slide), out, load_config(None, ["generator.name=stain_transfer", "run.threads=1"]))
    return out


def test_an_output_against_its_slide(run: Run, slide: Path, converted: Path) -> None:
    done = run(converted, "--source", slide, "--tile", "256", "--log-format", "json")
    assert done.code == 0, done.err
    made, given = (done.result["sides"][role] for role in ("generated", "source"))
    assert made["tiles"] == given["tiles"] > 20
    assert made["mpp"] == given["mpp"] == [pytest.approx(0.499), pytest.approx(0.499)]
    figures = done.result["figures"]
    assert figures["structure_ssim"]["value"] > 0.97, "a stain transfer changes no structure"
    assert figures["shift_p95"]["value"] < 0.1, "both are read on one lattice"
    assert figures["structure_ssim"]["note"] == "no interval: it needs two patients"


def test_a_slide_that_is_not_the_source_is_noticed(run: Run, converted: Path, data_dir: Path) -> None:
    other = data_dir / "slides" / "OS-1-detail.ome.tif"
    done = run(converted, "--source", other, "--tile", "256")
    assert done.code == 2
    assert "do not cover the tiles of the other slide" in done.err


def test_domains_of_a_tile_index(run: Run, slide: Path, data_dir: Path, tmp_path: Path) -> None:
    from wsi_pipeline.cohorts.index import make_index
    from wsi_pipeline.cohorts.settings import CohortConfig
    from wsi_pipeline.config import load_settings

    table = tmp_path / "cohort.csv"
    other = data_dir / "slides" / "OS-1-detail.ome.tif"
    table.write_text(f"slide,domain,patient,split\n{slide},FF,anna,test\n{other},FFPE,bert,test\n")
    config = load_settings(CohortConfig, None, ["tiling.mpp=0.5", "tiling.tile=128"])
    index = make_index(table, tmp_path / "index.parquet", config).path
    done = run(index, "--reference", index, "--draws", "0", "--log-format", "json", "--split", "test")
    assert done.code == 0, done.err
    made, real = (done.result["sides"][role] for role in ("generated", "reference"))
    assert (made["patients"], real["patients"]) == (1, 1)
    assert made["group_rule"] == "patient column of the index"
    assert made["tiles"] > real["tiles"] > 2
    assert done.result["figures"]["fid"]["value"] > 0.1
    missing = run(index, "--reference", index, "--split", "val")
    assert missing.code == 2
    assert "no tile has" in missing.err


def test_mistakes_are_one_line_and_a_code(run: Run, tiles: Path, tmp_path: Path) -> None:
    frozen, ffpe = tiles / "frozen", tiles / "ffpe"
    (tmp_path / "empty").mkdir()
    cases: list[tuple[int, str, tuple[str | Path, ...]]] = [
        (2, "nothing to compare it with", (frozen,)),
        (2, "holds no picture", (tmp_path / "empty", "--reference", ffpe)),
        (2, "inception-2015-12-05.pt", (frozen, "--reference", ffpe, "--extractor", "inception")),
        (2, "has to end in .html", (frozen, "--reference", ffpe, "--report", tmp_path / "a.pdf")),
        (2, "no such setting", (frozen, "--reference", ffpe, "--set", "drawz=3")),
        (2, "no tile has the name or position", (frozen, "--source", ffpe)),
        (5, "create it first", (frozen, "--reference", ffpe, "--report", tmp_path / "no" / "a.html")),
    ]
    for code, words, arguments in cases:
        done = run(*arguments)
        assert done.code == code, words
        assert words in done.err
        assert done.err.strip().splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in done.err


def test_help_loads_no_framework() -> None:
    code = (
        "import sys; from wsi_pipeline.evaluate_cli import evaluate; "
        "print([m for m in ('torch', 'numpy', 'timm', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
