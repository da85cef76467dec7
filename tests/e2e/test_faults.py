"""Whatever goes wrong: one clear error, its exit code, and no finished-looking output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import SLIDE, convert, digests, settings

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import (
    ConfigError,
    CorruptRegionError,
    GeneratorContractError,
    IncompleteOutputError,
    OutputError,
    OutputExistsError,
    UnsupportedSlideError,
)
from wsi_pipeline.pipeline.convert import convert_slide, export_slide
from wsi_pipeline.pipeline.settings import GeneratorConfig
from wsi_pipeline.pipeline.verify import verify_output
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.writers.ledger import Ledger
from wsi_pipeline.writers.ometiff import TiffConfig, export_ometiff


def test_an_existing_output_is_never_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "a.ome.zarr"
    convert(out, settings())
    before = digests(out)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        convert(out, settings(generator="identity"))
    assert digests(out) == before
    convert_slide(SLIDE, out, settings(generator="identity"), overwrite=True)
    assert digests(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ome.zarr"]


@pytest.mark.parametrize("name", ["a.png", "a", "a.svs", "a.zarr.zip", "a.tif"])
def test_an_unknown_ending_is_refused_before_anything_starts(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.ome\.zarr or \.ome\.tif"):
        convert(tmp_path / name, settings())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot be written"):
        convert(tmp_path / "file" / "a.ome.zarr", settings())


READ_ONLY = """
import os, sys
from pathlib import Path
from wsi_pipeline.errors import OutputError
from wsi_pipeline.pipeline.outputs import exclusive
if os.getuid() == 0:  # root may write everywhere
    os.setgid(65534)
    os.setuid(65534)
try:
    with exclusive(Path(sys.argv[1]), Path(sys.argv[1] + '.partial'), False):
        print("written")
except OutputError as error:
    print(error)
