"""The command line on real files: exit codes, one-line errors, clean JSON, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLI = [sys.executable, "-m", "wsi_pipeline.cli"]
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def assert_one_line_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr
    return lines[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lfs_pointer_a.tiff", "git lfs pull"),
        ("unopenable.tiff", "no reader opens it"),
        ("unreadable.svs", "cannot be decoded"),
    ],
)
def test_every_broken_file_is_refused(data_dir: Path, tmp_path: Path, name: str, message: str) -> None:
    broken = sorted(p.name for p in (data_dir / "broken").iterdir())
    assert broken == ["lfs_pointer_a.tiff", "unopenable.tiff", "unreadable.svs"], (
        "a new one needs a line here"
    )
    for command in (["plan"], ["convert", "-o", str(tmp_path / "x.ome.zarr")]):
        line = assert_one_line_error(
            run(command[0], data_dir / "broken" / name, *command[1:], cwd=tmp_path), 3
        )
        assert name.split(".")[0] in line
        assert message in line
    assert not (tmp_path / "x.ome.zarr").exists()


def test_fluorescence_is_refused_and_can_be_forced(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "test3-DAPI-2-(387).ndpi"
    line = assert_one_line_error(run("convert", slide, "-o", tmp_path / "x.ome.zarr"), 3)
    assert "fluorescence" in line
    forced = run("plan", slide, "--set", "input.stain=any", cwd=tmp_path)
    assert forced.returncode == 0, forced.stderr


def test_a_green_box_on_black_is_refused(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "test.tif"
    assert "H&E" in assert_one_line_error(run("plan", slide, "--mpp", "0.5", cwd=tmp_path), 3)


def test_ihc_is_no_h_and_e(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "ihc" / "skimage_ihc.png"
    assert "ihc-dab" in assert_one_line_error(run("plan", slide, "--mpp", "0.5", cwd=tmp_path), 3)


CONVERTIBLE = {
    "CMU-1-Small-Region.svs": [],
    "OS-1-detail.ome.tif": [],
}
"""Every slide of ``slides`` that shows H&E; the others are crops below, a green box, or not RGB."""


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.parametrize("ending", [".ome.zarr", ".ome.tif"])
def test_real_slides_convert_to_both_formats(data_dir: Path, tmp_path: Path, name: str, ending: str) -> None:
    out = tmp_path / f"out{ending}"
    done = run("convert", data_dir / "slides" / name, "-o", out, *CONVERTIBLE[name])
    assert done.returncode == 0, done.stderr
    assert out.exists()
    assert (tmp_path / f"out{ending}.qc.png").exists()
    assert run("verify", out).returncode == 0
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.work*"))


@pytest.mark.parametrize("name", ["small.svs", "boxes_0.dcm", "boxes_1.dcm", "sm_image.dcm"])
def test_crops_smaller_than_a_tile_convert_when_told_that_all_is_tissue(
    data_dir: Path, tmp_path: Path, name: str
) -> None:
    arguments = ["--mask", "whole", "--set", "input.stain=any"]
    done = run("convert", data_dir / "slides" / name, "-o", tmp_path / "a.ome.zarr", *arguments)
    assert done.returncode == 0, done.stderr
    assert run("verify", tmp_path / "a.ome.zarr").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["5714_HE_BT_C2.jpg", "5714_HE_BT_D2.jpg"])
@pytest.mark.parametrize("ending", [".ome.zarr", ".ome.tif"])
def test_frozen_sections_convert_to_both_formats(
    data_dir: Path, tmp_path: Path, name: str, ending: str
) -> None:
    out = tmp_path / f"out{ending}"
    done = run("convert", data_dir / "ff" / "her2st" / name, "--mpp", "0.687", "-o", out)
    assert done.returncode == 0, done.stderr
    assert run("verify", out).returncode == 0


def test_json_lines_are_all_that_stdout_gets(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    done = run("convert", slide, "-o", tmp_path / "a.ome.zarr", "--log-format", "json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events if e["event"] in ("planned", "result")] == ["planned", "result"]
    assert events[-1]["status"] == "converted"
    failed = run("convert", slide, "-o", tmp_path / "a.ome.zarr", "--log-format", "json")
    assert failed.returncode == 5
    assert json.loads(failed.stdout.splitlines()[-1])["kind"] == "OutputExistsError"


def test_a_plan_writes_its_overlay_and_nothing_else(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    done = run("plan", slide, "--geojson", "tissue.geojson", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = ["CMU-1-Small-Region.svs.overlay.png", "tissue.geojson"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    again = run("plan", slide, "--mask", "tissue.geojson", "--log-format", "json", cwd=tmp_path)
    first = run("plan", slide, "--log-format", "json", cwd=tmp_path)
    assert json.loads(again.stdout)["tissue_mm2"] == json.loads(first.stdout)["tissue_mm2"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "absent.svs"], 3, "absent.svs"),
        (["plan", "absent.svs", "--set", "tiling.overlapp=1"], 2, "tiling.overlapp: no such setting"),
        (["plan", "absent.svs", "--config", "absent.yaml"], 2, "absent.yaml"),
        (["verify", "absent.ome.zarr"], 5, "manifest.json"),
        (["export", "absent.ome.zarr", "-o", "x.ome.tif"], 5, "manifest.json"),
    ],
)
def test_exit_codes(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    assert message in assert_one_line_error(run(*arguments, cwd=tmp_path), code)


def test_a_wrong_choice_is_a_usage_error(tmp_path: Path) -> None:
    done = run("plan", "absent.svs", "--log-format", "xml", cwd=tmp_path)
    assert done.returncode == 2
    assert "--log-format" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_answers_at_once() -> None:
    started = time.perf_counter()
    assert run("--help").returncode == 0
    assert time.perf_counter() - started < 2.0, "0.2 s on a quiet machine"


@pytest.mark.slow
def test_outputs_side_by_side_share_no_file(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    first = run("convert", slide, "-o", tmp_path / "a.ome.tif")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = run("convert", slide, "-o", tmp_path / "a.ome.zarr", "--background", "white")
    assert first.returncode == second.returncode == 0, second.stderr
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_an_mpp_that_contradicts_the_file_is_said(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    done = run("plan", slide, "--mpp", "0.25", "--log-format", "json", cwd=tmp_path)
    assert json.loads(done.stdout)["mpp_origin"] == "--mpp (the file says aperio.MPP = 0.499 um/px)"
    for value in ("687", "0", "-1", "nan"):
        assert_one_line_error(run("plan", slide, "--mpp", value, cwd=tmp_path), 2)


def test_a_mask_beside_the_slide_is_an_error(data_dir: Path, tmp_path: Path) -> None:
    ring = [[9000, 9000], [9100, 9000], [9100, 9100], [9000, 9000]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    (tmp_path / "m.geojson").write_text(
        json.dumps({"type": "Feature", "geometry": geometry, "properties": {}})
    )
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    line = assert_one_line_error(run("plan", slide, "--mask", tmp_path / "m.geojson", cwd=tmp_path), 2)
    assert "no area lies on the slide" in line


@pytest.mark.parametrize("how", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    import psutil

    slide, out = tmp_path / "slide.ome.tif", tmp_path / "out.ome.zarr"
    subprocess.run(
        [sys.executable, str(SCRIPTS / "make_slide.py"), str(slide), "--size", "12000", "12000"], check=True
    )
    command = [*CLI, "convert", str(slide), "-o", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("out.ome.zarr.partial/ledger/band*"))) < 2:
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(how)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not out.exists()


def test_a_file_name_with_a_quote(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    assert run("plan", slide, "--geojson", "o'brien.geojson", cwd=tmp_path).returncode == 0
    done = run("plan", slide, "--mask", "o'brien.geojson", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert run("--version").stdout.strip() == "0.1.0"


def test_models_and_doctor_answer(tmp_path: Path) -> None:
    models = run("models", "--log-format", "json")
    names = [json.loads(line)["name"] for line in models.stdout.splitlines()]
    assert names == ["ffpe_mini", "identity", "lora_turbo", "stain_transfer", "translator"]
    doctor = [json.loads(line) for line in run("doctor", "--log-format", "json").stdout.splitlines()]
    assert {"versions", "devices", "disk"} <= {finding["part"] for finding in doctor}


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_resumable_output(tmp_path: Path, workers: str) -> None:
    slide, out = tmp_path / "slide.ome.tif", tmp_path / "out.ome.zarr"
    subprocess.run(
        [sys.executable, str(SCRIPTS / "make_slide.py"), str(slide), "--size", "12000", "12000"], check=True
    )
    command = [*CLI, "convert", str(slide), "-o", str(out), "--workers", workers]
    command += ["--set", "output.zarr.block=1024"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    partial = tmp_path / "out.ome.zarr.partial"
    while process.poll() is None and not any(
        path.read_bytes().count(b"\n") > 6 for path in partial.glob("ledger/*.jsonl")
    ):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "Run the same command again" in stderr
    assert not out.exists()
    again = subprocess.run([*command, "--log-format", "json"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["resumed"] >= 6


def test_odd_inputs_get_one_line(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    os.mkfifo(tmp_path / "pipe.svs")
    assert "no regular file" in assert_one_line_error(run("plan", tmp_path / "pipe.svs", cwd=tmp_path), 3)
    (tmp_path / "deep.geojson").write_text("[" * 100_000)
    line = assert_one_line_error(run("plan", slide, "--mask", tmp_path / "deep.geojson", cwd=tmp_path), 2)
    assert "deep.geojson" in line
    for roi in ("0,0,5", "9000,9000,5,5", "a,b,c,d"):
        assert "input.roi" in assert_one_line_error(run("plan", slide, "--roi", roi, cwd=tmp_path), 2)
    assert run("plan", slide, "--roi", f"0,0,{'9' * 300},5", cwd=tmp_path).returncode == 0


def test_a_region_without_tissue_is_a_result(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    arguments = [
        "--roi",
        "0,0,60,60",
        "--set",
        "output.zarr.block=1024",
        "--set",
        "generator.options.tile=128",
    ]
    done = run("convert", slide, "-o", tmp_path / "a.ome.zarr", "--background", "white", *arguments)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.partial"))


def test_a_tiny_region_at_a_coarse_resolution(data_dir: Path, tmp_path: Path) -> None:
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    ring = [[1000, 1500], [1040, 1500], [1040, 1540], [1000, 1540], [1000, 1500]]
    document = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (tmp_path / "roi.geojson").write_text(json.dumps(document))
    arguments = ["--roi", tmp_path / "roi.geojson", "--set", "tiling.mpp=8"]
    done = run("convert", slide, "-o", tmp_path / "a.ome.zarr", *arguments)
    assert done.returncode == 0, done.stderr