"""


def test_a_read_only_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(tmp_path / "a.ome.zarr")],
            capture_output=True,
            text=True,
        )
    finally:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o700)
    assert "cannot be written (Permission denied)" in done.stdout, done.stderr


class Vanishing(SyntheticSlide):
    """A slide whose pixels cannot be read any more below its first rows."""

    identity = SLIDE.identity

    def read_level(self, level: int, region: Region) -> U8_HWC:
        if level == 0 and region.y > 1500:
            raise CorruptRegionError(f"{self.slide_id}: is gone", slide_id=self.slide_id, region=region)
        return SyntheticSlide.read_level(self, level, region)


def test_a_slide_that_vanishes_can_be_resumed_when_it_is_back(tmp_path: Path) -> None:
    out, config = tmp_path / "a.ome.zarr", settings()
    gone = Vanishing(size=SLIDE.size, tissue_share=SLIDE.tissue_share, seed=SLIDE.seed)
    with pytest.raises(CorruptRegionError, match="is gone"):
        convert_slide(gone, out, config)
    assert not out.exists()
    result = convert(out, config)
    assert result.resumed > 0
    whole = tmp_path / "b.ome.zarr"
    convert(whole, config)
    assert digests(out) == digests(whole)


def test_a_slide_file_that_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    export_ometiff(SyntheticSlide(size=Size(1500, 1500)), path, TiffConfig())
    slide = open_slide(path)
    path.unlink()
    slide.close()
    with pytest.raises((UnsupportedSlideError, CorruptRegionError), match="slide"):
        convert_slide(slide, tmp_path / "a.ome.zarr", settings())
    assert not (tmp_path / "a.ome.zarr").exists()


def test_a_ledger_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append: Callable[..., None] = Ledger._append
    written = 0

    def full(self: Ledger, line: dict[str, Any]) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, line)

    monkeypatch.setattr(Ledger, "_append", full)
    with pytest.raises(OutputError, match="ledger cannot be written .No space left"):
        convert(tmp_path / "a.ome.zarr", settings())
    assert not (tmp_path / "a.ome.zarr").exists()
    monkeypatch.undo()
    assert convert(tmp_path / "a.ome.zarr", settings()).resumed == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights than this machine gives")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("name", ["a.ome.zarr", "a.ome.tif"])
def test_a_full_disk(small_disk: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="disk is full|No space left"):
        convert(small_disk / name, settings())
    assert not (small_disk / name).exists()
    if name == "a.ome.zarr":
        # Space was made: moved to a larger disk, the same command goes on where it stopped.
        shutil.copytree(small_disk / f"{name}.partial", tmp_path / f"{name}.partial")
        assert convert(tmp_path / name, settings()).resumed > 0


def test_a_second_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    from wsi_pipeline.pipeline.outputs import exclusive

    out = tmp_path / "a.ome.zarr"
    busy = exclusive(out, tmp_path / "a.ome.zarr.partial", False)
    with busy, pytest.raises(OutputError, match="another process"):
        convert(out, settings())
    convert(out, settings())


class Shrinking:
    """A generator that breaks its promise."""

    def __init__(self) -> None:
        from wsi_pipeline.generators import make_generator

        self._inner = make_generator("identity", {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, batch: Any, context: Any) -> U8_HWC:
        return batch.pixels_BHWC[:, ::2, ::2]  # type: ignore[no-any-return]


def test_a_generator_that_breaks_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_pipeline.pipeline.run.make_generator", lambda *_: Shrinking())
    with pytest.raises(GeneratorContractError, match="promised uint8"):
        convert(tmp_path / "a.ome.zarr", settings(generator="identity"))
    assert not (tmp_path / "a.ome.zarr").exists()


def test_an_unknown_generator(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cyclegan"):
        convert(tmp_path / "a.ome.zarr", replace(settings(), generator=GeneratorConfig(name="cyclegan")))


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    out = tmp_path / "a.ome.zarr"
    convert(out, settings())
    assert verify_output(out).ok
    shard = out / "0" / "c" / "0" / "2" / "1"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (out / "1" / "c" / "0" / "1" / "0").unlink()
    damaged = verify_output(out).damaged
    assert damaged == ("level 0 block (2, 1)", "level 1 block (1, 0)")


def test_verify_of_what_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IncompleteOutputError, match=r"manifest\.json"):
        verify_output(tmp_path / "empty")
    with pytest.raises(IncompleteOutputError):
        verify_output(tmp_path / "absent.ome.zarr")


def test_no_tissue_is_a_result_with_a_picture(tmp_path: Path) -> None:
    glass = SyntheticSlide(size=Size(3000, 3000), tissue_share=0.0)
    result = convert_slide(glass, tmp_path / "a.ome.zarr", settings())
    assert result.status == "no_tissue"
    assert result.reason
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ome.zarr.overlay.png"]


def test_a_worker_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_pipeline.pipeline import executors
    from wsi_pipeline.pipeline.settings import ExecutionConfig

    monkeypatch.setattr(executors, "run_band", _die)
    with pytest.raises(OutputError, match="worker died: it ended with exit code 9"):
        convert(tmp_path / "a.ome.zarr", settings(run=ExecutionConfig(workers=2)))
    monkeypatch.undo()
    assert convert(tmp_path / "a.ome.zarr", settings()).status == "converted"


def _die(job: object) -> None:
    os._exit(9)


def test_the_manifest_tells_where_the_output_comes_from(tmp_path: Path) -> None:
    out = tmp_path / "a.ome.zarr"
    result = convert(out, settings())
    manifest = json.loads((out / "manifest.json").read_text())
    assert "synthetic" in manifest["notice"]
    assert manifest["slide"]["mpp_origin"] == "synthetic"
    assert manifest["run"]["tiles"] == result.tiles
    assert str(tmp_path) not in json.dumps(manifest), "no local path leaves the machine"


def test_restart_does_not_touch_what_a_live_run_is_writing(tmp_path: Path) -> None:
    from wsi_pipeline.pipeline.outputs import exclusive

    out, partial = tmp_path / "a.ome.zarr", tmp_path / "a.ome.zarr.partial"
    with exclusive(out, partial, False):
        (partial / "block").write_text("being written")
        with pytest.raises(OutputError, match="another process"):
            convert_slide(SLIDE, out, settings(), restart=True)
        assert (partial / "block").exists()


def test_a_block_that_vanishes_while_the_run_goes_on_is_never_certified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_pipeline.pipeline import store

    checksums = store._checksums

    def lose_one(writer: Any, plan: Any) -> Any:
        (writer.root / "0" / "c" / "0" / "2" / "2").unlink()
        return checksums(writer, plan)

    monkeypatch.setattr(store, "_checksums", lose_one)
    with pytest.raises(IncompleteOutputError, match="1 blocks changed"):
        convert(tmp_path / "a.ome.zarr", settings())
    assert not (tmp_path / "a.ome.zarr").exists()
    monkeypatch.undo()
    assert convert(tmp_path / "a.ome.zarr", settings()).blocks == 1


def test_overwrite_spares_the_slide_and_whatever_is_not_ours(tmp_path: Path) -> None:
    slide_path = tmp_path / "slide.ome.tif"
    export_ometiff(SyntheticSlide(size=Size(1500, 1500)), slide_path, TiffConfig())
    before = slide_path.read_bytes()
    foreign = tmp_path / "data.zarr"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    link = tmp_path / "link.ome.zarr"
    link.symlink_to(tmp_path / "nowhere")
    slide = open_slide(slide_path)
    for target in (slide_path, foreign, link):
        with pytest.raises(OutputExistsError):
            convert_slide(slide, target, settings(), overwrite=True)
    assert slide_path.read_bytes() == before
    assert (foreign / "precious").read_text() == "x"


def test_a_killed_export_does_not_lose_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_pipeline.pipeline import convert as story

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "export_ometiff", die)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a.ome.tif", settings())
    monkeypatch.undo()
    assert not (tmp_path / "a.ome.tif").exists()
    result = convert(tmp_path / "a.ome.tif", settings())
    assert (result.blocks, result.resumed) == (0, 40)
    assert verify_output(tmp_path / "a.ome.tif").ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ome.tif", "a.ome.tif.manifest.json"]


def test_verify_sees_what_no_ledger_line_covers(tmp_path: Path) -> None:
    out = tmp_path / "a.ome.zarr"
    convert(out, settings())
    (out / "0" / "zarr.json").write_text("{}")
    shutil.rmtree(out / "labels" / "tissue" / "0")
    damaged = verify_output(out).damaged
    assert "0/zarr.json" in damaged
    assert any(name.startswith("labels/tissue/0/") for name in damaged)
    with pytest.raises(IncompleteOutputError, match="damaged"):
        export_slide(out, tmp_path / "a.ome.tif", settings())
    ledger = out / "ledger" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(IncompleteOutputError, match="39 of 40"):
        verify_output(out)


def test_two_outputs_of_one_slide_are_two_slides(tmp_path: Path) -> None:
    convert(tmp_path / "a.ome.zarr", settings())
    convert(tmp_path / "b.ome.zarr", settings(generator="identity"))
    first, second = open_slide(tmp_path / "a.ome.zarr"), open_slide(tmp_path / "b.ome.zarr")
    assert first.identity != second.identity
    region = Region(2000, 1500, 400, 400)
    assert (first.read_level(0, region) != second.read_level(0, region)).any()


def test_an_anisotropic_slide_may_be_all_tissue(tmp_path: Path) -> None:
    slide = SyntheticSlide(size=Size(1500, 1700), mpp=(0.5, 1.0))
    config = settings(generator="identity")
    config = replace(config, input=replace(config.input, mask="whole"))
    assert convert_slide(slide, tmp_path / "a.ome.zarr", config).status == "converted"
    assert open_slide(tmp_path / "a.ome.zarr").mpp == (0.5, 1.0)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), 1e9, 1000.0, 0.001])
def test_a_working_resolution_that_makes_no_sense(tmp_path: Path, mpp: float) -> None:
    config = settings()
    config = replace(config, tiling=replace(config.tiling, mpp=mpp))
    with pytest.raises(ConfigError, match=r"tiling\.mpp"):
        convert(tmp_path / "a.ome.zarr", config)


def test_a_qc_picture_that_cannot_be_written_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.ome.zarr.qc.png.partial").mkdir()
    config = settings()
    config = replace(config, output=replace(config.output, qc=True))
    notices: list[object] = []
    result = convert_slide(SLIDE, tmp_path / "a.ome.zarr", config, emit=notices.append)
    assert result.status == "converted"
    assert result.qc is None
    assert any("no QC picture" in str(notice) for notice in notices)


@pytest.mark.slow
def test_seam_figures_reach_the_manifest_with_a_verdict(tmp_path: Path) -> None:
    from wsi_pipeline import convert as public_convert

    result = public_convert(SLIDE, tmp_path / "a.ome.zarr", settings(), seams=True)
    seams = json.loads((tmp_path / "a.ome.zarr" / "manifest.json").read_text())["run"]["seams"]
    assert {"border_gradient", "line_excess", "sharpness", "grid_shift", "roi_equality"} <= set(seams)
    assert seams["roi_equality"]["pass"] is True
    assert seams["grid_shift"]["largest"] == 0
    assert result.figures is not None
    assert result.figures["seams"]["pass"] is True, "a pointwise generator leaves no trace of the grid"
    assert verify_output(tmp_path / "a.ome.zarr").ok, "the figures are added without touching what is hashed"
